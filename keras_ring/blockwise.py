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

from typing import Any

from keras import ops

from keras_ring import numerics
from keras_ring.kernel import BlockGradients, Kernel
from keras_ring.numerics import Partial
from keras_ring.primitives import Primitives
from keras_ring.tiling import Block, Tiling

Tensor = Any


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
        block: where the chunks lie, and what makes the scores.

    Returns:
        `Partial` with `out` (B, H, Q, E) and `lse` (B, H, Q).
    """
    tiling = Tiling(primitives, query, key, block)
    dtype = tiling.dtype
    read, write = primitives.read, primitives.write
    scaled = ops.cast(query, dtype) * block.scoring.scale
    queries = primitives.store(tiling.cut_queries(scaled))
    keys = primitives.store(tiling.cut_keys(key))
    values = primitives.store(tiling.cut_keys(value))
    rows = (tiling.pairs, tiling.rows)
    value_dim = ops.shape(value)[3]

    def query_tile(i, stores):
        query_i = read(queries, i)

        def visit(j, state):
            some, every = tiling.relation(i, j)

            def compute(masked):
                top, total, acc = state
                scores, _ = tiling.scored(
                    primitives.product("nrd,nsd->nrs", query_i, read(keys, j)),
                    *(i, j),
                    masked=masked,
                    turned=False,
                )
                new_top = numerics.larger(top, ops.max(scores, axis=-1))
                reference = ops.where(
                    ops.isinf(new_top), ops.zeros_like(new_top), new_top
                )
                p = ops.exp(scores - reference[..., None])
                decay = ops.exp(top - reference)
                total = total * decay + ops.sum(p, axis=-1)
                drop = tiling.dropped(i, j, turned=False)
                p = p if drop is None else drop(p)
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
            tiling.keys.count,
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
        tiling.queries.count,
        query_tile,
        (
            primitives.store(
                ops.zeros((tiling.queries.count, *rows, value_dim), dtype=dtype)
            ),
            primitives.store(
                ops.zeros((tiling.queries.count, *rows), dtype=dtype)
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
) -> BlockGradients:
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
        block: where the chunks lie, and what makes the scores.

    Returns:
        `BlockGradients` in the accumulation dtype.
    """
    tiling = Tiling(primitives, query, key, block)
    dtype, scoring = tiling.dtype, block.scoring
    read, write = primitives.read, primitives.write
    # A row that attends to nothing, and a row that only pads its tile, gets
    # p = exp(score - inf) = 0 everywhere.
    no_row = ops.full_like(lse, float("inf"))
    lse = ops.where(lse == -float("inf"), no_row, lse)
    scaled = ops.cast(query, dtype) * scoring.scale
    queries = primitives.store(tiling.cut_queries(scaled))
    lses = primitives.store(tiling.cut_queries(lse, fill=float("inf")))
    deltas = primitives.store(tiling.cut_queries(delta))
    grads_out = primitives.store(tiling.cut_queries(ops.cast(grad_out, dtype)))
    keys = primitives.store(tiling.cut_keys(key))
    values = primitives.store(tiling.cut_keys(value))
    pairs, rows = tiling.pairs, tiling.rows
    key_dim, value_dim = ops.shape(key)[3], ops.shape(value)[3]

    def key_tile(j, stores):
        key_j, value_j = read(keys, j), read(values, j)
        # Transposed once per tile: with it four of the five products below
        # have their operands in the order that matrix units prefer.
        key_turned = ops.swapaxes(key_j, 1, 2)

        def visit(i, state):
            some, every = tiling.relation(i, j)
            if some is False:
                return state
            grad_queries, grad_key, grad_value, extra = state

            def compute(masked):
                query_i, grad_out_i = read(queries, i), read(grads_out, i)
                scores, derivative = tiling.scored(
                    primitives.product("nsd,nrd->nsr", key_j, query_i),
                    *(i, j),
                    masked=masked,
                    turned=True,
                )
                p = ops.exp(scores - read(lses, i)[:, None])
                grad_p = primitives.product("nse,nre->nsr", value_j, grad_out_i)
                drop = tiling.dropped(i, j, turned=True)
                kept = p
                if drop is not None:
                    kept, grad_p = drop(p), drop(grad_p)
                grad_score = p * (grad_p - read(deltas, i)[:, None])
                own = {}
                if scoring.bias is not None:
                    own["bias"] = tiling.grad_bias(grad_score)
                if scoring.slopes is not None:
                    pull = grad_score * ops.swapaxes(
                        tiling.distances(i, j)[None], 1, 2
                    )
                    own["slopes"] = tiling.by_head(ops.sum(pull, axis=1))
                if derivative is not None:
                    grad_score = grad_score * derivative
                return (
                    primitives.product("nds,nsr->ndr", key_turned, grad_score),
                    grad_key
                    + primitives.product("nsr,nrd->nsd", grad_score, query_i),
                    grad_value
                    + primitives.product("nsr,nre->nse", kept, grad_out_i),
                    own,
                )

            def nothing():
                return zeros(key_dim, rows), grad_key, grad_value, no_extra()

            # Stores stay outside: a compiler may copy what passes through.
            grad_query, grad_key, grad_value, own = primitives.branch(
                some,
                lambda: primitives.branch(
                    every, lambda: compute(False), lambda: compute(True)
                ),
                nothing,
            )
            grad_queries = write(
                grad_queries, i, read(grad_queries, i) + grad_query
            )
            extra = dict(extra)
            if scoring.bias is not None:
                place = i * tiling.keys.count + j
                extra["bias"] = write(extra["bias"], place, own["bias"])
            if scoring.slopes is not None:
                extra["slopes"] = extra["slopes"] - own["slopes"]
            return grad_queries, grad_key, grad_value, extra

        grad_queries, grad_keys, grad_values, extra = stores
        grad_queries, grad_key, grad_value, extra = primitives.loop(
            tiling.queries.count,
            visit,
            (
                grad_queries,
                zeros(tiling.keys.tile, key_dim),
                zeros(tiling.keys.tile, value_dim),
                extra,
            ),
        )
        return (
            grad_queries,
            write(grad_keys, j, grad_key),
            write(grad_values, j, grad_value),
            extra,
        )

    def zeros(*shape):
        """Of one tile, for each sample and key head."""
        return ops.zeros((pairs, *shape), dtype=dtype)

    def no_extra():
        """The other gradients of a tile in which no pair counts."""
        none = {}
        if scoring.bias is not None:
            batch, _, heads, _ = ops.shape(scoring.bias)
            tile = (batch, tiling.queries.tile, heads, tiling.keys.tile)
            none["bias"] = ops.zeros(tile, dtype=dtype)
        if scoring.slopes is not None:
            none["slopes"] = ops.zeros((tiling.heads,), dtype=dtype)
        return none

    def store(count, tile):
        return primitives.store(
            ops.zeros((count, *ops.shape(tile)), dtype=dtype)
        )

    extra = no_extra()
    if scoring.bias is not None:
        count = tiling.queries.count * tiling.keys.count
        extra["bias"] = store(count, extra["bias"])
    grad_queries, grad_keys, grad_values, extra = primitives.loop(
        tiling.keys.count,
        key_tile,
        (
            store(tiling.queries.count, zeros(key_dim, rows)),
            store(tiling.keys.count, zeros(tiling.keys.tile, key_dim)),
            store(tiling.keys.count, zeros(tiling.keys.tile, value_dim)),
            extra,
        ),
    )
    grad_query = ops.swapaxes(primitives.stacked(grad_queries), 2, 3)
    bias = None
    if scoring.bias is not None:
        bias = tiling.join_bias(primitives.stacked(extra["bias"]))
    return BlockGradients(
        tiling.join_queries(grad_query) * scoring.scale,
        tiling.join_keys(primitives.stacked(grad_keys)),
        tiling.join_keys(primitives.stacked(grad_values)),
        bias,
        extra.get("slopes"),
    )


class BlockwiseKernel(Primitives, Kernel):
    """The reference among a backend's kernels: takes everything, anywhere."""

    name = "blockwise"

    def available(
        self, device: str | None = None, dtype: str | None = None
    ) -> bool:
        return True

    def rounds(self, dtype: str) -> bool:
        return False

    def block_forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> Partial:
        return block_forward(self, query, key, value, block)

    def block_backward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        delta: Tensor,
        grad_out: Tensor,
        block: Block,
    ) -> BlockGradients:
        del out  # Already in delta.
        return block_backward(
            self, query, key, value, lse, delta, grad_out, block
        )
