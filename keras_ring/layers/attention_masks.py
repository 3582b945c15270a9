"""Everything that masks one attention call, in two forms.

Keras describes masks as boolean arrays. Here they stay apart for as long as
possible: what is known by position stays a `keras_ring.masks.Mask` and what
is known by key stays one value per key, because the product of the two is an
array of queries times keys.
"""

import dataclasses
import functools
from typing import Any

from keras import ops

from keras_ring import numerics, random_bits, trials
from keras_ring.masks import (
    Causal,
    Explicit,
    Mask,
    Padding,
    PrefixLM,
    Segments,
    SlidingWindow,
)
from keras_ring.scoring import Dropout, Scoring

Tensor = Any


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionMasks:
    """The masks of one call, over folded tensors.

    Attributes:
        queries: `(batch, query_length)` or None; false rows give zeros.
        keys: `(batch, key_length)`s, false keys are not attended to.
        pairs: `(batch, heads or 1, query_length, all_keys)` or None.
        causal: whether later keys are hidden, aligned at the top left.
        sliding_window: hides keys this far away and further, or None.
        segments: ids `(batch, query_length)` and `(batch, key_length)`; keys
            of another id are hidden. None for no segments.
        prefix: `(batch,)`, so many keys are not hidden by `causal`; or None.
    """

    queries: Tensor | None
    keys: tuple[Tensor, ...]
    pairs: Tensor | None
    causal: bool
    sliding_window: int | None
    segments: tuple[Tensor, Tensor] | None = None
    prefix: Tensor | None = None

    def structured(self) -> Mask | None:
        """All masks but that of the queries, as functions of positions."""
        masks: list[Mask] = self._positional()
        if self.segments is not None:
            masks.append(Segments(*self.segments))
        if self.keys:
            masks.append(Padding(functools.reduce(ops.logical_and, self.keys)))
        if self.pairs is not None:
            masks.append(Explicit(ops.transpose(self.pairs, (0, 2, 1, 3))))
        if not masks:
            return None
        return functools.reduce(lambda first, second: first & second, masks)

    def dense(self, query_length: Any, key_length: Any) -> Tensor | None:
        """All masks as one boolean array that broadcasts to the scores
        `(batch, heads, query_length, key_length)`."""
        mask = self.structured()
        parts = []
        if mask is not None:
            queries = ops.arange(query_length, dtype="int32")
            keys = ops.arange(key_length, dtype="int32")
            parts.append(mask.allowed(queries, keys))
        if self.queries is not None:
            parts.append(self.queries[:, None, :, None])
        return functools.reduce(ops.logical_and, parts) if parts else None

    def zero_queries(self, out: Tensor) -> Tensor:
        """`out` `(batch, query_length, heads, depth)` without masked rows."""
        if self.queries is None:
            return out
        return ops.where(
            self.queries[:, :, None, None], out, ops.zeros_like(out)
        )

    def _positional(self) -> list[Mask]:
        masks: list[Mask] = []
        if self.prefix is not None:
            masks.append(PrefixLM(self.prefix))
        elif self.causal:
            masks.append(Causal())
        if self.sliding_window is not None:
            masks.append(SlidingWindow(self.sliding_window))
        return masks


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention that writes out every score, for those who ask to see them.

    Args:
        query: `(batch, query_length, heads, key_dim)`.
        key: `(batch, key_length, key_heads, key_dim)`.
        value: `(batch, key_length, key_heads, value_dim)`.
        scoring: what makes the scores.
        sinks: `(heads,)`, logits of one more key without a value, or None.

    Returns:
        `(out, scores)`: `(batch, query_length, heads, value_dim)` and the
        probabilities `(batch, heads, query_length, key_length)` after
        dropout, in the dtype of the query. A row that may attend to nothing
        is zero.
    """
    trials.refuse()
    dtype = query.dtype
    batch, length, heads, key_dim = ops.shape(query)
    key_length, key_heads = ops.shape(key)[1:3]
    group = heads // key_heads
    # Half precision would round what the softmax magnifies.
    wide = numerics.accumulation_dtype(dtype)
    grouped = ops.reshape(
        ops.cast(query, wide) * scoring.scale,
        (batch, length, key_heads, group, key_dim),
    )
    scores = ops.einsum("btkgd,bskd->bkgts", grouped, ops.cast(key, wide))
    scores = ops.reshape(scores, (batch, heads, length, key_length))
    queries, keys = (ops.arange(n, dtype="int32") for n in (length, key_length))
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * ops.tanh(scores / scoring.soft_cap)
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
    return ops.cast(out, dtype), ops.cast(scores, dtype)


def _dropped(
    scores: Tensor, dropout: Dropout, queries: Tensor, keys: Tensor
) -> Tensor:
    batch, heads = ops.shape(scores)[:2]
    kept = random_bits.keep(
        dropout.seed,
        [
            ops.reshape(ops.arange(batch, dtype="int32"), (-1, 1, 1, 1)),
            ops.reshape(ops.arange(heads, dtype="int32"), (1, -1, 1, 1)),
            queries[:, None],
            keys,
        ],
        dropout.rate,
    )
    share = 1.0 / (1.0 - dropout.rate)
    return ops.where(kept, scores * share, ops.zeros_like(scores))
