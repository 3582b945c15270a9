"""Positions that a functional model takes by `x[:, 0]` or `ops.take`.

Keras computes an operation of a functional model on what a layer sees. Where
that is a shard, its position 0 is not that of the sequence. So in a step the
two operations are given the positions themselves, from the device that holds
them (`ops.take_position`). Slices, whose results would be sequences of
another length, are left to the guard.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_ring.distribution import strategy
from keras_ring.distribution.lengths import OPEN
from keras_ring.keras_internals import calls, indexing_operations
from keras_ring.ops.sequence import shard_ring
from keras_ring.ops.take_position import take_position
from keras_ring.wrapping import Target

Tensor = Any
Sees = Callable[[Any], bool]


@functools.cache
def _classes() -> tuple[Any, Any]:
    return indexing_operations()


def targets() -> list[Target]:
    """Functions of Keras to be wrapped, for `wrapping.wrap_once`."""
    wrappers = _item, _take
    return [
        (owner, "call", wrap)
        for owner, wrap in zip(_classes(), wrappers, strict=True)
        if owner is not None
    ]


def takes_positions(operation: Any, node: Any, sees_sequence: Sees) -> bool:
    """True if a call of an operation takes positions of the sequence in a way
    that is computed right on a shard.

    Args:
        operation: a `keras.Operation` that is no layer.
        node: its call in the graph.
        sees_sequence: tells whether a symbolic tensor has the sequence on
            axis 1.
    """
    item, take = _classes()
    given = [*node.arguments.args, *node.arguments.kwargs.values()]
    if len(given) != 2 or not hasattr(given[0], "shape"):
        return False
    tensor, key = given
    if not sees_sequence(tensor):
        return False
    if item is not None and isinstance(operation, item):
        return _entry_of_position(key, len(tensor.shape)) is not None
    if take is not None and isinstance(operation, take):
        return _takes(operation, tensor, key)
    return False


def _item(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, x: Tensor, key: Any) -> Tensor:
        if _on_shard(self):
            place = _entry_of_position(key, len(x.shape))
            if place is not None:
                key = list(key)
                x = take_position(x, [key[place]])
                key[place] = 0
        return original(self, x, key)

    return call


def _take(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, x: Tensor, indices: Any) -> Tensor:
        if _on_shard(self) and _takes(self, x, indices):
            places = np.asarray(indices)
            x = take_position(x, places.ravel().tolist())
            indices = np.arange(places.size).reshape(places.shape)
        return original(self, x, indices)

    return call


def _on_shard(operation: Any) -> bool:
    """True if an operation is given a shard: in a step, and with a sequence
    that is split on axis 1."""
    world = strategy.current()
    if world is None or shard_ring() is None:
        return False
    lengths = OPEN if world.model is None else world.lengths.get(world.model)
    return any(
        (lengths or OPEN).split(node.input_tensors[0])
        for node in calls(operation)
    )


def _entry_of_position(key: Any, rank: int) -> int | None:
    """Index of the entry of a key that is the one position that it takes on
    axis 1; None for a key that does anything else with the first two axes."""
    if not isinstance(key, (tuple, list)):
        return None
    axis = 0
    for place, entry in enumerate(key):
        if entry is None:
            return None
        if entry is Ellipsis:
            axis += rank - (len(key) - 1 - list(key).count(None))
        elif axis == 1:
            whole = isinstance(entry, int) and not isinstance(entry, bool)
            return place if whole else None
        elif isinstance(entry, slice) and entry == slice(None):
            axis += 1
        else:
            return None
        if axis > 1:
            return None
    return None


def _takes(operation: Any, tensor: Any, indices: Any) -> bool:
    """True if known positions are taken on axis 1."""
    if operation.axis is None or operation.axis % len(tensor.shape) != 1:
        return False
    if not isinstance(indices, (int, list, tuple, np.ndarray, np.integer)):
        return False
    places = np.asarray(indices)
    return places.size > 0 and places.dtype.kind in "iu"
