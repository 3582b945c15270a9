"""Sizes that devices cannot share equally, and what is padding of them.

A batch of 5 on 2 devices is made one of 6, and a sequence of 7 one of 8:
the last row, and the last position, are there once more. They are real
data, so that whatever is computed of them is finite, and nobody sees them:
attention leaves them out, losses and metrics do not count them, and results
come without them.

The padded size alone does not tell the true one. So a `PaddedAxis` knows,
for every size of a shard, of which true size it is the shard; two true
sizes never have shards of one size.
"""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
from keras import ops

# A Python integer, or an int32 scalar where a program is traced once for
# many sizes.
Size = Any
Tensor = Any


class PaddedAxis:
    """One axis of what a step sees, shared by `parts` devices.

    Args:
        parts: number of devices that share the axis.

    Attributes:
        padded: whether some size on it is or may be padded.
    """

    def __init__(self, parts: int):
        self.parts = parts
        self.padded = False
        self._known: list[tuple[Size, Size, bool]] = []

    @property
    def sizes(self) -> list[int]:
        """The true sizes that are known, in the order in which they came."""
        return [true for _, true, _ in self._known]

    def add(self, true: Size) -> Size:
        """Make a size known, and give the size of its shards.

        Args:
            true: the size without padding.
        """
        local = self._free(true)
        padded = not _same(local * self.parts, true)
        self.know(local, true if padded else None)
        return local

    def know(self, local: Size, true: Size | None) -> None:
        """Take over a size that has been chosen before.

        Args:
            local: size of a shard.
            true: the size without padding, None where all shards together
                have none.
        """
        padded = true is not None
        self.padded = self.padded or padded
        true = true if padded else local * self.parts
        self._known.append((local, true, padded))

    def true(self, local: Size) -> Size | None:
        """The true size of what has shards of this size, None where that is
        just all shards together."""
        natural = local * self.parts
        found: Size = natural
        for size, true, padded in self._known:
            if not padded:
                continue
            if isinstance(size, int) and isinstance(local, int):
                found = true if size == local else found
            else:
                found = ops.where(
                    ops.equal(local, size), _scalar(true), _scalar(found)
                )
        return None if found is natural else found

    def whole(self, local: Size) -> Size:
        """The true size of what has shards of this size."""
        true = self.true(local)
        return local * self.parts if true is None else true

    def valid(self, local: Size, index: Any) -> Size:
        """Number of positions of a shard that are no padding.

        Args:
            local: size of the shard.
            index: its place on the axis.
        """
        true = self.true(local)
        if true is None:
            return local
        return clip(true - index * local, 0, local)

    def _free(self, true: Size) -> Size:
        """The smallest size of a shard that is no other size's."""
        local = -(-true // self.parts)
        # Each known size can be met once on the way up.
        for _ in self._known:
            for size, other, _ in self._known:
                taken = (size, other, local, true)
                if all(isinstance(number, int) for number in taken):
                    local += int(size == local and other != true)
                else:
                    taken = ops.logical_and(
                        ops.equal(size, local), ops.not_equal(other, true)
                    )
                    local = local + ops.cast(taken, "int32")
        return local


def axis_of(parts: int, sizes: Iterable[int]) -> PaddedAxis:
    """The axis of a batch that has these true sizes on it."""
    axis = PaddedAxis(parts)
    # Sizes that need no padding keep their own shards.
    for size in sorted(set(sizes), key=lambda size: (size % parts, size)):
        axis.add(size)
    return axis


def pairs(axis: PaddedAxis, sizes: Iterable[int]) -> list[tuple[int, int]]:
    """For each true size, the size of its shards and itself."""
    return [(local_size(axis, size), size) for size in sizes]


def local_size(axis: PaddedAxis, true: int) -> int:
    """The size of the shards of a size that `axis_of` was given."""
    for local, known, _ in axis._known:
        if known == true:
            return int(local)
    raise KeyError(true)


def part(tensor: Any, axis: int, index: int, local: int) -> Any:
    """The shard of a whole array, with its last element repeated.

    Args:
        tensor: array, with at least one element on `axis`.
        axis: 0 or 1.
        index: the place of the shard.
        local: its size.
    """
    first, size = index * local, tensor.shape[axis]
    if first + local > size:
        own = np.minimum(np.arange(first, first + local), size - 1)
        # What is no tensor stays none: Keras takes no mixture.
        take = np.take if isinstance(tensor, np.ndarray) else ops.take
        return take(tensor, own, axis=axis)
    chunk = slice(first, first + local)
    return tensor[chunk] if axis == 0 else tensor[:, chunk]


def trim(tensor: Tensor, axis: int, size: Size) -> Tensor:
    """The first `size` elements along an axis."""
    return tensor[(*(slice(None) for _ in range(axis)), slice(0, size))]


def clip(value: Size, low: int, high: Size) -> Size:
    """A size between two others."""
    if isinstance(value, int) and isinstance(high, int):
        return max(low, min(value, high))
    return ops.clip(_scalar(value), low, _scalar(high))


def _same(first: Size, second: Size) -> bool:
    """True if two sizes are known to be the same."""
    return first is second or (
        isinstance(first, int) and isinstance(second, int) and first == second
    )


def _scalar(size: Size) -> Any:
    return ops.cast(size, "int32")


_AXES: ContextVar[tuple[PaddedAxis, PaddedAxis, bool] | None] = ContextVar(
    "keras_ring_axes", default=None
)


@contextlib.contextmanager
def seen(
    rows: PaddedAxis, lengths: PaddedAxis, whole: bool = False
) -> Iterator[None]:
    """Code in here sees shards of these sizes.

    Args:
        rows: the batch axis.
        lengths: the sequence axis.
        whole: whether it sees shards of the batch only, and every sequence
            whole.
    """
    token = _AXES.set((rows, lengths, whole))
    try:
        yield
    finally:
        _AXES.reset(token)


def axes() -> tuple[PaddedAxis, PaddedAxis]:
    """The batch and the sequence axis of what the running code sees."""
    found = _AXES.get()
    if found is None:
        raise RuntimeError("No code that sees a shard runs here.")
    return found[:2]


def lengths() -> PaddedAxis | None:
    """The sequence axis of what the running code sees, None outside."""
    found = _AXES.get()
    return None if found is None else found[1]


def whole() -> bool:
    """True if the running code is in a step and sees whole sequences."""
    found = _AXES.get()
    return found is not None and found[2]


def true_length(length: Size, parts: int) -> Size | None:
    """Length of the sequence of which attention sees shards, None where they
    have no padding.

    Args:
        length: that the running code sees.
        parts: number of shards.
    """
    axis = lengths()
    if axis is None:
        return None
    if not whole():
        return axis.true(length)
    # Attention cuts it up itself; see `shards.of_whole`.
    equal = isinstance(length, int) and length % parts == 0
    return None if equal else length
