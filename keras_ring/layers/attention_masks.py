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

from keras_ring import numerics
from keras_ring.masks import Causal, Explicit, Mask, Padding, SlidingWindow

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
    """

    queries: Tensor | None
    keys: tuple[Tensor, ...]
    pairs: Tensor | None
    causal: bool
    sliding_window: int | None

    def structured(self) -> Mask | None:
        """All masks but that of the queries, as functions of positions."""
        masks: list[Mask] = self._positional()
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
        queries = ops.arange(query_length, dtype="int32")
        keys = ops.arange(key_length, dtype="int32")
        parts = [m.allowed(queries, keys) for m in self._positional()]
        parts += [valid[:, None, None, :] for valid in self.keys]
        if self.queries is not None:
            parts.append(self.queries[:, None, :, None])
        if self.pairs is not None:
            parts.append(self.pairs)
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
        if self.causal:
            masks.append(Causal())
        if self.sliding_window is not None:
            masks.append(SlidingWindow(self.sliding_window))
        return masks


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention that writes out every score, for those who ask to see them.

    Args:
        query: `(batch, query_length, heads, key_dim)`.
        key: `(batch, key_length, key_heads, key_dim)`.
        value: `(batch, key_length, key_heads, value_dim)`.
        mask: boolean, broadcastable to the scores, or None.
        scale: factor on the scores.

    Returns:
        `(out, scores)`: `(batch, query_length, heads, value_dim)` and the
        probabilities `(batch, heads, query_length, key_length)`, in the
        dtype of the query. A row that may attend to nothing is zero.
    """
    dtype = query.dtype
    batch, length, heads, key_dim = ops.shape(query)
    key_length, key_heads = ops.shape(key)[1:3]
    group = heads // key_heads
    # Half precision would round what the softmax magnifies.
    wide = numerics.accumulation_dtype(dtype)
    grouped = ops.reshape(
        ops.cast(query, wide) * scale,
        (batch, length, key_heads, group, key_dim),
    )
    scores = ops.einsum("btkgd,bskd->bkgts", grouped, ops.cast(key, wide))
    scores = ops.reshape(scores, (batch, heads, length, key_length))
    if mask is not None:
        # Finite, so that a row without any key has no 0 / 0 in its gradient.
        scores = ops.where(mask, scores, ops.cast(-1e9, wide))
    scores = ops.softmax(scores, axis=-1)
    if mask is not None:
        scores = ops.where(mask, scores, ops.zeros_like(scores))
    out = ops.einsum(
        "bkgts,bske->btkge",
        ops.reshape(scores, (batch, key_heads, group, length, key_length)),
        ops.cast(value, wide),
    )
    out = ops.reshape(out, (batch, length, heads, ops.shape(value)[3]))
    return ops.cast(out, dtype), ops.cast(scores, dtype)
