"""Tiles of a visit that have pairs, in the order in which they are computed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from keras import ops


class Needed(NamedTuple):
    """The tiles of the other side that each tile of a side has pairs with.

    Attributes:
        counts: int32 (tiles,): of how many; or one int for all.
        order: int32 (tiles, others): those come first, in order; None if it
            is all of them.
    """

    counts: Any
    order: Any = None

    def of(self, index: Any) -> tuple[Any, Callable]:
        """Number of tiles that a tile has pairs with, and a function from their
        number to their index."""
        counts, order = self
        if order is None:
            return counts, lambda number: number
        if isinstance(index, int) and isinstance(counts, np.ndarray):
            row = order[index]
            return int(counts[index]), lambda number: _entry(row, number)
        counts, order = (ops.convert_to_tensor(t) for t in (counts, order))
        return counts[index], lambda number: order[index][number]


def needed(nonempty: Any, shape: tuple[Any, Any], turned: bool) -> Needed:
    """For tiles of queries, or of keys if `turned`.

    Args:
        nonempty: whether some pair of a tile is allowed: a bool, or an array
            that broadcasts to `shape`.
        shape: tiles of queries and of keys.
    """
    # A single tile may as well be computed when it has no pair.
    alone = all(isinstance(count, int) and count == 1 for count in shape)
    others = shape[0 if turned else 1]
    if alone or isinstance(nonempty, (bool, np.bool_)):
        return Needed(others if alone or nonempty else 0)
    xp: Any = np if isinstance(nonempty, np.ndarray) else ops
    nonempty = xp.broadcast_to(nonempty, shape)
    nonempty = xp.transpose(nonempty) if turned else nonempty
    places = xp.arange(others, dtype="int32")
    behind = xp.where(nonempty, places, places + others)
    counts = (
        xp.sum(nonempty, axis=1, dtype="int32")
        if xp is np
        else ops.sum(ops.cast(nonempty, "int32"), axis=1)
    )
    order = xp.argsort(behind, axis=1)
    return Needed(counts, order.astype("int32") if xp is np else order)


def _entry(row: np.ndarray, number: Any) -> Any:
    if isinstance(number, int):
        return int(row[number])
    return ops.convert_to_tensor(row)[number]
