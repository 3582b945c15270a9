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
    `all_to_alls` is `all_to_all` of each tensor.
6.  Dtype, shape and structure are kept.
7.  In a ring of one every movement is a no-op.
8.  Every index takes part in every movement. Work may be skipped, transfers
    never.
9.  The parts that `split` makes obey laws 1 to 8 among their members: index
    `i` is member `i % inner` of its neighbours, and their number
    `i // inner` in the ring of those that have its place among theirs.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

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
    def start_exchange(
        self, tensors: Sequence[Tensor], permutation: Sequence[int]
    ) -> Pending:
        """Issue the transfer of every tensor of member `i` to member
        `permutation[i]`."""

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

    def start_shift(self, tensors: Sequence[Tensor], by: int = 1) -> Pending:
        """Issue the transfer of every tensor to the member at `index + by`."""
        size = self.size
        return self.start_exchange(
            tensors, [(i + by) % size for i in range(size)]
        )

    def shift(self, tensors: Sequence[Tensor], by: int = 1) -> list[Tensor]:
        """Move every tensor to the member at `index + by`."""
        return self.start_shift(tensors, by).wait()

    def exchange(
        self, tensors: Sequence[Tensor], permutation: Sequence[int]
    ) -> list[Tensor]:
        """Send the tensors of member `i` to member `permutation[i]`."""
        return self.start_exchange(tensors, permutation).wait()

    def all_to_alls(
        self, tensors: Sequence[Tensor], split_axis: int, concat_axis: int
    ) -> list[Tensor]:
        """`all_to_all` of several tensors, in as few messages as can be."""
        return [self.all_to_all(t, split_axis, concat_axis) for t in tensors]

    def split(self, inner: int) -> tuple["Transport", "Transport"]:
        """Cut the ring into groups of neighbours.

        Args:
            inner: members of a group; divides `size`.

        Returns:
            `(neighbours, ring)`: this member's group, and the ring of the
            members that have the same place in each group.
        """
        check_divides(inner, self.size)
        return Group(self, inner, True), Group(self, inner, False)

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


class PointToPoint(Transport):
    """Collectives that are made of shifts, where `index()` is an integer."""

    def all_gather(self, tensor: Tensor, axis: int) -> Tensor:
        if self.size == 1:
            return tensor
        return ops.concatenate(self._everyones(tensor), axis)

    def all_to_all(
        self, tensor: Tensor, split_axis: int, concat_axis: int
    ) -> Tensor:
        return self.all_to_alls([tensor], split_axis, concat_axis)[0]

    def all_to_alls(
        self, tensors: Sequence[Tensor], split_axis: int, concat_axis: int
    ) -> list[Tensor]:
        if self.size == 1:
            return list(tensors)
        for tensor in tensors:
            _check_splits(tensor, split_axis, self.size)
        index, size = self.index(), self.size
        parts = list(
            zip(*(ops.split(t, size, split_axis) for t in tensors), strict=True)
        )
        # All are issued before the first is awaited: one message for each
        # other member.
        pending = {
            (index - by) % size: self.start_shift(
                list(parts[(index + by) % size]), by
            )
            for by in range(1, size)
        }
        arrived = [
            parts[i] if i == index else pending[i].wait() for i in range(size)
        ]
        return [
            ops.concatenate(list(each), concat_axis)
            for each in zip(*arrived, strict=True)
        ]

    def sum(self, tensor: Tensor) -> Tensor:
        if self.size == 1:
            return tensor
        # In index order, so that the bits are the same on every member.
        total, *rest = self._everyones(tensor)
        for other in rest:
            total = total + other
        return total

    def _everyones(self, tensor: Tensor) -> list[Tensor]:
        arrived = {self.index(): tensor}
        for hop in range(1, self.size):
            (tensor,) = self.shift([tensor])
            arrived[(self.index() - hop) % self.size] = tensor
        return [arrived[i] for i in range(self.size)]


class Group(PointToPoint):
    """Some members of a ring. Their groups all move at the same time.

    Args:
        ring: all members.
        inner: how many neighbours are a group.
        neighbours: whether these are neighbours; else they are the members
            that have the same place in each group of neighbours.
    """

    def __init__(self, ring: Transport, inner: int, neighbours: bool):
        self.ring, self.inner, self.neighbours = ring, inner, neighbours
        self.size = inner if neighbours else ring.size // inner
        self.portion, self.eager = ring.portion, ring.eager

    def index(self) -> Any:
        return index_in_group(self.ring.index(), self.inner, self.neighbours)

    def start_exchange(
        self, tensors: Sequence[Tensor], permutation: Sequence[int]
    ) -> Pending:
        check_permutation(permutation, self.size)
        return self.ring.start_exchange(
            tensors, in_groups(permutation, self.groups())
        )

    def groups(self) -> list[list[int]]:
        """The members of every group, by their indices in the ring."""
        return groups(self.ring.size, self.inner, self.neighbours)

    def repeat(
        self,
        count: int,
        body: Callable[[Any, Any], Any],
        carry: Any,
        first: int = 0,
    ) -> Any:
        return self.ring.repeat(count, body, carry, first)


def groups(size: int, inner: int, neighbours: bool) -> list[list[int]]:
    """The indices of all groups of a ring, see `Transport.split`.

    Args:
        size: members of the ring.
        inner: how many neighbours are a group.
        neighbours: the groups of neighbours, or else the rings of those that
            have the same place among them.
    """
    rows = [list(range(i, i + inner)) for i in range(0, size, inner)]
    return rows if neighbours else [list(c) for c in zip(*rows, strict=True)]


def index_in_group(index: Any, inner: int, neighbours: bool) -> Any:
    """The number of a member in its group, of that in the ring; see
    `groups`."""
    return index % inner if neighbours else index // inner


def in_groups(
    permutation: Sequence[int], members: Sequence[Sequence[int]]
) -> list[int]:
    """The permutation of a ring that does one in each group of it.

    Args:
        permutation: of the places in a group.
        members: the indices of every group, in the order of their places.
    """
    moves = {
        group[place]: group[target]
        for group in members
        for place, target in enumerate(permutation)
    }
    return [moves[i] for i in range(len(moves))]


class LocalTransport(Transport):
    """A ring of one: one device that holds the whole sequence."""

    size = 1

    def index(self) -> int:
        return 0

    def start_exchange(
        self, tensors: Sequence[Tensor], permutation: Sequence[int]
    ) -> Pending:
        check_permutation(permutation, self.size)
        return Pending(lambda: list(tensors))

    def all_gather(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor

    def all_to_all(
        self, tensor: Tensor, split_axis: int, concat_axis: int
    ) -> Tensor:
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


LOCAL = LocalTransport()


def check_permutation(permutation: Sequence[int], size: int) -> None:
    """Refuse what is not a permutation of the ring's indices."""
    if sorted(permutation) != list(range(size)):
        raise ValueError(
            f"`permutation` must name every index from 0 to {size - 1} "
            f"exactly once. Received: permutation={list(permutation)}."
        )


def check_divides(inner: int, size: int) -> None:
    """Refuse groups of neighbours that a ring does not consist of."""
    if size % inner:
        raise ValueError(
            "The members of a group must divide the ring. Received: groups "
            f"of {inner} in a ring of {size}. Choose a divisor of {size}."
        )


def _check_splits(tensor: Tensor, axis: int, size: int) -> None:
    length = tensor.shape[axis]
    if length is not None and length % size:
        raise ValueError(
            "The axis that is split must be a multiple of the ring's size. "
            f"Received: shape={tuple(tensor.shape)}, split_axis={axis}, "
            f"size={size}. Pad it."
        )
