"""Sizes of tensors."""

from typing import Any

from keras import ops


def sizes(tensor: Any) -> tuple[Any, ...]:
    """`ops.shape`, without the operation that it adds to a program of
    TensorFlow for each tensor, if all sizes are known.

    Args:
        tensor: of any shape and dtype.

    Returns:
        Ints, or scalars where sizes are known only when the program runs.
    """
    known = tuple(tensor.shape)
    if all(isinstance(size, int) for size in known):
        return known
    found: tuple[Any, ...] = ops.shape(tensor)
    return found
