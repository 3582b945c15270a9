"""Attention over gathered keys: each device has those of all for a while.

Megatron's sequence parallelism gathers what attention needs (Korthikanti et
al. 2022, arXiv 2205.05198), Llama 3's context parallelism its keys and values
(Llama team 2024, arXiv 2407.21783, section 3.3.2). Keys and values are there
whole while attention is computed, and nothing of them is kept in between.
"""

import dataclasses
from typing import Any

from keras_ring.attention.kernel import Gradients, Inputs
from keras_ring.attention.numerics import Partial
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.sharing import balance
from keras_ring.attention.sharing.balance import Balanced
from keras_ring.attention.sharing.base import cast_each
from keras_ring.attention.visit import Visit
from keras_ring.distribution import placement, shards
from keras_ring.precision import accumulation_dtype
from keras_ring.shapes import sizes

Tensor = Any


@dataclasses.dataclass(frozen=True)
class AllGather(Balanced):
    """Local queries attend to the keys of all devices at once, which lie in
    natural order, whether the queries are balanced or not."""

    def enter(self, inputs: Inputs, scoring: Scoring) -> tuple[Inputs, Scoring]:
        if not self.balanced:
            return inputs, scoring
        carried = scoring.carried()
        tensors = [inputs.query, *carried.query]
        axes = [2] + [1] * len(carried.query)
        query, *own = balance.enter(self.transport, tensors, axes)
        return inputs._replace(query=query), scoring.replace(
            carried._replace(query=tuple(own))
        )

    def forward(self, inputs: Inputs, scoring: Scoring) -> Partial:
        return self.kernel.forward(*self._everything(inputs, scoring), None)

    def backward(
        self,
        inputs: Inputs,
        partial: Partial,
        grads: Partial,
        scoring: Scoring,
    ) -> Gradients:
        dtype = accumulation_dtype(inputs.query.dtype)
        rows = self.kernel.rows(partial, grads, dtype)
        whole, visit = self._everything(inputs, scoring)
        return self.kernel.backward(whole, rows, visit, None)

    def leave(self, grads: list[Tensor], dtype: Any) -> list[Tensor]:
        query, *sides = grads
        grads.clear()
        own = [shards.sum_of_own_part(self.transport, g, 2) for g in sides]
        (query,) = self.leave_rows(cast_each([query], dtype))
        return [query, *cast_each(own, dtype)]

    def _everything(
        self, inputs: Inputs, scoring: Scoring
    ) -> tuple[Inputs, Visit]:
        """All keys, and where the local queries lie among them."""
        gather, carried = self.transport.all_gather, scoring.carried()
        keys = tuple(gather(tensor, 1) for tensor in carried.key)
        key, value = (gather(tensor, 2) for tensor in inputs[1:])
        starts = placement.starts(
            self.transport.index(),
            sizes(inputs.query)[2],
            self.transport.size,
            self.balanced,
        )
        visit = Visit(starts, (0,), scoring.replace(carried._replace(key=keys)))
        return Inputs(inputs.query, key, value), visit
