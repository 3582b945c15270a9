"""`keras_ring.ops.take_position`: positions of a sequence that is split."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ring import tensor_arguments
from keras_ring.ops.sequence import ring_sum, shard_ring, whole_length
from keras_ring.precision import is_floating

Tensor = Any
Index = int | Sequence[int]


def take_position(tensor: Tensor, index: Index) -> Tensor:
    """Take positions of the whole sequence, on every device of the ring.

    This is what `tensor[:, index]` is on one device, whichever device holds
    the position: so a classifier reads the first one. Each position costs a
    sum of its features over the ring. Its gradient goes to that position
    alone.

    Args:
        tensor: `(batch, length, ...)` of any dtype, as a layer sees it.
        index: the position, or several of them, in the whole sequence
            without padding. Negative ones count from its end.

    Returns:
        `(batch, ...)` for one position, `(batch, positions, ...)` for
        several.

    Raises:
        ValueError: for an index that is no integer or not in the sequence.

    Example:

    ```python
    first = keras_ring.ops.take_position(x, 0)
    ```
    """
    tensor_arguments.is_array("tensor", tensor)
    positions = _positions(index)
    if len(tensor.shape) < 2:
        raise ValueError(
            "A sequence has the shape (batch, length, ...). Received: "
            f"tensor.shape={tuple(tensor.shape)}. Pass a whole batch."
        )
    if isinstance(tensor, keras.KerasTensor):
        return TakePosition(index).symbolic_call(tensor)
    taken = _taken(tensor, positions)
    return taken if np.ndim(index) else ops.squeeze(taken, 1)


@keras.saving.register_keras_serializable(package="keras_ring")
class TakePosition(keras.Operation):
    """`take_position` as a node of a functional model."""

    def __init__(self, index: Index, *, name: str | None = None):
        super().__init__(name=name)
        self.index = index

    def call(self, tensor: Tensor) -> Tensor:
        return take_position(tensor, self.index)

    def compute_output_spec(self, tensor: Tensor) -> keras.KerasTensor:
        shape = (tensor.shape[0], *np.shape(self.index), *tensor.shape[2:])
        return keras.KerasTensor(shape, dtype=tensor.dtype)


def _positions(index: Index) -> list[int]:
    flat = np.atleast_1d(np.asarray(index))
    if flat.ndim > 1 or not flat.size or flat.dtype.kind not in "iu":
        raise ValueError(
            "`index` must be an integer or a list of integers. Received: "
            f"index={index!r}. Pass 0, or [0, -1]."
        )
    return [int(position) for position in flat]


def _taken(tensor: Tensor, positions: list[int]) -> Tensor:
    """`(batch, positions, ...)`."""
    local = ops.shape(tensor)[1]
    length = whole_length(local)
    if isinstance(length, int):
        for position in positions:
            if not -length <= position < length:
                raise ValueError(
                    "`index` must be a position of the sequence. Received: "
                    f"index={position} for a length of {length}. Pass one "
                    f"from {-length} to {length - 1}."
                )
    from_start = [p if p >= 0 else length + p for p in positions]
    places = ops.stack([ops.cast(p, "int32") for p in from_start])
    ring = shard_ring()
    if ring is None:
        return ops.take(tensor, places, axis=1)
    there = ops.logical_and(places >= 0, places < length)
    places = places - ops.cast(ring.index() * local, "int32")
    here = ops.logical_and(places >= 0, places < local)
    # What is nowhere stays outside, for the framework to refuse.
    own = ops.where(there, ops.clip(places, 0, local - 1), local)
    rows = ops.take(tensor, own, axis=1)
    here = ops.reshape(here, (1, -1, *[1] * (len(tensor.shape) - 2)))
    # Not by a product: what others have there may be no number.
    rows = ops.where(here, rows, ops.zeros_like(rows))
    if keras.backend.standardize_dtype(tensor.dtype) == "bool":
        return ops.cast(ring.sum(ops.cast(rows, "int32")), "bool")
    if not is_floating(tensor):
        return ring.sum(rows)
    return ring_sum(rows)
