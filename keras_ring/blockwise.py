"""Attention of one chunk of queries over one chunk of keys, tile by tile.

The reference kernel: online softmax over tiles, so that no score row longer
than a tile exists, and a backward that recomputes the probabilities from
the log-sum-exp (Rabe and Staats 2021, arXiv 2112.05682; Dao et al. 2022,
arXiv 2205.14135, algorithms 1 and 4). Pure `keras.ops`, plus the handful of
`Primitives` in which the frameworks differ: loops, branches and a store of
tiles that can be written in place.

Legend: B batch, H query heads, K key/value heads, G = H / K, N = B * K,
Q and S query and key lengths, q and s their tiles, D and E the head
dimensions of query/key and of value. Rows r = G * q: the query heads that
share one key head are further rows of the same product, so keys and values
are never repeated.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_ring import numerics
from keras_ring.masks import Mask
from keras_ring.numerics import Partial

Tensor = Any

TILE = 256


class Primitives(abc.ABC):
    """The control flow that the blockwise kernel needs of a framework."""

    @abc.abstractmethod
    def loop(self, count: Any, body: Callable, carry: Any) -> Any:
        """`for i in range(count): carry = body(i, carry)`, not unrolled
        in a compiled program. `carry` is a tuple of tensors and stores."""

    @abc.abstractmethod
    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        """Run and return one of two nullary functions, never both. A
        Python bool decides at once."""

    @abc.abstractmethod
    def store(self, tensor: Tensor) -> Any:
        """Tiles `(count, ...)` that `read` and `write` work on."""

    @abc.abstractmethod
    def read(self, store: Any, index: Any) -> Tensor:
        """Tile `index` of a store."""

    @abc.abstractmethod
    def write(self, store: Any, index: Any, tile: Tensor) -> Any:
        """The store with tile `index` replaced; the old one is not used
        again, so it may be overwritten."""

    @abc.abstractmethod
    def stacked(self, store: Any) -> Tensor:
        """The tiles of a store as one tensor `(count, ...)`."""

    @abc.abstractmethod
    def product(self, equation: str, left: Tensor, right: Tensor) -> Tensor:
        """Einsum of two tensors, accumulated and returned in the
        accumulation dtype of `left`."""


@dataclasses.dataclass(frozen=True)
class Block:
    """What a kernel must know of one visit beside the tensors.

    Attributes:
        query_start: global position of the first query; int or int32 scalar.
        key_start: global position of the first visiting key.
        scale: factor on the scores.
        mask: over the tensors of this visit, or None.
    """

    query_start: Any
    key_start: Any
    scale: float
    mask: Mask | None = None

    def relation(self, query_length: Any, key_length: Any) -> tuple[Any, Any]:
        """Whether some and whether every pair of the chunks is allowed."""
        if self.mask is None:
            return True, True
        # A symbolic dimension (JAX) does not compare with every number.
        query_length, key_length = (
            n if isinstance(n, int) else ops.convert_to_tensor(n, dtype="int32")
            for n in (query_length, key_length)
        )
        return self.mask.relation(
            (self.query_start, self.query_start + query_length - 1),
            (self.key_start, self.key_start + key_length - 1),
        )


class _Tiling:
    """The tile arithmetic of one visit: shapes, cuts and the mask of a tile."""

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
        self.block = block
        self.primitives = primitives
        mask = block.mask
        if mask is not None:
            self.query_tensors = [
                self._cut_mask(t, self.query_length, self.query_tile)
                for t in mask.query_tensors()
            ]
            self.key_tensors = [
                self._cut_mask(t, self.key_length, self.key_tile)
                for t in mask.key_tensors()
            ]

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
        ragged = not (
            isinstance(self.key_length, int)
            and self.key_length % self.key_tile == 0
        )
        if self.block.mask is None:
            return True, not ragged
        query_first = self.block.query_start + query_index * self.query_tile
        key_first = self.block.key_start + key_index * self.key_tile
        some, every = self.block.mask.relation(
            (query_first, query_first + self.query_tile - 1),
            (key_first, key_first + self.key_tile - 1),
        )
        return some, False if ragged else every

    def allowed(self, query_index: Any, key_index: Any) -> Tensor:
        """Boolean (N or 1, G * q, s): the pairs of a tile that count."""
        key_local = key_index * self.key_tile + ops.arange(
            self.key_tile, dtype="int32"
        )
        allowed = ops.reshape(
            key_local < self.key_length, (1, 1, 1, self.key_tile)
        )
        if self.block.mask is not None:
            query_positions = (
                self.block.query_start
                + query_index * self.query_tile
                + ops.arange(self.query_tile, dtype="int32")
            )
            read = self.primitives.read
            mask = self.block.mask.replace(
                tuple(read(t, query_index) for t in self.query_tensors),
                tuple(read(t, key_index) for t in self.key_tensors),
            )
            allowed = ops.logical_and(
                allowed,
                mask.allowed(query_positions, self.block.key_start + key_local),
            )
        shape = ops.shape(allowed)
        for_all = isinstance(shape[0], int) and shape[:2] == (1, 1)
        if for_all:
            batch, key_heads = 1, 1
        else:
            batch, key_heads = self.batch, self.key_heads
        if shape[1] == 1:
            allowed = allowed[:, :, None]
        else:
            allowed = ops.reshape(
                allowed,
                (shape[0], self.key_heads, self.group, *shape[2:]),
            )
        allowed = ops.broadcast_to(
            allowed,
            (batch, key_heads, self.group, self.query_tile, self.key_tile),
        )
        return ops.reshape(
            allowed,
            (
                batch * key_heads,
                self.group * self.query_tile,
                self.key_tile,
            ),
        )

    def _cut_mask(self, tensor: Tensor, length: Any, tile: int) -> Any:
        """(B, L, ...) -> store of (B, tile, ...)."""
        shape = ops.shape(tensor)
        dtype = tensor.dtype
        if "bool" in str(dtype):
            tensor = ops.cast(tensor, "int8")
        tensor = _pad(tensor, 1, length, tile, 0)
        tensor = ops.reshape(tensor, (shape[0], -1, tile, *shape[2:]))
        axes = (1, 0, *range(2, len(shape) + 1))
        return self.primitives.store(ops.transpose(tensor, axes))


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


def block_forward(
    primitives: Primitives,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: Block,
) -> Partial:
    """Attention of the queries over the visiting keys alone.

    Args:
        primitives: the framework's control flow.
        query: (B, H, Q, D).
        key: (B, K, S, D).
        value: (B, K, S, E).
        block: where the chunks lie, the scale and the mask.

    Returns:
        `Partial` with `out` (B, H, Q, E) and `lse` (B, H, Q).
    """
    dtype = numerics.accumulation_dtype(query.dtype)
    tiling = _Tiling(primitives, query, key, block)
    read, write = primitives.read, primitives.write
    scaled = ops.cast(query, dtype) * block.scale
    queries = primitives.store(tiling.cut_queries(scaled))
    keys = primitives.store(tiling.cut_keys(key))
    values = primitives.store(tiling.cut_keys(value))
    rows = (tiling.batch * tiling.key_heads, tiling.group * tiling.query_tile)
    value_dim = ops.shape(value)[3]

    def query_tile(i, stores):
        query_i = read(queries, i)

        def visit(j, state):
            some, every = tiling.relation(i, j)

            def compute(masked):
                top, total, acc = state
                scores = primitives.product(
                    "nrd,nsd->nrs", query_i, read(keys, j)
                )
                if masked:
                    scores = ops.where(
                        tiling.allowed(i, j), scores, -float("inf")
                    )
                new_top = numerics.larger(top, ops.max(scores, axis=-1))
                reference = ops.where(
                    ops.isinf(new_top), ops.zeros_like(new_top), new_top
                )
                p = ops.exp(scores - reference[..., None])
                decay = ops.exp(top - reference)
                total = total * decay + ops.sum(p, axis=-1)
                acc = acc * decay[..., None] + primitives.product(
                    "nrs,nse->nre", p, read(values, j)
                )
                return new_top, total, acc

            return primitives.branch(
                some,
                lambda: primitives.branch(
                    every, lambda: compute(False), lambda: compute(True)
                ),
                lambda: state,
            )

        top, total, acc = primitives.loop(
            tiling.key_count,
            visit,
            (
                ops.full(rows, -float("inf"), dtype=dtype),
                ops.zeros(rows, dtype=dtype),
                ops.zeros((*rows, value_dim), dtype=dtype),
            ),
        )
        empty = total == 0
        total = ops.where(empty, ops.ones_like(total), total)
        lse = ops.where(empty, top, top + ops.log(total))
        outs, lses = stores
        return write(outs, i, acc / total[..., None]), write(lses, i, lse)

    outs, lses = primitives.loop(
        tiling.query_count,
        query_tile,
        (
            primitives.store(
                ops.zeros((tiling.query_count, *rows, value_dim), dtype=dtype)
            ),
            primitives.store(
                ops.zeros((tiling.query_count, *rows), dtype=dtype)
            ),
        ),
    )
    return Partial(
        tiling.join_queries(primitives.stacked(outs)),
        tiling.join_queries(primitives.stacked(lses)),
    )


def block_backward(
    primitives: Primitives,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    block: Block,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one visit contributes to the gradients.

    `lse` and `delta` belong to attention over all keys of the sequence, so
    `p = exp(score - lse)` are the final probabilities and the contributions
    of the visits simply add up.

    Args:
        primitives: the framework's control flow.
        query: (B, H, Q, D).
        key: (B, K, S, D).
        value: (B, K, S, E).
        lse: (B, H, Q), accumulation dtype.
        delta: (B, H, Q), see `numerics.row_delta`.
        grad_out: (B, H, Q, E).
        block: where the chunks lie, the scale and the mask.

    Returns:
        `(grad_query, grad_key, grad_value)` in the accumulation dtype.
    """
    dtype = numerics.accumulation_dtype(query.dtype)
    tiling = _Tiling(primitives, query, key, block)
    read, write = primitives.read, primitives.write
    # A row that attends to nothing, and a row that only pads its tile, gets
    # p = exp(score - inf) = 0 everywhere.
    no_row = ops.full_like(lse, float("inf"))
    lse = ops.where(lse == -float("inf"), no_row, lse)
    scaled = ops.cast(query, dtype) * block.scale
    queries = primitives.store(tiling.cut_queries(scaled))
    lses = primitives.store(tiling.cut_queries(lse, fill=float("inf")))
    deltas = primitives.store(tiling.cut_queries(delta))
    grads_out = primitives.store(tiling.cut_queries(ops.cast(grad_out, dtype)))
    keys = primitives.store(tiling.cut_keys(key))
    values = primitives.store(tiling.cut_keys(value))
    pairs = tiling.batch * tiling.key_heads
    key_dim, value_dim = ops.shape(key)[3], ops.shape(value)[3]
    rows = tiling.group * tiling.query_tile

    def key_tile(j, stores):
        key_j, value_j = read(keys, j), read(values, j)
        # Transposed once per tile: with it four of the five products below
        # have their operands in the order that matrix units prefer.
        key_turned = ops.swapaxes(key_j, 1, 2)

        def visit(i, state):
            some, every = tiling.relation(i, j)

            def compute(masked):
                grad_queries, grad_key, grad_value = state
                query_i, grad_out_i = read(queries, i), read(grads_out, i)
                scores = primitives.product("nsd,nrd->nsr", key_j, query_i)
                if masked:
                    scores = ops.where(
                        ops.swapaxes(tiling.allowed(i, j), 1, 2),
                        scores,
                        -float("inf"),
                    )
                p = ops.exp(scores - read(lses, i)[:, None])
                grad_p = primitives.product("nse,nre->nsr", value_j, grad_out_i)
                grad_score = p * (grad_p - read(deltas, i)[:, None])
                grad_value = grad_value + primitives.product(
                    "nsr,nre->nse", p, grad_out_i
                )
                grad_key = grad_key + primitives.product(
                    "nsr,nrd->nsd", grad_score, query_i
                )
                grad_query = primitives.product(
                    "nds,nsr->ndr", key_turned, grad_score
                )
                grad_queries = write(
                    grad_queries, i, read(grad_queries, i) + grad_query
                )
                return grad_queries, grad_key, grad_value

            return primitives.branch(
                some,
                lambda: primitives.branch(
                    every, lambda: compute(False), lambda: compute(True)
                ),
                lambda: state,
            )

        grad_queries, grad_keys, grad_values = stores
        grad_queries, grad_key, grad_value = primitives.loop(
            tiling.query_count,
            visit,
            (
                grad_queries,
                ops.zeros((pairs, tiling.key_tile, key_dim), dtype=dtype),
                ops.zeros((pairs, tiling.key_tile, value_dim), dtype=dtype),
            ),
        )
        return (
            grad_queries,
            write(grad_keys, j, grad_key),
            write(grad_values, j, grad_value),
        )

    def zeros(*shape):
        return primitives.store(ops.zeros(shape, dtype=dtype))

    grad_queries, grad_keys, grad_values = primitives.loop(
        tiling.key_count,
        key_tile,
        (
            zeros(tiling.query_count, pairs, key_dim, rows),
            zeros(tiling.key_count, pairs, tiling.key_tile, key_dim),
            zeros(tiling.key_count, pairs, tiling.key_tile, value_dim),
        ),
    )
    grad_query = ops.swapaxes(primitives.stacked(grad_queries), 2, 3)
    return (
        tiling.join_queries(grad_query) * block.scale,
        tiling.join_keys(primitives.stacked(grad_keys)),
        tiling.join_keys(primitives.stacked(grad_values)),
    )
