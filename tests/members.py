"""Results that each member of the mesh has its own part of."""

import numpy as np
from keras import ops

from keras_ring.distribution import strategy


def from_each(tensor):
    """Inside `strategy.run`: the member's term of a sum, such as its part
    of the gradient of a weight, in a form that `run` can join."""
    world = strategy.current()
    tensor = ops.expand_dims(ops.expand_dims(tensor, 0), 0)
    if world.inside():
        return tensor
    # The code sees everything: the sum is here, in one of the places.
    sizes = world.data_size, world.sequence_size
    rest = [(0, 0)] * (len(tensor.shape) - 2)
    return ops.pad(tensor, [(0, sizes[0] - 1), (0, sizes[1] - 1), *rest])


def everyones(tensor):
    """Inside `strategy.run`: each member's own value of something that is
    the same on all, to be compared outside."""
    world = strategy.current()
    sizes = world.data_size, world.sequence_size
    tensor = ops.expand_dims(ops.expand_dims(tensor, 0), 0)
    if world.inside():
        return tensor
    return ops.broadcast_to(tensor, (*sizes, *tensor.shape[2:]))


def total(joined):
    """Outside: the sum over all members of what `from_each` gave."""
    return np.sum(ops.convert_to_numpy(joined), axis=(0, 1), dtype="float64")
