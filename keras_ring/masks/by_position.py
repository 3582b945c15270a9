"""Masks that are known from the positions alone."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_ring import arguments, tensor_arguments
from keras_ring.masks.band import FAR, Band
from keras_ring.masks.mask import Carried, Mask, Shape, Span, either, fits

Tensor = Any

# The largest position that an int32 holds; "no limit" may be a larger number.
_LAST = 2**31 - 1


def _limit(size: Any) -> Any:
    """A size that int32 positions can be compared with; tensors as they are."""
    return min(size, _LAST) if isinstance(size, int) else size


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

    def reach(self) -> tuple[float, float]:
        return math.inf, 0

    def grows(self) -> bool:
        return True

    def relation(self, queries: Span, keys: Span) -> tuple[Any, Any]:
        return queries.last >= keys.first, queries.first >= keys.last

    def band(self) -> Band:
        return Band(least=0)

    def tile(self, queries: Any, keys: Any, div: Callable) -> Any:
        return queries >= keys

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return (query_positions[:, None] >= key_positions[None, :])[None, None]


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
        size = arguments.integer("size", self.size)
        object.__setattr__(self, "size", size)

    def reach(self) -> tuple[float, float]:
        return self.size - 1, self.size - 1

    def relation(self, queries: Span, keys: Span) -> tuple[Any, Any]:
        below, above = queries.first - keys.last, keys.first - queries.last
        size = _limit(self.size)
        nonempty = (below < size) & (above < size)
        below, above = queries.last - keys.first, keys.last - queries.first
        return nonempty, (below < size) & (above < size)

    def band(self) -> Band:
        size = min(self.size, FAR)
        return Band(1 - size, size - 1)

    def tile(self, queries: Any, keys: Any, div: Callable) -> Any:
        distance, size = queries - keys, _limit(self.size)
        return (distance < size) & (distance > -size)

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        distance = query_positions[:, None] - key_positions[None, :]
        return (ops.abs(distance) < _limit(self.size))[None, None]


@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
    """A query attends to every key of its own block and of earlier ones.

    With size 2, 4 queries and 4 keys:

        1 1 0 0
        1 1 0 0
        1 1 1 1
        1 1 1 1

    Args:
        size: positive integer, positions in a block; 1 is `Causal()`.

    Raises:
        ValueError: if `size` is no positive integer.
    """

    size: int

    def __post_init__(self) -> None:
        size = arguments.integer("size", self.size)
        object.__setattr__(self, "size", size)

    def reach(self) -> tuple[float, float]:
        return math.inf, self.size - 1

    def grows(self) -> bool:
        return True

    def relation(self, queries: Span, keys: Span) -> tuple[Any, Any]:
        size = _limit(self.size)
        return (
            queries.last // size >= keys.first // size,
            queries.first // size >= keys.last // size,
        )

    def tile(self, queries: Any, keys: Any, div: Callable) -> Any:
        size = _limit(self.size)
        return div(queries, size) >= div(keys, size)

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        size = _limit(self.size)
        query_blocks, key_blocks = (
            query_positions // size,
            key_positions // size,
        )
        return (query_blocks[:, None] >= key_blocks[None, :])[None, None]


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixLM(Mask):
    """The first `length` keys are seen by all, the rest causally.

    With length 2, 4 queries and 4 keys:

        1 1 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1

    Args:
        length: integer not below 0, or integers `(batch,)`, one prefix for
            each sample.

    Raises:
        ValueError: for a negative number or a tensor of another rank.

    Reference:
        Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.2.1
    """

    length: int | Tensor

    def __post_init__(self) -> None:
        plain = isinstance(self.length, numbers.Integral)
        if plain or not hasattr(self.length, "shape"):
            length = arguments.integer(
                *("length", self.length, 0, ", or an integer tensor (batch,)")
            )
            object.__setattr__(self, "length", length)

    def carried(self) -> Carried:
        if isinstance(self.length, int):
            return Carried()
        return Carried(shared=(self.length,))

    def replace(self, carried: Carried) -> "PrefixLM":
        return PrefixLM(*carried.shared) if carried.shared else self

    def structure(self) -> Any:
        return PrefixLM, self.length if isinstance(self.length, int) else None

    def check(self, query: Shape, key: Shape, all_keys: int | None) -> None:
        for length in self.carried().shared:
            tensor_arguments.integers("PrefixLM(length)", length)
            if not fits(length.shape, query[:1]):
                raise ValueError(
                    "PrefixLM(length) takes an integer or one integer for "
                    "each sample, (batch,). Received: length.shape="
                    f"{tuple(length.shape)}, query.shape={query}. Reshape it."
                )

    def grows(self) -> bool:
        return True

    def relation(self, queries: Span, keys: Span) -> tuple[Any, Any]:
        shortest = longest = _limit(self.length)
        if not isinstance(self.length, int):
            shortest, longest = ops.min(self.length), ops.max(self.length)
        nonempty, full = Causal().relation(queries, keys)
        return (
            either(nonempty, _below(keys.first, longest)),
            either(full, _below(keys.last, shortest)),
        )

    def tile(self, queries: Any, keys: Any, div: Callable) -> Any:
        return (queries >= keys) | (keys < _limit(self.length))

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        if isinstance(self.length, int):
            in_prefix = (key_positions < _limit(self.length))[
                None, None, None, :
            ]
        else:
            length = ops.cast(self.length, "int32")
            in_prefix = (key_positions[None, :] < length[:, None])[
                :, None, None, :
            ]
        causal = Causal().allowed(query_positions, key_positions)
        return ops.logical_or(causal, in_prefix)


@dataclasses.dataclass(frozen=True, eq=False)
class Before(Mask):
    """Only keys, or only queries, at positions below `limit`, which may be a
    tensor: what the package hides its own padding with.

    Args:
        limit: int or int32 scalar.
        queries: whether queries are meant and not keys.
    """

    limit: Any
    queries: bool = False

    def carried(self) -> Carried:
        if isinstance(self.limit, int):
            return Carried()
        return Carried(shared=(self.limit,))

    def replace(self, carried: Carried) -> "Before":
        if not carried.shared:
            return self
        return Before(carried.shared[0], self.queries)

    def structure(self) -> Any:
        limit = self.limit if isinstance(self.limit, int) else None
        return Before, self.queries, limit

    def relation(self, queries: Span, keys: Span) -> tuple[Any, Any]:
        span = queries if self.queries else keys
        return _below(span.first, self.limit), _below(span.last, self.limit)

    def band(self) -> Band:
        limit = self.limit
        if isinstance(limit, int):
            limit = min(limit, FAR)
        return Band(rows=limit) if self.queries else Band(stop=limit)

    def tile(self, queries: Any, keys: Any, div: Callable) -> Any:
        return (queries if self.queries else keys) < self.limit

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        if self.queries:
            return (query_positions < self.limit)[None, None, :, None]
        return (key_positions < self.limit)[None, None, None, :]


def _below(positions: Any, limit: Any) -> Any:
    if isinstance(limit, int):
        return positions < limit
    return ops.less(ops.cast(positions, limit.dtype), limit)
