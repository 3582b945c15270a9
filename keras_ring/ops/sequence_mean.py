"""The mean over a sequence that may be split over devices."""

from typing import Any

from keras import ops

from keras_ring import precision
from keras_ring.ops.sequence import (
    ring_sum,
    sequence_positions,
    shard_ring,
    true_length,
)

Tensor = Any


def sequence_mean(tensor: Tensor) -> Tensor:
    """The mean over all positions of the whole sequence.

    Args:
        tensor: `(batch, length, ...)`, floating point, as a layer sees it.

    Returns:
        `(batch, ...)` in the accumulation dtype, the same on every device of
        a ring. What a ring pads does not count. The gradient is exact.
    """
    tensor = ops.cast(tensor, precision.accumulation_dtype(tensor.dtype))
    ring = shard_ring()
    if ring is None:
        return precision.mean(tensor, 1)
    length = ops.shape(tensor)[1]
    true = true_length(length)
    if true is None:
        true = length * ring.size
    else:
        real = ops.less(sequence_positions(tensor), true)
        real = ops.reshape(real, (1, -1, *[1] * (len(tensor.shape) - 2)))
        tensor = ops.where(real, tensor, ops.zeros_like(tensor))
    total = ring_sum(ops.sum(tensor, axis=1))
    return total / ops.cast(true, total.dtype)
