"""Attention in one piece, with every score at once."""

import math
from typing import Any, NamedTuple

from keras import ops

from keras_ring import precision, random_bits
from keras_ring.attention.scoring import Dropout, Scoring
from keras_ring.distribution import trials

Tensor = Any


class Dense(NamedTuple):
    """Results of `dense_attention`.

    Attributes:
        out: `(batch, query_length, heads, value_dim)`, dtype of the query. A
            row that may attend to nothing is zero.
        lse: `(batch, query_length, heads)`, the log-sum-exp of the scores,
            sinks included, in the accumulation dtype.
        scores: `(batch, heads, query_length, key_length)`, the probabilities
            after dropout, dtype of the query.
    """

    out: Tensor
    lse: Tensor
    scores: Tensor


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    sinks: Tensor | None = None,
) -> Dense:
    """Attention that writes out every score.

    For those who ask to see them, and for a program that is exported: a few
    plain operations that every format has, at lengths that are not known.

    Args:
        query: `(batch, query_length, heads, key_dim)`.
        key: `(batch, key_length, key_heads, key_dim)`.
        value: `(batch, key_length, key_heads, value_dim)`.
        scoring: what makes the scores.
        sinks: `(heads,)`, logits of one more key without a value, or None.
    """
    trials.refuse()
    dtype = query.dtype
    batch, length, heads, key_dim = ops.shape(query)
    key_length, key_heads = ops.shape(key)[1:3]
    group = heads // key_heads
    # Half precision would round what the softmax magnifies.
    wide = precision.accumulation_dtype(dtype)
    grouped = ops.reshape(
        ops.cast(query, wide) * scoring.scale,
        (batch, length, key_heads, group, key_dim),
    )
    scores = ops.einsum("btkgd,bskd->bkgts", grouped, ops.cast(key, wide))
    scores = ops.reshape(scores, (batch, heads, length, key_length))
    queries, keys = (ops.arange(n, dtype="int32") for n in (length, key_length))
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * precision.tanh(scores / scoring.soft_cap)
    if scoring.slopes is not None:
        distance = ops.abs(queries[:, None] - keys[None, :])
        slopes = ops.cast(scoring.slopes, wide)[:, None, None]
        scores = scores - slopes * ops.cast(distance, wide)
    if scoring.bias is not None:
        bias = ops.transpose(scoring.bias, (0, 2, 1, 3))
        scores = scores + ops.cast(bias, wide)
    mask = None
    if scoring.mask is not None:
        mask = scoring.mask.allowed(queries, keys)
        # Finite, so that a row without any key has no 0 / 0 in its gradient.
        scores = ops.where(mask, scores, ops.cast(-1e9, wide))
    if sinks is not None:
        sink = ops.cast(sinks, wide)[None, :, None, None]
        sink = ops.broadcast_to(sink, (batch, heads, length, 1))
        scores = ops.concatenate([scores, sink], axis=-1)
    lse = ops.transpose(ops.logsumexp(scores, axis=-1), (0, 2, 1))
    if mask is not None and sinks is None:
        some = ops.transpose(ops.any(mask, axis=-1), (0, 2, 1))
        lse = ops.where(some, lse, ops.cast(-math.inf, wide))
    scores = ops.softmax(scores, axis=-1)[..., :key_length]
    if mask is not None:
        scores = ops.where(mask, scores, ops.zeros_like(scores))
    if scoring.dropout is not None:
        scores = _dropped(scores, scoring.dropout, queries, keys)
    out = ops.einsum(
        "bkgts,bske->btkge",
        ops.reshape(scores, (batch, key_heads, group, length, key_length)),
        ops.cast(value, wide),
    )
    out = ops.reshape(out, (batch, length, heads, ops.shape(value)[3]))
    return Dense(ops.cast(out, dtype), lse, ops.cast(scores, dtype))


def _dropped(
    scores: Tensor, dropout: Dropout, queries: Tensor, keys: Tensor
) -> Tensor:
    batch, heads = ops.shape(scores)[:2]
    rows = dropout.first_row + ops.arange(batch, dtype="int32")
    kept = random_bits.keep(
        dropout.seed,
        [
            ops.reshape(rows, (-1, 1, 1, 1)),
            ops.reshape(ops.arange(heads, dtype="int32"), (1, -1, 1, 1)),
            queries[:, None],
            keys,
        ],
        dropout.rate,
    )
    share = 1.0 / (1.0 - dropout.rate)
    return ops.where(kept, scores * share, ops.zeros_like(scores))
