"""Arguments of one call of an attention layer, checked together."""

import dataclasses
from typing import Any

from keras import ops

from keras_ring import arguments
from keras_ring.layers.attention import arguments as attention_arguments
from keras_ring.layers.attention import limits
from keras_ring.layers.attention.axes import AttentionAxes
from keras_ring.layers.attention.masks import AttentionMasks, of_pairs
from keras_ring.layers.attention.options import AttentionOptions

Tensor = Any
Shape = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of a layer: its tensors, or their `KerasTensor`s.

    The names are those of `RingAttention`'s call, where they are described.
    """

    query: Tensor
    value: Tensor
    key: Tensor
    query_mask: Tensor | None = None
    value_mask: Tensor | None = None
    key_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    return_attention_scores: bool = False
    use_causal_mask: bool = False
    attention_bias: Tensor | None = None
    segment_ids: Tensor | None = None
    key_segment_ids: Tensor | None = None
    prefix_length: Tensor | None = None

    def _named(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names}

    def check(
        self, options: AttentionOptions, overridden: bool
    ) -> AttentionAxes:
        """Refuse a call that cannot be computed here.

        Args:
            options: of the layer.
            overridden: whether a subclass computes its own attention.

        Returns:
            The axes attended over.

        Raises:
            ValueError: for tensors that do not fit, or to each other.
            NotImplementedError: for what a ring does not have.
        """
        scores = self.return_attention_scores
        arguments.flag("return_attention_scores", scores)
        arguments.flag("use_causal_mask", self.use_causal_mask)
        attention_arguments.check_tensors(
            inputs=self._named("query", "value", "key"),
            masks=self._named("query_mask", "value_mask", "key_mask"),
            ids=self._named("segment_ids", "key_segment_ids", "prefix_length"),
            attention_mask=self.attention_mask,
            attention_bias=self.attention_bias,
        )
        shapes = checked_shapes(
            options, self.query.shape, self.value.shape, self.key.shape
        )
        axes = AttentionAxes.of(len(shapes[0]), options.attention_axes)
        limits.check_scores(scores, options.flash_attention)
        limits.check_ring(axes, scores, overridden)
        limits.check_heads(options)
        return axes

    def masks(
        self, options: AttentionOptions, axes: AttentionAxes, rotary: Any
    ) -> AttentionMasks:
        """The masks over folded tensors, checked.

        Args:
            options: of the layer.
            axes: what `check` returned.
            rotary: the layer's rotary embedding, or None.
        """
        causal = bool(self.use_causal_mask or options.causal)
        limits.check_positions(
            axes,
            causal=causal,
            sliding_window=options.sliding_window,
            alibi=options.slopes,
            rotary=rotary,
            prefix_length=self.prefix_length,
        )
        return AttentionMasks.of_call(
            axes,
            options.heads.query,
            {
                "query_mask": (self.query_mask, self.query),
                "value_mask": (self.value_mask, self.value),
                "key_mask": (self.key_mask, self.key),
            },
            self.attention_mask,
            causal,
            options.sliding_window,
            (self.segment_ids, self.key_segment_ids),
            self.prefix_length,
        )

    def bias(
        self, options: AttentionOptions, axes: AttentionAxes
    ) -> Tensor | None:
        """The bias, folded: `(batch, query_length, heads or 1, all_keys)`."""
        found = of_pairs(
            axes,
            options.heads.query,
            self.attention_bias,
            self.query,
            self.key,
            name="attention_bias",
        )
        return None if found is None else ops.transpose(found, (0, 2, 1, 3))


def checked_shapes(
    options: AttentionOptions, query: Any, value: Any = None, key: Any = None
) -> tuple[Shape, Shape, Shape]:
    """The shapes of query, value and key, where None is the one before.

    Raises:
        ValueError: for shapes that cannot attend to each other.
    """
    value = query if value is None else value
    key = value if key is None else key
    shapes = tuple(query), tuple(value), tuple(key)
    attention_arguments.check_shapes(*shapes)
    axes = AttentionAxes.of(len(shapes[0]), options.attention_axes)
    attention_arguments.check_shapes(*shapes, axes.free)
    return shapes
