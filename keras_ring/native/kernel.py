"""The C++ attention as a kernel, as far as it is the same on each backend."""

import abc
import functools
import os
from typing import Any

import keras

from keras_ring.kernel import BlockGradients, FoldingKernel
from keras_ring.masks import Mask
from keras_ring.masks.band import Band
from keras_ring.native.library import UnavailableError, tell
from keras_ring.numerics import Partial
from keras_ring.visit import Block

Tensor = Any


class NativeKernel(FoldingKernel):
    """float32 attention with a `Band` of pairs in one call, which adds to what
    was there before.

    A subclass says how its framework calls the library.

    Args:
        otherwise: computes the visits that do not fit: of other dtypes,
            masks, scores and sizes.

    Attributes:
        any_mask: whether masks are taken that are no `Band`.
        open_axes: of how many axes, from the first on, sizes may be unknown.
        open_limits: whether `Band.stop` and `Band.rows` may be tensors.
    """

    name = "native"
    any_mask = False
    open_axes = 0
    open_limits = False

    @abc.abstractmethod
    def load(self) -> None:
        """Compile and load the library, once.

        Raises:
            UnavailableError: if that does not work here.
        """

    @abc.abstractmethod
    def forward(
        self,
        partial: Partial | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block: Block,
        pairs: Any,
    ) -> Partial:
        """`Kernel.fold` of what fits; `pairs` is the mask as a `Band`, or None
        with `any_mask`."""

    @abc.abstractmethod
    def backward(
        self,
        grad_query: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lse: Tensor,
        delta: Tensor,
        grad_out: Tensor,
        block: Block,
        pairs: Any,
    ) -> BlockGradients:
        """`Kernel.fold_backward` of what fits."""

    def here(self) -> bool:
        """True if this process prefers it, apart from device and dtype."""
        return True

    def available(
        self, device: str | None = None, dtype: str | None = None
    ) -> bool:
        if device not in (None, "cpu") or dtype not in (None, "float32"):
            return False
        # By name, where no dtype is said, it is wherever it can be.
        return (dtype is None or self.here()) and self.loads()

    def loads(self) -> bool:
        """True if there is a library. What fails is told of; that a machine has
        no compiler is not."""
        try:
            self.load()
        except UnavailableError as error:
            if not error.expected:
                tell(f"The attention kernel 'native' is not used: {error}")
            return False
        return True

    def missing(self) -> str:
        """Why there is no library; empty if there is one."""
        try:
            self.load()
        except UnavailableError as error:
            return str(error)
        return ""

    def rounds(self, dtype: str) -> bool:
        return False

    def fold(
        self,
        partial: Partial | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block: Block,
    ) -> Partial:
        if not self.fits(query, key, value, block):
            return self.otherwise.fold(partial, query, key, value, block)
        pairs = self._band(block)
        return self.forward(partial, query, key, value, block, pairs)

    def fold_backward(
        self,
        grad_query: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        delta: Tensor,
        grad_out: Tensor,
        block: Block,
    ) -> BlockGradients:
        if not self.fits(query, key, value, block):
            return self.otherwise.fold_backward(
                *(grad_query, query, key, value, out, lse, delta, grad_out),
                block,
            )
        del out  # Already in delta.
        pairs = self._band(block)
        return self.backward(
            *(grad_query, query, key, value, lse, delta, grad_out, block, pairs)
        )

    def fits(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> bool:
        """True if a visit has float32 scores that are scaled products, and
        sizes and a mask that the library takes."""
        scoring, tensors = block.scoring, (query, key, value)
        return (
            scoring.only_products
            and scoring.scale > 0
            and all(map(self._takes, tensors))
            and (self.any_mask or self._band(block) is not None)
        )

    def _takes(self, tensor: Tensor) -> bool:
        """True if it is of float32, and of sizes that are not 0 or not yet
        known."""
        return _name(tensor.dtype) == "float32" and all(
            size or (size is None and axis < self.open_axes)
            for axis, size in enumerate(tensor.shape)
        )

    def _band(self, block: Block) -> Band | None:
        return band(block.scoring.mask, self.open_limits)


@functools.cache
def _name(dtype: Any) -> str:
    found: str = keras.backend.standardize_dtype(dtype)
    return found


def band(mask: Mask | None, open_limits: bool = False) -> Band | None:
    """The pairs of a mask; None if they are no band.

    Args:
        mask: any.
        open_limits: whether the band may have limits that are tensors.
    """
    found = Band() if mask is None else mask.band()
    if found is None or open_limits or found.known:
        return found
    return None


def threads() -> int:
    """As many as this process has cores for."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
