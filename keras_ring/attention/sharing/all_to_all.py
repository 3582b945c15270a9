"""Attention by heads: all positions and a part of the heads on each device.

DeepSpeed Ulysses (Jacobs et al. 2023, arXiv 2309.14509): an all-to-all takes
the sequence axis of queries, keys and values for the heads, attention is then
of each head on one device, and another all-to-all brings the results back.
Where the members that exchange heads are groups of a ring, another way to
share goes on between the groups (USP: Fang and Zhao 2024, arXiv 2405.07719).
"""

import dataclasses
import math
from typing import Any

from keras import ops

from keras_ring.attention.kernel import Gradients, Inputs
from keras_ring.attention.numerics import Partial
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.sharing.base import Sharing, cast_each
from keras_ring.distribution import shards
from keras_ring.masks import Carried, Mask
from keras_ring.shapes import sizes

Tensor = Any


@dataclasses.dataclass(frozen=True)
class AllToAll(Sharing):
    """Each device attends with its heads, over the sequence of its group.

    The transport is that of the group, which divides the query heads. Where
    it does not divide the key heads, these are repeated as often as it takes.

    Attributes:
        heads: numbers of query heads and of key heads of all members.
        inner: the way to share with other groups. A ring of one if there are
            none.
    """

    heads: tuple[int, int]
    inner: Sharing

    @property
    def repeats(self) -> int:
        """Number of copies of a key head, so that each member has as many."""
        return math.lcm(self.heads[1], self.transport.size) // self.heads[1]

    def enter(self, inputs: Inputs, scoring: Scoring) -> tuple[Inputs, Scoring]:
        query, *sides = inputs
        if self.repeats > 1:
            sides = [ops.repeat(side, self.repeats, axis=1) for side in sides]
        moved = Inputs(*self.transport.all_to_alls([query, *sides], 1, 2))
        own = self.heads[0] // self.transport.size
        first = self.transport.index() * own
        bias, slopes, dropout = scoring.bias, scoring.slopes, scoring.dropout
        if bias is not None:
            bias = self._rows(bias, bias.shape[2] > 1)
        if slopes is not None:
            slopes = ops.slice(slopes, (first,), (own,))
        if dropout is not None:
            first = ops.cast(first + dropout.first_head, "int32")
            dropout = dataclasses.replace(dropout, first_head=first)
        scoring = dataclasses.replace(
            scoring,
            mask=self._mask(scoring.mask),
            bias=bias,
            slopes=slopes,
            dropout=dropout,
        )
        return self.inner.enter(moved, scoring)

    def enter_rows(self, rows: list[Tensor]) -> list[Tensor]:
        moved = self.transport.all_to_alls(rows, 1, 2)
        rows.clear()
        return self.inner.enter_rows(moved)

    def leave_rows(self, rows: list[Tensor]) -> list[Tensor]:
        return self.transport.all_to_alls(self.inner.leave_rows(rows), 2, 1)

    def forward(self, inputs: Inputs, scoring: Scoring) -> Partial:
        return self.inner.forward(inputs, scoring)

    def backward(
        self,
        inputs: Inputs,
        partial: Partial,
        grads: Partial,
        scoring: Scoring,
    ) -> Gradients:
        return self.inner.backward(inputs, partial, grads, scoring)

    def leave(self, grads: list[Tensor], dtype: Any) -> list[Tensor]:
        # What is summed afterwards is not rounded before.
        wide = dtype if self.repeats == 1 else grads[0].dtype
        moved = self.transport.all_to_alls(self.inner.leave(grads, wide), 2, 1)
        if self.repeats > 1:
            moved[1:] = [self._summed(grad) for grad in moved[1:]]
        return cast_each(moved, dtype)

    def leave_bias(self, grad: Tensor, heads: int) -> Tensor:
        grad = self.inner.leave_bias(grad, heads)
        if heads > 1:
            return self.transport.all_to_all(grad, 1, 2)
        return shards.sum_of_own_part(self.transport, grad, 1)

    def leave_slopes(self, grad: Tensor) -> Tensor:
        grad = self.inner.leave_slopes(grad)
        (own,) = sizes(grad)
        first = self.transport.index() * own
        everyones = ops.zeros((self.heads[0],), dtype=grad.dtype)
        return ops.slice_update(everyones, (first,), grad)

    def _mask(self, mask: Mask | None) -> Mask | None:
        """A mask over the positions of the group and this device's heads."""
        if mask is None:
            return None
        carried, by_head = mask.carried(), mask.by_head()
        query, key = (
            tuple(self._rows(t, heads) for t, heads in zip(*s, strict=True))
            for s in zip(carried[:2], by_head[:2], strict=True)
        )
        return mask.replace(Carried(query, key, carried.shared))

    def _rows(self, tensor: Tensor, by_head: bool) -> Tensor:
        """(batch, length, ...) over the positions of the group; with heads on
        axis 2 those of this device."""
        if by_head:
            return self.transport.all_to_all(tensor, 2, 1)
        return self.transport.all_gather(tensor, 1)

    def _summed(self, grad: Tensor) -> Tensor:
        """The gradient of each key head, of that of its repetitions."""
        batch, _, *rest = sizes(grad)
        shape = batch, self.heads[1], self.repeats, *rest
        return ops.sum(ops.reshape(grad, shape), axis=2)
