"""`keras_ring.layers.RingAttention`: multi-head attention around a ring."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ring import random_bits
from keras_ring.distribution import strategy
from keras_ring.keras_internals import attach_mask
from keras_ring.layers.attention import empty_rows as empty
from keras_ring.layers.attention import limits, stock
from keras_ring.layers.attention.call import AttentionCall, checked_shapes
from keras_ring.layers.attention.options import AttentionOptions
from keras_ring.layers.attention.projections import Projections
from keras_ring.layers.attention.written_out import written_out
from keras_ring.layers.rotary_embedding import RotaryEmbedding, rotary_of
from keras_ring.ops.ring_attention import ring_attention

Tensor = Any
Shape = tuple[int | None, ...]


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
        attention: how devices share the attention of a sequence, as of
            `keras_ring.DistributedStrategy`; as that says if None.
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
        attention: str | None = None,
        head_dim: int | None = None,
        num_query_heads: int | None = None,
        **kwargs: Any,
    ):
        options = AttentionOptions.checked(
            num_heads=num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            dropout=dropout,
            use_bias=use_bias,
            output_shape=output_shape,
            attention_axes=attention_axes,
            sliding_window=sliding_window,
            flash_attention=flash_attention,
            use_gate=use_gate,
            seed=seed,
            num_key_value_heads=num_key_value_heads,
            causal=causal,
            scale=scale,
            soft_cap=soft_cap,
            alibi=alibi,
            sinks=sinks,
            empty_rows=empty_rows,
            strip_masks=strip_masks,
            attention=attention,
            head_dim=head_dim,
            num_query_heads=num_query_heads,
        )
        super().__init__(**kwargs)
        self.supports_masking = True
        self._options = options
        self._rotary = rotary_of(rotary, self.dtype_policy)
        self.seed = options.seed
        self._set_projection_options(
            *(kernel_initializer, bias_initializer),
            *(kernel_regularizer, bias_regularizer, activity_regularizer),
            *(kernel_constraint, bias_constraint),
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
        shapes = checked_shapes(
            self._options, query_shape, value_shape, key_shape
        )
        # Which world the weights belong to: the trainer compares it with the
        # strategy that is active when training starts.
        self._ring_world = strategy.current()
        self._build_projections(*shapes)
        if self._options.sinks:
            self._sink_logits = self.add_weight(
                name="sinks",
                shape=(self._options.heads.query,),
                initializer="zeros",
            )
        if self._rotary is not None and not self._rotary.built:
            heads = (self._options.heads.query, self._options.heads.key_dim)
            self._rotary.build((*shapes[0][:2], *heads))
        # Its seed is part of the state that stock layers save; what is
        # dropped is decided by `random_bits`.
        self._dropout_layer = keras.layers.Dropout(
            self._options.dropout, seed=self.seed, dtype=self.dtype_policy
        )
        if self._options.dropout:
            random_bits.share_seed(self._dropout_layer.seed_generator)

    def __call__(
        self,
        query: Tensor,
        value: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # Both are given: only then does Keras find both tensors' masks.
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
        options = self._options
        value = query if value is None else value
        key = value if key is None else key
        if options.strip_masks:
            for tensor in (query, value, key):
                attach_mask(tensor, None)
        given = AttentionCall(
            *(query, value, key),
            *(query_mask, value_mask, key_mask, attention_mask),
            return_attention_scores,
            use_causal_mask,
            attention_bias,
            segment_ids,
            key_segment_ids,
            prefix_length,
        )
        axes = given.check(options, self._overridden())
        masks = given.masks(options, axes, self._rotary)
        bias = given.bias(options, axes)
        gate = self._gate_dense(query) if options.use_gate else None
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
        scores = lse = None
        if return_attention_scores or self._overridden():
            more: dict[str, Any] = {}
            if return_attention_scores:
                more["return_attention_scores"] = True
            if bias is not None:
                limits.check_overridden(self._overridden())
                more["attention_bias"] = bias
            out, scores = self._compute_attention(
                *(query, key, value),
                masks.dense(ops.shape(query)[1], ops.shape(key)[1]),
                training,
                **more,
            )
        else:
            seed = self._dropout_seed(training)
            out, lse = ring_attention(
                *(query, key, value),
                mask=masks.structured(),
                bias=bias,
                sinks=self._sink_logits if options.sinks else None,
                return_lse=True,
                **options.of_call(seed),
            )
        if lse is not None and empty.is_mean(options, axes, masks):
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
            training, return_attention_scores, use_causal_mask: as in a call.
            attention_bias: `(batch, query_length, heads or 1, key_length)`.

        Returns:
            `(out, scores)`, see `keras_ring.attention.dense.Dense`.
        """
        del return_attention_scores
        found = written_out(
            self._options,
            query,
            key,
            value,
            attention_mask,
            use_causal_mask,
            attention_bias,
            self._sink_logits if self._options.sinks else None,
            self._dropout_seed(training),
        )
        return found.out, found.scores

    def _dropout_seed(self, training: bool | None) -> Tensor | None:
        """The seed of this call, or None where nothing is dropped."""
        if not (training and self._options.dropout):
            return None
        return self._dropout_layer.seed_generator.next()

    def _overridden(self) -> bool:
        return (
            type(self)._compute_attention
            is not RingAttention._compute_attention
        )

    def compute_output_shape(
        self,
        query_shape: Shape,
        value_shape: Shape | None = None,
        key_shape: Shape | None = None,
    ) -> Shape:
        query, _, _ = checked_shapes(
            self._options, query_shape, value_shape, key_shape
        )
        return query[:-1] + (self._options.output_shape or query[-1:])

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
        segment_ids: Any = None,
        key_segment_ids: Any = None,
        prefix_length: Any = None,
    ) -> Any:
        del training
        value = query if value is None else value
        key = value if key is None else key
        given = AttentionCall(
            *(query, value, key),
            *(query_mask, value_mask, key_mask, attention_mask),
            return_attention_scores,
            use_causal_mask,
            attention_bias,
            segment_ids,
            key_segment_ids,
            prefix_length,
        )
        axes = given.check(self._options, self._overridden())
        output = keras.KerasTensor(
            self.compute_output_shape(query.shape, value.shape, key.shape),
            dtype=self.compute_dtype,
        )
        if not return_attention_scores:
            return output
        shape = axes.scores_shape(
            query.shape, key.shape, self._options.heads.query
        )
        return output, keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **self._projection_config(),
            **self._options.config(),
            "rotary": keras.saving.serialize_keras_object(self._rotary),
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
            ValueError: for another layer, also a subclass of the two, or one
                whose weights are not those of its configuration (LoRA,
                quantized).
            NotImplementedError: for what the stock layer does and this one
                does not.
        """
        ours = cls(**stock.config(layer))
        if layer.built:
            stock.copy_weights(layer, ours)
        return ours
