"""One visit: where its chunks lie, and what a mask says of them.

A visit is the attention of a member's queries over the K/V block that it has
at the time: one ring step. Kernels are given its description as a `Visit`.
"""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ring.attention.scoring import Scoring
from keras_ring.masks import Carried, Mask, Span

Tensor = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """The positions of one side of a visit, cut into tiles.

    A chunk is one or more contiguous parts of equal length, and no tile
    reaches over the end of one; the last tile of each may be padded.

    Attributes:
        starts: global position at which each part begins; ints or int32
            scalars.
        length: of all parts together; an int, or a tensor if unknown.
        limit: positions of a tile at most; None if each part is one tile.
    """

    starts: tuple[Any, ...]
    length: Any
    limit: int | None = None

    @property
    def part(self) -> Any:
        """The length of a part."""
        return self.length // len(self.starts)

    @property
    def tile(self) -> Any:
        """The length of a tile."""
        part = self.part
        if self.limit is None:
            return part
        if not isinstance(part, int):
            return self.limit
        # As equal as can be, so that little is padded.
        return -(-part // -(-part // self.limit)) if part else 1

    @property
    def tiles_of_part(self) -> Any:
        return 1 if self.limit is None else -(-self.part // self.tile)

    @property
    def count(self) -> Any:
        """Number of tiles."""
        return len(self.starts) * self.tiles_of_part

    @property
    def unpadded(self) -> bool:
        """True if no tile is padded, as far as is known."""
        if self.limit is None:
            return True
        return isinstance(self.part, int) and self.part % self.tile == 0

    def cut(self, tensor: Tensor, axis: int, fill: Any = 0) -> Tensor:
        """(..., length, ...) -> (..., count, tile, ...)."""
        if self.limit is None and len(self.starts) == 1:
            return ops.expand_dims(tensor, axis)
        before = tuple(ops.shape(tensor)[:axis])
        after = tuple(ops.shape(tensor)[axis + 1 :])
        if not self.unpadded:
            parts = len(self.starts)
            tensor = ops.reshape(tensor, (*before, parts, self.part, *after))
            widths: list = [(0, 0)] * len(tensor.shape)
            widths[axis + 1] = 0, self.tiles_of_part * self.tile - self.part
            tensor = ops.pad(tensor, widths, constant_values=fill)
        return ops.reshape(tensor, (*before, self.count, self.tile, *after))

    def join(self, tiles: Tensor, axis: int) -> Tensor:
        """(..., count, tile, ...) -> (..., length, ...)."""
        before = tuple(ops.shape(tiles)[:axis])
        after = tuple(ops.shape(tiles)[axis + 2 :])
        if not self.unpadded:
            parts, padded = len(self.starts), self.tiles_of_part * self.tile
            tiles = ops.reshape(tiles, (*before, parts, padded, *after))
            kept = (slice(None),) * (axis + 1) + (slice(0, self.part),)
            tiles = tiles[kept]
        return ops.reshape(tiles, (*before, self.length, *after))

    def place(self, index: Any) -> Any:
        """First index of a tile in its part."""
        if len(self.starts) == 1:
            return index * self.tile
        return index % self.tiles_of_part * self.tile

    def positions(self, index: Any) -> Tensor:
        """int32 (tile,): the global positions of a tile."""
        start = self.starts[0]
        for number, other in enumerate(self.starts[1:], start=1):
            later = index >= number * self.tiles_of_part
            if isinstance(later, bool):
                start = other if later else start
            else:
                start = ops.where(later, other, start)
        first = start + self.place(index)
        return first + ops.arange(self.tile, dtype="int32")

    def real(self, index: Any) -> Tensor:
        """Boolean (tile,): false where a tile is padded."""
        place = self.place(index) + ops.arange(self.tile, dtype="int32")
        return place < self.part

    def spans(self, shape: tuple[int, int]) -> Span:
        """The positions of all tiles, as arrays of a shape."""
        count = self.tiles_of_part
        if all(isinstance(number, int) for number in (*self.starts, count)):
            # Of a single tile the length need not be known.
            inside: Any = np.arange(count)
            inside = inside * (self.tile if count > 1 else 1)
            firsts = [start + inside for start in self.starts]
            first: Any = np.concatenate(firsts).reshape(shape)
        else:
            inside = self.tile * ops.arange(self.tiles_of_part, dtype="int32")
            firsts = [start + inside for start in self.starts]
            if len(firsts) > 1:
                firsts = [ops.concatenate(firsts)]
            first = ops.reshape(firsts[0], shape)
        return Span(first, first + self.tile - 1)


def relations(mask: Mask, queries: Side, keys: Side) -> tuple[Any, Any]:
    """`Mask.relation` of every tile of a visit at once.

    Args:
        mask: over the uncut tensors of the visit.
        queries, keys: the tiles.
    """
    carried = mask.carried()
    cut = Carried(
        tuple(in_tiles(t, queries) for t in carried.query),
        tuple(in_tiles(t, keys) for t in carried.key),
        carried.shared,
    )
    return mask.replace(cut).relation(
        queries.spans((-1, 1)), keys.spans((1, -1))
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Visit:
    """Description of one ring step: where its tensors lie, and its scores.

    Attributes:
        query_starts: global position of the first query of each part of the
            chunk, see `Side`; ints or int32 scalars.
        key_starts: likewise of the visiting keys.
        scoring: what makes the scores, over the tensors of this visit.
    """

    query_starts: tuple[Any, ...]
    key_starts: tuple[Any, ...]
    scoring: Scoring

    def relation(self, query_length: Any, key_length: Any) -> tuple[Any, Any]:
        """Two answers: if some, and if every, pair of the chunks is allowed."""
        mask = self.scoring.mask
        if mask is None:
            return True, True
        sides = []
        for starts, length in (
            (self.query_starts, query_length),
            (self.key_starts, key_length),
        ):
            # A symbolic dimension (JAX) does not compare with every number.
            if not isinstance(length, int):
                length = ops.convert_to_tensor(length, dtype="int32")
            sides.append(Side(starts, length))
        nonempty, full = relations(mask, *sides)
        return _reduced(nonempty, np.any, ops.any), _reduced(
            full, np.all, ops.all
        )


def in_tiles(tensor: Tensor, side: Side) -> Tensor:
    """(B, L, ...) -> (count, B, tile, ...)."""
    if keras.backend.standardize_dtype(tensor.dtype) == "bool":
        tensor = ops.cast(tensor, "int8")
    tensor = side.cut(tensor, 1)
    return ops.transpose(tensor, (1, 0, *range(2, len(tensor.shape))))


def _reduced(relation: Any, plain: Any, traced: Any) -> Any:
    """Reduce an answer of many tiles to one for some, or for all, of them."""
    if isinstance(relation, bool):
        return relation
    if isinstance(relation, (np.bool_, np.ndarray)):
        return bool(plain(relation))
    return traced(relation)
