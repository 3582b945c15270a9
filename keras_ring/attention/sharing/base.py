"""Sharing interface: attention over a sequence that lies on several devices.

All tensors here are heads first, `(batch, heads, length, head_dim)`, and
local: the chunk that one device holds.
"""

import abc
import dataclasses
import itertools
from typing import Any

from keras import ops

from keras_ring import backends
from keras_ring.attention.kernel import Gradients, Inputs, Kernel
from keras_ring.attention.numerics import Partial
from keras_ring.attention.scoring import Scoring
from keras_ring.distribution.transport import Transport
from keras_ring.masks import Carried
from keras_ring.shapes import sizes

Tensor = Any


@dataclasses.dataclass(frozen=True)
class Sharing(abc.ABC):
    """One way to compute attention over the shards of a sequence.

    A subclass says how keys reach queries, forward and backward, and where
    queries and keys lie meanwhile (`enter`, and `leave`, which brings results
    and gradients back). The base gives the whole its own gradient: only query,
    key, value, output and log-sum-exp are kept for the backward, never a score.

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
            rows over all keys, which padding may follow, the slopes' is this
            device's term of a sum.
        """

    def enter(self, inputs: Inputs, scoring: Scoring) -> tuple[Inputs, Scoring]:
        """Move the operands to where they are used.

        Args:
            inputs: the local chunks in natural order.
            scoring: over local tensors in natural order.

        Returns:
            What `forward` and `backward` get, the scoring with as many
            tensors.
        """
        return inputs, scoring

    def enter_rows(self, rows: list[Tensor]) -> list[Tensor]:
        """Move what belongs to the queries to where these are.

        Args:
            rows: chunks `(batch, heads, length, ...)` in natural order. The
                list may be emptied, so that none need be there twice.
        """
        return rows

    def leave_rows(self, rows: list[Tensor]) -> list[Tensor]:
        """Undo `enter_rows`; the list may be emptied."""
        return rows

    def leave(self, grads: list[Tensor], dtype: Any) -> list[Tensor]:
        """Move the gradients of query, key and value to their owners.

        Args:
            grads: as `backward` returns them. The list may be emptied.
            dtype: that they are to have.
        """
        return cast_each(grads, dtype)

    def leave_bias(self, grad: Tensor, heads: int) -> Tensor:
        """Move the gradient of a bias to the owners of its rows.

        Args:
            grad: as `backward` returns it, in the dtype of the bias.
            heads: that the bias has, 1 for one that all heads share.
        """
        return grad

    def leave_slopes(self, grad: Tensor) -> Tensor:
        """Make this device's term of the gradient of all slopes."""
        return grad

    def attend(self, inputs: Inputs, scoring: Scoring) -> Partial:
        """Attention over the whole sequence, with its own gradient.

        Args:
            inputs: the local chunks in natural order, of one dtype.
            scoring: over local tensors in natural order.

        Returns:
            `Partial` in natural order, `out` in the inputs' dtype.
        """
        counts = [len(side) for side in scoring.carried()]
        dtype, bias = inputs.query.dtype, scoring.bias

        def operands(*tensors: Tensor) -> tuple[Inputs, Scoring]:
            carried = iter(tensors[3:])
            sides = (tuple(itertools.islice(carried, n)) for n in counts)
            return Inputs(*tensors[:3]), scoring.replace(Carried(*sides))

        def forward(*tensors: Tensor) -> tuple[tuple, tuple]:
            # Moved once: the backward finds them as they are needed.
            placed, own = self.enter(*operands(*tensors))
            out, lse = self.forward(placed, own)
            out = ops.cast(out, dtype)
            residuals = *placed, *itertools.chain(*own.carried()), out, lse
            return tuple(self.leave_rows([out, lse])), residuals

        def backward(
            residuals: tuple, grad_out: Tensor, grad_lse: Tensor
        ) -> tuple:
            *given, out, lse = residuals
            placed, own = operands(*given)
            pulls = Partial(*self.enter_rows([grad_out, grad_lse]))
            found = self.backward(placed, Partial(out, lse), pulls, own)
            others: list[Tensor | None] = [None] * sum(counts)
            if bias is not None and found.bias is not None:
                # The chunks of the keys may be padded, and the bias not.
                grad_bias = found.bias[..., : sizes(bias)[3]]
                grad_bias = ops.cast(grad_bias, bias.dtype)
                others[0] = self.leave_bias(grad_bias, bias.shape[2])
            if own.slopes is not None:
                slopes = ops.cast(found.slopes, own.slopes.dtype)
                others[counts[0] + counts[1]] = self.leave_slopes(slopes)
            grads = list(found[:3])
            # What is moved needs room: nothing else is kept meanwhile.
            del found, pulls, grad_out, grad_lse
            return (*self.leave(grads, dtype), *others)

        custom_gradient = backends.load().runtime.custom_gradient
        attention = custom_gradient(forward, backward)
        return Partial(
            *attention(*inputs, *itertools.chain(*scoring.carried()))
        )


def cast_each(tensors: list[Tensor], dtype: Any) -> list[Tensor]:
    """All tensors in a dtype; the list is emptied, so that no two of one are
    there for longer than the cast."""
    return [ops.cast(tensors.pop(0), dtype) for _ in range(len(tensors))]
