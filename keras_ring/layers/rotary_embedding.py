"""`keras_ring.layers.RotaryEmbedding`: rotary positions on a shard."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ring import arguments, tensor_arguments
from keras_ring.distribution import strategy
from keras_ring.layers.positions import checked_positions, checked_start
from keras_ring.ops.sequence import sequence_positions
from keras_ring.precision import accumulation_dtype

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ring")
class RotaryEmbedding(keras.layers.Layer):
    """Rotary position embedding that knows its place in the sequence.

    Rotates pairs of features by an angle that grows with the position, so
    that the product of two rotated vectors depends on their distance only.
    Feature `i` is paired with feature `i + rotary_dim / 2`. The positions
    are those in the whole sequence, also where the layer sees a shard of it.

    Angles and rotation are computed in float32 (float64 for float64) and
    the result is cast to the compute dtype.

    Args:
        max_wavelength: the longest wavelength, in positions.
        scaling_factor: positions are divided by it.
        sequence_axis: the sequence axis of the input.
        feature_axis: the feature axis of the input.
        rotary_dim: number of features, from the first, that are rotated;
            the rest passes through. All of them if None.
        **kwargs: name, dtype and others of `keras.layers.Layer`.

    Call arguments:
        inputs: `(batch, length, heads, head_dim)` or `(batch, length,
            features)`, floating point.
        start_index: int or int scalar, the position of the first element of
            the whole sequence (decoding with a cache).
        positions: integers `(length,)` or `(batch, length)` in place of the
            natural positions; split as the inputs are.

    Returns:
        A tensor with the shape of the input, in the compute dtype.

    Raises:
        ValueError: for an odd number of features to rotate, positions that
            do not fit, or arguments that are out of range.

    Example:

    ```python
    rotary = keras_ring.layers.RotaryEmbedding()
    query, key = rotary(query), rotary(key)
    ```

    Reference:
        Su et al., "RoFormer: Enhanced Transformer with Rotary Position
        Embedding", 2021, https://arxiv.org/abs/2104.09864
    """

    def __init__(
        self,
        max_wavelength: float = 10000,
        scaling_factor: float = 1.0,
        sequence_axis: int = 1,
        feature_axis: int = -1,
        rotary_dim: int | None = None,
        **kwargs: Any,
    ):
        max_wavelength = arguments.positive("max_wavelength", max_wavelength)
        scaling_factor = arguments.positive("scaling_factor", scaling_factor)
        sequence_axis = arguments.integer("sequence_axis", sequence_axis, None)
        feature_axis = arguments.integer("feature_axis", feature_axis, None)
        if rotary_dim is not None:
            rotary_dim = arguments.integer(
                "rotary_dim", rotary_dim, 2, ", or None for all features"
            )
            if rotary_dim % 2:
                raise ValueError(
                    "`rotary_dim` must be even, since features are rotated in "
                    f"pairs. Received: rotary_dim={rotary_dim}. Pass "
                    f"{rotary_dim - 1} or {rotary_dim + 1}."
                )
        super().__init__(**kwargs)
        self.max_wavelength = max_wavelength
        self.scaling_factor = scaling_factor
        self.sequence_axis = sequence_axis
        self.feature_axis = feature_axis
        self.rotary_dim = rotary_dim
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        self._ring_world = strategy.current()
        self._axes(len(input_shape))
        self._rotated(input_shape)

    def call(
        self,
        inputs: Tensor,
        start_index: int | Tensor = 0,
        positions: Tensor | None = None,
    ) -> Tensor:
        tensor_arguments.floating("inputs", inputs)
        sequence_axis, feature_axis = self._axes(len(inputs.shape))
        rotated = self._rotated(inputs.shape)
        if positions is None:
            positions = sequence_positions(inputs, sequence_axis)
            positions = positions + checked_start(start_index)
        else:
            positions = checked_positions(
                positions, start_index, inputs, sequence_axis
            )
        dtype = accumulation_dtype(inputs.dtype)
        cos, sin = self._cos_sin(
            positions, rotated, len(inputs.shape), sequence_axis, dtype
        )
        half = rotated // 2

        def features(start: int, stop: int | None) -> Tensor:
            places = [slice(None)] * len(inputs.shape)
            places[feature_axis] = slice(start, stop)
            return inputs[tuple(places)]

        first, second = features(0, half), features(half, rotated)
        first, second = ops.cast(first, dtype), ops.cast(second, dtype)
        parts = [
            ops.cast(first * cos - second * sin, inputs.dtype),
            ops.cast(second * cos + first * sin, inputs.dtype),
        ]
        if rotated != inputs.shape[feature_axis]:
            parts.append(features(rotated, None))
        return ops.concatenate(parts, axis=feature_axis)

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def compute_output_spec(
        self, inputs: Any, *args: Any, **kwargs: Any
    ) -> keras.KerasTensor:
        del args, kwargs  # Positions.
        tensor_arguments.floating("inputs", inputs)
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "max_wavelength": self.max_wavelength,
            "scaling_factor": self.scaling_factor,
            "sequence_axis": self.sequence_axis,
            "feature_axis": self.feature_axis,
            "rotary_dim": self.rotary_dim,
        }

    def _cos_sin(
        self,
        positions: Tensor,
        rotated: int,
        rank: int,
        sequence_axis: int,
        dtype: str,
    ) -> tuple[Tensor, Tensor]:
        """Both broadcast against half of the rotated features."""
        _, feature_axis = self._axes(rank)
        exponents = np.arange(0, rotated, 2) / rotated
        frequencies = self.max_wavelength**-exponents / self.scaling_factor
        shape = [1] * rank
        shape[feature_axis] = rotated // 2
        frequencies = ops.convert_to_tensor(frequencies.reshape(shape), dtype)
        shape = [1] * rank
        if len(positions.shape) == 2:
            shape[0] = ops.shape(positions)[0]
        shape[sequence_axis] = ops.shape(positions)[-1]
        angles = ops.reshape(ops.cast(positions, dtype), shape) * frequencies
        return ops.cos(angles), ops.sin(angles)

    def _axes(self, rank: int) -> tuple[int, int]:
        """The sequence and the feature axis, counted from the front."""
        axes = []
        for name in ("sequence_axis", "feature_axis"):
            axis = getattr(self, name)
            if not -rank <= axis < rank or axis % rank == 0:
                raise ValueError(
                    f"`{name}` must be an axis of the input other than the "
                    f"batch axis. Received: {name}={axis} for an input of "
                    f"rank {rank}. Pass one from 1 to {rank - 1}."
                )
            axes.append(axis % rank)
        if axes[0] == axes[1]:
            raise ValueError(
                "`sequence_axis` and `feature_axis` must differ. Received: "
                f"sequence_axis={self.sequence_axis}, feature_axis="
                f"{self.feature_axis} for an input of rank {rank}. Change one."
            )
        return axes[0], axes[1]

    def _rotated(self, shape: tuple[int | None, ...]) -> int:
        """The number of features that are rotated."""
        features = shape[self.feature_axis]
        rotated = self.rotary_dim or features
        if not rotated or rotated % 2:
            raise ValueError(
                "The number of features to rotate must be known, positive and "
                "even. "
                f"Received: input shape {tuple(shape)}, feature_axis="
                f"{self.feature_axis}. Set `rotary_dim` to an even number."
            )
        if features is not None and rotated > features:
            raise ValueError(
                "`rotary_dim` cannot exceed the number of features. "
                f"Received: rotary_dim={rotated}, input shape {tuple(shape)}. "
                "Lower it."
            )
        return rotated


def rotary_of(value: Any, dtype: Any) -> RotaryEmbedding | None:
    """The layer that an argument `rotary` stands for, or None.

    Args:
        value: True for one as it is by default, a layer or its serialized
            form, False or None.
        dtype: policy of a new one.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, dict):
        value = keras.saving.deserialize_keras_object(value)
    if value is None or isinstance(value, RotaryEmbedding):
        return value
    if isinstance(value, (bool, np.bool_)):
        if not value:
            return None
        return RotaryEmbedding(name="rotary", dtype=dtype)
    raise ValueError(
        "`rotary` must be True, False or a keras_ring.layers."
        f"RotaryEmbedding. Received: rotary={arguments.shown(value)}. Pass "
        "RotaryEmbedding(...) for a wavelength of your own."
    )
