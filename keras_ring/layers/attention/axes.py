"""Attention over any axes, as attention over one sequence.

`keras_ring.ops.ring_attention` knows one sequence axis. With other
`attention_axes` the axes that are not attended over become part of the
batch and those that are become one sequence, for the tensors and for their
masks alike. For the usual `(batch, length, features)` nothing is moved.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from keras import ops

Tensor = Any


@dataclasses.dataclass(frozen=True)
class AttentionAxes:
    """Axes of an input of one rank that are attended over.

    Attributes:
        rank: rank of the inputs, batch and features included.
        axes: the axes attended over, in the order of the flat sequence.
    """

    rank: int
    axes: tuple[int, ...]

    @classmethod
    def of(
        cls, rank: int, attention_axes: tuple[int, ...] | None
    ) -> "AttentionAxes":
        """The axes of a rank; None stands for all but batch and features.

        Raises:
            ValueError: for an axis that is the batch, the features, not
                there, or named twice.
        """
        if attention_axes is None:
            return cls(rank, tuple(range(1, rank - 1)))
        axes = tuple(a if a >= 0 else rank + a for a in attention_axes)
        if len(set(axes)) != len(axes) or not set(axes) <= set(
            range(1, rank - 1)
        ):
            raise ValueError(
                "`attention_axes` must name axes between the batch (0) and "
                f"the features ({rank - 1} or -1), each once. Received: "
                f"attention_axes={attention_axes} for inputs of rank {rank}. "
                "Leave the batch and the features out, or pass None for all "
                "between."
            )
        return cls(rank, axes)

    @property
    def free(self) -> tuple[int, ...]:
        """Axes that are neither batch, attended over, nor features."""
        return tuple(a for a in range(1, self.rank - 1) if a not in self.axes)

    @property
    def plain(self) -> bool:
        """True if tensors are `(batch, length, ...)` as they are."""
        return self.rank == 3

    def lengths(self, shape: Sequence[Any]) -> tuple[Any, ...]:
        """The sizes of the axes attended over, of an input's shape."""
        return tuple(shape[a] for a in self.axes)

    def scores_shape(
        self, query: Sequence[Any], key: Sequence[Any], heads: int
    ) -> tuple[Any, ...]:
        """The shape of the attention scores for two inputs' shapes."""
        batch = (query[0], *(query[a] for a in self.free))
        return (*batch, heads, *self.lengths(query), *self.lengths(key))

    def fold(self, tensor: Tensor) -> Tensor:
        """`(batch, dims..., *rest)` -> `(folded batch, length, *rest)`."""
        if self.plain:
            return tensor
        rest = tuple(range(self.rank - 1, len(tensor.shape)))
        tensor = ops.transpose(tensor, (0, *self.free, *self.axes, *rest))
        shape = tuple(ops.shape(tensor))
        first, last = 1 + len(self.free), self.rank - 1
        return ops.reshape(
            tensor,
            (
                math.prod(shape[:first]),
                math.prod(shape[first:last]),
                *shape[last:],
            ),
        )

    def unfold(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Undo `fold`, giving the axes their sizes in `like`."""
        if self.plain:
            return tensor
        sizes = tuple(ops.shape(like))
        order = (0, *self.free, *self.axes)
        rest = tuple(ops.shape(tensor))[2:]
        tensor = ops.reshape(tensor, tuple(sizes[a] for a in order) + rest)
        back = tuple(order.index(a) for a in range(len(order)))
        more = tuple(range(len(back), len(back) + len(rest)))
        return ops.transpose(tensor, back + more)

    def unfold_scores(self, scores: Tensor, query: Tensor, key: Tensor) -> Any:
        """`(folded batch, heads, queries, keys)` -> `scores_shape`."""
        if self.plain:
            return scores
        heads = scores.shape[1]
        shape = self.scores_shape(ops.shape(query), ops.shape(key), heads)
        return ops.reshape(scores, shape)

    def fold_positions(self, mask: Tensor, like: Tensor, name: str) -> Tensor:
        """One value for each position of `like`, such as a mask or an id, as
        `(folded batch, length)`.

        Raises:
            ValueError: for a mask of another shape.
        """
        shape = tuple(ops.shape(like))[: self.rank - 1]
        given = tuple(ops.shape(mask))
        if len(given) < 2 or not _broadcasts(given, shape[: len(given)]):
            raise ValueError(
                f"`{name}` must have the shape of its tensor without the "
                f"features: (batch, length). Received: {name}.shape="
                f"{tuple(mask.shape)} for a tensor of shape "
                f"{tuple(like.shape)}. Give one value for each position."
            )
        given += (1,) * (len(shape) - len(given))
        return self.fold(_broadcast(ops.reshape(mask, given), shape))

    def fold_pairs(
        self,
        pairs: Tensor,
        query_sizes: tuple[Any, ...],
        key_lengths: tuple[Any, ...],
        name: str = "attention_mask",
    ) -> Tensor:
        """Fold what is said of each score, such as a mask or a bias, as
        `(folded batch, heads or 1, queries, keys)`.

        Args:
            pairs: `(leading..., query axes..., key axes...)`, where the
                leading axes are the first ones of (batch, axes not attended
                over, heads). Sizes of 1 and missing axes broadcast.
            query_sizes: `(batch, dims..., heads)`, the query's sizes.
            key_lengths: sizes of the attended axes over all devices.
            name: of the argument, for errors.

        Raises:
            ValueError: for a mask that does not broadcast to the scores.
        """
        batch, attended = 1 + len(self.free), len(self.axes)
        target: tuple[Any, ...] = (
            *(query_sizes[a] for a in (0, *self.free)),
            query_sizes[-1],
            *self.lengths(query_sizes),
            *key_lengths,
        )
        given = tuple(ops.shape(pairs))
        leading, missing = len(given) - 2 * attended, len(target) - len(given)
        shape = given[:leading] + (1,) * missing + given[leading:]
        if leading < 0 or not _broadcasts(shape, target):
            raise ValueError(
                f"`{name}` must broadcast to the attention scores: "
                "(query_length, key_length), (batch, query_length, "
                "key_length) or (batch, heads, query_length, key_length). "
                f"Received: {name}.shape={tuple(pairs.shape)} for "
                f"scores of shape {target}. On a device that holds a part of "
                "the sequence the rows are its own queries and the columns "
                "all keys: feed it as (batch, query_length, key_length)."
            )
        # One mask for all heads stays one.
        target = (*target[:batch], shape[batch], *target[batch + 1 :])
        pairs = ops.reshape(pairs, shape)
        pairs = _broadcast(pairs, target)
        if self.plain:
            return pairs
        keys = batch + 1 + attended
        return ops.reshape(
            pairs,
            (
                math.prod(target[:batch]),
                shape[batch],
                math.prod(target[batch + 1 : keys]),
                math.prod(target[keys:]),
            ),
        )


def _broadcasts(shape: tuple[Any, ...], target: tuple[Any, ...]) -> bool:
    """True if known sizes are 1 or those of the target, axis by axis."""
    return len(shape) == len(target) and all(
        not isinstance(size, int)
        or not isinstance(wanted, int)
        or size == 1
        or size == wanted
        for size, wanted in zip(shape, target, strict=True)
    )


def _broadcast(tensor: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """Broadcast to a shape, unless the tensor is known to have it."""
    known = tuple(tensor.shape)
    if all(
        isinstance(size, int) and size == have
        for have, size in zip(known, shape, strict=True)
    ):
        return tensor
    return ops.broadcast_to(tensor, shape)
