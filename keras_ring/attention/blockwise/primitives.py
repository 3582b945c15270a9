"""The control flow in which the frameworks differ: loops, branches and a
store of tiles that can be written in place. The shared kernel is pure
`keras.ops` beside these."""

import abc
from collections.abc import Callable
from typing import Any

Tensor = Any


class Primitives(abc.ABC):
    """The control flow that the blockwise kernel needs of a framework.

    Attributes:
        tile: positions of a tile at most; None for the usual number.
        short: the longest chunk for which half a tile is better under a mask
            that leaves some of these empty.
    """

    tile: int | None = None
    short: int = 0

    @abc.abstractmethod
    def loop(self, count: Any, body: Callable, carry: Any) -> Any:
        """`for i in range(count): carry = body(i, carry)`, not unrolled
        in a compiled program. `count` is an int or an int32 scalar, `carry` a
        tuple of tensors and stores."""

    @abc.abstractmethod
    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        """Run and return one of two nullary functions, never both. A
        Python bool decides at once."""

    @abc.abstractmethod
    def store(self, tensor: Tensor, axis: int = 0) -> Any:
        """Tiles that `read` and `write` work on, side by side along an axis.
        Everything else is told the same axis."""

    @abc.abstractmethod
    def read(self, store: Any, index: Any, axis: int = 0) -> Tensor:
        """Tile `index` of a store, without the axis."""

    @abc.abstractmethod
    def write(self, store: Any, index: Any, tile: Tensor, axis: int = 0) -> Any:
        """The store with tile `index` replaced; the old one is not used
        again, so it may be overwritten."""

    @abc.abstractmethod
    def stacked(self, store: Any, axis: int = 0) -> Tensor:
        """The tiles of a store as one tensor, as `store` was given it."""

    @abc.abstractmethod
    def product(self, equation: str, left: Tensor, right: Tensor) -> Tensor:
        """Einsum of two tensors, accumulated and returned in the
        accumulation dtype of `left`."""
