"""The oracle: attention in naive float64 NumPy, with its exact gradients.

Independent of the package: no shared code, no blocks, no rings.
"""

import dataclasses
from typing import NamedTuple

import numpy as np


class Attention(NamedTuple):
    """Everything one call of plain attention has to get right."""

    out: np.ndarray
    lse: np.ndarray
    grad_query: np.ndarray
    grad_key: np.ndarray
    grad_value: np.ndarray


def attention(
    query,
    key,
    value,
    grad_out,
    *,
    allowed=None,
    scale=None,
    grad_lse=None,
):
    """`full_attention` without options, as a tuple."""
    found = full_attention(
        query,
        key,
        value,
        grad_out,
        allowed=allowed,
        scale=scale,
        grad_lse=grad_lse,
    )
    return Attention(*(getattr(found, name) for name in Attention._fields))


@dataclasses.dataclass(frozen=True)
class FullAttention:
    """Results, gradients, and the arrays on the way to them.

    Attributes:
        out: (batch, queries, heads, value_dim).
        lse: (batch, queries, heads); -inf where nothing is attended to.
        grad_query, grad_key, grad_value: as the tensors.
        grad_bias, grad_slopes, grad_sinks: likewise, None without.
        magnitude: `scale * |query| @ |key|`, and like all below
            (batch, heads, queries, keys).
        tanh: of the scores before the cap; zeros without a cap.
        scores: what enters the softmax, -inf where not allowed.
        p: the softmax, over keys and sink.
        keep: factor of dropout, 0 or 1 / (1 - rate).
        grad_p: gradient of `p`.
        grad_scores: gradient of `scores`.
        inner: (batch, heads, queries), sum of p * grad_p.
        p_sink: (batch, heads, queries), the sink's share; zeros without.
        distance: (queries, keys), how far apart the positions are.
    """

    out: np.ndarray
    lse: np.ndarray
    grad_query: np.ndarray
    grad_key: np.ndarray
    grad_value: np.ndarray
    grad_bias: np.ndarray | None
    grad_slopes: np.ndarray | None
    grad_sinks: np.ndarray | None
    magnitude: np.ndarray
    tanh: np.ndarray
    scores: np.ndarray
    p: np.ndarray
    keep: np.ndarray
    grad_p: np.ndarray
    grad_scores: np.ndarray
    inner: np.ndarray
    p_sink: np.ndarray
    distance: np.ndarray


def full_attention(
    query,
    key,
    value,
    grad_out,
    *,
    allowed=None,
    scale=None,
    soft_cap=None,
    bias=None,
    slopes=None,
    sinks=None,
    kept=None,
    rate=0.0,
    grad_lse=None,
):
    """Softmax attention and the gradients for given cotangents.

    Args:
        query: (batch, queries, heads, head_dim).
        key: (batch, keys, key_heads, head_dim).
        value: (batch, keys, key_heads, value_dim).
        grad_out: (batch, queries, heads, value_dim).
        allowed: boolean, broadcastable to (batch, heads, queries, keys).
        scale: factor on the scores, 1 / sqrt(head_dim) if None.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        bias: (batch or 1, queries, heads or 1, keys), added to the scores.
        slopes: (heads,); slope * |i - j| is subtracted from the scores.
        sinks: (heads,); one more logit in every row, without a value.
        kept: boolean (batch, heads, queries, keys), what dropout keeps.
        rate: how much dropout drops.
        grad_lse: (batch, queries, heads), zero if None.
    """
    query, key, value, grad_out = (
        np.asarray(t, np.float64) for t in (query, key, value, grad_out)
    )
    group = query.shape[2] // key.shape[2]
    keys, values = (np.repeat(t, group, axis=2) for t in (key, value))
    if scale is None:
        scale = query.shape[3] ** -0.5
    raw = scale * pairs(query, keys)
    tanh = np.zeros_like(raw)
    scores = raw
    if soft_cap is not None:
        tanh = np.tanh(raw / soft_cap)
        scores = soft_cap * tanh
    positions = (np.arange(n, dtype=np.float64) for n in raw.shape[2:])
    distance = np.abs(np.subtract.outer(*positions))
    if slopes is not None:
        slopes = np.asarray(slopes, np.float64)
        scores = scores - slopes[None, :, None, None] * distance
    if bias is not None:
        bias = np.asarray(bias, np.float64)
        scores = scores + np.swapaxes(bias, 1, 2)
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    sink = np.full(scores.shape[:3], -np.inf)
    if sinks is not None:
        sink[:] = np.asarray(sinks, np.float64)[None, :, None]
    top = np.maximum(scores.max(-1), sink)
    top = np.where(np.isinf(top), 0.0, top)
    weights = np.exp(scores - top[..., None])
    sink_weight = np.exp(sink - top)
    total = weights.sum(-1) + sink_weight
    safe = np.where(total == 0, 1.0, total)
    p, p_sink = weights / safe[..., None], sink_weight / safe
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    keep = np.ones_like(p)
    if kept is not None:
        keep = np.where(kept, 1 / (1 - rate), 0.0)
    dropped = p * keep
    out = np.einsum("bhqk,bkhd->bqhd", dropped, values)

    grad_p = keep * pairs(grad_out, values)
    inner = (p * grad_p).sum(-1)
    grad_lse = np.zeros_like(lse) if grad_lse is None else heads_first(grad_lse)
    grad_scores = p * (grad_p + (grad_lse - inner)[..., None])
    grad_raw = scale * grad_scores * (1 - tanh**2)
    grad_query = np.einsum("bhqk,bkhd->bqhd", grad_raw, keys)
    grad_keys = np.einsum("bhqk,bqhd->bkhd", grad_raw, query)
    grad_values = np.einsum("bhqk,bqhd->bkhd", dropped, grad_out)
    grad_bias = grad_slopes = grad_sinks = None
    if bias is not None:
        grad_bias = sum_like(np.swapaxes(grad_scores, 1, 2), bias.shape)
    if slopes is not None:
        grad_slopes = -(grad_scores * distance).sum((0, 2, 3))
    if sinks is not None:
        grad_sinks = (p_sink * (grad_lse - inner)).sum((0, 2))
    return FullAttention(
        out=out,
        lse=np.swapaxes(lse, 1, 2),
        grad_query=grad_query,
        grad_key=ungroup(grad_keys, group),
        grad_value=ungroup(grad_values, group),
        grad_bias=grad_bias,
        grad_slopes=grad_slopes,
        grad_sinks=grad_sinks,
        magnitude=abs(scale) * pairs(np.abs(query), np.abs(keys)),
        tanh=tanh,
        scores=scores,
        p=p,
        keep=keep,
        grad_p=grad_p,
        grad_scores=grad_scores,
        inner=inner,
        p_sink=p_sink,
        distance=distance,
    )


def pairs(first, second):
    """(b, q, h, d) and (b, k, h, d) -> products (b, h, q, k)."""
    return np.matmul(
        np.swapaxes(first, 1, 2), np.transpose(second, (0, 2, 3, 1))
    )


def heads_first(rows):
    """(batch, queries, heads) -> (batch, heads, queries)."""
    return np.swapaxes(np.asarray(rows, np.float64), 1, 2)


def ungroup(tensor, group):
    """Sum over the query heads that share a key head, on axis 2."""
    batch, length, heads, dim = tensor.shape
    shape = (batch, length, heads // group, group, dim)
    return tensor.reshape(shape).sum(3)


def sum_like(tensor, shape):
    """Sum over the axes on which `shape` is 1 and was broadcast."""
    axes = tuple(
        axis
        for axis, (have, want) in enumerate(
            zip(tensor.shape, shape, strict=True)
        )
        if want == 1 and have > 1
    )
    return tensor.sum(axes, keepdims=True)


def causal(queries, keys):
    """(1, 1, queries, keys): key position at most the query's."""
    return (np.arange(queries)[:, None] >= np.arange(keys)[None])[None, None]


def window(queries, keys, size):
    """(1, 1, queries, keys): positions less than `size` apart."""
    distance = np.arange(queries)[:, None] - np.arange(keys)[None]
    return (np.abs(distance) < size)[None, None]


def padding(valid):
    """(batch, 1, 1, keys)."""
    return np.asarray(valid, bool)[:, None, None, :]


def segments(query_ids, key_ids):
    """(batch, 1, queries, keys): both of one document."""
    query_ids, key_ids = np.asarray(query_ids), np.asarray(key_ids)
    return (query_ids[:, :, None] == key_ids[:, None, :])[:, None]


def prefix(queries, keys, length):
    """(batch or 1, 1, queries, keys): of the first `length` keys, or not
    later than the query."""
    key = np.arange(keys)[None, None, None, :]
    length = np.reshape(length, (-1, 1, 1, 1))
    return (key < length) | causal(queries, keys)


def blocks(queries, keys, size):
    """(1, 1, queries, keys): the key's block at most the query's."""
    query = np.arange(queries)[:, None] // size
    return (np.arange(keys)[None] // size <= query)[None, None]
