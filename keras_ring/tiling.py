"""One visit, cut into tiles: shapes, masks and what makes a tile's scores.

Legend: B batch, H query heads, K key/value heads, G = H / K, N = B * K,
Q and S query and key lengths, q and s their tiles, D and E the head
dimensions of query/key and of value. Rows r = G * q: the query heads that
share one key head are further rows of the same product, so keys and values
are never repeated.
"""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ring import numerics, random_bits
from keras_ring.masks import Carried, Span
from keras_ring.masks.by_tensor import columns
from keras_ring.primitives import Primitives
from keras_ring.scoring import Scoring

Tensor = Any

TILE = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """What a kernel must know of one visit beside the tensors.

    Attributes:
        query_start: global position of the first query; int or int32 scalar.
        key_start: global position of the first visiting key.
        scoring: what makes the scores, over the tensors of this visit.
    """

    query_start: Any
    key_start: Any
    scoring: Scoring

    def relation(self, query_length: Any, key_length: Any) -> tuple[Any, Any]:
        """Whether some and whether every pair of the chunks is allowed."""
        mask = self.scoring.mask
        if mask is None:
            return True, True
        # A symbolic dimension (JAX) does not compare with every number.
        query_length, key_length = (
            n if isinstance(n, int) else ops.convert_to_tensor(n, dtype="int32")
            for n in (query_length, key_length)
        )
        query, key, shared = mask.carried()
        # The chunk is one tile.
        cut = Carried(
            tuple(ops.expand_dims(t, 0) for t in query),
            tuple(ops.expand_dims(t, 0) for t in key),
            shared,
        )
        some, every = mask.replace(cut).relation(
            Span(self.query_start, self.query_start + query_length - 1),
            Span(self.key_start, self.key_start + key_length - 1),
        )
        return _only(some), _only(every)


class Tiling:
    """The tile arithmetic of one visit: shapes, cuts and what is special
    about the scores of a tile."""

    def __init__(
        self, primitives: Primitives, query: Tensor, key: Tensor, block: Block
    ):
        self.batch, self.heads, self.query_length, _ = ops.shape(query)
        _, self.key_heads, self.key_length, _ = ops.shape(key)
        self.group = self.heads // self.key_heads
        self.query_tile = _tile_size(self.query_length)
        self.key_tile = _tile_size(self.key_length)
        self.query_count = -(-self.query_length // self.query_tile)
        self.key_count = -(-self.key_length // self.key_tile)
        self.pairs = self.batch * self.key_heads
        self.rows = self.group * self.query_tile
        self.block = block
        self.scoring = block.scoring
        self.primitives = primitives
        self.dtype = numerics.accumulation_dtype(query.dtype)
        carried = self.scoring.carried()
        self.cut = Carried(
            tuple(
                self._cut(t, self.query_length, self.query_tile)
                for t in carried.query
            ),
            tuple(
                self._cut(t, self.key_length, self.key_tile)
                for t in carried.key
            ),
            carried.shared,
        )
        self.some, self.every = self._relations()
        self.stores = self.cut._replace(
            query=tuple(primitives.store(t) for t in self.cut.query),
            key=tuple(primitives.store(t) for t in self.cut.key),
        )

    def cut_queries(self, tensor: Tensor, fill: float = 0.0) -> Tensor:
        """(B, H, Q, ...) -> (count, N, G * q, ...)."""
        rest = tuple(ops.shape(tensor)[3:])
        tensor = _pad(tensor, 2, self.query_length, self.query_tile, fill)
        tensor = ops.reshape(
            tensor,
            (
                self.batch * self.key_heads,
                self.group,
                self.query_count,
                self.query_tile,
                *rest,
            ),
        )
        axes = (2, 0, 1, 3, *range(4, 4 + len(rest)))
        tensor = ops.transpose(tensor, axes)
        return ops.reshape(
            tensor,
            (
                self.query_count,
                self.batch * self.key_heads,
                self.group * self.query_tile,
                *rest,
            ),
        )

    def join_queries(self, tiles: Tensor) -> Tensor:
        """(count, N, G * q, ...) -> (B, H, Q, ...)."""
        rest = tuple(ops.shape(tiles)[3:])
        tiles = ops.reshape(
            tiles,
            (
                self.query_count,
                self.batch * self.key_heads,
                self.group,
                self.query_tile,
                *rest,
            ),
        )
        axes = (1, 2, 0, 3, *range(4, 4 + len(rest)))
        tensor = ops.reshape(
            ops.transpose(tiles, axes),
            (
                self.batch,
                self.heads,
                self.query_count * self.query_tile,
                *rest,
            ),
        )
        return tensor[:, :, : self.query_length]

    def cut_keys(self, tensor: Tensor) -> Tensor:
        """(B, K, S, D) -> (count, N, s, D)."""
        depth = ops.shape(tensor)[3]
        tensor = _pad(tensor, 2, self.key_length, self.key_tile, 0.0)
        tensor = ops.reshape(
            tensor,
            (
                self.batch * self.key_heads,
                self.key_count,
                self.key_tile,
                depth,
            ),
        )
        return ops.transpose(tensor, (1, 0, 2, 3))

    def join_keys(self, tiles: Tensor) -> Tensor:
        """(count, N, s, D) -> (B, K, S, D)."""
        depth = ops.shape(tiles)[3]
        tensor = ops.reshape(
            ops.transpose(tiles, (1, 0, 2, 3)),
            (
                self.batch,
                self.key_heads,
                self.key_count * self.key_tile,
                depth,
            ),
        )
        return tensor[:, :, : self.key_length]

    def relation(self, query_index: Any, key_index: Any) -> tuple[Any, Any]:
        """Whether some and whether every pair of a tile is allowed."""
        return (
            self._pick(self.some, query_index, key_index),
            self._pick(self.every, query_index, key_index),
        )

    def scored(
        self, products: Tensor, i: Any, j: Any, masked: bool, turned: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The scores of a tile from its scaled products.

        Args:
            products: (N, r, s), or (N, s, r) if `turned`.
            i: query tile.
            j: key tile.
            masked: whether some pairs of the tile do not count.
            turned: whether keys are rows.

        Returns:
            The scores, and the derivative of a score by its product where
            that is not 1 (else None).
        """
        scoring = self.scoring
        derivative = None
        if scoring.soft_cap is not None:
            turn = numerics.tanh(products / scoring.soft_cap)
            products = turn * scoring.soft_cap
            derivative = 1.0 - turn * turn
        extra = None
        if scoring.slopes is not None:
            slopes = self._by_row(ops.cast(scoring.slopes, self.dtype))
            extra = -slopes[:, :, None] * self.distances(i, j)
        if scoring.bias is not None:
            bias = columns(self._tile(i, j).bias, self._key_positions(j))
            bias = self._as_rows(ops.cast(bias, self.dtype))
            extra = bias if extra is None else extra + bias
        if extra is not None:
            products = products + (_turned(extra) if turned else extra)
        if masked:
            allowed = self.allowed(i, j)
            products = ops.where(
                _turned(allowed) if turned else allowed,
                products,
                -float("inf"),
            )
        return products, derivative

    def dropped(self, i: Any, j: Any, turned: bool) -> Any:
        """A function that drops entries of a tile and scales the others;
        None where nothing is dropped."""
        dropout = self.scoring.dropout
        if dropout is None:
            return None
        batch = dropout.first_row + ops.arange(self.batch, dtype="int32")
        heads = ops.arange(self.heads, dtype="int32")
        kept = random_bits.keep(
            dropout.seed,
            [
                ops.reshape(batch, (-1, 1, 1, 1)),
                ops.reshape(heads, (1, -1, 1, 1)),
                self._query_positions(i)[:, None],
                self._key_positions(j),
            ],
            dropout.rate,
        )
        kept = self._as_rows(kept)
        kept = _turned(kept) if turned else kept
        share = 1.0 / (1.0 - dropout.rate)
        return lambda tile: ops.where(kept, tile * share, 0.0)

    def distances(self, i: Any, j: Any) -> Tensor:
        """(r, s): how far apart queries and keys of a tile are."""
        distance = ops.abs(
            self._query_positions(i)[:, None] - self._key_positions(j)[None, :]
        )
        return ops.cast(ops.tile(distance, (self.group, 1)), self.dtype)

    def allowed(self, i: Any, j: Any) -> Tensor:
        """Boolean (N or 1, r, s): the pairs of a tile that count."""
        local = j * self.key_tile + ops.arange(self.key_tile, dtype="int32")
        allowed = ops.reshape(local < self.key_length, (1, 1, 1, self.key_tile))
        if self.scoring.mask is not None:
            mask: Any = self._tile(i, j).mask
            allowed = ops.logical_and(
                allowed,
                mask.allowed(self._query_positions(i), self._key_positions(j)),
            )
        return self._as_rows(allowed)

    def grad_bias(self, grad_scores: Tensor) -> Tensor:
        """(N, s, r) -> (B or 1, q, H or 1, s): one tile of the gradient."""
        bias: Any = self.scoring.bias
        bias_batch, _, bias_heads, _ = bias.shape
        tile = ops.reshape(
            grad_scores,
            (
                self.batch,
                self.key_heads,
                self.key_tile,
                self.group,
                self.query_tile,
            ),
        )
        tile = ops.reshape(
            ops.transpose(tile, (0, 4, 1, 3, 2)),
            (self.batch, self.query_tile, self.heads, self.key_tile),
        )
        if bias_batch == 1:
            tile = ops.sum(tile, axis=0, keepdims=True)
        return ops.sum(tile, axis=2, keepdims=True) if bias_heads == 1 else tile

    def join_bias(self, tiles: Tensor) -> Tensor:
        """(query tiles * key tiles, B', q, H', s) -> (B', Q, H', S)."""
        _, batch, _, heads, _ = ops.shape(tiles)
        tiles = ops.reshape(
            tiles,
            (
                self.query_count,
                self.key_count,
                batch,
                self.query_tile,
                heads,
                self.key_tile,
            ),
        )
        joined = ops.reshape(
            ops.transpose(tiles, (2, 0, 3, 4, 1, 5)),
            (
                batch,
                self.query_count * self.query_tile,
                heads,
                self.key_count * self.key_tile,
            ),
        )
        return joined[:, : self.query_length, :, : self.key_length]

    def by_head(self, rows: Tensor) -> Tensor:
        """(N, r) -> (H,): the sum over samples and queries."""
        rows = ops.reshape(
            rows, (self.batch, self.key_heads, self.group, self.query_tile)
        )
        return ops.reshape(ops.sum(rows, axis=(0, 3)), (self.heads,))

    def _by_row(self, by_head: Tensor) -> Tensor:
        """(H,) -> (N, r)."""
        return ops.reshape(
            ops.broadcast_to(
                ops.reshape(by_head, (1, self.key_heads, self.group, 1)),
                (self.batch, self.key_heads, self.group, self.query_tile),
            ),
            (self.pairs, self.rows),
        )

    def _as_rows(self, tile: Tensor) -> Tensor:
        """What broadcasts to (B, H, q, s) -> (N or 1, r, s)."""
        shape = ops.shape(tile)
        if isinstance(shape[0], int) and shape[:2] == (1, 1):
            batch, key_heads = 1, 1
        else:
            batch, key_heads = self.batch, self.key_heads
        if shape[1] == 1:
            tile = tile[:, :, None]
        else:
            tile = ops.reshape(
                tile, (shape[0], self.key_heads, self.group, *shape[2:])
            )
        tile = ops.broadcast_to(
            tile,
            (batch, key_heads, self.group, self.query_tile, self.key_tile),
        )
        return ops.reshape(tile, (batch * key_heads, self.rows, self.key_tile))

    def _tile(self, i: Any, j: Any) -> Scoring:
        """The scoring over the tensors of one tile."""
        read = self.primitives.read
        return self.scoring.replace(
            self.stores._replace(
                query=tuple(read(t, i) for t in self.stores.query),
                key=tuple(read(t, j) for t in self.stores.key),
            )
        )

    def _query_positions(self, i: Any) -> Tensor:
        start = self.block.query_start + i * self.query_tile
        return start + ops.arange(self.query_tile, dtype="int32")

    def _key_positions(self, j: Any) -> Tensor:
        start = self.block.key_start + j * self.key_tile
        return start + ops.arange(self.key_tile, dtype="int32")

    def _relations(self) -> tuple[Any, Any]:
        """`relation` of every tile at once: bools, or arrays that broadcast
        to (query tiles, key tiles)."""
        whole: Any = (
            isinstance(self.key_length, int)
            and self.key_length % self.key_tile == 0
        )
        mask = self.scoring.mask
        if mask is None:
            return True, whole
        spans = []
        for start, count, tile, shape in (
            (
                self.block.query_start,
                self.query_count,
                self.query_tile,
                (-1, 1),
            ),
            (self.block.key_start, self.key_count, self.key_tile, (1, -1)),
        ):
            if isinstance(start, int) and isinstance(count, int):
                first: Any = start + tile * np.arange(count).reshape(shape)
            else:
                first = start + tile * ops.reshape(
                    ops.arange(count, dtype="int32"), shape
                )
            spans.append(Span(first, first + tile - 1))
        query, key, shared = self.cut
        # Those of the mask stand behind those of the scoring.
        behind = mask.carried()
        cut = Carried(
            query[len(query) - len(behind.query) :],
            key[len(key) - len(behind.key) :],
            shared[len(shared) - len(behind.shared) :],
        )
        some, every = mask.replace(cut).relation(*spans)
        return some, every if whole else False

    def _pick(self, relation: Any, i: Any, j: Any) -> Any:
        """The entry of one tile."""
        if isinstance(relation, (bool, np.bool_)):
            return bool(relation)
        rows, columns = relation.shape
        i, j = (0 if rows == 1 else i), (0 if columns == 1 else j)
        if isinstance(i, int) and isinstance(j, int):
            entry = relation[i, j]
            return bool(entry) if isinstance(entry, np.bool_) else entry
        return ops.convert_to_tensor(relation)[i, j]

    def _cut(self, tensor: Tensor, length: Any, tile: int) -> Any:
        """(B, L, ...) -> (count, B, tile, ...)."""
        shape = ops.shape(tensor)
        if keras.backend.standardize_dtype(tensor.dtype) == "bool":
            tensor = ops.cast(tensor, "int8")
        tensor = _pad(tensor, 1, length, tile, 0)
        tensor = ops.reshape(tensor, (shape[0], -1, tile, *shape[2:]))
        axes = (1, 0, *range(2, len(shape) + 1))
        return ops.transpose(tensor, axes)


def _only(relation: Any) -> Any:
    """The one entry that there is for one tile."""
    if isinstance(relation, bool):
        return relation
    if isinstance(relation, (np.bool_, np.ndarray)):
        return bool(np.all(relation))
    return ops.reshape(relation, ())


def _turned(tile: Tensor) -> Tensor:
    return ops.swapaxes(tile, 1, 2)


def _tile_size(length: Any) -> int:
    return min(TILE, length) if isinstance(length, int) else TILE


def _pad(
    tensor: Tensor, axis: int, length: Any, tile: int, fill: Any
) -> Tensor:
    """Pad one axis up to a multiple of the tile."""
    if isinstance(length, int) and length % tile == 0:
        return tensor
    widths: list = [(0, 0)] * len(tensor.shape)
    widths[axis] = (0, -(-length // tile) * tile - length)
    return ops.pad(tensor, widths, constant_values=fill)
