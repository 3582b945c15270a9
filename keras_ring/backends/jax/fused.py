"""Fused operations that know no positions, in a ring that knows them late.

An operation computes a visit that is whole, or the square on the diagonal of
a causal mask. Positions are traced, so what a visit is - nothing, whole, that
square, or anything else - is decided on the device, and each is a branch of
the program. What is anything else, or cannot be computed so at all, is left
to another kernel.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from keras_ring import numerics
from keras_ring.kernel import BlockGradients, Kernel
from keras_ring.masks import Mask
from keras_ring.masks.mask import both
from keras_ring.numerics import Partial
from keras_ring.visit import Block


class FusedKernel(Kernel):
    """An operation where it fits, another kernel where it does not.

    Args:
        otherwise: computes the visits that do not fit.
    """

    def __init__(self, otherwise: Kernel):
        self.otherwise = otherwise

    @abc.abstractmethod
    def fits(
        self, query: jax.Array, key: jax.Array, value: jax.Array, block: Block
    ) -> bool:
        """True if the operation can compute a visit, of sizes that are known
        and of a score that is a scaled product."""

    @abc.abstractmethod
    def forward(
        self,
        causal: bool,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        scale: float,
    ) -> tuple[jax.Array, jax.Array]:
        """`out` (B, H, Q, E) and `lse` (B, H, Q) of one call."""

    @abc.abstractmethod
    def backward(
        self,
        causal: bool,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        out: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        grad_out: jax.Array,
        scale: float,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The three gradients of one call, by tensors in the order of
        `block_backward`; `lse` is `inf` for a row that sees nothing."""

    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        return self.otherwise.branch(predicate, yes, no)

    def block_forward(
        self, query: jax.Array, key: jax.Array, value: jax.Array, block: Block
    ) -> Partial:
        if not self._computes(query, key, value, block):
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
        return Partial(*(joined(parts) for parts in zip(*rows, strict=True)))

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
        if not self._computes(query, key, value, block):
            return self.otherwise.block_backward(
                query, key, value, out, lse, delta, grad_out, block
            )
        by_row = [
            _parts(t, block.query_starts)
            for t in (query, out, lse, delta, grad_out)
        ]
        by_column = [_parts(t, block.key_starts) for t in (key, value)]
        grads: list[dict[int, Any]] = [{}, {}, {}]
        for row, (own, *rest) in enumerate(zip(*by_row, strict=True)):
            for column, seen in enumerate(zip(*by_column, strict=True)):
                tensors: list[Any] = [own, *seen, *rest]
                shares = self._backward(tensors, _part(block, row, column))
                places = row, column, column
                for found, share, place in zip(
                    grads, shares[:3], places, strict=True
                ):
                    add(found, place, share)
        return BlockGradients(*(joined(list(g.values())) for g in grads))

    def _computes(
        self, query: jax.Array, key: jax.Array, value: jax.Array, block: Block
    ) -> bool:
        """True if calls may be able to compute a visit."""
        return (
            by_place(query, key, value, block)
            and block.scoring.scale > 0
            and self.fits(query, key, value, block)
        )

    def _kinds(self, block: Block, queries: int, keys: int) -> Any:
        """Kind of a part of a visit: nothing, whole, a causal square or
        anything else, as the number of a branch, which may be traced."""
        some, every = block.relation(queries, keys)
        square: Any = False
        others = _beside_causal(block.scoring.mask)
        if others is not None and queries == keys:
            square = block.query_starts[0] == block.key_starts[0]
            for other in others:
                # Padding of the ring, say, which only the last chunks have.
                scoring = dataclasses.replace(block.scoring, mask=other)
                alone = dataclasses.replace(block, scoring=scoring)
                square = both(square, alone.relation(queries, keys)[1])
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
        fused: Callable[[bool], Any],
        otherwise: Callable[[], Any],
    ) -> Any:
        number = self._kinds(block, queries, keys)
        branches = (
            nothing,
            lambda: fused(False),
            lambda: fused(True),
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

        def fused(causal: bool) -> Partial:
            out, lse = self.forward(
                causal, query, key, value, block.scoring.scale
            )
            return Partial(out.astype(dtype), lse.astype(dtype))

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

        def nothing() -> BlockGradients:
            return BlockGradients(
                *(_like(jnp.zeros(t.shape, dtype), t) for t in tensors[:3])
            )

        def fused(causal: bool) -> BlockGradients:
            # exp(score - inf) = 0: a row that sees nothing gives nothing.
            grads = self.backward(
                *(causal, query, key, value, out),
                jnp.where(lse == -jnp.inf, jnp.inf, lse),
                *(delta, grad_out, block.scoring.scale),
            )
            return BlockGradients(*(grad.astype(dtype) for grad in grads))

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


def by_place(
    query: jax.Array, key: jax.Array, value: jax.Array, block: Block
) -> bool:
    """True if a visit, of sizes that are known, has scores that are scaled
    products and are masked by their places: what a mask carries would have to
    be cut along with the tensors."""
    mask = block.scoring.mask
    sizes = (*query.shape, *key.shape, *value.shape)
    return (
        all(isinstance(size, int) and size for size in sizes)
        and block.scoring.only_products
        and (mask is None or not any(mask.carried()))
    )


def _beside_causal(mask: Mask | None) -> list[Mask] | None:
    """The other conditions on a pair, under a mask that is causal too; None
    under one that is not."""
    if mask is None:
        return None
    parts = mask.parts()
    found = [part for part in parts if not part.purely_causal()]
    return found if len(found) < len(parts) else None


def add(sums: dict[int, Any], place: int, share: Any) -> None:
    """Add what belongs to a part of a chunk to the sum that is there."""
    have = sums.get(place)
    sums[place] = share if have is None else have + share


def joined(parts: Sequence[jax.Array]) -> jax.Array:
    """(B, H, part, ...) -> (B, H, length, ...)."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 2)


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
