"""Which query may attend to which key, as functions of global positions.

A mask is a frozen object. It tells of a block of queries and keys whether
none, some or all pairs are allowed before anything is computed, so that
empty blocks cost nothing, and gives the exact pairs where only some are.
Masks combine with `&`. Positions are global, so a mask means the same on
every device and for every ring size.

A mask may carry tensors. Those on the query side stay with the queries,
those on the key side travel around the ring with the keys. Each has the
layout `(batch, length, ...)`, with the sequence on axis 1, and is given as
the layer sees it: the global sequence on JAX, the own shard on TensorFlow
and PyTorch.
"""

import abc
import dataclasses
from typing import Any

from keras import ops

Tensor = Any
Range = tuple[Any, Any]
Shape = tuple[int | None, ...]


class Mask(abc.ABC):
    """Base of all masks: the four questions that attention asks."""

    def query_tensors(self) -> tuple[Tensor, ...]:
        """Tensors `(batch, query_length, ...)` that stay with the queries."""
        return ()

    def key_tensors(self) -> tuple[Tensor, ...]:
        """Tensors `(batch, key_length, ...)` that travel with the keys."""
        return ()

    def structure(self) -> Any:
        """What is left of the mask without its tensors: equal and hashable
        for masks that differ in their tensors only."""
        return self

    def replace(
        self, query_tensors: tuple[Tensor, ...], key_tensors: tuple[Tensor, ...]
    ) -> "Mask":
        """The same mask over other tensors (a slice, a visiting chunk)."""
        del query_tensors, key_tensors
        return self

    def check(self, query: Shape, key: Shape, ring: int) -> None:
        """Refuse tensors that do not fit; sizes that are None fit all.

        Args:
            query: `(batch, query_length, heads, head_dim)` as the layer
                sees it.
            key: `(batch, key_length, key_heads, head_dim)`, likewise.
            ring: how many chunks like `key` make all the keys.

        Raises:
            ValueError: if a tensor of the mask has another batch or length.
        """
        for name, shape, tensors in (
            ("query", query, self.query_tensors()),
            ("key", key, self.key_tensors()),
        ):
            for tensor in tensors:
                if not _fits(tensor.shape[:2], shape[:2]):
                    raise ValueError(
                        f"{type(self).__name__} must have the batch and the "
                        f"length of the {name} on its first two axes, as the "
                        "layer sees them. Received: mask tensor of shape "
                        f"{tuple(tensor.shape)}, {name}.shape={shape}."
                    )

    def relation(self, queries: Range, keys: Range) -> tuple[Any, Any]:
        """`(some, every)` for inclusive position ranges `(first, last)`.

        `some` is false only if no pair in the block is allowed, `every` is
        true only if all are. Python bools where the ranges are integers.
        """
        del queries, keys
        return True, False

    @abc.abstractmethod
    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Boolean, broadcastable to `(batch, heads, queries, keys)`.

        Args:
            query_positions: int32 `(queries,)`, global.
            key_positions: int32 `(keys,)`, global.
        """

    def __and__(self, other: "Mask") -> "Mask":
        if not isinstance(other, Mask):
            return NotImplemented
        return And(self, other)


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """A query attends to its own position and to earlier ones.

    Aligned at the top left when the lengths differ, as in Keras: query `i`
    sees keys `0` to `i`. With 4 queries and 4 keys:

        1 0 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1
    """

    def relation(self, queries: Range, keys: Range) -> tuple[Any, Any]:
        return queries[1] >= keys[0], queries[0] >= keys[1]

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return (
            ops.expand_dims(query_positions, 1)
            >= ops.expand_dims(key_positions, 0)
        )[None, None]


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """A query attends to keys less than `size` positions away, either side.

    Combine it with `Causal()` for the window of a decoder. With size 2, 4
    queries and 4 keys:

        1 1 0 0
        1 1 1 0
        0 1 1 1
        0 0 1 1

    Args:
        size: positive integer; 1 leaves a query only its own position.

    Raises:
        ValueError: if `size` is no positive integer.
    """

    size: int

    def __post_init__(self) -> None:
        if (
            not isinstance(self.size, int)
            or isinstance(self.size, bool)
            or self.size < 1
        ):
            raise ValueError(
                "The `size` of a sliding window must be a positive integer. "
                f"Received: size={self.size!r}."
            )

    def relation(self, queries: Range, keys: Range) -> tuple[Any, Any]:
        below, above = queries[0] - keys[1], keys[0] - queries[1]
        some = (below < self.size) & (above < self.size)
        below, above = queries[1] - keys[0], keys[1] - queries[0]
        return some, (below < self.size) & (above < self.size)

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        distance = ops.expand_dims(query_positions, 1) - ops.expand_dims(
            key_positions, 0
        )
        return (ops.abs(distance) < self.size)[None, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Padding(Mask):
    """Only valid keys are attended to.

    With `valid = [[1, 1, 0, 1]]`, every query sees keys 0, 1 and 3.

    Args:
        valid: boolean `(batch, key_length)`, true where the key is real.
    """

    valid: Tensor

    def structure(self) -> Any:
        return Padding

    def key_tensors(self) -> tuple[Tensor, ...]:
        return (self.valid,)

    def replace(
        self, query_tensors: tuple[Tensor, ...], key_tensors: tuple[Tensor, ...]
    ) -> "Padding":
        return Padding(*key_tensors)

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return ops.cast(self.valid, "bool")[:, None, None, :]


@dataclasses.dataclass(frozen=True, eq=False)
class Explicit(Mask):
    """The allowed pairs, written out: rows are sharded with the queries.

    This is the only mask whose size is queries times keys. Where a
    structured mask says the same, use that one.

    Args:
        pairs: boolean `(batch, query_length, heads or 1, all_keys)`, true
            where the pair is allowed. The last axis is every key of the
            sequence on every device.
    """

    pairs: Tensor

    def structure(self) -> Any:
        return Explicit

    def query_tensors(self) -> tuple[Tensor, ...]:
        return (self.pairs,)

    def replace(
        self, query_tensors: tuple[Tensor, ...], key_tensors: tuple[Tensor, ...]
    ) -> "Explicit":
        return Explicit(*query_tensors)

    def check(self, query: Shape, key: Shape, ring: int) -> None:
        shape = tuple(self.pairs.shape)
        keys = None if key[1] is None else key[1] * ring
        fits = len(shape) == 4 and any(
            _fits(shape, (*query[:2], heads, keys)) for heads in (1, query[2])
        )
        if not fits:
            raise ValueError(
                "Explicit(pairs) must have the shape (batch, query_length, "
                "heads or 1, all keys), where all keys are those of every "
                f"device. Received: pairs.shape={shape}, query.shape={query},"
                f" key.shape={key}, {keys} keys in all. Transpose or "
                "broadcast the mask to that shape."
            )

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        columns = ops.minimum(key_positions, ops.shape(self.pairs)[3] - 1)
        pairs = ops.take(self.pairs, columns, axis=3)
        return ops.transpose(ops.cast(pairs, "bool"), (0, 2, 1, 3))


@dataclasses.dataclass(frozen=True, eq=False)
class And(Mask):
    """Pairs that both masks allow; what `first & second` makes.

    Args:
        first: a mask.
        second: another.
    """

    first: Mask
    second: Mask

    def structure(self) -> Any:
        return And, self.first.structure(), self.second.structure()

    def query_tensors(self) -> tuple[Tensor, ...]:
        return self.first.query_tensors() + self.second.query_tensors()

    def key_tensors(self) -> tuple[Tensor, ...]:
        return self.first.key_tensors() + self.second.key_tensors()

    def replace(
        self, query_tensors: tuple[Tensor, ...], key_tensors: tuple[Tensor, ...]
    ) -> "And":
        at_query = len(self.first.query_tensors())
        at_key = len(self.first.key_tensors())
        return And(
            self.first.replace(query_tensors[:at_query], key_tensors[:at_key]),
            self.second.replace(query_tensors[at_query:], key_tensors[at_key:]),
        )

    def check(self, query: Shape, key: Shape, ring: int) -> None:
        self.first.check(query, key, ring)
        self.second.check(query, key, ring)

    def relation(self, queries: Range, keys: Range) -> tuple[Any, Any]:
        some_first, every_first = self.first.relation(queries, keys)
        some_second, every_second = self.second.relation(queries, keys)
        return some_first & some_second, every_first & every_second

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return ops.logical_and(
            self.first.allowed(query_positions, key_positions),
            self.second.allowed(query_positions, key_positions),
        )


def _fits(shape: Any, wanted: Any) -> bool:
    return len(shape) == len(wanted) and all(
        have == want or not isinstance(have, int) or want is None
        for have, want in zip(shape, wanted, strict=True)
    )
