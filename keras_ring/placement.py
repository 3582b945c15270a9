"""Which global positions a shard holds.

The sequence is split into `size` equal, contiguous chunks in natural order:
index `i` holds positions `i * length` to `(i + 1) * length - 1`, where
`length` is the length of one chunk. Everything here is plain arithmetic, so
that it works on Python integers and on traced scalars alike.
"""

from typing import Any

Index = Any


def start(index: Index, length: Index) -> Index:
    """The global position of the first element of the chunk at `index`."""
    return index * length


def source(index: Index, hop: Index, size: int) -> Index:
    """The index whose chunk visits `index` after `hop` hops by +1."""
    return (index - hop + size) % size


def check_divisible(length: int, size: int, name: str) -> None:
    """Refuse a length that the ring cannot split into equal chunks."""
    if length % size:
        down, up = length // size * size, -(-length // size) * size
        raise ValueError(
            f"The sequence length of `{name}` must be a multiple of the "
            f"sequence-parallel size, because every device holds an equal "
            f"chunk. Received: length={length}, sequence_parallel={size}. "
            f"Pad the sequence to {up} (and mask the padding), cut it to "
            f"{down}, or use a size that divides {length}."
        )
