"""A world as the parts of TensorFlow's backend know it, which its runtime uses.

They are given one and never ask for the active one, so that no part imports
the runtime that is made of them.
"""

import abc
from typing import Any

from keras_ring.distribution import world


class Member(world.World):
    """The replicas of a strategy.

    Attributes:
        tf_strategy: the `tf.distribute.Strategy` that drives them.
        workers: number of processes that they are on.
        placed: whether tensors are copied from one to another.
    """

    tf_strategy: Any
    workers: int
    placed: bool

    @abc.abstractmethod
    def numbers_of_all(self, number: int) -> list[int]:
        """The number that each replica's worker gave, on every worker."""

    @abc.abstractmethod
    def gathered(self, tensor: Any) -> Any:
        """On a replica: what `everyones` needs of a result."""

    @abc.abstractmethod
    def everyones(self, value: Any) -> list[Any]:
        """The results of all replicas, in mesh order, on every worker."""
