"""`keras_ring.layers.BlockwiseFeedForward`: a feed-forward in chunks."""

from typing import Any

import keras

from keras_ring import arguments, random_bits, tensor_arguments
from keras_ring.distribution import strategy
from keras_ring.layers import dense_options
from keras_ring.ops.blockwise_feed_forward import blockwise_feed_forward
from keras_ring.ops.positional_dropout import positional_dropout

Shape = tuple[int | None, ...]
Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ring")
class BlockwiseFeedForward(dense_options.DenseOptions, keras.layers.Layer):
    """The feed-forward of a transformer, one chunk of positions at a time.

    `down(activation(up(x)))`, or with a gate
    `down(activation(gate(x)) * up(x))`: SwiGLU with `activation="silu"`,
    GeGLU with `"gelu"`. It computes what the same `keras.layers.Dense` layers
    would. But the hidden features, several times as wide as the inputs,
    exist for `chunk_size` positions at a time, forward and backward; what is
    kept for the backward are the inputs alone, and the backward computes the
    hidden features once more. (Where Keras has quantized the projections,
    they exist for all positions at once.)

    Args:
        hidden_dim: number of hidden features.
        activation: name of a Keras activation, or a function of a tensor
            that treats positions one by one.
        gated: whether to multiply the hidden features by an activated gate.
        use_bias: whether the projections have biases.
        chunk_size: positions of a sequence (of a shard of it, under a
            strategy) that are computed at a time, at most.
        dropout: rate of dropout on the hidden features, in training only.
            What is dropped does not depend on the ring or on the chunks.
        kernel_initializer: initializer of the kernels.
        bias_initializer: initializer of the biases.
        kernel_regularizer: regularizer of the kernels.
        bias_regularizer: regularizer of the biases.
        kernel_constraint: constraint on the kernels.
        bias_constraint: constraint on the biases.
        seed: seed of the dropout.
        **kwargs: name, dtype and others of `keras.layers.Layer`.

    Call arguments:
        inputs: `(batch, length, features)`, floating point.
        training: whether dropout applies.

    Returns:
        A tensor with the shape of the inputs, in the compute dtype.

    Raises:
        ValueError: for arguments out of range, or inputs of another rank.

    Example:

    ```python
    x = x + keras_ring.layers.BlockwiseFeedForward(2048)(norm(x))
    ```

    Reference:
        Liu and Abbeel, "Blockwise Parallel Transformer for Large Context
        Models", 2023, https://arxiv.org/abs/2305.19370; Shazeer, "GLU
        Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202
    """

    def __init__(
        self,
        hidden_dim: int,
        activation: Any = "gelu",
        gated: bool = False,
        use_bias: bool = True,
        chunk_size: int = 1024,
        dropout: float = 0.0,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        hidden_dim = arguments.integer("hidden_dim", hidden_dim)
        chunk_size = arguments.integer("chunk_size", chunk_size)
        dropout = arguments.rate("dropout", dropout)
        gated = arguments.flag("gated", gated)
        use_bias = arguments.flag("use_bias", use_bias)
        seed = arguments.seed("seed", seed)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.hidden_dim = hidden_dim
        self.activation = keras.activations.get(activation)
        self.gated = gated
        self.use_bias = use_bias
        self.chunk_size = chunk_size
        self.dropout = dropout
        self.seed = seed
        self.seed_generator = None
        if dropout:
            self.seed_generator = keras.random.SeedGenerator(seed)
            random_bits.share_seed(self.seed_generator)
        dense_options.keep(
            self,
            {
                "kernel_initializer": kernel_initializer,
                "bias_initializer": bias_initializer,
                "kernel_regularizer": kernel_regularizer,
                "bias_regularizer": bias_regularizer,
                "kernel_constraint": kernel_constraint,
                "bias_constraint": bias_constraint,
            },
        )

    def build(self, input_shape: Shape) -> None:
        features = dense_options.features_of(input_shape)
        self._ring_world = strategy.current()
        self.gate = None
        if self.gated:
            self.gate = self._dense("gate", self.hidden_dim, input_shape)
        self.up = self._dense("up", self.hidden_dim, input_shape)
        hidden_shape = (*input_shape[:-1], self.hidden_dim)
        self.down = self._dense("down", features, hidden_shape)

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        tensor_arguments.floating("inputs", inputs)
        gate = self.gate
        seed = None
        if training and self.seed_generator is not None:
            seed = self.seed_generator.next()
        if self._quantized():
            return self._of_layers(inputs, seed)
        return blockwise_feed_forward(
            inputs,
            self.up.kernel,
            self.down.kernel,
            gate_kernel=None if gate is None else gate.kernel,
            up_bias=self.up.bias,
            gate_bias=None if gate is None else gate.bias,
            down_bias=self.down.bias,
            activation=self.activation,
            dropout=0.0 if seed is None else self.dropout,
            dropout_seed=seed,
            chunk_size=self.chunk_size,
        )

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def compute_output_spec(
        self, inputs: Any, training: bool | None = None
    ) -> keras.KerasTensor:
        del training
        tensor_arguments.floating("inputs", inputs)
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **dense_options.config(self),
            "hidden_dim": self.hidden_dim,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "use_bias": self.use_bias,
            "chunk_size": self.chunk_size,
            "dropout": self.dropout,
            "seed": self.seed,
        }

    def _quantized(self) -> bool:
        """True if a projection has weights that only it can read."""
        projections = (self.up, self.gate, self.down)
        return any(
            layer is not None and layer.quantization_mode is not None
            for layer in projections
        )

    def _of_layers(self, inputs: Tensor, seed: Tensor | None) -> Tensor:
        """The same by the layers that Keras has quantized, for all positions
        at once."""
        hidden = self.up(inputs)
        if self.gate is None:
            hidden = self.activation(hidden)
        else:
            hidden = self.activation(self.gate(inputs)) * hidden
        if seed is not None:
            hidden = positional_dropout(hidden, seed, self.dropout)
        return self.down(hidden)

    def _dense(
        self, name: str, units: int, input_shape: Shape
    ) -> keras.layers.Dense:
        """A built projection, of which this layer reads the weights unless
        they are quantized."""
        layer = keras.layers.Dense(
            units,
            use_bias=self.use_bias,
            # A copy each: one initializer object gives equal values twice.
            kernel_initializer=dense_options.copied(self.kernel_initializer),
            bias_initializer=dense_options.copied(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build(input_shape)
        return layer
