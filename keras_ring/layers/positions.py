"""Checks of positions, for the layers that take them."""

import numbers
from typing import Any

from keras import ops

from keras_ring import arguments, tensor_arguments

Tensor = Any


def checked_start(start_index: Any) -> Any:
    """The position of the first element of the whole sequence.

    Args:
        start_index: int, or an int scalar.

    Returns:
        An int, or an int32 scalar.

    Raises:
        ValueError: for another dtype, or more than one number.
    """
    shape = getattr(start_index, "shape", None)
    if isinstance(start_index, numbers.Integral) or shape is None:
        return arguments.integer("start_index", start_index, least=None)
    tensor_arguments.integers("start_index", start_index)
    if len(shape) > 0:
        raise ValueError(
            "`start_index` must be one number for the whole batch. Received: "
            f"start_index={arguments.shown(start_index)}. Give each sample "
            "its own with `positions`, (batch, length)."
        )
    return ops.cast(start_index, "int32")


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
    # By its type first: what a tensor holds may not be known yet.
    if not (isinstance(start_index, numbers.Integral) and start_index == 0):
        raise ValueError(
            "`start_index` and `positions` cannot be combined. Received: "
            f"start_index={start_index}. Add it to the positions."
        )
    positions = tensor_arguments.tensor("positions", positions)
    # Floating-point positions would be rounded by a half-precision policy.
    tensor_arguments.integers("positions", positions)
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
            f"inputs.shape={tuple(inputs.shape)}. Give each position its own."
        )
    return positions
