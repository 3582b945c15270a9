"""Trying a layer on parts of a made-up sequence, with nobody around.

The guard calls layers so (`guard/trial.py`). Functions that ask where they
are in a ring are told their place in one. Whoever wants something of the
other members, who are not there, ends the trial; attention gives something
that was made up as well, position by position.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from keras_ring.distribution.transport import Pending, Transport

Tensor = Any


class NotTriedError(Exception):
    """Something was called in a trial that needs a ring."""


class Place(Transport):
    """A place in a ring that has no other members.

    Args:
        index: which.
        size: of how many.
    """

    def __init__(self, index: int, size: int):
        self.size = size
        self._index = index

    def index(self) -> int:
        return self._index

    def start_exchange(
        self, tensors: Sequence[Tensor], permutation: Sequence[int]
    ) -> Pending:
        raise NotTriedError

    def all_gather(self, tensor: Tensor, axis: int) -> Tensor:
        raise NotTriedError

    def all_to_all(
        self, tensor: Tensor, split_axis: int, concat_axis: int
    ) -> Tensor:
        raise NotTriedError

    def sum(self, tensor: Tensor) -> Tensor:
        raise NotTriedError


_PLACE: ContextVar[Place | None] = ContextVar("keras_ring_place", default=None)


def place() -> Place | None:
    """The place of the code that is tried here, None outside of trials."""
    return _PLACE.get()


def refuse() -> None:
    """End the trial that runs here, if any.

    Raises:
        NotTriedError: in a trial.
    """
    if _PLACE.get() is not None:
        raise NotTriedError


@contextlib.contextmanager
def at(index: int, size: int) -> Iterator[None]:
    """Code in here is tried, on one of `size` parts of a sequence."""
    token = _PLACE.set(Place(index, size))
    try:
        yield
    finally:
        _PLACE.reset(token)
