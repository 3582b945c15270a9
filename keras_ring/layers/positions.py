"""What the layers that take positions check of them."""

from typing import Any

import keras
from keras import ops

Tensor = Any


def checked_positions(
    positions: Tensor, start_index: Any, inputs: Tensor, axis: int
) -> Tensor:
    """Refuse positions that do not belong to the inputs.

    Args:
        positions: integers `(length,)` or `(batch, length)`.
        start_index: must be 0, since positions say where things start.
        inputs: the tensor that they are for.
        axis: its sequence axis.

    Returns:
        The positions as a tensor.

    Raises:
        ValueError: for another shape or dtype, or a start index as well.
    """
    if not (isinstance(start_index, int) and start_index == 0):
        raise ValueError(
            "`start_index` and `positions` cannot be combined. Received: "
            f"start_index={start_index}. Add it to the positions."
        )
    positions = ops.convert_to_tensor(positions)
    dtype = keras.backend.standardize_dtype(positions.dtype)
    if "int" not in dtype:
        raise ValueError(
            "`positions` must be integers: a half-precision policy rounds "
            f"floating-point positions. Received: dtype={dtype}. Cast them "
            "to int32."
        )
    shape = tuple(positions.shape)
    allowed = ({inputs.shape[0], 1}, {inputs.shape[axis]})
    fits = len(shape) in (1, 2) and all(
        have is None or None in want or have in want
        for have, want in zip(shape, allowed[-len(shape) :], strict=True)
    )
    if not fits:
        raise ValueError(
            "`positions` must have the shape (length,) or (batch, length) "
            f"of the inputs. Received: positions.shape={shape}, "
            f"inputs.shape={tuple(inputs.shape)}."
        )
    return positions
