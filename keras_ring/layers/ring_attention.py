"""`keras_ring.layers.RingAttention`: multi-head attention around a ring."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ring import arguments, random_bits, strategy
from keras_ring.keras_internals import attach_mask
from keras_ring.layers import attention_arguments, keras_attention
from keras_ring.layers import attention_limits as limits
from keras_ring.layers import empty_rows as empty
from keras_ring.layers.attention_axes import AttentionAxes
from keras_ring.layers.attention_masks import AttentionMasks
from keras_ring.layers.projections import Projections
from keras_ring.layers.rotary_embedding import RotaryEmbedding, rotary_of
from keras_ring.ops.dense_attention import dense_attention
from keras_ring.ops.ring_attention import ring_attention
from keras_ring.ops.sequence import whole_length
from keras_ring.scoring import Dropout, Scoring

Tensor = Any
Shape = tuple[int | None, ...]


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


@keras.saving.register_keras_serializable(package="keras_ring")
class RingAttention(Projections, keras.layers.Layer):
    """Multi-head attention over a sequence that is spread over devices.

    It does what `keras.layers.MultiHeadAttention` and
    `keras.layers.GroupQueryAttention` do, tile by tile. Under a
    `keras_ring.DistributedStrategy` every device keeps its part of the
    sequence and the keys and values travel around the ring; without one the
    layer runs on one device. Either way no score matrix exists, keys and
    values are never repeated for grouped heads, and the result is that of
    the stock layers to rounding.

    Two things differ from them unless they are asked for: a query that may
    attend to nothing gives zeros before the output projection
    (`empty_rows`), and the inputs keep their Keras masks (`strip_masks`).

    `RingAttention.from_keras_layer(layer)` makes one from a stock layer, with
    its weights and asking for both.

    Args:
        num_heads: number of query heads. `num_query_heads` is another
            spelling of it; give one of the two.
        key_dim: size of each query and key head. `head_dim` is another
            spelling of it; give one of the two.
        value_dim: size of each value head; `key_dim` if None.
        dropout: rate of dropout on the attention probabilities, in training
            only. The seed, the sample, the head and the two positions decide
            which are dropped: the same for every ring size and on every
            backend.
        use_bias: whether the projections have biases.
        output_shape: shape of the output's features, an int or a tuple; the
            width of the query if None.
        attention_axes: axes to attend over; all between the batch and the
            features if None. Around a ring only axis 1.
        sliding_window: positive integer; a query attends to keys less than
            this many positions away, on either side. With a causal mask it
            is the window of a decoder.
        flash_attention: True promises that no scores are written out, and
            refuses what needs them (`dropout`, `return_attention_scores`).
            The computation never writes them out unless they are asked for,
            so that None and False mean the same, and
            `keras.config.disable_flash_attention()` changes nothing.
        kernel_initializer: initializer of the projections' kernels.
        bias_initializer: initializer of their biases.
        kernel_regularizer: regularizer of the kernels.
        bias_regularizer: regularizer of the biases.
        activity_regularizer: regularizer of every projection's output.
        kernel_constraint: constraint on the kernels.
        bias_constraint: constraint on the biases.
        use_gate: whether to multiply the attention by a sigmoid of a
            projection of the query before the output projection.
        seed: seed of the dropout.
        num_key_value_heads: number of key/value heads, a divisor of the
            query heads; as many as those if None. 1 is multi-query.
        causal: hide later keys from every query, in every call.
        scale: factor on the scores; `1 / sqrt(key_dim)` if None.
        soft_cap: bound on the size of the scaled products, `soft_cap *
            tanh(x / soft_cap)` as in Gemma 2; none if None.
        alibi: True subtracts the slopes of the ALiBi paper times the
            distance from the scores; a number for each head sets the slopes.
        sinks: learn a logit for each head that takes part in the softmax and
            has no value, so that a head can attend to nothing. Starts at 0.
        rotary: True, or a `keras_ring.layers.RotaryEmbedding`, to rotate
            queries and keys by their positions.
        empty_rows: what a query that may attend to nothing gives before the
            output projection: `"zeros"`, or `"stock"` for what stock layers
            give. That is the mean of all values, masked ones too, which
            costs a sum over the ring; and zeros where stock layers write
            out their scores (with `dropout`, for inputs of a rank other
            than 3, and if the scores are asked for).
        strip_masks: take the Keras masks off the inputs when the layer runs,
            as `keras.layers.MultiHeadAttention` does: what is given the same
            tensors later finds no masks on them.
        head_dim: another spelling of `key_dim`.
        num_query_heads: another spelling of `num_heads`.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        query: `(batch, query_length, features)`, floating point; any number
            of axes between batch and features.
        value: `(batch, key_length, features)`; `query` if None, which is
            self-attention.
        key: `(batch, key_length, features)`; `value` if None.
        query_mask: boolean `(batch, query_length)`; false rows attend to
            nothing. Taken from the query's Keras mask if None.
        value_mask: boolean `(batch, key_length)`; false keys are not
            attended to. Taken from the value's Keras mask if None.
        key_mask: as `value_mask`, of the key. Both apply.
        attention_mask: boolean, true where a query may attend to a key:
            `(query_length, key_length)`, `(batch, query_length, key_length)`
            or `(batch, heads, query_length, key_length)`, axes of size 1
            broadcast. This is the only mask as large as the scores.
        return_attention_scores: return `(output, scores)`, with the
            probabilities `(batch, heads, query_length, key_length)`. They
            are computed in one piece; on one device only.
        training: whether dropout applies.
        use_causal_mask: hide later keys from every query, in this call.
            Aligned at the top left where the lengths differ.
        attention_bias: added to the scores, floating point; shapes as of
            `attention_mask`. It is differentiable.
        segment_ids: integers `(batch, query_length)`; a query attends to
            keys with the same id only, which keeps packed documents apart.
        key_segment_ids: integers `(batch, key_length)`, the ids of the keys;
            `segment_ids` if None.
        prefix_length: integers `(batch,)`, the number of keys at the start
            that every query sees; the others are seen causally.

    Returns:
        `(batch, query_length, features)` in the compute dtype, and the scores
        if they are asked for. The query's Keras mask stays on the output.

    Raises:
        ValueError: for arguments or shapes that do not fit.
        NotImplementedError: around a ring for `return_attention_scores` and
            other axes than axis 1.

    Example:

    ```python
    attention = keras_ring.layers.RingAttention(8, key_dim=64, causal=True)
    y = attention(x)
    ```

    Reference:
        Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers
        for Near-Infinite Context", 2023, https://arxiv.org/abs/2310.01889;
        Ainslie et al., "GQA", 2023, https://arxiv.org/abs/2305.13245
    """

    def __init__(
        self,
        num_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: int | tuple[int, ...] | None = None,
        attention_axes: int | tuple[int, ...] | None = None,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        seed: int | None = None,
        *,
        num_key_value_heads: int | None = None,
        causal: bool = False,
        scale: float | None = None,
        soft_cap: float | None = None,
        alibi: bool | Sequence[float] | None = None,
        sinks: bool = False,
        rotary: bool | RotaryEmbedding | None = None,
        empty_rows: str = "zeros",
        strip_masks: bool = False,
        head_dim: int | None = None,
        num_query_heads: int | None = None,
        **kwargs: Any,
    ):
        heads = attention_arguments.heads(
            num_heads,
            key_dim,
            value_dim,
            num_key_value_heads,
            num_query_heads,
            head_dim,
        )
        dropout = attention_arguments.dropout_rate(dropout, flash_attention)
        if scale is not None:
            scale = arguments.finite(
                "scale", scale, ", or None for 1 / sqrt(key_dim)"
            )
        soft_cap = attention_arguments.soft_cap(soft_cap)
        slopes = attention_arguments.alibi_slopes(alibi, heads.query)
        empty.check(empty_rows, sinks)
        sliding_window = attention_arguments.optional_positive(
            "sliding_window", sliding_window
        )
        output_shape = attention_arguments.output_shape(output_shape)
        attention_axes = attention_arguments.attention_axes(attention_axes)
        use_bias = arguments.flag("use_bias", use_bias)
        use_gate = arguments.flag("use_gate", use_gate)
        causal = arguments.flag("causal", causal)
        sinks = arguments.flag("sinks", sinks)
        strip_masks = arguments.flag("strip_masks", strip_masks)
        seed = arguments.seed("seed", seed)
        super().__init__(**kwargs)
        self.supports_masking = True
        self._num_heads = heads.query
        self._num_key_value_heads = heads.key_value
        self._key_dim = heads.key_dim
        self._value_dim = heads.value_dim
        self._dropout = dropout
        self._use_bias = use_bias
        self._output_shape = output_shape
        self._attention_axes = attention_axes
        self._sliding_window = sliding_window
        self._flash_attention = flash_attention
        self._use_gate = use_gate
        self._causal = causal
        self._scale = scale
        self._soft_cap = soft_cap
        self._slopes = slopes
        self._sinks = sinks
        self._rotary = rotary_of(rotary, self.dtype_policy)
        self._empty_rows = empty_rows
        self._strip_masks = strip_masks
        self.seed = seed
        self._set_projection_options(
            kernel_initializer,
            bias_initializer,
            kernel_regularizer,
            bias_regularizer,
            activity_regularizer,
            kernel_constraint,
            bias_constraint,
        )
        self._ring_world: Any = None

    def build(
        self,
        query_shape: Shape,
        value_shape: Shape | None = None,
        key_shape: Shape | None = None,
    ) -> None:
        """Create the projections for inputs of these shapes.

        Args:
            query_shape: shape of `query`.
            value_shape: shape of `value`; that of `query` if None.
            key_shape: shape of `key`; that of `value` if None.

        Raises:
            ValueError: for shapes that cannot attend to each other.
        """
        shapes = self._check_shapes(query_shape, value_shape, key_shape)
        # Which world the weights belong to: the trainer compares it with the
        # strategy that is active when training starts.
        self._ring_world = strategy.current()
        self._build_projections(*shapes)
        if self._sinks:
            self._sink_logits = self.add_weight(
                name="sinks", shape=(self._num_heads,), initializer="zeros"
            )
        if self._rotary is not None and not self._rotary.built:
            heads = (self._num_heads, self._key_dim)
            self._rotary.build((*shapes[0][:2], *heads))
        # Its seed is part of the state that stock layers save; what is
        # dropped is decided by `random_bits`.
        self._dropout_layer = keras.layers.Dropout(
            self._dropout, seed=self.seed, dtype=self.dtype_policy
        )
        if self._dropout:
            random_bits.share_seed(self._dropout_layer.seed_generator)

    def __call__(
        self,
        query: Tensor,
        value: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Both by name: only then does Keras find both tensors' masks.
        value = query if value is None else value
        return super().__call__(query, value, *args, **kwargs)

    def call(
        self,
        query: Tensor,
        value: Tensor | None = None,
        key: Tensor | None = None,
        query_mask: Tensor | None = None,
        value_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        attention_bias: Tensor | None = None,
        segment_ids: Tensor | None = None,
        key_segment_ids: Tensor | None = None,
        prefix_length: Tensor | None = None,
    ) -> Any:
        value = query if value is None else value
        key = value if key is None else key
        if self._strip_masks:
            for tensor in (query, value, key):
                attach_mask(tensor, None)
        axes = self._check_call(
            {"query": query, "value": value, "key": key},
            {
                "query_mask": query_mask,
                "value_mask": value_mask,
                "key_mask": key_mask,
            },
            {
                "segment_ids": segment_ids,
                "key_segment_ids": key_segment_ids,
                "prefix_length": prefix_length,
            },
            attention_mask,
            attention_bias,
            return_attention_scores,
            use_causal_mask,
        )
        causal = use_causal_mask or self._causal
        limits.check_positions(
            axes,
            causal=bool(causal),
            sliding_window=self._sliding_window,
            alibi=self._slopes,
            rotary=self._rotary,
            prefix_length=prefix_length,
        )
        masks = self._masks(
            axes,
            {
                "query_mask": (query_mask, query),
                "value_mask": (value_mask, value),
                "key_mask": (key_mask, key),
            },
            attention_mask,
            causal,
            (segment_ids, key_segment_ids),
            prefix_length,
        )
        bias = self._pairs(
            axes, attention_bias, query, key, name="attention_bias"
        )
        gate = self._gate_dense(query) if self._use_gate else None
        inputs = query, key
        query, key, value = (
            axes.fold(ops.cast(tensor, self.compute_dtype))
            for tensor in self._project(query, key, value)
        )
        if self._rotary is not None:
            # A layer that the user made may have another dtype.
            query, key = (
                ops.cast(self._rotary(tensor), self.compute_dtype)
                for tensor in (query, key)
            )
        if bias is not None:
            bias = ops.transpose(bias, (0, 2, 1, 3))
        scores = lse = None
        if return_attention_scores or self._overridden():
            options: dict[str, Any] = {}
            if return_attention_scores:
                options["return_attention_scores"] = True
            if bias is not None:
                limits.check_overridden(self._overridden())
                options["attention_bias"] = bias
            out, scores = self._compute_attention(
                query,
                key,
                value,
                masks.dense(ops.shape(query)[1], ops.shape(key)[1]),
                training,
                **options,
            )
        else:
            seed = self._dropout_seed(training)
            out, lse = ring_attention(
                query,
                key,
                value,
                mask=masks.structured(),
                scale=self._scale,
                soft_cap=self._soft_cap,
                bias=bias,
                alibi=self._slopes,
                sinks=self._sink_logits if self._sinks else None,
                dropout=0.0 if seed is None else self._dropout,
                dropout_seed=seed,
                return_lse=True,
            )
        if lse is not None and self._mean_where_empty(axes, masks):
            out = empty.mean_of_values(out, lse, value, masks)
        else:
            out = masks.zero_queries(out)
        out = axes.unfold(out, inputs[0])
        if gate is not None:
            out = ops.multiply(out, gate)
        out = self._output_dense(out)
        if return_attention_scores:
            return out, axes.unfold_scores(scores, *inputs)
        return out

    def _compute_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        training: bool | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
        attention_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention with all its scores, on one device.

        A subclass of a stock layer overrides this method to change the
        attention, and so can a subclass of this one: where it is overridden
        it computes every call.

        Args:
            query: `(batch, query_length, heads, key_dim)`, axes folded.
            key: `(batch, key_length, key_heads, key_dim)`.
            value: `(batch, key_length, key_heads, value_dim)`.
            attention_mask: boolean, as in a call; all masks in one.
            training: as in a call.
            return_attention_scores: whether the scores were asked for.
            use_causal_mask: hide later keys as well.
            attention_bias: `(batch, query_length, heads or 1, key_length)`.

        Returns:
            `(out, scores)`, see `ops.dense_attention.Dense`.
        """
        del return_attention_scores
        pairs = None
        plain = AttentionAxes(3, (1,))
        if attention_mask is not None:
            pairs = plain.fold_pairs(
                attention_mask, ops.shape(query)[:3], (ops.shape(key)[1],)
            )
        masks = AttentionMasks(None, (), pairs, use_causal_mask, None)
        dropout = None
        seed = self._dropout_seed(training)
        if seed is not None:
            dropout = Dropout(self._dropout, ops.cast(seed, "int32"), 0)
        scoring = Scoring(
            scale=self._key_dim**-0.5 if self._scale is None else self._scale,
            mask=masks.structured(),
            soft_cap=self._soft_cap,
            bias=attention_bias,
            slopes=self._slopes,
            dropout=dropout,
        )
        sinks = self._sink_logits if self._sinks else None
        found = dense_attention(query, key, value, scoring, sinks)
        return found.out, found.scores

    def _dropout_seed(self, training: bool | None) -> Tensor | None:
        """The seed of this call, or None where nothing is dropped."""
        if not (training and self._dropout):
            return None
        return self._dropout_layer.seed_generator.next()

    def _mean_where_empty(
        self, axes: AttentionAxes, masks: AttentionMasks
    ) -> bool:
        """True if a stock layer would not write out the scores of a call in
        which some query may attend to nothing."""
        return (
            self._empty_rows == "stock"
            and axes.plain
            and not self._dropout
            and empty.may_be(masks)
        )

    def _overridden(self) -> bool:
        return (
            type(self)._compute_attention
            is not RingAttention._compute_attention
        )

    def _masks(
        self,
        axes: AttentionAxes,
        padding: dict[str, tuple[Tensor | None, Tensor]],
        attention_mask: Tensor | None,
        causal: bool,
        segment_ids: tuple[Tensor | None, Tensor | None],
        prefix_length: Tensor | None,
    ) -> AttentionMasks:
        """The masks of a call over folded tensors, checked."""
        folded = {
            name: axes.fold_positions(ops.cast(mask, "bool"), like, name)
            for name, (mask, like) in padding.items()
            if mask is not None
        }
        query, key = padding["query_mask"][1], padding["key_mask"][1]
        pairs = self._pairs(
            axes, attention_mask, query, key, name="attention_mask"
        )
        return AttentionMasks(
            queries=folded.pop("query_mask", None),
            keys=tuple(folded.values()),
            pairs=None if pairs is None else ops.cast(pairs, "bool"),
            causal=bool(causal),
            sliding_window=self._sliding_window,
            segments=_segments(axes, *segment_ids, query, key),
            prefix=prefix_length,
        )

    def _pairs(
        self,
        axes: AttentionAxes,
        pairs: Tensor | None,
        query: Tensor,
        key: Tensor,
        name: str,
    ) -> Tensor | None:
        """Bias or mask of each score, folded: `(batch, heads or 1,
        query_length, all_keys)`."""
        if pairs is None:
            return None
        return axes.fold_pairs(
            pairs,
            (*ops.shape(query)[:-1], self._num_heads),
            tuple(whole_length(n) for n in axes.lengths(ops.shape(key))),
            name,
        )

    def _check_shapes(
        self, query: Any, value: Any = None, key: Any = None
    ) -> tuple[Shape, Shape, Shape]:
        value = query if value is None else value
        key = value if key is None else key
        shapes = tuple(query), tuple(value), tuple(key)
        attention_arguments.check_shapes(*shapes)
        axes = AttentionAxes.of(len(shapes[0]), self._attention_axes)
        attention_arguments.check_shapes(*shapes, axes.free)
        return shapes

    def _check_call(
        self,
        inputs: dict[str, Tensor],
        masks: dict[str, Tensor | None],
        ids: dict[str, Tensor | None],
        attention_mask: Tensor | None,
        attention_bias: Tensor | None,
        scores: bool,
        use_causal_mask: bool,
    ) -> AttentionAxes:
        """Refuse a call that cannot be computed here; `inputs` are query,
        value and key."""
        arguments.flag("return_attention_scores", scores)
        arguments.flag("use_causal_mask", use_causal_mask)
        attention_arguments.check_tensors(
            inputs=inputs,
            masks=masks,
            ids=ids,
            attention_mask=attention_mask,
            attention_bias=attention_bias,
        )
        shapes = self._check_shapes(*(t.shape for t in inputs.values()))
        axes = AttentionAxes.of(len(shapes[0]), self._attention_axes)
        limits.check_scores(scores, self._flash_attention)
        limits.check_ring(axes, scores, self._overridden())
        return axes

    def compute_output_shape(
        self,
        query_shape: Shape,
        value_shape: Shape | None = None,
        key_shape: Shape | None = None,
    ) -> Shape:
        query, _, _ = self._check_shapes(query_shape, value_shape, key_shape)
        return query[:-1] + (self._output_shape or query[-1:])

    def compute_output_spec(
        self,
        query: Any,
        value: Any = None,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        attention_bias: Any = None,
        **ids: Any,
    ) -> Any:
        del training
        value = query if value is None else value
        key = value if key is None else key
        axes = self._check_call(
            {"query": query, "value": value, "key": key},
            {
                "query_mask": query_mask,
                "value_mask": value_mask,
                "key_mask": key_mask,
            },
            ids,
            attention_mask,
            attention_bias,
            return_attention_scores,
            use_causal_mask,
        )
        output = keras.KerasTensor(
            self.compute_output_shape(query.shape, value.shape, key.shape),
            dtype=self.compute_dtype,
        )
        if not return_attention_scores:
            return output
        shape = axes.scores_shape(query.shape, key.shape, self._num_heads)
        return output, keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **self._projection_config(),
            "num_heads": self._num_heads,
            "key_dim": self._key_dim,
            "value_dim": self._value_dim,
            "num_key_value_heads": self._num_key_value_heads,
            "dropout": self._dropout,
            "use_bias": self._use_bias,
            "output_shape": self._output_shape,
            "attention_axes": self._attention_axes,
            "sliding_window": self._sliding_window,
            "flash_attention": self._flash_attention,
            "use_gate": self._use_gate,
            "causal": self._causal,
            "scale": self._scale,
            "soft_cap": self._soft_cap,
            "alibi": self._slopes,
            "sinks": self._sinks,
            "rotary": keras.saving.serialize_keras_object(self._rotary),
            "empty_rows": self._empty_rows,
            "strip_masks": self._strip_masks,
            "seed": self.seed,
        }

    @classmethod
    def from_keras_layer(cls, layer: keras.layers.Layer) -> "RingAttention":
        """Make the layer that does what a stock layer does, with its weights.

        Args:
            layer: a `keras.layers.MultiHeadAttention` or
                `keras.layers.GroupQueryAttention`, built or not.

        Returns:
            A layer of the same configuration and name. If `layer` is built
            it is built too and has the same weights.

        Raises:
            ValueError: for another layer, a subclass with its own ways
                included, or one whose weights are not those of its
                configuration (LoRA, quantized).
            NotImplementedError: for what the stock layer does and this one
                does not.
        """
        ours = cls(**keras_attention.config(layer))
        if layer.built:
            keras_attention.copy_weights(layer, ours)
        return ours
