"""From a whole sequence to the shards of a ring and back, with exact gradients.

What is differentiated is the mean of the devices' objectives, so the gradient
of a shard is the sum of what all members of the ring ask of it, whether they
hold the gathered sequence each for itself or do all the same with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops, tree

from keras_ring import backends
from keras_ring.distribution import padding
from keras_ring.distribution.transport import Transport
from keras_ring.precision import accumulation_dtype, is_floating

Tensor = Any


def gather(
    ring: Transport, tensor: Tensor, axis: int, true: Any = None
) -> Tensor:
    """The whole sequence on every member, from everyone's shard.

    Args:
        ring: the members.
        tensor: this member's shard, of any dtype.
        axis: the sequence axis, not negative.
        true: the length without padding, None where there is none.
    """
    local = ops.shape(tensor)[axis]

    def whole(shard: Tensor) -> Tensor:
        every = ring.all_gather(shard, axis)
        return every if true is None else padding.trim(every, axis, true)

    if not is_floating(tensor):
        return whole(tensor)

    def forward(shard: Tensor) -> tuple[tuple, tuple]:
        return (whole(shard),), ()

    def backward(residuals: tuple, grad: Tensor) -> tuple:
        del residuals
        if true is not None:
            shape = list(ops.shape(grad))
            shape[axis] = local * ring.size - shape[axis]
            grad = ops.concatenate(
                [grad, ops.zeros(shape, dtype=grad.dtype)], axis
            )
        return (sum_of_own_part(ring, grad, axis),)

    custom_gradient = backends.load().runtime.custom_gradient
    return custom_gradient(forward, backward)(tensor)[0]


def own_part(
    ring: Transport, tensor: Tensor, axis: int, length: Any = None
) -> Tensor:
    """This member's shard of a whole sequence, which copies of the last
    element fill up where the ring cannot split it equally.

    Args:
        ring: the members.
        tensor: with the whole sequence on `axis`, the same on every member.
        axis: the sequence axis, not negative.
        length: that the shard shall have; the smallest if None.
    """
    shape, size = list(ops.shape(tensor)), ring.size
    if length is None:
        length = -(-shape[axis] // size)
    missing = length * size - shape[axis]
    if not isinstance(missing, int) or missing:
        last = ops.take(tensor, [shape[axis] - 1], axis=axis)
        copies = list(shape)
        copies[axis] = missing
        tensor = ops.concatenate([tensor, ops.broadcast_to(last, copies)], axis)
    parts = ops.reshape(
        tensor, [*shape[:axis], size, length, *shape[axis + 1 :]]
    )
    start = [0] * len(parts.shape)
    start[axis] = ring.index()
    own = [*shape[:axis], 1, length, *shape[axis + 1 :]]
    return ops.squeeze(ops.slice(parts, start, own), axis)


def of_whole(
    function: Callable[..., Any],
    ring: Transport,
    tensors: Sequence[Tensor],
    shared: Sequence[Tensor],
) -> Any:
    """`World.per_shard` where every member sees the whole sequence: each
    takes its own part, and all get everyone's results.

    Args:
        function: `function(transport, *shards, *shared)`.
        ring: the members.
        tensors: with the whole sequence on axis 1. The results have the
            length of the first.
        shared: what has no sequence axis.
    """
    length = ops.shape(tensors[0])[1]
    equal = isinstance(length, int) and length % ring.size == 0
    true = None if equal else length
    parts = [own_part(ring, tensor, 1) for tensor in tensors]
    results = function(ring, *parts, *shared)
    return tree.map_structure(
        lambda result: gather(ring, result, 1, true), results
    )


def sum_of_own_part(ring: Transport, grad: Tensor, axis: int) -> Tensor:
    """Every member's gradient of this device's chunk, summed.

    Args:
        ring: the members.
        grad: of the whole sequence, which `axis` holds.
        axis: not negative.
    """
    dtype = keras.backend.standardize_dtype(grad.dtype)
    # Each member's gradient of this device's part, stacked on axis 0.
    asked = ring.all_to_all(
        ops.expand_dims(grad, 0), split_axis=axis + 1, concat_axis=0
    )
    asked = ops.cast(asked, accumulation_dtype(dtype))
    return ops.cast(ops.sum(asked, axis=0), dtype)
