"""Masks that the data decide: tensors that lie and travel with the sequence."""

import dataclasses
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_ring import tensor_arguments
from keras_ring.masks.mask import Carried, Mask, Shape, Span, fits

Tensor = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Padding(Mask):
    """Only valid keys are attended to.

    With `valid = [[1, 1, 0, 1]]`, every query sees keys 0, 1 and 3.

    Args:
        valid: boolean `(batch, key_length)`, or integers 0 and 1; true
            where the key is real.
    """

    valid: Tensor

    def carried(self) -> Carried:
        return Carried(key=(self.valid,))

    def replace(self, carried: Carried) -> "Padding":
        return Padding(*carried.key)

    def structure(self) -> Any:
        return Padding

    def check(self, query: Shape, key: Shape, all_keys: int | None) -> None:
        _check_each_position("Padding(valid)", self.valid)
        tensor_arguments.boolean("Padding(valid)", self.valid)
        super().check(query, key, all_keys)

    def relation(self, queries: Span, keys: Span) -> tuple[Any, Any]:
        del queries, keys
        valid = ops.cast(self.valid, "bool")
        return (
            ops.any(valid, axis=(1, 2))[None, :],
            ops.all(valid, axis=(1, 2))[None, :],
        )

    def tile(self, queries: Any, keys: Any, div: Callable) -> Any:
        return (self.valid != 0)[None, :]

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return ops.cast(self.valid, "bool")[:, None, None, :]


@dataclasses.dataclass(frozen=True, eq=False)
class Segments(Mask):
    """A query attends to the keys that have its id: packed documents.

    With ids `[[0, 0, 1, 1]]` on both sides:

        1 1 0 0
        1 1 0 0
        0 0 1 1
        0 0 1 1

    Combine it with `Causal()` for decoders. Blocks whose ids cannot meet are
    not computed, so documents that lie one after the other cost what they
    cost apart.

    Args:
        query_ids: integers `(batch, query_length)`, any values.
        key_ids: integers `(batch, key_length)`.
    """

    query_ids: Tensor
    key_ids: Tensor

    def carried(self) -> Carried:
        return Carried((self.query_ids,), (self.key_ids,))

    def replace(self, carried: Carried) -> "Segments":
        return Segments(*carried.query, *carried.key)

    def structure(self) -> Any:
        return Segments

    def check(self, query: Shape, key: Shape, all_keys: int | None) -> None:
        for name in ("query_ids", "key_ids"):
            ids = getattr(self, name)
            _check_each_position(f"Segments({name})", ids)
            tensor_arguments.integers(f"Segments({name})", ids)
        super().check(query, key, all_keys)

    def relation(self, queries: Span, keys: Span) -> tuple[Any, Any]:
        del queries, keys
        # (tiles of queries, 1, batch) and (1, tiles of keys, batch).
        query_low, query_high = (
            function(self.query_ids, axis=2)[:, None]
            for function in (ops.min, ops.max)
        )
        key_low, key_high = (
            function(self.key_ids, axis=2)[None, :]
            for function in (ops.min, ops.max)
        )
        # Not by `<=`: the ids of the two sides may have two dtypes.
        meet = ops.logical_and(
            ops.less_equal(query_low, key_high),
            ops.less_equal(key_low, query_high),
        )
        # Both sides hold one id, and the same one.
        same = ops.logical_and(
            ops.equal(query_low, key_high), ops.equal(key_low, query_high)
        )
        single = ops.equal(query_low, query_high)
        return (
            ops.any(meet, axis=2),
            ops.all(ops.logical_and(same, single), axis=2),
        )

    def tile(self, queries: Any, keys: Any, div: Callable) -> Any:
        return self.query_ids[:, None] == self.key_ids[None, :]

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return ops.equal(self.query_ids[:, :, None], self.key_ids[:, None, :])[
            :, None
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class Explicit(Mask):
    """The allowed pairs, written out: rows are sharded with the queries.

    This is the only mask whose size is queries times keys. Where a
    structured mask says the same, use that one.

    Args:
        pairs: boolean `(batch, query_length, heads or 1, all_keys)`, or
            integers 0 and 1; true where the pair is allowed. The last axis
            is every key of the sequence on every device.
    """

    pairs: Tensor

    def carried(self) -> Carried:
        return Carried(query=(self.pairs,))

    def by_head(self) -> Carried:
        return Carried(query=(self.pairs.shape[2] != 1,))

    def replace(self, carried: Carried) -> "Explicit":
        return Explicit(*carried.query)

    def structure(self) -> Any:
        return Explicit

    def check(self, query: Shape, key: Shape, all_keys: int | None) -> None:
        tensor_arguments.is_array("Explicit(pairs)", self.pairs)
        tensor_arguments.boolean(
            *("Explicit(pairs)", self.pairs),
            ", or give it to `ring_attention` as `bias=`",
        )
        check_pairs("Explicit(pairs)", self.pairs, query, key, all_keys)

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return ops.cast(columns(self.pairs, key_positions), "bool")


def columns(pairs: Tensor, key_positions: Tensor) -> Tensor:
    """The columns of a tensor over all keys that belong to some positions.

    Args:
        pairs: `(batch, queries, heads, all_keys)`.
        key_positions: int32 `(keys,)`; those past the end get the last one.

    Returns:
        `(batch, heads, queries, keys)`.
    """
    last = ops.shape(pairs)[3] - 1
    taken = ops.take(pairs, ops.minimum(key_positions, last), axis=3)
    return ops.transpose(taken, (0, 2, 1, 3))


def _check_each_position(name: str, values: Tensor) -> None:
    """Refuse what is not one value for each position of each sample."""
    tensor_arguments.is_array(name, values)
    if len(values.shape) != 2:
        raise ValueError(
            f"{name} must have the shape (batch, length). Received: mask "
            f"tensor of shape {tuple(values.shape)}. Add or take away axes "
            "with keras.ops.reshape."
        )


def check_pairs(
    name: str, pairs: Tensor, query: Shape, key: Shape, all_keys: int | None
) -> None:
    """Refuse a tensor over pairs that does not fit; see `Mask.check`."""
    shape = tuple(pairs.shape)
    if not any(
        fits(shape, (batch, query[1], heads, all_keys))
        for heads in (1, query[2])
        for batch in (1, query[0])
    ):
        raise ValueError(
            f"{name} must have the shape (batch or 1, query_length, heads or "
            "1, all keys), where all keys are those of every device. "
            f"Received: shape={shape}, query.shape={query}, key.shape={key}, "
            f"{all_keys} keys in all. Transpose or broadcast it to that shape."
        )
