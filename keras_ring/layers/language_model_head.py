"""`keras_ring.layers.LanguageModelHead`: the projection to a vocabulary."""

from typing import Any

import keras
from keras import ops

from keras_ring import arguments, precision, tensor_arguments
from keras_ring.distribution import strategy
from keras_ring.layers import dense_options
from keras_ring.layers.attention import options

Shape = tuple[int | None, ...]
Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ring")
class LanguageModelHead(dense_options.DenseOptions, keras.layers.Layer):
    """The projection to the vocabulary, for a loss that works in chunks.

    The layer owns the weights of `keras.layers.Dense(vocabulary_size)`, but
    returns the features that came in: a tensor of logits, tokens times
    vocabulary, is never made. `keras_ring.losses.ChunkedCrossEntropy(head)`
    computes the logits chunk by chunk, and `logits` those of a few positions
    for inference.

    Args:
        vocabulary_size: number of classes, the tokens of the vocabulary.
        use_bias: whether the logits have a bias.
        soft_cap: bound on the size of the logits, which become `soft_cap *
            tanh(logit / soft_cap)`; none if None.
        accuracy: whether to count how often the label has the largest logit,
            as the metric "accuracy" of the model. The loss feeds it from the
            logits that it has anyway; tokens that it ignores or that the
            features' Keras mask hides do not count.
        kernel_initializer: initializer of the kernel.
        bias_initializer: initializer of the bias.
        kernel_regularizer: regularizer of the kernel.
        bias_regularizer: regularizer of the bias.
        kernel_constraint: constraint on the kernel.
        bias_constraint: constraint on the bias.
        **kwargs: name, dtype and others of `keras.layers.Layer`.

    Call arguments:
        inputs: `(batch, length, features)`, floating point.

    Returns:
        The inputs, in the compute dtype.

    Raises:
        ValueError: for arguments out of range, or inputs of another rank.

    Example:

    ```python
    head = keras_ring.layers.LanguageModelHead(50_000)
    model = keras.Model(tokens, head(x))
    model.compile("adam", keras_ring.losses.ChunkedCrossEntropy(head))
    model.fit(tokens, next_tokens)
    logits = head.logits(model.predict(tokens)[:, -1:])
    ```
    """

    def __init__(
        self,
        vocabulary_size: int,
        use_bias: bool = True,
        soft_cap: float | None = None,
        accuracy: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ):
        vocabulary_size = arguments.integer("vocabulary_size", vocabulary_size)
        use_bias = arguments.flag("use_bias", use_bias)
        soft_cap = options.soft_cap(soft_cap)
        accuracy = arguments.flag("accuracy", accuracy)
        super().__init__(**kwargs)
        self.supports_masking = True
        self.vocabulary_size = vocabulary_size
        self.use_bias = use_bias
        self.soft_cap = soft_cap
        self.accuracy = None
        if accuracy:
            self.accuracy = keras.metrics.Mean(name="accuracy")
            # It sees what the loss sees, which has no padding.
            self.accuracy.updated_by_loss = True
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
        self.kernel = self.add_weight(
            name="kernel",
            shape=(features, self.vocabulary_size),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.vocabulary_size,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )

    def call(self, inputs: Tensor) -> Tensor:
        tensor_arguments.floating("inputs", inputs)
        return inputs

    def logits(self, features: Tensor) -> Tensor:
        """Compute the logits of a few positions, all at once.

        Args:
            features: `(..., features)`, such as the output of the model at
                the last position.

        Returns:
            `(..., vocabulary_size)`, in the compute dtype.

        Raises:
            ValueError: if the layer has not been built, or for another
                number of features.
        """
        if not self.built:
            raise ValueError(
                "The head has no weights before it is built. Received: the "
                f"layer {self.name!r}, not built. Call it in a model first."
            )
        features = tensor_arguments.tensor("features", features)
        tensor_arguments.floating("features", features)
        width = self.kernel.shape[0]
        if len(features.shape) < 1 or features.shape[-1] not in (None, width):
            raise ValueError(
                f"`features` must have {width} features on the last axis, "
                "those that the head was built for. Received: features.shape="
                f"{tuple(features.shape)}. Pass the output of the model."
            )
        dtype = self.compute_dtype
        logits = precision.matmul(
            ops.cast(features, dtype), ops.cast(self.kernel, dtype)
        )
        if self.bias is not None:
            logits = ops.add(logits, ops.cast(self.bias, dtype))
        if self.soft_cap is None:
            return logits
        return self.soft_cap * precision.tanh(logits / self.soft_cap)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def compute_output_spec(self, inputs: Any) -> keras.KerasTensor:
        tensor_arguments.floating("inputs", inputs)
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **dense_options.config(self),
            "vocabulary_size": self.vocabulary_size,
            "use_bias": self.use_bias,
            "soft_cap": self.soft_cap,
            "accuracy": self.accuracy is not None,
        }
