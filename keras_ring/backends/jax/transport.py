"""The ring on JAX: `lax.ppermute` over one named axis of a mesh."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
from jax import lax

from keras_ring.distribution.transport import (
    Pending,
    Transport,
    check_permutation,
)

_PLACE: ContextVar[jax.Array | None] = ContextVar(
    "keras_ring_place", default=None
)


def place() -> jax.Array | None:
    """This member's place in the ring as a value of the program that is
    traced, int32 `()`; None where nobody has said it."""
    return _PLACE.get()


@contextlib.contextmanager
def at(place: jax.Array | None) -> Iterator[None]:
    """Context in which what is traced runs at this place in the ring.

    The compiler's own number of a device is not used: where it splits other
    axes of the mesh by itself, it refuses some programs that ask for it.
    """
    token = _PLACE.set(place)
    try:
        yield
    finally:
        _PLACE.reset(token)


class RingTransport(Transport):
    """Members along a mesh axis, used inside `jax.shard_map`.

    Transfers are issued where they stand in the program; the compiler
    starts them early and waits for them late.
    """

    def __init__(self, axis: str, size: int):
        self.axis = axis
        self.size = size

    def index(self) -> jax.Array:
        known = place()
        return lax.axis_index(self.axis) if known is None else known

    def start_shift(self, tensors: Sequence[jax.Array], by: int = 1) -> Pending:
        moved = self.exchange(
            tensors, [(i + by) % self.size for i in range(self.size)]
        )
        return Pending(lambda: moved)

    def exchange(
        self, tensors: Sequence[jax.Array], permutation: Sequence[int]
    ) -> list[jax.Array]:
        check_permutation(permutation, self.size)
        if self.size == 1:
            return list(tensors)
        return list(
            lax.ppermute(
                tuple(tensors), self.axis, list(enumerate(permutation))
            )
        )

    def all_gather(self, tensor: jax.Array, axis: int) -> jax.Array:
        return lax.all_gather(tensor, self.axis, axis=axis, tiled=True)

    def all_to_all(
        self, tensor: jax.Array, split_axis: int, concat_axis: int
    ) -> jax.Array:
        return lax.all_to_all(
            tensor, self.axis, split_axis, concat_axis, tiled=True
        )

    def sum(self, tensor: jax.Array) -> jax.Array:
        return lax.psum(tensor, self.axis)

    def repeat(
        self,
        count: int,
        body: Callable[[Any, Any], Any],
        carry: Any,
        first: int = 0,
    ) -> Any:
        if count == 0:
            return carry
        hops = jax.numpy.arange(first, first + count, dtype="int32")
        return lax.scan(lambda c, hop: (body(hop, c), None), carry, hops)[0]
