"""One visit, cut into tiles: shapes and what makes a tile's scores.

Legend: B batch, H query heads, K key/value heads, G = H / K, N = B * K,
Q and S query and key lengths, q and s their tiles, D and E the head
dimensions of query/key and of value. Rows r = G * q: the query heads that
share one key head are further rows of the same product, so keys and values
are never repeated.
"""

from typing import Any

import numpy as np
from keras import ops

from keras_ring import precision, random_bits
from keras_ring.attention.blockwise import schedule
from keras_ring.attention.blockwise.primitives import Primitives
from keras_ring.attention.blockwise.schedule import Needed
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Side, Visit, in_tiles, relations
from keras_ring.masks import Carried
from keras_ring.masks.by_tensor import columns

Tensor = Any

TILE = 512


def _halves_are_better(
    primitives: Primitives, query_length: Any, key_length: Any, mask: Any
) -> bool:
    """True if tiles of half the size leave out enough of a short chunk."""
    return (
        mask is not None
        and mask.grows()
        and isinstance(query_length, int)
        and isinstance(key_length, int)
        and max(query_length, key_length) <= primitives.short
    )


class Tiling:
    """The tile arithmetic of one visit: shapes, cuts and what is special
    about the scores of a tile."""

    def __init__(
        self, primitives: Primitives, query: Tensor, key: Tensor, visit: Visit
    ):
        self.batch, self.heads, query_length, _ = ops.shape(query)
        _, self.key_heads, key_length, _ = ops.shape(key)
        self.group = self.heads // self.key_heads
        limit = TILE if primitives.tile is None else min(TILE, primitives.tile)
        mask = visit.scoring.mask
        if _halves_are_better(primitives, query_length, key_length, mask):
            limit = min(limit, TILE // 2)
        self.queries = Side(visit.query_starts, query_length, limit)
        self.keys = Side(visit.key_starts, key_length, limit)
        self.pairs = self.batch * self.key_heads
        self.rows = self.group * self.queries.tile
        self.scoring = visit.scoring
        self.primitives = primitives
        self.dtype = precision.accumulation_dtype(query.dtype)
        self._nonempty, self._full = self._relations()
        carried = self.scoring.carried()
        self.stores = Carried(
            tuple(
                primitives.store(in_tiles(t, self.queries))
                for t in carried.query
            ),
            tuple(
                primitives.store(in_tiles(t, self.keys)) for t in carried.key
            ),
            carried.shared,
        )

    def store_queries(self, tensor: Tensor, fill: float = 0.0) -> Any:
        """(B, H, Q, ...) -> a store of tiles (N, G, q, ...)."""
        rest = tuple(ops.shape(tensor)[3:])
        side = self.queries
        tensor = ops.reshape(
            side.cut(tensor, 2, fill),
            (self.pairs, self.group, side.count, side.tile, *rest),
        )
        return self.primitives.store(tensor, axis=2)

    def no_queries(self, *rest: Any) -> Any:
        """A store of the same tiles, all zeros, to be written."""
        side = self.queries
        shape = (self.pairs, self.group, side.count, side.tile, *rest)
        return self.primitives.store(ops.zeros(shape, dtype=self.dtype), axis=2)

    def read_queries(self, store: Any, index: Any) -> Tensor:
        """(N, r, ...): a tile, its groups side by side."""
        tile = self.primitives.read(store, index, axis=2)
        rest = tuple(ops.shape(tile)[3:])
        return ops.reshape(tile, (self.pairs, self.rows, *rest))

    def write_queries(self, store: Any, index: Any, tile: Tensor) -> Any:
        rest = tuple(ops.shape(tile)[2:])
        tile = ops.reshape(
            tile, (self.pairs, self.group, self.queries.tile, *rest)
        )
        return self.primitives.write(store, index, tile, axis=2)

    def join_queries(self, store: Any) -> Tensor:
        """(B, H, Q, ...): the tiles of a store."""
        tiles = self.primitives.stacked(store, axis=2)
        rest = tuple(ops.shape(tiles)[4:])
        side = self.queries
        tiles = ops.reshape(
            tiles, (self.batch, self.heads, side.count, side.tile, *rest)
        )
        return side.join(tiles, 2)

    def no_turned(self, depth: Any) -> Any:
        """A store of tiles (N, D, r), all zeros, to be added to."""
        side = self.queries
        shape = self.pairs, depth, self.group, side.count, side.tile
        return self.primitives.store(ops.zeros(shape, dtype=self.dtype), axis=3)

    def add_turned(self, store: Any, index: Any, tile: Tensor) -> Any:
        old = self.primitives.read(store, index, axis=3)
        tile = old + ops.reshape(tile, ops.shape(old))
        return self.primitives.write(store, index, tile, axis=3)

    def join_turned(self, store: Any) -> Tensor:
        """(B, H, Q, D): the tiles of a store, turned."""
        tiles, side = self.primitives.stacked(store, axis=3), self.queries
        depth = ops.shape(tiles)[1]
        tiles = ops.reshape(
            ops.transpose(tiles, (0, 2, 3, 4, 1)),
            (self.batch, self.heads, side.count, side.tile, depth),
        )
        return side.join(tiles, 2)

    def store_keys(self, tensor: Tensor) -> Any:
        """(B, K, S, D) -> a store of tiles (N, s, D)."""
        side, depth = self.keys, ops.shape(tensor)[3]
        tensor = ops.reshape(
            side.cut(tensor, 2), (self.pairs, side.count, side.tile, depth)
        )
        return self.primitives.store(tensor, axis=1)

    def no_keys(self, depth: Any) -> Any:
        """A store of the same tiles, all zeros, to be written."""
        shape = self.pairs, self.keys.count, self.keys.tile, depth
        return self.primitives.store(ops.zeros(shape, dtype=self.dtype), axis=1)

    def join_keys(self, store: Any) -> Tensor:
        """(B, K, S, D): the tiles of a store."""
        tiles, side = self.primitives.stacked(store, axis=1), self.keys
        depth = ops.shape(tiles)[3]
        shape = self.batch, self.key_heads, side.count, side.tile, depth
        return side.join(ops.reshape(tiles, shape), 2)

    def needed(self, turned: bool = False) -> Needed:
        """The tiles of keys that each tile of queries has pairs with; if
        `turned` which tiles of queries each tile of keys has pairs with."""
        counts = self.queries.count, self.keys.count
        return schedule.needed(self._nonempty, counts, turned)

    def full(self, query_index: Any, key_index: Any) -> Any:
        """True if every pair of a tile is allowed."""
        return self._pick(self._full, query_index, key_index)

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
            turn = precision.tanh(products / scoring.soft_cap)
            products = turn * scoring.soft_cap
            derivative = 1.0 - turn * turn
        extra = None
        if scoring.slopes is not None:
            slopes = self._by_row(ops.cast(scoring.slopes, self.dtype))
            extra = -slopes[:, :, None] * self.distances(i, j)
        if scoring.bias is not None:
            bias = columns(self._tile(i, j).bias, self.keys.positions(j))
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
        heads = dropout.first_head + ops.arange(self.heads, dtype="int32")
        kept = random_bits.keep(
            dropout.seed,
            [
                ops.reshape(batch, (-1, 1, 1, 1)),
                ops.reshape(heads, (1, -1, 1, 1)),
                self.queries.positions(i)[:, None],
                self.keys.positions(j),
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
            self.queries.positions(i)[:, None] - self.keys.positions(j)[None, :]
        )
        return ops.cast(ops.tile(distance, (self.group, 1)), self.dtype)

    def allowed(self, i: Any, j: Any) -> Tensor:
        """Boolean (N or 1, r, s): the pairs of a tile that count."""
        allowed = ops.reshape(self.keys.real(j), (1, 1, 1, -1))
        if self.scoring.mask is not None:
            mask: Any = self._tile(i, j).mask
            allowed = ops.logical_and(
                allowed,
                mask.allowed(self.queries.positions(i), self.keys.positions(j)),
            )
        return self._as_rows(allowed)

    def grad_bias(self, grad_scores: Tensor) -> Tensor:
        """(N, s, r) -> (B or 1, q, H or 1, s): one tile of the gradient."""
        bias: Any = self.scoring.bias
        bias_batch, _, bias_heads, _ = bias.shape
        rows, columns = self.queries.tile, self.keys.tile
        tile = ops.reshape(
            grad_scores,
            (self.batch, self.key_heads, columns, self.group, rows),
        )
        tile = ops.reshape(
            ops.transpose(tile, (0, 4, 1, 3, 2)),
            (self.batch, rows, self.heads, columns),
        )
        if bias_batch == 1:
            tile = ops.sum(tile, axis=0, keepdims=True)
        return ops.sum(tile, axis=2, keepdims=True) if bias_heads == 1 else tile

    def join_bias(self, tiles: Tensor) -> Tensor:
        """(query tiles * key tiles, B', q, H', s) -> (B', Q, H', S)."""
        _, batch, _, heads, _ = ops.shape(tiles)
        rows, columns = self.queries, self.keys
        tiles = ops.reshape(
            tiles,
            (rows.count, columns.count, batch, rows.tile, heads, columns.tile),
        )
        tiles = ops.transpose(tiles, (2, 0, 3, 4, 1, 5))
        return columns.join(rows.join(tiles, 1), 3)

    def by_head(self, rows: Tensor) -> Tensor:
        """(N, r) -> (H,): the sum over samples and queries."""
        rows = ops.reshape(
            rows, (self.batch, self.key_heads, self.group, self.queries.tile)
        )
        return ops.reshape(ops.sum(rows, axis=(0, 3)), (self.heads,))

    def _by_row(self, by_head: Tensor) -> Tensor:
        """(H,) -> (N, r)."""
        return ops.reshape(
            ops.broadcast_to(
                ops.reshape(by_head, (1, self.key_heads, self.group, 1)),
                (self.batch, self.key_heads, self.group, self.queries.tile),
            ),
            (self.pairs, self.rows),
        )

    def _as_rows(self, tile: Tensor) -> Tensor:
        """Reshape what broadcasts to (B, H, q, s) -> (N or 1, r, s)."""
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
            (batch, key_heads, self.group, self.queries.tile, self.keys.tile),
        )
        return ops.reshape(tile, (batch * key_heads, self.rows, self.keys.tile))

    def _tile(self, i: Any, j: Any) -> Scoring:
        """The scoring over the tensors of one tile."""
        read = self.primitives.read
        return self.scoring.replace(
            self.stores._replace(
                query=tuple(read(t, i) for t in self.stores.query),
                key=tuple(read(t, j) for t in self.stores.key),
            )
        )

    def _relations(self) -> tuple[Any, Any]:
        """`relation` of every tile at once: bools, or arrays that broadcast
        to (query tiles, key tiles)."""
        unpadded, mask = self.keys.unpadded, self.scoring.mask
        if mask is None:
            return True, unpadded
        nonempty, full = relations(mask, self.queries, self.keys)
        return nonempty, full if unpadded else False

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


def _turned(tile: Tensor) -> Tensor:
    return ops.swapaxes(tile, 1, 2)
