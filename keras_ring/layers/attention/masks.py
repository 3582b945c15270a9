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

from keras_ring.layers.attention.axes import AttentionAxes
from keras_ring.masks import (
    Causal,
    Explicit,
    Mask,
    Padding,
    PrefixLM,
    Segments,
    SlidingWindow,
)
from keras_ring.ops.sequence import whole_length

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

    @classmethod
    def of_call(
        cls,
        axes: AttentionAxes,
        heads: int,
        padding: dict[str, tuple[Tensor | None, Tensor]],
        attention_mask: Tensor | None,
        causal: bool,
        sliding_window: int | None,
        segment_ids: tuple[Tensor | None, Tensor | None],
        prefix_length: Tensor | None,
    ) -> "AttentionMasks":
        """Fold and check the masks that a layer was called with.

        Args:
            axes: attended over.
            heads: number of query heads.
            padding: "query_mask", "value_mask" and "key_mask", each with the
                tensor that it belongs to.
            attention_mask: see the layer's call, as all that follow.
            causal, sliding_window, prefix_length: likewise.
            segment_ids: of the queries and of the keys.
        """
        folded = {
            name: axes.fold_positions(ops.cast(mask, "bool"), like, name)
            for name, (mask, like) in padding.items()
            if mask is not None
        }
        query, key = padding["query_mask"][1], padding["key_mask"][1]
        pairs = of_pairs(
            axes, heads, attention_mask, query, key, name="attention_mask"
        )
        return cls(
            queries=folded.pop("query_mask", None),
            keys=tuple(folded.values()),
            pairs=None if pairs is None else ops.cast(pairs, "bool"),
            causal=bool(causal),
            sliding_window=sliding_window,
            segments=_segments(axes, *segment_ids, query, key),
            prefix=prefix_length,
        )

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


def of_pairs(
    axes: AttentionAxes,
    heads: int,
    pairs: Tensor | None,
    query: Tensor,
    key: Tensor,
    name: str,
) -> Tensor | None:
    """Bias or mask of each score, folded: `(batch, heads or 1, query_length,
    all_keys)`."""
    if pairs is None:
        return None
    return axes.fold_pairs(
        pairs,
        (*ops.shape(query)[:-1], heads),
        tuple(whole_length(n) for n in axes.lengths(ops.shape(key))),
        name,
    )


def _segments(
    axes: AttentionAxes,
    segment_ids: Tensor | None,
    key_segment_ids: Tensor | None,
    query: Tensor,
    key: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """The ids of queries and keys, folded."""
    if segment_ids is None:
        if key_segment_ids is not None:
            raise ValueError(
                "`key_segment_ids` needs `segment_ids`, those of the queries. "
                "Received: segment_ids=None. Pass both."
            )
        return None
    if key_segment_ids is None:
        key_segment_ids = segment_ids
    return (
        axes.fold_positions(segment_ids, query, "segment_ids"),
        axes.fold_positions(key_segment_ids, key, "key_segment_ids"),
    )
