"""A world as the parts of PyTorch's backend know it, which its runtime uses.

They are given one and never ask for the active one, so that no part imports
the runtime that is made of them.
"""

import abc
from contextlib import AbstractContextManager
from typing import Any

from keras_ring.distribution import world
from keras_ring.distribution.padding import PaddedAxis


class Member(world.World):
    """One process of a strategy.

    Attributes:
        rank: number of this process.
        size: number of all processes.
        agreement: of all processes, an `agreement.Agreement`.
        step: the `training.Step` that runs now, or None.
    """

    rank: int
    size: int
    agreement: Any
    step: Any

    @abc.abstractmethod
    def stepping(self) -> AbstractContextManager[None]:
        """Code in here sees shards."""

    @abc.abstractmethod
    def applying(self) -> AbstractContextManager[bool]:
        """Code in here applies gradients; tells whether this is the outermost
        time."""

    @abc.abstractmethod
    def shard(
        self, tensor: Any, split: bool, rows: PaddedAxis, lengths: PaddedAxis
    ) -> Any:
        """This process's rows of a global array, and its chunk if `split`."""

    @abc.abstractmethod
    def unshard(
        self, tensor: Any, split: bool, rows: PaddedAxis, lengths: PaddedAxis
    ) -> Any:
        """The global tensor of everyone's part; the inverse of `shard`."""
