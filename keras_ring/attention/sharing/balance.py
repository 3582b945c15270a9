"""Equal work for all members of a ring under a causal mask.

Chunks lie in natural order outside of attention. Inside, where it pays, the
members hold the balanced chunks of `placement`: halves of the natural ones
are exchanged on the way in and back again on the way out, so that nothing
else, and no user, ever sees another order.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_ring.attention.sharing.base import Sharing
from keras_ring.distribution import placement
from keras_ring.distribution.transport import Transport
from keras_ring.masks import Mask

Tensor = Any

# Shorter halves have less work than their exchange costs.
SHORTEST = 128


@dataclasses.dataclass(frozen=True)
class Balanced(Sharing):
    """A sharing whose members may hold balanced chunks.

    Attributes:
        balanced: whether queries, and what a subclass puts beside them, lie
            in the balanced chunks of `placement` while attention is computed.
    """

    balanced: bool = False

    def enter_rows(self, rows: list[Tensor]) -> list[Tensor]:
        if not self.balanced:
            return rows
        return enter(self.transport, rows, [2] * len(rows))

    def leave_rows(self, rows: list[Tensor]) -> list[Tensor]:
        if not self.balanced:
            return rows
        return leave(self.transport, rows, [2] * len(rows))

    def leave_bias(self, grad: Tensor, heads: int) -> Tensor:
        if not self.balanced:
            return grad
        return leave(self.transport, [grad], [1])[0]


def pays(
    choice: placement.Choice,
    size: int,
    mask: Mask | None,
    query_length: Any,
    key_length: Any,
) -> bool:
    """True if attention should work on balanced chunks.

    Args:
        choice: what the user wants; "auto" for where it pays, and True for
            wherever it is possible and the work is not equal anyway.
        size: members of the ring.
        mask: of the attention.
        query_length: of one chunk; no integer where it is not known.
        key_length: likewise.
    """
    if choice is False or size == 1 or mask is None or not mask.grows():
        return False
    if not isinstance(query_length, int) or query_length != key_length:
        return False
    shortest = 1 if choice is True else SHORTEST
    return query_length % 2 == 0 and query_length // 2 >= shortest


def enter(
    transport: Transport, tensors: list[Tensor], axes: Sequence[int]
) -> list[Tensor]:
    """Natural chunks become balanced ones.

    Args:
        transport: of the ring.
        tensors: any that lie along the sequence. The list is empty
            afterwards, so that none need be there twice.
        axes: the sequence axis of each.
    """
    return _moved(transport, tensors, axes, placement.moves(transport.size))


def leave(
    transport: Transport, tensors: list[Tensor], axes: Sequence[int]
) -> list[Tensor]:
    """Balanced chunks become natural ones; undoes `enter`, and empties the
    list as well."""
    moves = placement.moves(transport.size)
    return _moved(transport, tensors, axes, [_inverse(m) for m in moves])


def _moved(
    transport: Transport,
    tensors: list[Tensor],
    axes: Sequence[int],
    moves: Sequence[list[int]],
) -> list[Tensor]:
    """The first halves moved by one permutation, the second by another."""
    most = transport.portion
    if (
        most is not None
        and len(tensors) > 1
        and tensors[0].shape[axes[0]] > most
    ):
        # One after the other, so that one at a time is there twice.
        return [
            _moved(transport, [tensors.pop(0)], [axis], moves)[0]
            for axis in axes
        ]
    halves = [
        ops.split(t, 2, axis=a) for t, a in zip(tensors, axes, strict=True)
    ]
    tensors.clear()
    parts = [
        transport.exchange(list(side), move)
        for side, move in zip(zip(*halves, strict=True), moves, strict=True)
    ]
    return [
        ops.concatenate(both, axis=axis)
        for *both, axis in zip(*parts, axes, strict=True)
    ]


def _inverse(permutation: list[int]) -> list[int]:
    return [permutation.index(i) for i in range(len(permutation))]
