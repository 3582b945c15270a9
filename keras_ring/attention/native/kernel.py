"""The C++ attention as a kernel, as far as it is the same on each backend."""

import abc
import functools
import os
from typing import Any

import keras

from keras_ring.attention.kernel import FallbackKernel, Gradients, Inputs, Rows
from keras_ring.attention.native.library import UnavailableError, tell
from keras_ring.attention.numerics import Partial
from keras_ring.attention.visit import Visit
from keras_ring.masks import Mask
from keras_ring.masks.band import Band

Tensor = Any


class NativeKernel(FallbackKernel):
    """float32 attention with a `Band` of pairs in one call, which adds to what
    was there before.

    A subclass says how its framework calls the library.

    Args:
        fallback: computes what does not fit: other dtypes, masks, scores and
            sizes.

    Attributes:
        any_mask: whether masks are taken that are no `Band`.
        open_axes: of how many axes, from the first on, sizes may be unknown.
        open_limits: whether `Band.stop` and `Band.rows` may be tensors.
    """

    name = "native"
    description = "this package's own in C++, for CPUs in float32"
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
    def call_forward(
        self, inputs: Inputs, visit: Visit, band: Any, carry: Partial | None
    ) -> Partial:
        """`compute` with the mask as a `Band`, or None with `any_mask`."""

    @abc.abstractmethod
    def call_backward(
        self,
        inputs: Inputs,
        rows: Rows,
        visit: Visit,
        band: Any,
        carry: Tensor | None,
    ) -> Gradients:
        """`compute_gradients` with the mask as a `Band`, or None with
        `any_mask`."""

    def preferred_here(self) -> bool:
        """Return True if this process prefers it, apart from device and
        dtype."""
        return True

    def available(self) -> bool:
        return self.loads()

    def preferred(self, device: str | None, dtype: str) -> bool:
        return (
            device in (None, "cpu")
            and dtype == "float32"
            and self.preferred_here()
            and self.loads()
        )

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

    def reason(self) -> str:
        try:
            self.load()
        except UnavailableError as error:
            return str(error)
        return ""

    def compute(
        self, inputs: Inputs, visit: Visit, carry: Partial | None
    ) -> Partial:
        return self.call_forward(inputs, visit, self._band(visit), carry)

    def compute_gradients(
        self, inputs: Inputs, rows: Rows, visit: Visit, carry: Tensor | None
    ) -> Gradients:
        band = self._band(visit)
        return self.call_backward(inputs, rows, visit, band, carry)

    def fits(
        self, inputs: Inputs, visit: Visit, rows: Rows | None = None
    ) -> bool:
        """Return True for float32 scores that are scaled products, and sizes
        and a mask that the library takes."""
        scoring = visit.scoring
        return (
            scoring.only_products
            and scoring.scale > 0
            and all(map(self._takes, inputs))
            and (self.any_mask or self._band(visit) is not None)
        )

    def _takes(self, tensor: Tensor) -> bool:
        """True if it is of float32, and of sizes that are not 0 or not yet
        known."""
        return _name(tensor.dtype) == "float32" and all(
            size or (size is None and axis < self.open_axes)
            for axis, size in enumerate(tensor.shape)
        )

    def _band(self, visit: Visit) -> Band | None:
        return band(visit.scoring.mask, self.open_limits)


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
