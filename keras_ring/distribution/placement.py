"""Placement: the global positions that a shard holds.

The sequence is split into `size` equal, contiguous chunks in natural order:
index `i` holds positions `i * length` to `(i + 1) * length - 1`, where
`length` is the length of one chunk. Everything here is plain arithmetic, so
that it works on Python integers and on traced scalars alike.

Under a causal mask later chunks have more work than earlier ones, and all
members wait for the last. While attention is computed they may therefore
hold the *balanced* chunks: of the `2 * size` halves of chunks, index `i` has
`i` and `2 * size - 1 - i`, whose work adds up to the same for every `i`
(Zhu et al. 2024, ring-flash-attention's "zigzag"; Llama 3, arXiv 2407.21783,
section 3.3.2). Of the two, the one with the even number stands first: that
one was the first half of some chunk, and so each half of the natural chunks
moves by a permutation of its own.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from keras import ops

Index = Any
# What users say of balanced chunks, see `balance.pays`.
Choice = bool | Literal["auto"]


def start(index: Index, length: Index) -> Index:
    """The global position of the first element of the chunk at `index`."""
    return index * length


def starts(index: Index, length: Index, size: int, balanced: bool) -> tuple:
    """The global positions at which the parts of a chunk begin.

    Args:
        index: of the member that holds the chunk.
        length: of the chunk, divisible by two if `balanced`.
        size: members of the ring.
        balanced: whether the chunk is the balanced one.
    """
    if not balanced:
        return (start(index, length),)
    low, high = index, 2 * size - 1 - index
    even = index % 2 == 0
    if isinstance(even, bool):
        first, second = (low, high) if even else (high, low)
    else:
        first, second = ops.where(even, low, high), ops.where(even, high, low)
    return first * (length // 2), second * (length // 2)


@dataclasses.dataclass(frozen=True)
class Portion:
    """The positions of a chunk that travel together: the same ones of each
    of its parts, so that balanced work stays balanced.

    Attributes:
        parts: contiguous parts of the chunk, of equal length.
        begin, end: in each part; `end` is None for all that follow.
    """

    parts: int
    begin: int = 0
    end: int | None = None

    def of(self, tensor: Any, axis: int) -> Any:
        """The portion of a tensor over the chunk."""
        if self.begin == 0 and self.end is None:
            return tensor
        before = (slice(None),) * axis
        length = tensor.shape[axis] // self.parts
        end = length if self.end is None else self.end
        taken = [
            tensor[(*before, slice(first + self.begin, first + end))]
            for first in range(0, tensor.shape[axis], length)
        ]
        return taken[0] if len(taken) == 1 else ops.concatenate(taken, axis)


def portions(length: Any, parts: int, most: int | None) -> list[Portion]:
    """All portions of a chunk, as equal as can be.

    Args:
        length: of the chunk, divisible by `parts`.
        parts: of the chunk.
        most: positions of a portion; None for the whole chunk at once.
    """
    if most is None or not isinstance(length, int) or length <= most:
        return [Portion(parts)]
    cuts = _cut(length // parts, -(-length // most))
    return [Portion(parts, begin, end) for begin, end in cuts]


class QueryBand(NamedTuple):
    """Neighbouring positions of a chunk: all of it, or some of one part.

    Attributes:
        part: number of the part; None for the whole chunk.
        begin, end: in the chunk.
        offset: of `begin` in its part.
    """

    part: int | None = None
    begin: int = 0
    end: int | None = None
    offset: int = 0

    def of(self, tensor: Any, axis: int) -> Any:
        """The band of a tensor over the chunk."""
        if self.part is None:
            return tensor
        before = (slice(None),) * axis
        return tensor[(*before, slice(self.begin, self.end))]

    def starts(self, starts: tuple) -> tuple:
        """First positions of it, of those of all parts."""
        if self.part is None:
            return starts
        return (starts[self.part] + self.offset,)


def bands(length: Any, parts: int, most: int | None) -> list[QueryBand]:
    """A chunk cut into bands, as equal as can be, in order.

    Args:
        length: of the chunk, divisible by `parts`.
        parts: of the chunk.
        most: positions of a band; None for the whole chunk at once.
    """
    if most is None or not isinstance(length, int) or length <= most:
        return [QueryBand()]
    part = length // parts
    return [
        QueryBand(number, number * part + begin, number * part + end, begin)
        for number in range(parts)
        for begin, end in _cut(part, -(-part // most))
    ]


def _cut(length: int, count: int) -> list[tuple[int, int]]:
    """Beginning and end of `count` pieces at most, as equal as can be."""
    step = -(-length // count)
    return [
        (begin, min(begin + step, length)) for begin in range(0, length, step)
    ]


def joined(tensors: Sequence[Any], parts: int, axis: int) -> Any:
    """The chunk of which all portions are given, along `axis`."""
    if len(tensors) == 1:
        return tensors[0]
    cut = [ops.split(tensor, parts, axis=axis) for tensor in tensors]
    return ops.concatenate(
        [part for same in zip(*cut, strict=True) for part in same], axis=axis
    )


def moves(size: int) -> tuple[list[int], list[int]]:
    """Destinations of the first and the second halves of the natural chunks.

    Returns:
        Two permutations: the half of member `i` goes to member `[i]`.
    """

    def home(half: int) -> int:
        return min(half, 2 * size - 1 - half)

    return (
        [home(2 * i) for i in range(size)],
        [home(2 * i + 1) for i in range(size)],
    )


def source(index: Index, hop: Index, size: int) -> Index:
    """The index whose chunk visits `index` after `hop` hops by +1."""
    return (index - hop + size) % size


def hops(
    size: int,
    query_length: Index,
    key_length: Index,
    reach: tuple[float, float],
) -> tuple[int, int]:
    """The first and the last hop at which some member has work to do.

    Args:
        size: members of the ring.
        query_length: of one contiguous chunk.
        key_length: likewise.
        reach: how many positions back and ahead of itself a query may see,
            see `Mask.reach`.

    Returns:
        Numbers of hops, `first` not above 0 and `last - first` below `size`:
        visits begin with the chunk that is `first` hops away.
    """
    whole = 0, size - 1
    if not isinstance(query_length, int) or not isinstance(key_length, int):
        return whole
    back, ahead = reach
    needed = set()
    for query in range(size):
        for key in range(size):
            nearest = start(query, query_length) - start(key + 1, key_length)
            furthest = start(query + 1, query_length) - start(key, key_length)
            if nearest + 1 <= back and furthest - 1 >= -ahead:
                needed.add((query - key) % size)
    return min(
        (_arc(first, needed, size) for first in range(0, -size, -1)),
        key=lambda arc: (arc[1] - arc[0], -arc[0]),
    )


def _arc(first: int, needed: Iterable[int], size: int) -> tuple[int, int]:
    """The hops from `first` on that cover the needed ones, around the ring."""
    return first, max(
        (first + (hop - first) % size for hop in needed), default=first
    )
