"""Fused operations that know no positions, in a ring that knows them late.

An operation computes a visit that is whole, or the square on the diagonal of
a causal mask. Positions are traced, so what a visit is - nothing, whole, that
square, or anything else - is decided on the device, and each is a branch of
the program. What is anything else, or cannot be computed so at all, is left
to another kernel.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from keras_ring import precision
from keras_ring.attention import numerics
from keras_ring.attention.kernel import (
    FallbackKernel,
    Gradients,
    Inputs,
    Rows,
    merged,
    summed,
)
from keras_ring.attention.numerics import Partial
from keras_ring.attention.visit import Visit
from keras_ring.backends.jax.kernels.parts import add, by_place, joined
from keras_ring.masks import Mask
from keras_ring.masks.mask import both


class FusedKernel(FallbackKernel):
    """An operation where it fits, another kernel where it does not.

    Args:
        fallback: computes what does not fit.
    """

    @abc.abstractmethod
    def takes(self, inputs: Inputs, visit: Visit) -> bool:
        """Return True if the operation can compute a block, of sizes that
        are known and of a score that is a scaled product."""

    @abc.abstractmethod
    def call_forward(
        self, inputs: Inputs, scale: float, causal: bool
    ) -> tuple[jax.Array, jax.Array]:
        """`out` (B, H, Q, E) and `lse` (B, H, Q) of one call."""

    @abc.abstractmethod
    def call_backward(
        self, inputs: Inputs, rows: Rows, scale: float, causal: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The gradients of query, key and value of one call; `rows.lse` is
        `inf` for a row that sees nothing."""

    def fits(
        self, inputs: Inputs, visit: Visit, rows: Rows | None = None
    ) -> bool:
        return (
            by_place(inputs, visit)
            and visit.scoring.scale > 0
            and self.takes(inputs, visit)
        )

    def compute(
        self, inputs: Inputs, visit: Visit, carry: Partial | None
    ) -> Partial:
        found = []
        for row, query in enumerate(_parts(inputs.query, visit.query_starts)):
            total: Partial | None = None
            for column in range(len(visit.key_starts)):
                key, value = (
                    _parts(t, visit.key_starts)[column] for t in inputs[1:]
                )
                part = self._forward(
                    Inputs(query, key, value), _part(visit, row, column)
                )
                total = merged(total, part)
            found.append(total)
        whole = Partial(*(joined(parts) for parts in zip(*found, strict=True)))
        return merged(carry, whole)

    def compute_gradients(
        self,
        inputs: Inputs,
        rows: Rows,
        visit: Visit,
        carry: jax.Array | None,
    ) -> Gradients:
        by_row = [_parts(t, visit.query_starts) for t in (inputs.query, *rows)]
        by_column = [_parts(t, visit.key_starts) for t in inputs[1:]]
        grads: list[dict[int, Any]] = [{}, {}, {}]
        for row, (query, *rest) in enumerate(zip(*by_row, strict=True)):
            for column, seen in enumerate(zip(*by_column, strict=True)):
                shares = self._backward(
                    Inputs(query, *seen),
                    Rows(*rest),
                    _part(visit, row, column),
                )
                places = row, column, column
                for found, share, place in zip(
                    grads, shares[:3], places, strict=True
                ):
                    add(found, place, share)
        whole = Gradients(*(joined(list(g.values())) for g in grads))
        return summed(carry, whole)

    def _kinds(self, visit: Visit, queries: int, keys: int) -> Any:
        """Kind of a part of a visit: nothing, whole, a causal square or
        anything else, as the number of a branch, which may be traced."""
        nonempty, full = visit.relation(queries, keys)
        square: Any = False
        others = _beside_causal(visit.scoring.mask)
        if others is not None and queries == keys:
            square = visit.query_starts[0] == visit.key_starts[0]
            for other in others:
                # Padding of the ring, say, which only the last chunks have.
                scoring = dataclasses.replace(visit.scoring, mask=other)
                alone = dataclasses.replace(visit, scoring=scoring)
                square = both(square, alone.relation(queries, keys)[1])
        whole = [not_traced(t) for t in (nonempty, full, square)]
        if all(known is not None for known in whole):
            nonempty, full, square = whole
            number: Any = (
                1 if full else 0 if not nonempty else 2 if square else 3
            )
        else:
            number = jnp.where(
                full,
                1,
                jnp.where(
                    jnp.logical_not(nonempty), 0, jnp.where(square, 2, 3)
                ),
            )
        return number

    def _switched(
        self,
        visit: Visit,
        inputs: Inputs,
        nothing: Callable[[], Any],
        fused: Callable[[bool], Any],
        fallback: Callable[[], Any],
    ) -> Any:
        lengths = inputs.query.shape[2], inputs.key.shape[2]
        number = self._kinds(visit, *lengths)
        branches = (
            nothing,
            lambda: fused(False),
            lambda: fused(True),
            fallback,
        )
        if isinstance(number, int):
            return branches[number]()
        return lax.switch(number, branches)

    def _forward(self, inputs: Inputs, visit: Visit) -> Partial:
        """The partial result of one part of a visit."""
        query = inputs.query
        dtype = jnp.dtype(precision.accumulation_dtype(str(query.dtype)))
        shape = query.shape[:3]

        def nothing() -> Partial:
            width = inputs.value.shape[3]
            return Partial(
                _like(jnp.zeros((*shape, width), dtype), query),
                _like(jnp.full(shape, -jnp.inf, dtype), query),
            )

        def fused(causal: bool) -> Partial:
            out, lse = self.call_forward(inputs, visit.scoring.scale, causal)
            return Partial(out.astype(dtype), lse.astype(dtype))

        found: Partial = self._switched(
            visit,
            inputs,
            nothing,
            fused,
            lambda: self.fallback.forward(inputs, visit, None),
        )
        return found

    def _backward(self, inputs: Inputs, rows: Rows, visit: Visit) -> Gradients:
        """The gradients of one part of a visit."""
        name = str(inputs.query.dtype)
        dtype = jnp.dtype(precision.accumulation_dtype(name))

        def nothing() -> Gradients:
            return Gradients(
                *(_like(jnp.zeros(t.shape, dtype), t) for t in inputs)
            )

        def fused(causal: bool) -> Gradients:
            lse = numerics.without_empty_rows(rows.lse)
            grads = self.call_backward(
                inputs, rows._replace(lse=lse), visit.scoring.scale, causal
            )
            return Gradients(*(grad.astype(dtype) for grad in grads))

        found: Gradients = self._switched(
            visit,
            inputs,
            nothing,
            fused,
            lambda: self.fallback.backward(inputs, rows, visit, None),
        )
        return found


def _beside_causal(mask: Mask | None) -> list[Mask] | None:
    """The other conditions on a pair, under a mask that is causal too; None
    under one that is not."""
    if mask is None:
        return None
    parts = mask.parts()
    found = [part for part in parts if not part.purely_causal()]
    return found if len(found) < len(parts) else None


def not_traced(value: Any) -> bool | None:
    """A predicate as a bool; None if it is known on the device only."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    return None


def _part(visit: Visit, row: int, column: int) -> Visit:
    return dataclasses.replace(
        visit,
        query_starts=(visit.query_starts[row],),
        key_starts=(visit.key_starts[column],),
    )


def _parts(tensor: jax.Array, starts: tuple[Any, ...]) -> list[jax.Array]:
    """(B, H, length, ...) -> the equal parts of its length."""
    return jnp.split(tensor, len(starts), axis=2)


def _like(tensor: jax.Array, other: jax.Array) -> jax.Array:
    """A constant that varies over the devices as another tensor does, so that
    all branches have one type."""
    return tensor + jnp.zeros_like(other, dtype=tensor.dtype).sum()
