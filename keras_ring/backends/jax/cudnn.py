"""The attention of NVIDIA's cuDNN on GPUs, as JAX has it.

JAX's `dot_product_attention` returns the log-sum-exp, but its gradient takes
none that belongs to a longer sequence, which is what a ring needs (Dao et
al. 2022, arXiv 2205.14135, algorithms 1 and 4). The private operations behind
it do. Their presence is checked here, their results in
`keras_ring.kernels`. They compute in half precision, round each partial
result to it, and want widths that are multiples of 8.

Positions are traced, so what a visit is - nothing, whole, or the square on
the diagonal of a causal mask - is decided on the device, and each is a branch
of the program. What is none of these, or cannot be computed so at all, is
left to another kernel.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from keras_ring import numerics
from keras_ring.attention import Kernel
from keras_ring.backends.jax import local
from keras_ring.blockwise import BlockGradients
from keras_ring.masks import Causal
from keras_ring.numerics import Partial
from keras_ring.tiling import Block

try:
    from jax._src.cudnn import fused_attention_stablehlo as private

    FORWARD = private._dot_product_attention_fwd_p_wrapper
    BACKWARD = private._dot_product_attention_bwd_p_wrapper
    FULL = private.MaskType.NO_MASK
    CAUSAL = private.MaskType.CAUSAL
    HEADS_FIRST = private.AttentionLayout.BNTH.value
except (ImportError, AttributeError):  # Another release of JAX.
    FORWARD = BACKWARD = FULL = CAUSAL = HEADS_FIRST = None

HALF = ("float16", "bfloat16")
WIDEST, MULTIPLE = 128, 8


class CuDnnKernel:
    """cuDNN where it fits, another kernel where it does not.

    Args:
        otherwise: computes the visits that do not fit.

    Legend: B batch, H query heads, K key/value heads, Q and S query and key
    lengths, D and E the head dimensions of query/key and of value, W the
    width that all tensors of a call have.
    """

    name = "cudnn"

    def __init__(self, otherwise: Kernel):
        self.otherwise = otherwise

    def available(
        self, device: str | None = None, dtype: str | None = None
    ) -> bool:
        return (
            FORWARD is not None
            and (device or local.platform()) == "gpu"
            and dtype in (None, *HALF)
        )

    def rounds(self, dtype: str) -> bool:
        return dtype in HALF

    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        return self.otherwise.branch(predicate, yes, no)

    def block_forward(
        self, query: jax.Array, key: jax.Array, value: jax.Array, block: Block
    ) -> Partial:
        if not self._fits(query, key, value, block):
            return self.otherwise.block_forward(query, key, value, block)
        rows = []
        for row, queries in enumerate(_parts(query, block.query_starts)):
            found = None
            for column in range(len(block.key_starts)):
                keys, values = (
                    _parts(t, block.key_starts)[column] for t in (key, value)
                )
                part = self._forward(
                    queries, keys, values, _part(block, row, column)
                )
                found = part if found is None else numerics.merge(found, part)
            rows.append(found)
        return Partial(
            *(
                parts[0] if len(parts) == 1 else jnp.concatenate(parts, 2)
                for parts in zip(*rows, strict=True)
            )
        )

    def block_backward(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        out: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        grad_out: jax.Array,
        block: Block,
    ) -> BlockGradients:
        if not self._fits(query, key, value, block):
            return self.otherwise.block_backward(
                query, key, value, out, lse, delta, grad_out, block
            )
        by_row = [
            _parts(t, block.query_starts)
            for t in (query, out, lse, delta, grad_out)
        ]
        by_column = [_parts(t, block.key_starts) for t in (key, value)]
        grads: dict[tuple[str, int], Any] = {}
        for row, (own, *rest) in enumerate(zip(*by_row, strict=True)):
            for column, seen in enumerate(zip(*by_column, strict=True)):
                tensors: list[Any] = [own, *seen, *rest]
                share = self._backward(tensors, _part(block, row, column))
                for name, grad in (
                    (("query", row), share.query),
                    (("key", column), share.key),
                    (("value", column), share.value),
                ):
                    have = grads.get(name)
                    grads[name] = grad if have is None else have + grad
        whole = (
            [grad for (own, _), grad in sorted(grads.items()) if own == name]
            for name in ("query", "key", "value")
        )
        return BlockGradients(
            *(
                parts[0] if len(parts) == 1 else jnp.concatenate(parts, 2)
                for parts in whole
            )
        )

    def _fits(
        self, query: jax.Array, key: jax.Array, value: jax.Array, block: Block
    ) -> bool:
        """Whether cuDNN may be able to compute a visit."""
        scoring, mask = block.scoring, block.scoring.mask
        sizes = (*query.shape, *key.shape, *value.shape)
        return (
            self.available(dtype=str(query.dtype))
            and all(isinstance(size, int) and size for size in sizes)
            and max(query.shape[3], value.shape[3]) <= WIDEST
            and scoring.scale > 0
            and scoring.soft_cap is None
            and scoring.bias is None
            and scoring.slopes is None
            and scoring.dropout is None
            # What a mask carries would be masked pair by pair.
            and (mask is None or not any(mask.carried()))
        )

    def _kinds(self, block: Block, queries: int, keys: int) -> Any:
        """What a part of a visit is: nothing, whole, a causal square or
        anything else, as the number of a branch, which may be traced."""
        some, every = block.relation(queries, keys)
        square: Any = False
        if isinstance(block.scoring.mask, Causal) and queries == keys:
            square = block.query_starts[0] == block.key_starts[0]
        whole = [not_traced(t) for t in (some, every, square)]
        if all(known is not None for known in whole):
            some, every, square = whole
            number: Any = 1 if every else 0 if not some else 2 if square else 3
        else:
            number = jnp.where(
                every,
                1,
                jnp.where(jnp.logical_not(some), 0, jnp.where(square, 2, 3)),
            )
        return number

    def _switched(
        self,
        block: Block,
        queries: int,
        keys: int,
        nothing: Callable[[], Any],
        fused: Callable[[Any], Any],
        otherwise: Callable[[], Any],
    ) -> Any:
        number = self._kinds(block, queries, keys)
        branches = (
            nothing,
            lambda: fused(FULL),
            lambda: fused(CAUSAL),
            otherwise,
        )
        if isinstance(number, int):
            return branches[number]()
        return lax.switch(number, branches)

    def _forward(
        self, query: jax.Array, key: jax.Array, value: jax.Array, block: Block
    ) -> Partial:
        dtype = jnp.dtype(numerics.accumulation_dtype(str(query.dtype)))
        shape = query.shape[:3]

        def nothing() -> Partial:
            return Partial(
                _like(jnp.zeros((*shape, value.shape[3]), dtype), query),
                _like(jnp.full(shape, -jnp.inf, dtype), query),
            )

        def fused(kind: Any) -> Partial:
            width = _width(max(query.shape[3], value.shape[3]))
            out, lse = FORWARD.bind(
                *(_widened(t, width) for t in (query, key, value)),
                *_unused(query.dtype),
                **_options(block, kind),
                is_training=True,
            )
            return Partial(
                out[..., : value.shape[3]].astype(dtype), lse.astype(dtype)
            )

        return self._switched(
            block,
            shape[2],
            key.shape[2],
            nothing,
            fused,
            lambda: self.otherwise.block_forward(query, key, value, block),
        )

    def _backward(
        self, tensors: list[jax.Array], block: Block
    ) -> BlockGradients:
        """`block_backward` of tensors in its order and of one part."""
        query, key, value, out, lse, delta, grad_out = tensors
        dtype = jnp.dtype(numerics.accumulation_dtype(str(query.dtype)))
        inputs = query, key, value
        wide = out.astype(dtype), grad_out.astype(dtype)

        def nothing() -> BlockGradients:
            return BlockGradients(
                *(_like(jnp.zeros(t.shape, dtype), t) for t in inputs)
            )

        def call(kind: Any, out: jax.Array, grad_out: jax.Array) -> Any:
            width = _width(max(query.shape[3], out.shape[3]))
            tensors = (_widened(t, width) for t in inputs)
            # exp(score - inf) = 0: a row that sees nothing gives nothing.
            seen = jnp.where(lse == -jnp.inf, jnp.inf, lse)
            grads = BACKWARD.bind(
                *tensors,
                *_unused(query.dtype),
                seen.astype("float32"),
                _widened(out.astype(query.dtype), width),
                _widened(grad_out.astype(query.dtype), width),
                **_options(block, kind),
            )
            return tuple(
                grad[..., : t.shape[3]].astype(dtype)
                for grad, t in zip(grads[:3], inputs, strict=True)
            )

        def fused(kind: Any) -> BlockGradients:
            """cuDNN makes delta of `out` and `grad_out`. Where the
            log-sum-exp has a gradient of its own they are given one column
            more, in which the values are 0, and their product is delta;
            where there is no room for one, another kernel computes it."""
            out, grad_out = wide
            products = grad_out * out
            # The sum that delta was made of may have been added up in
            # another order; what that changes is far below half precision.
            pull = jnp.abs(jnp.sum(products, axis=-1) - delta)
            size = jnp.sum(jnp.abs(products), axis=-1)
            plain = jnp.all(pull <= 2.0**-20 * size)

            def with_column() -> Any:
                if value.shape[3] + 1 > WIDEST:
                    grads = self.otherwise.block_backward(
                        *inputs, out, lse, delta, tensors[6], block
                    )
                    return grads.query, grads.key, grads.value
                column = delta[..., None]
                return call(
                    kind,
                    jnp.concatenate([jnp.zeros_like(out), column], -1),
                    jnp.concatenate([grad_out, jnp.ones_like(column)], -1),
                )

            return BlockGradients(
                *lax.cond(plain, lambda: call(kind, *wide), with_column)
            )

        return self._switched(
            block,
            query.shape[2],
            key.shape[2],
            nothing,
            fused,
            lambda: self.otherwise.block_backward(
                query, key, value, out, lse, delta, grad_out, block
            ),
        )


def not_traced(value: Any) -> bool | None:
    """A predicate as a bool; None if it is known on the device only."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    return None


def _part(block: Block, row: int, column: int) -> Block:
    return dataclasses.replace(
        block,
        query_starts=(block.query_starts[row],),
        key_starts=(block.key_starts[column],),
    )


def _parts(tensor: jax.Array, starts: tuple[Any, ...]) -> list[jax.Array]:
    """(B, H, length, ...) -> the equal parts of its length."""
    return jnp.split(tensor, len(starts), axis=2)


def _like(tensor: jax.Array, other: jax.Array) -> jax.Array:
    """A constant that varies over the devices as another tensor does, so that
    all branches have one type."""
    return tensor + jnp.zeros_like(other, dtype=tensor.dtype).sum()


def _unused(dtype: Any) -> list[jax.Array]:
    """Stands for bias, lengths, offsets and pages, of which there are none."""
    return [jnp.zeros(0, dtype)] * 7


def _options(block: Block, kind: Any) -> dict[str, Any]:
    return {
        "scale": block.scoring.scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": kind,
        "layout": HEADS_FIRST,
        "sliding_window_length": None,
    }


def _width(width: int) -> int:
    return -(-width // MULTIPLE) * MULTIPLE


def _widened(tensor: jax.Array, width: int) -> jax.Array:
    more = width - tensor.shape[3]
    if not more:
        return tensor
    return jnp.pad(tensor, ((0, 0),) * 3 + ((0, more),))
