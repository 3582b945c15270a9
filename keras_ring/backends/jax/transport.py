"""The ring on JAX: `lax.ppermute` over one named axis of a mesh."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
from jax import lax

from keras_ring.distribution.transport import (
    Pending,
    Transport,
    check_divides,
    check_permutation,
    groups,
    in_groups,
    index_in_group,
)


class Place(NamedTuple):
    """A device's place in the mesh, as values of the program that is traced.

    Attributes:
        sequence: of its shard of the sequence, int32 `()`.
        batch: of its part of the batch, int32 `()`, or 0 where what is traced
            sees the whole batch.
        model: of its part of the heads, likewise.
    """

    sequence: jax.Array
    batch: jax.Array | int
    model: jax.Array | int = 0


_PLACE: ContextVar[Place | None] = ContextVar("keras_ring_place", default=None)


def place() -> Place | None:
    """The place of the device that runs what is traced; None where nobody
    has said it."""
    return _PLACE.get()


@contextlib.contextmanager
def at(place: Place | None) -> Iterator[None]:
    """Context in which what is traced runs at this place.

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

    groups: list[list[int]] | None = None

    def __init__(self, axis: str, size: int):
        self.axis = axis
        self.size = size

    def index(self) -> jax.Array:
        known = place()
        return lax.axis_index(self.axis) if known is None else known.sequence

    def start_exchange(
        self, tensors: Sequence[jax.Array], permutation: Sequence[int]
    ) -> Pending:
        check_permutation(permutation, self.size)
        if self.size == 1:
            return Pending(lambda: list(tensors))
        if self.groups is not None:
            permutation = in_groups(permutation, self.groups)
        moved = lax.ppermute(
            tuple(tensors), self.axis, list(enumerate(permutation))
        )
        return Pending(lambda: list(moved))

    def all_gather(self, tensor: jax.Array, axis: int) -> jax.Array:
        return lax.all_gather(
            tensor,
            self.axis,
            axis=axis,
            tiled=True,
            axis_index_groups=self.groups,
        )

    def all_to_all(
        self, tensor: jax.Array, split_axis: int, concat_axis: int
    ) -> jax.Array:
        return lax.all_to_all(
            tensor,
            self.axis,
            split_axis,
            concat_axis,
            tiled=True,
            axis_index_groups=self.groups,
        )

    def sum(self, tensor: jax.Array) -> jax.Array:
        return lax.psum(tensor, self.axis, axis_index_groups=self.groups)

    def split(self, inner: int) -> tuple[Transport, Transport]:
        check_divides(inner, self.size)
        return _Group(self, inner, True), _Group(self, inner, False)

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


class _Group(RingTransport):
    """`distribution.transport.Group`, with JAX's collectives in groups."""

    def __init__(self, ring: RingTransport, inner: int, neighbours: bool):
        self.groups = groups(ring.size, inner, neighbours)
        super().__init__(ring.axis, len(self.groups[0]))
        self.ring, self.inner, self.neighbours = ring, inner, neighbours

    def index(self) -> jax.Array:
        found: jax.Array = index_in_group(
            self.ring.index(), self.inner, self.neighbours
        )
        return found
