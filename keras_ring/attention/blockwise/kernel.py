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

from keras_ring import precision
from keras_ring.attention import numerics
from keras_ring.attention.blockwise.primitives import Primitives
from keras_ring.attention.blockwise.tiles import Tiling
from keras_ring.attention.kernel import (
    Gradients,
    Inputs,
    Kernel,
    Rows,
    merged,
    summed,
)
from keras_ring.attention.numerics import Partial
from keras_ring.attention.visit import Visit

Tensor = Any


def forward_alone(
    primitives: Primitives, inputs: Inputs, visit: Visit
) -> Partial:
    """Attention of the queries over the keys of one block alone.

    Args:
        primitives: the framework's control flow.
        inputs: query (B, H, Q, D), key (B, K, S, D), value (B, K, S, E).
        visit: where they lie, and what makes the scores.

    Returns:
        `Partial` with `out` (B, H, Q, E) and `lse` (B, H, Q).
    """
    query, key, value = inputs
    tiling = Tiling(primitives, query, key, visit)
    dtype = tiling.dtype
    scaled = ops.cast(query, dtype) * visit.scoring.scale
    queries = tiling.store_queries(scaled)
    keys, values = tiling.store_keys(key), tiling.store_keys(value)
    needed = tiling.needed()
    rows = (tiling.pairs, tiling.rows)
    value_dim = ops.shape(value)[3]

    def query_tile(i, stores):
        query_i = tiling.read_queries(queries, i)
        count, key_tile = needed.of(i)

        def meet(number, state):
            j = key_tile(number)
            top, total, acc = state

            def compute(masked):
                key_j = primitives.read(keys, j, axis=1)
                scores, _ = tiling.scored(
                    primitives.product("nrd,nsd->nrs", query_i, key_j),
                    *(i, j),
                    masked=masked,
                    turned=False,
                )
                new_top = precision.larger(top, ops.max(scores, axis=-1))
                reference = ops.where(
                    ops.isinf(new_top), ops.zeros_like(new_top), new_top
                )
                p = ops.exp(scores - reference[..., None])
                decay = ops.exp(top - reference)
                new_total = total * decay + ops.sum(p, axis=-1)
                drop = tiling.dropped(i, j, turned=False)
                p = p if drop is None else drop(p)
                value_j = primitives.read(values, j, axis=1)
                new_acc = acc * decay[..., None] + primitives.product(
                    "nrs,nse->nre", p, value_j
                )
                return new_top, new_total, new_acc

            return primitives.branch(
                tiling.full(i, j),
                lambda: compute(False),
                lambda: compute(True),
            )

        top, total, acc = primitives.loop(
            count,
            meet,
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
        return (
            tiling.write_queries(outs, i, acc / total[..., None]),
            tiling.write_queries(lses, i, lse),
        )

    outs, lses = primitives.loop(
        tiling.queries.count,
        query_tile,
        (tiling.no_queries(value_dim), tiling.no_queries()),
    )
    return Partial(tiling.join_queries(outs), tiling.join_queries(lses))


def backward_alone(
    primitives: Primitives, inputs: Inputs, rows: Rows, visit: Visit
) -> Gradients:
    """Gradients that one block contributes.

    The log-sum-exp and `delta` of the rows belong to attention over all keys
    of the sequence, so `p = exp(score - lse)` are the final probabilities and
    the contributions of the blocks simply add up.

    Args:
        primitives: the framework's control flow.
        inputs: query (B, H, Q, D), key (B, K, S, D), value (B, K, S, E).
        rows: lse (B, H, Q), delta (B, H, Q), grad_out (B, H, Q, E); what
            `out` says is in `delta` already.
        visit: where the operands lie, and what makes the scores.

    Returns:
        `Gradients` in the accumulation dtype.
    """
    query, key, value = inputs
    lse = rows.lse
    tiling = Tiling(primitives, query, key, visit)
    dtype, scoring = tiling.dtype, visit.scoring
    read, write = primitives.read, primitives.write
    # A row that only pads its tile is one that attends to nothing, too.
    lse = numerics.without_empty_rows(lse)
    scaled = ops.cast(query, dtype) * scoring.scale
    queries = tiling.store_queries(scaled)
    lses = tiling.store_queries(lse, fill=float("inf"))
    deltas = tiling.store_queries(rows.delta)
    grads_out = tiling.store_queries(ops.cast(rows.grad_out, dtype))
    keys, values = tiling.store_keys(key), tiling.store_keys(value)
    needed = tiling.needed(turned=True)
    pairs = tiling.pairs
    key_dim, value_dim = ops.shape(key)[3], ops.shape(value)[3]

    def key_tile(j, stores):
        key_j, value_j = read(keys, j, axis=1), read(values, j, axis=1)
        # Transposed once per tile: with it four of the five products below
        # have their operands in the order that matrix units prefer.
        key_turned = ops.swapaxes(key_j, 1, 2)
        count, query_tile = needed.of(j)

        def meet(number, state):
            i = query_tile(number)
            grad_queries, grad_key, grad_value, extra = state

            def compute(masked):
                query_i, grad_out_i = (
                    tiling.read_queries(t, i) for t in (queries, grads_out)
                )
                scores, derivative = tiling.scored(
                    primitives.product("nsd,nrd->nsr", key_j, query_i),
                    *(i, j),
                    masked=masked,
                    turned=True,
                )
                p = ops.exp(scores - tiling.read_queries(lses, i)[:, None])
                grad_p = primitives.product("nse,nre->nsr", value_j, grad_out_i)
                drop = tiling.dropped(i, j, turned=True)
                kept = p
                if drop is not None:
                    kept, grad_p = drop(p), drop(grad_p)
                grad_score = p * (
                    grad_p - tiling.read_queries(deltas, i)[:, None]
                )
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

            # Stores stay outside: a compiler may copy what passes through.
            grad_query, grad_key, grad_value, own = primitives.branch(
                tiling.full(i, j),
                lambda: compute(False),
                lambda: compute(True),
            )
            grad_queries = tiling.add_turned(grad_queries, i, grad_query)
            extra = dict(extra)
            if scoring.bias is not None:
                place = i * tiling.keys.count + j
                extra["bias"] = write(extra["bias"], place, own["bias"])
            if scoring.slopes is not None:
                extra["slopes"] = extra["slopes"] - own["slopes"]
            return grad_queries, grad_key, grad_value, extra

        grad_queries, grad_keys, grad_values, extra = stores
        grad_queries, grad_key, grad_value, extra = primitives.loop(
            count,
            meet,
            (
                grad_queries,
                zeros(tiling.keys.tile, key_dim),
                zeros(tiling.keys.tile, value_dim),
                extra,
            ),
        )
        return (
            grad_queries,
            write(grad_keys, j, grad_key, axis=1),
            write(grad_values, j, grad_value, axis=1),
            extra,
        )

    def zeros(*shape):
        """Of one tile, for each sample and key head."""
        return ops.zeros((pairs, *shape), dtype=dtype)

    extra: dict[str, Any] = {}
    if scoring.bias is not None:
        batch, _, heads, _ = ops.shape(scoring.bias)
        count = tiling.queries.count * tiling.keys.count
        tile = batch, tiling.queries.tile, heads, tiling.keys.tile
        extra["bias"] = primitives.store(ops.zeros((count, *tile), dtype=dtype))
    if scoring.slopes is not None:
        extra["slopes"] = ops.zeros((tiling.heads,), dtype=dtype)
    grad_queries, grad_keys, grad_values, extra = primitives.loop(
        tiling.keys.count,
        key_tile,
        (
            tiling.no_turned(key_dim),
            tiling.no_keys(key_dim),
            tiling.no_keys(value_dim),
            extra,
        ),
    )
    bias = None
    if scoring.bias is not None:
        bias = tiling.join_bias(primitives.stacked(extra["bias"]))
    return Gradients(
        tiling.join_turned(grad_queries) * scoring.scale,
        tiling.join_keys(grad_keys),
        tiling.join_keys(grad_values),
        bias,
        extra.get("slopes"),
    )


class BlockwiseKernel(Primitives, Kernel):
    """The reference among a backend's kernels: takes everything, anywhere."""

    name = "blockwise"
    description = "the reference in this package's own loops, for everything"

    def available(self) -> bool:
        return True

    def preferred(self, device: str | None, dtype: str) -> bool:
        return True

    def device(self, tensor: Tensor) -> str | None:
        """Kind of device that a tensor lies on; None where nobody knows."""
        return None

    def forward(
        self, inputs: Inputs, visit: Visit, carry: Partial | None
    ) -> Partial:
        return merged(carry, self.forward_alone(inputs, visit))

    def backward(
        self, inputs: Inputs, rows: Rows, visit: Visit, carry: Tensor | None
    ) -> Gradients:
        return summed(carry, self.backward_alone(inputs, rows, visit))

    def forward_alone(self, inputs: Inputs, visit: Visit) -> Partial:
        """Call `forward_alone`; a backend may make a program of it."""
        return forward_alone(self, inputs, visit)

    def backward_alone(
        self, inputs: Inputs, rows: Rows, visit: Visit
    ) -> Gradients:
        """Call `backward_alone`; a backend may make a program of it."""
        return backward_alone(self, inputs, rows, visit)
