"""Sharing interface: attention over a sequence that lies on several devices.

All tensors here are heads first, `(batch, heads, length, head_dim)`, and
local: the chunk that one device holds.
"""

import abc
import dataclasses
from typing import Any

from keras import ops

from keras_ring import backends
from keras_ring.attention.kernel import Gradients, Inputs, Kernel
from keras_ring.attention.numerics import Partial
from keras_ring.attention.scoring import Scoring
from keras_ring.distribution.transport import Transport
from keras_ring.masks import Carried

Tensor = Any


@dataclasses.dataclass(frozen=True)
class Sharing(abc.ABC):
    """One way to compute attention over the shards of a sequence.

    A subclass says how keys reach queries, forward and backward, and where
    queries and keys lie meanwhile (`enter` and `leave`, which undoes it). The
    base gives the whole its own gradient: only query, key, value, output and
    log-sum-exp are kept for the backward, never a score.

    Attributes:
        transport: moves tensors between the devices that share the sequence.
        kernel: computes one K/V block.
    """

    transport: Transport
    kernel: Kernel

    @abc.abstractmethod
    def forward(self, inputs: Inputs, scoring: Scoring) -> Partial:
        """Attention of this device's queries over the keys of all devices.

        Args:
            inputs: the local chunks, where `enter` has put them.
            scoring: what makes the scores, over tensors that lie there too.

        Returns:
            `Partial` over all keys, in the accumulation dtype.
        """

    @abc.abstractmethod
    def backward(
        self,
        inputs: Inputs,
        partial: Partial,
        grads: Partial,
        scoring: Scoring,
    ) -> Gradients:
        """Gradients of this device's chunks.

        Args:
            inputs: as in `forward`.
            partial: what `forward` returned, `out` in the inputs' dtype.
            grads: the gradients of both.
            scoring: as in `forward`.

        Returns:
            In the accumulation dtype; the bias' gradient is that of the local
            rows over all keys, the slopes' is this device's term of a sum.
        """

    def enter(self, tensors: list[Tensor], axis: int) -> list[Tensor]:
        """Move tensors that lie along the sequence to where they are used.

        Args:
            tensors: chunks in natural order. The list may be emptied, so that
                none need be there twice.
            axis: the sequence axis of all of them.
        """
        return tensors

    def leave(self, tensors: list[Tensor], axis: int) -> list[Tensor]:
        """Move them back to natural order; the list may be emptied."""
        return tensors

    def attend(self, inputs: Inputs, scoring: Scoring) -> Partial:
        """Attention over the whole sequence, with its own gradient.

        Args:
            inputs: the local chunks in natural order, of one dtype.
            scoring: over local tensors in natural order.

        Returns:
            `Partial` in natural order, `out` in the inputs' dtype.
        """
        counts = [len(side) for side in scoring.carried()]
        at_key, at_shared = counts[0], counts[0] + counts[1]
        dtype = inputs.query.dtype

        def with_tensors(carried: list[Tensor]) -> Scoring:
            sides = (
                carried[:at_key],
                carried[at_key:at_shared],
                carried[at_shared:],
            )
            return scoring.replace(Carried(*(tuple(side) for side in sides)))

        def forward(*tensors: Tensor) -> tuple[tuple, tuple]:
            # Moved once: the backward finds them as they are needed.
            placed = Inputs(*self.enter(list(tensors[:3]), 2))
            carried = [
                *self.enter(list(tensors[3 : 3 + at_shared]), 1),
                *tensors[3 + at_shared :],
            ]
            out, lse = self.forward(placed, with_tensors(carried))
            out = ops.cast(out, dtype)
            residuals = *placed, *carried, out, lse
            return tuple(self.leave([out, lse], 2)), residuals

        def backward(
            residuals: tuple, grad_out: Tensor, grad_lse: Tensor
        ) -> tuple:
            *given, out, lse = residuals
            placed, carried = Inputs(*given[:3]), given[3:]
            pulls = Partial(*self.enter([grad_out, grad_lse], 2))
            grads = self.backward(
                placed, Partial(out, lse), pulls, with_tensors(carried)
            )
            others: list[Tensor | None] = [None] * len(carried)
            if grads.bias is not None:
                grad_bias = ops.cast(grads.bias, carried[0].dtype)
                (others[0],) = self.leave([grad_bias], 1)
            if grads.slopes is not None:
                slopes = ops.cast(grads.slopes, carried[at_shared].dtype)
                others[at_shared] = slopes
            pairs = zip(placed, grads[:3], strict=True)
            own = [ops.cast(grad, tensor.dtype) for tensor, grad in pairs]
            # What is moved needs room: nothing else is kept meanwhile.
            del grads, pairs, pulls, grad_out, grad_lse
            return (*self.leave(own, 2), *others)

        custom_gradient = backends.load().runtime.custom_gradient
        attention = custom_gradient(forward, backward)
        sides = scoring.carried()
        return Partial(
            *attention(*inputs, *sides.query, *sides.key, *sides.shared)
        )
