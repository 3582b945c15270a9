"""Attention of one visit in Triton, written in Pallas.

FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithms 1 and 2), with what a
ring needs: results in float32, a log-sum-exp and a delta of the whole
sequence in the backward, and masks by global positions, which may be known
on the device only. How far a mask reaches bounds the loops.

Legend: B batch, H query heads, K key/value heads, G = H / K, Q and S query
and key lengths, multiples of the tiles q and s; D and E the head dimensions
of query/key and of value, powers of two. Lengths, tiles and widths of less
are padded before.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from keras_ring.masks import Carried, Mask

Ref = Any

# As far as everything: a longer reach added to a position may not be int32.
_FAR = 2**30


@dataclasses.dataclass(frozen=True)
class Program:
    """One visit, as far as it is known before anything runs.

    Attributes:
        mask: of the visit, or None; a program reads the tensors that it is
            given, and of those that the mask has only counts them.
        scale: factor on the products.
        tiles: q, s.
        lengths: queries and keys without padding.
        options: of `pallas_call`.
    """

    mask: Mask | None
    scale: float
    tiles: tuple[int, int]
    lengths: tuple[int, int]
    options: dict[str, Any]

    def forward(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        carried: Sequence[jax.Array],
        starts: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Attention over the visiting keys alone.

        Args:
            query: (B, H, Q, D).
            key: (B, K, S, D).
            value: (B, K, S, E).
            carried: int32 (B, Q), those of the mask that stay with the
                queries, then (B, S).
            starts: int32 (2,), the global positions of both sides.

        Returns:
            float32 (B, H, Q, E) and (B, H, Q).
        """
        batch, heads, rows, _ = query.shape
        tile = self.tiles[0]
        out, lse = pl.pallas_call(
            functools.partial(_forward, self),
            grid=(rows // tile, batch, heads),
            in_specs=[
                _whole(starts),
                _rows(query, tile),
                *self._visiting(heads, key, value),
                *(_sample(tensor) for tensor in carried),
            ],
            out_specs=[_rows(value, tile), _rows(None, tile)],
            out_shape=[
                _float32(batch, heads, rows, value.shape[3]),
                _float32(batch, heads, rows),
            ],
            name="ring_attention_forward",
            **self.options,
        )(starts, query, key, value, *carried)
        return out, lse

    def backward(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        grad_out: jax.Array,
        carried: Sequence[jax.Array],
        starts: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Compute what the visit adds to the gradients.

        Args:
            query: (B, H, Q, D).
            key: (B, K, S, D).
            value: (B, K, S, E).
            lse: float32 (B, H, Q); `inf` for a row that sees nothing.
            delta: float32 (B, H, Q).
            grad_out: (B, H, Q, E), dtype of the query.
            carried: see `forward`.
            starts: see `forward`.

        Returns:
            float32 (B, H, Q, D), (B, K, S, D), (B, K, S, E).
        """
        batch, heads, rows, _ = query.shape
        _, key_heads, columns, _ = key.shape
        tensors = starts, query, key, value, lse, delta, grad_out, *carried
        above = [_sample(tensor) for tensor in carried]
        tile = self.tiles[0]
        grad_query = pl.pallas_call(
            functools.partial(_grad_query, self),
            grid=(rows // tile, batch, heads),
            in_specs=[
                _whole(starts),
                _rows(query, tile),
                *self._visiting(heads, key, value),
                _rows(None, tile),
                _rows(None, tile),
                _rows(grad_out, tile),
                *above,
            ],
            out_specs=_rows(query, tile),
            out_shape=_float32(*query.shape),
            name="ring_attention_grad_query",
            **self.options,
        )(*tensors)
        tile, group = self.tiles[1], heads // key_heads
        grad_key, grad_value = pl.pallas_call(
            functools.partial(_grad_keys, self, group),
            grid=(columns // tile, batch, key_heads),
            in_specs=[
                _whole(starts),
                _group(query, group),
                _rows(key, tile),
                _rows(value, tile),
                _group(lse, group),
                _group(delta, group),
                _group(grad_out, group),
                *above,
            ],
            out_specs=[_rows(key, tile), _rows(value, tile)],
            out_shape=[_float32(*key.shape), _float32(*value.shape)],
            name="ring_attention_grad_keys",
            **self.options,
        )(*tensors)
        return grad_query, grad_key, grad_value

    def _visiting(self, heads: int, *tensors: jax.Array) -> Iterator[Any]:
        """All keys of the head that a query head belongs to."""
        for tensor in tensors:
            group = heads // tensor.shape[1]
            yield pl.BlockSpec(
                (None, None, *tensor.shape[2:]),
                lambda i, b, h, group=group: (b, lax.div(h, group), 0, 0),
            )

    def columns(self, starts: Ref, row: Any) -> tuple[Any, Any]:
        """The tiles of keys that some query of a tile of rows may see."""
        back, ahead = _reach(self.mask)
        return _within(
            starts[0] - starts[1] + row * self.tiles[0],
            *(self.tiles[0], back, ahead),
            *(self.tiles[1], self.lengths[1]),
        )

    def rows(self, starts: Ref, column: Any) -> tuple[Any, Any]:
        """The tiles of queries that may see some key of a tile."""
        back, ahead = _reach(self.mask)
        return _within(
            starts[1] - starts[0] + column * self.tiles[1],
            *(self.tiles[1], ahead, back),
            *(self.tiles[0], self.lengths[0]),
        )

    def scores(
        self,
        query: jax.Array,
        key: jax.Array,
        starts: Ref,
        carried: Sequence[Ref],
        row: Any,
        column: Any,
    ) -> jax.Array:
        """float32 (q, s), `-inf` where a pair does not count."""
        products = product(query, key, 1, 1)
        products = products * self.scale
        places = [
            index * tile + jnp.arange(tile, dtype=jnp.int32)
            for index, tile in zip((row, column), self.tiles, strict=True)
        ]
        allowed = None
        if self.mask is not None:
            own, seen, _ = self.mask.carried()
            tensors = [
                ref[pl.ds(index * tile, tile)]
                for refs, index, tile in (
                    (carried[: len(own)], row, self.tiles[0]),
                    (carried[len(own) :], column, self.tiles[1]),
                )
                for ref in refs
            ]
            assert len(carried) == len(own) + len(seen)
            mask = self.mask.replace(
                Carried(tuple(tensors[: len(own)]), tuple(tensors[len(own) :]))
            )
            allowed = mask.tile(
                (starts[0] + places[0])[:, None],
                (starts[1] + places[1])[None, :],
                lax.div,
            )
        if self.lengths[1] % self.tiles[1]:
            real = (places[1] < self.lengths[1])[None, :]
            allowed = real if allowed is None else allowed & real
        if allowed is None:
            return products
        return jnp.where(
            jnp.broadcast_to(allowed, products.shape), products, -jnp.inf
        )


def product(
    left: jax.Array, right: jax.Array, row: int, column: int
) -> jax.Array:
    """The product over one axis of each in float32, without TF32."""
    return lax.dot_general(
        *(left, right),
        dimension_numbers=(((row,), (column,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _forward(program: Program, *refs: Ref) -> None:
    starts, query_ref, key_ref, value_ref, *carried, out_ref, lse_ref = refs
    row, (rows, columns) = pl.program_id(0), program.tiles
    query = query_ref[...]

    def visit(column: Any, state: Any) -> Any:
        top, total, acc = state
        seen = pl.ds(column * columns, columns)
        scores = program.scores(
            query, key_ref[seen, :], starts, carried, row, column
        )
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        reference = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        p = jnp.exp(scores - reference[:, None])
        decay = jnp.exp(top - reference)
        value = value_ref[seen, :]
        acc = acc * decay[:, None] + product(p.astype(value.dtype), value, 1, 0)
        return new_top, total * decay + jnp.sum(p, axis=1), acc

    top, total, acc = lax.fori_loop(
        *program.columns(starts, row),
        visit,
        (
            jnp.full((rows,), -jnp.inf, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            jnp.zeros((rows, value_ref.shape[1]), jnp.float32),
        ),
    )
    nonempty = total > 0.0
    total = jnp.where(nonempty, total, 1.0)
    out_ref[...] = acc / total[:, None]
    lse_ref[...] = jnp.where(nonempty, top + jnp.log(total), -jnp.inf)


def _grad_query(program: Program, *refs: Ref) -> None:
    starts, query_ref, key_ref, value_ref, *refs_of_rows = refs
    lse_ref, delta_ref, grad_ref, *carried, out_ref = refs_of_rows
    row, columns = pl.program_id(0), program.tiles[1]
    query, grad_out = query_ref[...], grad_ref[...]
    lse, delta = lse_ref[...], delta_ref[...]

    def visit(column: Any, acc: jax.Array) -> jax.Array:
        seen = pl.ds(column * columns, columns)
        key = key_ref[seen, :]
        scores = program.scores(query, key, starts, carried, row, column)
        p = jnp.exp(scores - lse[:, None])
        grad_p = product(grad_out, value_ref[seen, :], 1, 1)
        grad_scores = p * (grad_p - delta[:, None])
        return acc + product(grad_scores.astype(key.dtype), key, 1, 0)

    zeros = jnp.zeros(query_ref.shape, jnp.float32)
    bounds = program.columns(starts, row)
    out_ref[...] = lax.fori_loop(*bounds, visit, zeros) * program.scale


def _grad_keys(program: Program, group: int, *refs: Ref) -> None:
    starts, query_ref, key_ref, value_ref, *refs_of_rows = refs
    lse_ref, delta_ref, grad_ref, *carried, key_out, value_out = refs_of_rows
    column, rows = pl.program_id(0), program.tiles[0]
    key, value = key_ref[...], value_ref[...]
    bounds = program.rows(starts, column)

    def of_head(head: Any, grads: Any) -> Any:
        def visit(row: Any, grads: Any) -> Any:
            grad_key, grad_value = grads
            own = pl.ds(row * rows, rows)
            query, grad_out = query_ref[head, own, :], grad_ref[head, own, :]
            scores = program.scores(query, key, starts, carried, row, column)
            p = jnp.exp(scores - lse_ref[head, own][:, None])
            grad_value += product(p.astype(grad_out.dtype), grad_out, 0, 0)
            grad_p = product(grad_out, value, 1, 1)
            grad_scores = p * (grad_p - delta_ref[head, own][:, None])
            grad_key += product(grad_scores.astype(query.dtype), query, 0, 0)
            return grad_key, grad_value

        return lax.fori_loop(*bounds, visit, grads)

    grads = tuple(
        jnp.zeros(ref.shape, jnp.float32) for ref in (key_ref, value_ref)
    )
    if group == 1:
        grad_key, grad_value = of_head(0, grads)
    else:
        grad_key, grad_value = lax.fori_loop(0, group, of_head, grads)
    key_out[...] = grad_key * program.scale
    value_out[...] = grad_value


def _whole(tensor: jax.Array) -> Any:
    return pl.BlockSpec(tensor.shape, lambda i, b, h: (0,) * tensor.ndim)


def _sample(tensor: jax.Array) -> Any:
    """All of a sample's (B, length)."""
    return pl.BlockSpec((None, tensor.shape[1]), lambda i, b, h: (b, 0))


def _rows(tensor: jax.Array | None, tile: int) -> Any:
    """A tile of a head's (B, heads, length, width), or of (B, H, length)."""
    if tensor is None:
        return pl.BlockSpec((None, None, tile), lambda i, b, h: (b, h, i))
    return pl.BlockSpec(
        (None, None, tile, tensor.shape[3]), lambda i, b, h: (b, h, i, 0)
    )


def _group(tensor: jax.Array, group: int) -> Any:
    """All rows of the query heads that share a key head."""
    rest = (0,) * (tensor.ndim - 2)
    return pl.BlockSpec(
        (None, group, *tensor.shape[2:]), lambda i, b, h: (b, h, *rest)
    )


def _float32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _within(
    first: Any, size: int, back: float, ahead: float, tile: int, length: int
) -> tuple[Any, Any]:
    """Tiles of one side that a tile of the other may reach.

    Args:
        first: where the other tile begins, counted from this side's start.
        size: of the other tile.
        back: how far before itself a position of it may reach.
        ahead: how far after itself.
        tile: size of the tiles of this side.
        length: of this side.
    """
    low: Any = jnp.int32(0)
    high: Any = jnp.int32(-(-length // tile))
    if back < _FAR:
        low = lax.div(jnp.maximum(first - int(back), 0), jnp.int32(tile))
    if ahead < _FAR:
        end = jnp.maximum(first + size + int(ahead), 0)
        high = jnp.minimum(high, lax.div(end + (tile - 1), jnp.int32(tile)))
    return low, high


def _reach(mask: Mask | None) -> tuple[float, float]:
    return (math.inf, math.inf) if mask is None else mask.reach()
