"""Transport interface, and its laws.

A transport moves tensors between the members of one ring: the devices that
hold the chunks of one sequence. The blockwise loop talks to nothing else.

Laws, each a test that runs on real devices (`tests/test_transport.py`):

1.  `size` shifts by +1 are the identity.
2.  A shift by -1 undoes a shift by +1.
3.  After a shift by `by`, index `i` holds what index `i - by` held.
4.  `exchange` by a permutation equals the same permutation of the chunks.
5.  `all_gather` is the concatenation in index order; `all_to_all` done twice
    with its axes swapped is the identity; `sum` is the sum over the ring.
6.  Dtype, shape and structure are kept.
7.  In a ring of one every movement is a no-op.
8.  Every index takes part in every movement. Work may be skipped, transfers
    never.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any

Tensor = Any


class Pending:
    """A transfer that has been issued; `wait()` gives its result.

    Between the two, compute can run: that is where a hop hides. Frameworks
    whose compiler schedules transfers return an already finished `Pending`.
    """

    def __init__(self, finish: Callable[[], list[Tensor]]):
        self._finish = finish

    def wait(self) -> list[Tensor]:
        """The tensors that arrived, in the order in which they were sent."""
        return self._finish()


class Transport(abc.ABC):
    """The members of one ring, seen from one of them.

    Attributes:
        size: number of members, a static integer.
        portion: how many positions of a chunk travel together at most, where
            what is sent and received takes memory for as long as something
            refers to it; None where a compiler plans the memory of the
            whole program.
        eager: whether movements run where they are called, one after the
            other, and are not part of a program.
    """

    size: int
    portion: int | None = None
    eager: bool = False

    @abc.abstractmethod
    def index(self) -> Any:
        """This member's place in the ring: an int or an int32 scalar."""

    @abc.abstractmethod
    def start_shift(self, tensors: Sequence[Tensor], by: int = 1) -> Pending:
        """Issue the transfer of every tensor to the member at `index + by`."""

    @abc.abstractmethod
    def exchange(
        self, tensors: Sequence[Tensor], permutation: Sequence[int]
    ) -> list[Tensor]:
        """Send the tensors of member `i` to member `permutation[i]`."""

    @abc.abstractmethod
    def all_gather(self, tensor: Tensor, axis: int) -> Tensor:
        """Concatenate every member's tensor along `axis`, in index order."""

    @abc.abstractmethod
    def all_to_all(
        self, tensor: Tensor, split_axis: int, concat_axis: int
    ) -> Tensor:
        """Split along one axis, send part `i` to member `i`, concatenate
        what arrives along the other axis, in index order."""

    @abc.abstractmethod
    def sum(self, tensor: Tensor) -> Tensor:
        """Sum every member's tensor, elementwise; the result is on all."""

    def shift(self, tensors: Sequence[Tensor], by: int = 1) -> list[Tensor]:
        """Move every tensor to the member at `index + by`."""
        return self.start_shift(tensors, by).wait()

    def repeat(
        self,
        count: int,
        body: Callable[[Any, Any], Any],
        carry: Any,
        first: int = 0,
    ) -> Any:
        """Run `carry = body(hop, carry)` for `count` hops from `first` on.

        Unrolled here; a framework whose transfers work inside a compiled
        loop overrides it.
        """
        for hop in range(first, first + count):
            carry = body(hop, carry)
        return carry


class LocalTransport(Transport):
    """A ring of one: one device that holds the whole sequence."""

    size = 1

    def index(self) -> int:
        return 0

    def start_shift(self, tensors: Sequence[Tensor], by: int = 1) -> Pending:
        return Pending(lambda: list(tensors))

    def exchange(
        self, tensors: Sequence[Tensor], permutation: Sequence[int]
    ) -> list[Tensor]:
        check_permutation(permutation, self.size)
        return list(tensors)

    def all_gather(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor

    def all_to_all(
        self, tensor: Tensor, split_axis: int, concat_axis: int
    ) -> Tensor:
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


def check_permutation(permutation: Sequence[int], size: int) -> None:
    """Refuse what is not a permutation of the ring's indices."""
    if sorted(permutation) != list(range(size)):
        raise ValueError(
            f"`permutation` must name every index from 0 to {size - 1} "
            f"exactly once. Received: permutation={list(permutation)}."
        )
