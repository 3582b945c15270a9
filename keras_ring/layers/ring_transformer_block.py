"""`keras_ring.layers.RingTransformerBlock`: attention and feed-forward."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_ring import arguments, backends, precision, random_bits
from keras_ring.distribution import strategy
from keras_ring.keras_internals import full_values, mask_of
from keras_ring.layers import dense_options
from keras_ring.layers.attention import arguments as attention_arguments
from keras_ring.layers.attention import options
from keras_ring.layers.blockwise_feed_forward import BlockwiseFeedForward
from keras_ring.layers.ring_attention import RingAttention
from keras_ring.layers.rotary_embedding import rotary_of
from keras_ring.ops.positional_dropout import positional_dropout
from keras_ring.recompute.rematerialised import rematerialised

Shape = tuple[int | None, ...]
Tensor = Any

NORMS = {
    "layer": keras.layers.LayerNormalization,
    "rms": keras.layers.RMSNormalization,
}


@keras.saving.register_keras_serializable(package="keras_ring")
class RingTransformerBlock(keras.layers.Layer):
    """A transformer block, attention and feed-forward, around a ring.

    With `norm_placement="pre"`

        x = x + attention(norm(x));  x = x + feed_forward(norm(x))

    and with `"post"`

        x = norm(x + attention(x));  x = norm(x + feed_forward(x)).

    Attention is a `RingAttention`, the feed-forward a `BlockwiseFeedForward`;
    the result is that of the stock layers in their place. `remat` says what
    is kept of the forward for the backward. In units of the block's input,
    batch x length x features of the compute dtype, and with as many key
    features as features:

    - `"feed_forward"`: what lies between the parts (the input, the outputs of
      the norms, queries, keys, values, the attention's output, the middle of
      the block): about 8; the hidden features of the feed-forward are
      computed once more, in either mode.
    - `"block"`: the input alone: 1. The block is computed once more in the
      backward, with the hops of its ring.

    Both give the same results.

    Args:
        num_heads: number of query heads.
        hidden_dim: number of hidden features of the feed-forward.
        key_dim: size of each head; the features divided by `num_heads` if
            None.
        num_key_value_heads: number of key/value heads, a divisor of
            `num_heads`; as many as those if None.
        causal: whether to hide later keys from every query.
        norm: `"layer"` for `keras.layers.LayerNormalization`, or `"rms"` for
            `keras.layers.RMSNormalization`.
        norm_placement: `"pre"` or `"post"`, as above.
        activation: activation of the feed-forward: a name, or a function of
            a tensor that treats positions one by one.
        gated: whether the feed-forward has a gate, see
            `BlockwiseFeedForward`.
        rotary: rotary positions of queries and keys: True, or a
            `RotaryEmbedding`.
        dropout: rate of dropout on the outputs of attention and
            feed-forward. What is dropped does not depend on the ring.
        attention_dropout: rate of dropout on the attention probabilities.
        sliding_window: positive integer; a query attends to keys less than
            this many positions away.
        soft_cap: bound on the size of the scaled products, see
            `RingAttention`.
        alibi: slopes of ALiBi, see `RingAttention`.
        sinks: whether each head learns a logit that attends to nothing, see
            `RingAttention`.
        use_bias: whether the projections have biases.
        epsilon: `epsilon` of the norms.
        remat: `"feed_forward"` or `"block"`, as above.
        chunk_size: number of positions, at most, whose hidden features exist
            at a time.
        kernel_initializer: initializer of all kernels.
        bias_initializer: initializer of all biases.
        seed: seed of the dropouts.
        attention: how devices share the attention of a sequence, see
            `RingAttention`.
        **kwargs: name, dtype and others of `keras.layers.Layer`.

    Call arguments:
        inputs: `(batch, length, features)`, floating point.
        mask: boolean `(batch, length)`; the Keras mask of the inputs if left
            out. False positions are not attended to.
        segment_ids: integers `(batch, length)`: a position attends to those
            with the same id only, which keeps packed documents apart.
        training: whether dropout applies.

    Returns:
        A tensor with the shape of the inputs, in the compute dtype.

    Raises:
        ValueError: for arguments out of range, or inputs of another rank.

    Example:

    ```python
    for _ in range(12):
        x = keras_ring.layers.RingTransformerBlock(
            8, 2048, causal=True, rotary=True, remat="block"
        )(x)
    ```

    Reference:
        Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers
        for Near-Infinite Context", 2023, https://arxiv.org/abs/2310.01889
    """

    def __init__(
        self,
        num_heads: int,
        hidden_dim: int,
        key_dim: int | None = None,
        num_key_value_heads: int | None = None,
        causal: bool = False,
        norm: str = "layer",
        norm_placement: str = "pre",
        activation: Any = "gelu",
        gated: bool = False,
        rotary: Any = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        alibi: bool | Sequence[float] | None = None,
        sinks: bool = False,
        use_bias: bool = True,
        epsilon: float = 1e-6,
        remat: str = "feed_forward",
        chunk_size: int = 1024,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        seed: int | None = None,
        attention: str | None = None,
        **kwargs: Any,
    ):
        # Here, though the parts are built later and would refuse it then.
        num_heads = arguments.integer("num_heads", num_heads)
        if key_dim is not None:
            key_dim = arguments.integer("key_dim", key_dim)
        heads = options.heads(
            num_heads,
            1 if key_dim is None else key_dim,
            None,
            num_key_value_heads,
            None,
            None,
        )
        optional_positive = options.optional_positive
        if isinstance(rotary, dict):
            rotary = keras.saving.deserialize_keras_object(rotary)
        rotary_of(rotary, None)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.num_heads = heads.query
        self.hidden_dim = arguments.integer("hidden_dim", hidden_dim)
        self.key_dim = None if key_dim is None else heads.key_dim
        self.num_key_value_heads = optional_positive(
            "num_key_value_heads", num_key_value_heads
        )
        self.causal = arguments.flag("causal", causal)
        self.norm = arguments.choice("norm", norm, tuple(NORMS))
        self.norm_placement = arguments.choice(
            "norm_placement", norm_placement, ("pre", "post")
        )
        self.activation = keras.activations.get(activation)
        self.gated = arguments.flag("gated", gated)
        self.rotary = rotary
        self.dropout = dropout = arguments.rate("dropout", dropout)
        self.attention_dropout = arguments.rate(
            "attention_dropout", attention_dropout
        )
        self.sliding_window = optional_positive(
            "sliding_window", sliding_window
        )
        self.soft_cap = options.soft_cap(soft_cap)
        self.alibi = options.alibi_slopes(alibi, heads.query)
        self.sinks = arguments.flag("sinks", sinks)
        self.use_bias = arguments.flag("use_bias", use_bias)
        self.epsilon = arguments.not_negative("epsilon", epsilon)
        self.remat = arguments.choice("remat", remat, ("feed_forward", "block"))
        self.chunk_size = arguments.integer("chunk_size", chunk_size)
        # `attention` is the layer.
        self._sharing = options.sharing(attention)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.seed = seed = arguments.seed("seed", seed)
        self.seed_generator = None
        if dropout:
            self.seed_generator = keras.random.SeedGenerator(seed)
            random_bits.share_seed(self.seed_generator)
        self.feed_forward = BlockwiseFeedForward(
            self.hidden_dim,
            activation=self.activation,
            gated=self.gated,
            use_bias=self.use_bias,
            chunk_size=self.chunk_size,
            kernel_initializer=self.kernel_initializer,
            bias_initializer=self.bias_initializer,
            dtype=self.dtype_policy,
            name="feed_forward",
        )

    def build(self, input_shape: Shape) -> None:
        features = dense_options.features_of(input_shape)
        if self.key_dim is None and features % self.num_heads:
            raise ValueError(
                "The features must be a multiple of `num_heads`, or `key_dim` "
                f"be given. Received: input_shape={tuple(input_shape)}, "
                f"num_heads={self.num_heads}. Choose a divisor of {features}."
            )
        self._ring_world = strategy.current()
        self.attention_norm = self._norm("attention_norm", input_shape)
        self.attention = RingAttention(
            self.num_heads,
            self.key_dim or features // self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            causal=self.causal,
            rotary=self.rotary,
            dropout=self.attention_dropout,
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
            alibi=self.alibi,
            sinks=self.sinks,
            use_bias=self.use_bias,
            attention=self._sharing,
            kernel_initializer=self.kernel_initializer,
            bias_initializer=self.bias_initializer,
            seed=self.seed,
            dtype=self.dtype_policy,
            name="attention",
        )
        self.attention.build(input_shape)
        self.feed_forward_norm = self._norm("feed_forward_norm", input_shape)
        self.feed_forward.build(input_shape)

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        training: bool | None = None,
    ) -> Tensor:
        training = bool(training)
        _check_tensors(inputs, mask, segment_ids)
        if mask is None:
            # Keras fills `mask` in only where the inputs are the only tensor.
            mask = mask_of(inputs)
        if self.remat != "block":
            return self._compute(inputs, mask, segment_ids, training)
        variables = self.variables
        # The function sees the generators as they are now, each time it is
        # computed; for those who come after they advance here, once.
        values = [ops.copy(value) for value in full_values(variables)]
        if training:
            for generator in self._drawn_generators():
                generator.next()
        optional = [t for t in (mask, segment_ids) if t is not None]

        def function(inputs: Tensor, *rest: Tensor) -> tuple[Tensor]:
            given = list(rest)
            hidden = None if mask is None else given.pop(0)
            ids = None if segment_ids is None else given.pop(0)
            scope = keras.StatelessScope(
                state_mapping=list(zip(variables, given, strict=True))
            )
            with scope:
                return (self._compute(inputs, hidden, ids, training),)

        (outputs,) = rematerialised(function)(inputs, *optional, *values)
        return outputs

    def _compute(
        self,
        inputs: Tensor,
        mask: Tensor | None,
        segment_ids: Tensor | None,
        training: bool,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            masks = {"query_mask": mask, "value_mask": mask}
            given = {k: v for k, v in masks.items() if v is not None}
            if segment_ids is not None:
                given["segment_ids"] = segment_ids
            x = self.attention(x, x, training=training, **given)
            return self._drop(x, training)

        def feed_forward(x: Tensor) -> Tensor:
            return self._drop(self.feed_forward(x), training)

        def first(x: Tensor) -> Tensor:
            return _normalised(self.attention_norm, x)

        def second(x: Tensor) -> Tensor:
            return _normalised(self.feed_forward_norm, x)

        x = inputs
        if self.norm_placement == "pre":
            x = ops.add(x, attend(first(x)))
            return ops.add(x, feed_forward(second(x)))
        x = first(ops.add(x, attend(x)))
        return second(ops.add(x, feed_forward(x)))

    def _drop(self, x: Tensor, training: bool) -> Tensor:
        if self.seed_generator is None or not training:
            return x
        return positional_dropout(x, self.seed_generator.next(), self.dropout)

    def _drawn_generators(self) -> list[keras.random.SeedGenerator]:
        """The generators of one call, as often as it draws from each."""
        drawn = []
        if self.seed_generator is not None:
            drawn += [self.seed_generator] * 2
        if self.attention_dropout:
            drawn.append(self.attention._dropout_layer.seed_generator)
        return drawn

    def compute_output_shape(
        self, input_shape: Shape, *args: Any, **kwargs: Any
    ) -> Shape:
        del args, kwargs  # Those of the masks.
        return tuple(input_shape)

    def compute_output_spec(
        self,
        inputs: Any,
        mask: Any = None,
        segment_ids: Any = None,
        training: bool | None = None,
    ) -> keras.KerasTensor:
        del training
        _check_tensors(inputs, mask, segment_ids)
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        rotary = self.rotary
        if isinstance(rotary, keras.layers.Layer):
            rotary = keras.saving.serialize_keras_object(rotary)
        plain = (
            *("num_heads", "hidden_dim", "key_dim", "num_key_value_heads"),
            *("causal", "norm", "norm_placement", "gated", "dropout"),
            *("attention_dropout", "sliding_window", "soft_cap", "alibi"),
            *("sinks", "use_bias", "epsilon", "remat", "chunk_size", "seed"),
        )
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in plain},
            "attention": self._sharing,
            "activation": keras.activations.serialize(self.activation),
            "rotary": rotary,
            "kernel_initializer": keras.initializers.serialize(
                self.kernel_initializer
            ),
            "bias_initializer": keras.initializers.serialize(
                self.bias_initializer
            ),
        }

    def _norm(self, name: str, input_shape: Shape) -> keras.layers.Layer:
        layer = NORMS[self.norm](
            epsilon=self.epsilon, dtype=self.dtype_policy, name=name
        )
        layer.build(input_shape)
        return layer


def _check_tensors(inputs: Any, mask: Any, segment_ids: Any) -> None:
    attention_arguments.check_tensors(
        inputs={"inputs": inputs},
        masks={"mask": mask},
        ids={"segment_ids": segment_ids},
    )


def _normalised(norm: keras.layers.Layer, x: Tensor) -> Tensor:
    """`norm(x)`, in plain operations where a program is exported: those that
    Keras calls are missing in ONNX."""
    if not backends.load().runtime.exporting(x):
        return norm(x)
    x = ops.cast(x, precision.accumulation_dtype(norm.compute_dtype))
    if isinstance(norm, keras.layers.LayerNormalization):
        x = x - precision.mean(x, -1, keepdims=True)
    size = precision.mean(ops.square(x), -1, keepdims=True)
    x = x * ops.rsqrt(size + norm.epsilon)
    if isinstance(norm, keras.layers.LayerNormalization):
        x = x * norm.gamma + norm.beta
    else:
        x = x * norm.scale
    return ops.cast(x, norm.compute_dtype)
