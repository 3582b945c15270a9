"""`keras_ring.layers.PositionEmbedding`: learned positions on a shard."""

from typing import Any

import keras
from keras import ops

from keras_ring import arguments
from keras_ring.distribution import padding, placement, strategy
from keras_ring.keras_internals import in_symbolic_scope, without_values
from keras_ring.layers import dense_options
from keras_ring.layers.positions import checked_positions, checked_start
from keras_ring.ops.dense_take import dense_take
from keras_ring.ops.sequence import shard_ring, true_length, whole_length

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ring")
class PositionEmbedding(keras.layers.Layer):
    """A learned vector for each position of the whole sequence.

    It returns the vectors of the positions that it sees, ready to be added
    to the input; on a shard these are the positions of the shard in the
    whole sequence.

    Args:
        sequence_length: number of positions that have a vector: the longest
            whole sequence.
        initializer: initializer of the vectors.
        **kwargs: name, dtype and others of `keras.layers.Layer`.

    Call arguments:
        inputs: `(batch, length, features)`; only its shape is used.
        start_index: int or int scalar, the position of the first element of
            the whole sequence (decoding with a cache).
        positions: integers `(length,)` or `(batch, length)` in place of the
            natural positions; split as the inputs are.

    Returns:
        `(batch, length, features)` in the compute dtype. NaN where one of
        `positions` has no vector, and everywhere for a `start_index` that is
        a tensor and leaves no vector for a position.

    Raises:
        ValueError: for a sequence longer than `sequence_length`, inputs of
            another rank, or positions that do not fit.

    Example:

    ```python
    x = x + keras_ring.layers.PositionEmbedding(4096)(x)
    ```

    Reference:
        Devlin et al., "BERT", 2018, https://arxiv.org/abs/1810.04805
    """

    def __init__(
        self,
        sequence_length: int,
        initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ):
        sequence_length = arguments.integer("sequence_length", sequence_length)
        super().__init__(**kwargs)
        self.sequence_length = sequence_length
        self.initializer = keras.initializers.get(initializer)
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        features = dense_options.features_of(input_shape)
        self._ring_world = strategy.current()
        self.position_embeddings = self.add_weight(
            name="embeddings",
            shape=(self.sequence_length, features),
            initializer=self.initializer,
            trainable=True,
        )

    def call(
        self,
        inputs: Tensor,
        start_index: int | Tensor = 0,
        positions: Tensor | None = None,
    ) -> Tensor:
        shape = ops.shape(inputs)
        if not _has_values(inputs, shape[1]):
            # The made-up length may be longer than the table.
            return ops.zeros_like(inputs, dtype=self.compute_dtype)
        table = ops.convert_to_tensor(self.position_embeddings)
        if positions is not None:
            positions = checked_positions(positions, start_index, inputs, 1)
            vectors = self._at(table, positions)
        else:
            # The positions of a chunk are contiguous: a slice, whose
            # gradient is dense on every backend.
            start = checked_start(start_index)
            vectors = self._natural(table, shape[1], start)
            if not isinstance(start, int):
                # What cannot be read here is seen in the result: a slice
                # beyond the end would give the last vectors instead.
                end = start + whole_length(shape[1])
                inside = ops.logical_and(
                    start >= 0, end <= self.sequence_length
                )
                vectors = ops.where(inside, vectors, _nowhere(vectors))
        return ops.broadcast_to(vectors, shape)

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...]
    ) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "sequence_length": self.sequence_length,
            "initializer": keras.initializers.serialize(self.initializer),
        }

    def _at(self, table: Tensor, positions: Tensor) -> Tensor:
        """The vectors of positions, NaN for one that has none: what a tensor
        holds is seen in the result."""
        # In an integer that any place of the table fits in.
        wide = keras.backend.standardize_dtype(positions.dtype)
        wide = "int64" if wide in ("int64", "uint64") else "int32"
        positions = ops.cast(positions, wide)
        inside = ops.logical_and(
            positions >= 0, positions < self.sequence_length
        )
        there = ops.where(inside, positions, ops.zeros_like(positions))
        vectors = dense_take(table, there)
        return ops.where(inside[..., None], vectors, _nowhere(vectors))

    def _natural(self, table: Tensor, length: Any, start_index: Any) -> Tensor:
        """The vectors of the natural positions that the layer sees."""
        ring, whole = shard_ring(), whole_length(length)
        if isinstance(whole, int) and isinstance(start_index, int):
            end = start_index + whole
            if start_index < 0 or end > self.sequence_length:
                raise ValueError(
                    "Every position of the whole sequence must have a "
                    f"vector. Received: positions from {start_index} to "
                    f"{end - 1}, sequence_length={self.sequence_length}. "
                    "Build the layer with a larger `sequence_length`, or cut "
                    "the sequences."
                )
        width = table.shape[1]
        if not isinstance(length, int) and not ops.is_tensor(length):
            # An exported program, which cannot say whether a slice fits.
            places = ops.arange(length, dtype="int32") + start_index
            return self._at(table, places)
        if ring is None:
            return ops.slice(table, [start_index, 0], [length, width])
        first, true = placement.start(ring.index(), length), true_length(length)
        if true is None:
            return ops.slice(table, [first + start_index, 0], [length, width])
        # Padding has no vector; the table may end before it.
        own = padding.clip(true - first, 0, length)
        first = padding.clip(first, 0, true) + start_index
        return ops.concatenate(
            [
                ops.slice(table, [first, 0], [own, width]),
                ops.zeros((length - own, width), dtype=table.dtype),
            ],
            0,
        )


def _has_values(tensor: Tensor, length: Any) -> bool:
    """False where Keras only infers shapes, on JAX with a length that is an
    expression. Programs for open lengths are exported with one as well."""
    known = isinstance(length, int) or ops.is_tensor(length)
    return not without_values(tensor) and (known or not in_symbolic_scope())


def _nowhere(vectors: Tensor) -> Tensor:
    """Vectors of positions that the table does not have."""
    return ops.zeros_like(vectors) + float("nan")
