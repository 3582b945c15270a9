"""The oracle: attention in naive float64 NumPy, with its exact gradients.

Independent of the package: no shared code, no blocks, no rings.
"""

from typing import NamedTuple

import numpy as np


class Attention(NamedTuple):
    """Everything one call of attention has to get right."""

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
    """Softmax attention and the gradients for given cotangents.

    Args:
        query: (batch, queries, heads, head_dim).
        key: (batch, keys, key_heads, head_dim).
        value: (batch, keys, key_heads, value_dim).
        grad_out: (batch, queries, heads, value_dim).
        allowed: boolean, broadcastable to (batch, heads, queries, keys).
        scale: factor on the scores, 1 / sqrt(head_dim) if None.
        grad_lse: (batch, queries, heads), zero if None.
    """
    query, key, value, grad_out = (
        np.asarray(t, np.float64) for t in (query, key, value, grad_out)
    )
    group = query.shape[2] // key.shape[2]
    keys, values = (np.repeat(t, group, axis=2) for t in (key, value))
    if scale is None:
        scale = query.shape[3] ** -0.5
    scores = scale * np.einsum("bqhd,bkhd->bhqk", query, keys)
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    top = np.where(np.isinf(top), 0.0, top)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    p = weights / np.where(total == 0, 1.0, total)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    out = np.einsum("bhqk,bkhd->bqhd", p, values)

    grad_p = np.einsum("bqhd,bkhd->bhqk", grad_out, values)
    grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdims=True))
    if grad_lse is not None:
        grad_scores += p * np.swapaxes(grad_lse, 1, 2)[..., None]
    grad_query = scale * np.einsum("bhqk,bkhd->bqhd", grad_scores, keys)
    grad_keys = scale * np.einsum("bhqk,bqhd->bkhd", grad_scores, query)
    grad_values = np.einsum("bhqk,bqhd->bkhd", p, grad_out)

    def ungroup(tensor):
        batch, length, heads, dim = tensor.shape
        shape = (batch, length, heads // group, group, dim)
        return tensor.reshape(shape).sum(3)

    return Attention(
        out,
        np.swapaxes(lse, 1, 2),
        grad_query,
        ungroup(grad_keys),
        ungroup(grad_values),
    )


def causal(queries, keys):
    """(1, 1, queries, keys): key position at most the query's."""
    return (np.arange(queries)[:, None] >= np.arange(keys)[None])[None, None]


def padding(valid):
    """(batch, 1, 1, keys)."""
    return np.asarray(valid, bool)[:, None, None, :]
