"""The dense maps of an attention layer, named and shaped as Keras does."""

import string
from operator import attrgetter
from typing import Any

import keras

from keras_ring.layers import dense_options
from keras_ring.layers.attention.options import AttentionOptions

Shape = tuple[int | None, ...]


class Projections:
    """Gives a layer its query, key, value, gate and output projections.

    A mixin of a `keras.layers.Layer` that has `AttentionOptions`. The
    names of attributes and weights, their shapes and their order are those
    of `keras.layers.MultiHeadAttention` and `GroupQueryAttention`.
    """

    dtype_policy: Any
    _kernel_initializer: Any
    _bias_initializer: Any
    _kernel_regularizer: Any
    _bias_regularizer: Any
    _kernel_constraint: Any
    _bias_constraint: Any
    _options: AttentionOptions

    def _set_projection_options(
        self,
        kernel_initializer: Any,
        bias_initializer: Any,
        kernel_regularizer: Any,
        bias_regularizer: Any,
        activity_regularizer: Any,
        kernel_constraint: Any,
        bias_constraint: Any,
    ) -> None:
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
            prefix="_",
        )
        self._activity_regularizer = keras.regularizers.get(
            activity_regularizer
        )

    def _projection_config(self) -> dict[str, Any]:
        return {
            **dense_options.config(self, prefix="_"),
            "activity_regularizer": keras.regularizers.serialize(
                self._activity_regularizer
            ),
        }

    def _build_projections(
        self, query_shape: Shape, value_shape: Shape, key_shape: Shape
    ) -> None:
        query = (self._options.heads.query, self._options.heads.key_dim)
        key = (self._options.heads.key_value, self._options.heads.key_dim)
        value = (self._options.heads.key_value, self._options.heads.value_dim)
        mixed = (self._options.heads.query, self._options.heads.value_dim)
        self._query_dense = self._dense("query", query_shape, query)
        self._key_dense = self._dense("key", key_shape, key)
        if self._options.use_gate:
            self._gate_dense = self._dense(
                "gate", query_shape, mixed, activation="sigmoid"
            )
        self._value_dense = self._dense("value", value_shape, value)
        self._output_dense = self._dense(
            "attention_output",
            query_shape[:-1] + mixed,
            self._options.output_shape or query_shape[-1:],
            contracted=2,
        )

    def _dense(
        self,
        name: str,
        input_shape: Shape,
        features: Any,
        contracted: int = 1,
        **options: Any,
    ) -> keras.layers.EinsumDense:
        """A built projection of the last axes of an input to `features`."""
        letters = iter(string.ascii_letters)
        kept = "".join(next(letters) for _ in input_shape[:-contracted])
        summed = "".join(next(letters) for _ in range(contracted))
        made = "".join(next(letters) for _ in features)
        layer = keras.layers.EinsumDense(
            f"{kept}{summed},{summed}{made}->{kept}{made}",
            output_shape=(None,) * (len(kept) - 1) + tuple(features),
            bias_axes=made if self._options.use_bias else None,
            kernel_initializer=dense_options.copied(self._kernel_initializer),
            bias_initializer=dense_options.copied(self._bias_initializer),
            kernel_regularizer=self._kernel_regularizer,
            bias_regularizer=self._bias_regularizer,
            activity_regularizer=self._activity_regularizer,
            kernel_constraint=self._kernel_constraint,
            bias_constraint=self._bias_constraint,
            dtype=self.dtype_policy,
            name=name,
            **options,
        )
        # A mask on the input is this layer's business and no reason to warn.
        layer.supports_masking = True
        layer.build(input_shape)
        return layer

    def _project(self, query: Any, key: Any, value: Any) -> tuple:
        return (
            self._query_dense(query),
            self._key_dense(key),
            self._value_dense(value),
        )

    # `output_shape` is no property: Keras' summary takes it for its own.

    @property
    def query_dense(self) -> keras.layers.EinsumDense:
        return self._query_dense

    @property
    def key_dense(self) -> keras.layers.EinsumDense:
        return self._key_dense

    @property
    def value_dense(self) -> keras.layers.EinsumDense:
        return self._value_dense

    @property
    def output_dense(self) -> keras.layers.EinsumDense:
        return self._output_dense

    @property
    def num_heads(self) -> int:
        return self._options.heads.query

    @property
    def num_query_heads(self) -> int:
        return self._options.heads.query

    @property
    def num_key_value_heads(self) -> int:
        return self._options.heads.key_value

    @property
    def key_dim(self) -> int:
        return self._options.heads.key_dim

    @property
    def head_dim(self) -> int:
        return self._options.heads.key_dim

    @property
    def value_dim(self) -> int:
        return self._options.heads.value_dim

    @property
    def dropout(self) -> float:
        return self._options.dropout

    @property
    def use_bias(self) -> bool:
        return self._options.use_bias

    @property
    def use_gate(self) -> bool:
        return self._options.use_gate

    @property
    def attention_axes(self) -> tuple[int, ...] | None:
        return self._options.attention_axes

    @property
    def sliding_window(self) -> int | None:
        return self._options.sliding_window

    # The names under which a subclass of a stock layer finds them.
    _num_heads = property(attrgetter("_options.heads.query"))
    _num_query_heads = _num_heads
    _num_key_value_heads = property(attrgetter("_options.heads.key_value"))
    _key_dim = property(attrgetter("_options.heads.key_dim"))
    _head_dim = _key_dim
    _value_dim = property(attrgetter("_options.heads.value_dim"))
    _dropout = property(attrgetter("_options.dropout"))
    _use_bias = property(attrgetter("_options.use_bias"))
    _use_gate = property(attrgetter("_options.use_gate"))
    _output_shape = property(attrgetter("_options.output_shape"))
    _attention_axes = property(attrgetter("_options.attention_axes"))
    _sliding_window = property(attrgetter("_options.sliding_window"))
    _flash_attention = property(attrgetter("_options.flash_attention"))
