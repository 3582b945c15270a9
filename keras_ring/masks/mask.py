"""Base of all masks: their questions, their tensors, `&` and `|`."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_ring.arguments import shown
from keras_ring.masks.band import Band

Tensor = Any
Shape = tuple[int | None, ...]


class Carried(NamedTuple):
    """Tensors that belong to attention beside query, key and value.

    They are given as the layer sees them: the global sequence on JAX, this
    device's shard on TensorFlow and PyTorch.

    Attributes:
        query: `(batch, query_length, ...)`, stay with the queries.
        key: `(batch, key_length, ...)`, travel around the ring with the keys.
        shared: without a sequence axis, the same on every member of a ring.
    """

    query: tuple[Tensor, ...] = ()
    key: tuple[Tensor, ...] = ()
    shared: tuple[Tensor, ...] = ()

    def join(self, other: "Carried") -> "Carried":
        """The tensors of both."""
        return Carried(
            *(tuple(a) + tuple(b) for a, b in zip(self, other, strict=True))
        )

    def split(self, first: "Carried") -> tuple["Carried", "Carried"]:
        """Undo `first.join(second)`, for other tensors in the same places."""
        counts = [len(side) for side in first]
        return (
            Carried(*(s[:n] for s, n in zip(self, counts, strict=True))),
            Carried(*(s[n:] for s, n in zip(self, counts, strict=True))),
        )


class Span(NamedTuple):
    """Positions of the tiles of one side of a block, both ends inclusive.

    Plain integers for one tile; for many, arrays that broadcast to
    `(query tiles, key tiles)`.

    Attributes:
        first: the first position of each tile.
        last: the last one.
    """

    first: Any
    last: Any


# Answers of a mask about its pairs, which follow from what `allowed` computes.
_ANSWERS = (
    *("relation", "reach", "grows", "band", "parts", "needed"),
    *("has_tile", "tile"),
)


class Mask(abc.ABC):
    """Base of all masks: the questions that attention asks.

    A mask has to say `allowed`, and its tensors if it has any (`carried`,
    `replace`, `structure`). Each further answer makes some kernel faster, and
    without it that kernel computes every pair or leaves the mask to another.

    A subclass with an `allowed` of its own inherits none of the answers that
    follow from the pairs: they would be those of the other mask.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        said_by: dict[str, Any] = {
            name: next(c for c in order if name in vars(c))
            for name in ("allowed", *_ANSWERS)
        }
        pairs = order.index(said_by.pop("allowed"))
        for name, owner in said_by.items():
            # A class without pairs of its own answers for its subclasses.
            of_others = owner.allowed is not Mask.allowed
            if of_others and order.index(owner) > pairs:
                setattr(cls, name, vars(Mask)[name])

    def carried(self) -> Carried:
        """Return the tensors of the mask, by how they travel."""
        return Carried()

    def replace(self, carried: Carried) -> "Mask":
        """Return the same mask over other tensors, such as a slice or those
        of a visiting chunk."""
        del carried
        return self

    def by_head(self) -> Carried:
        """Return True for each tensor that has the heads on axis 2, a pair's
        answer for each; in the places of `carried`, of which the shared ones
        cannot."""
        own = self.carried()
        return Carried(*(tuple(False for _ in side) for side in own))

    def structure(self) -> Any:
        """Return the mask without its tensors: equal and hashable for masks
        that differ in their tensors only."""
        return self

    def check(self, query: Shape, key: Shape, all_keys: int | None) -> None:
        """Refuse tensors that do not fit; sizes that are None fit all.

        Args:
            query: `(batch, query_length, heads, head_dim)` as the layer
                sees it.
            key: `(batch, key_length, key_heads, head_dim)`, likewise.
            all_keys: number of keys of all devices together.

        Raises:
            ValueError: if a tensor of the mask has another batch or length,
                or a dtype that says something else.
        """
        carried = self.carried()
        for name, shape, tensors in (
            ("query", query, carried.query),
            ("key", key, carried.key),
        ):
            for tensor in tensors:
                if not fits(tensor.shape[:2], shape[:2]):
                    raise ValueError(
                        f"{type(self).__name__} must have the batch and the "
                        f"length of the {name} on its first two axes, as the "
                        "layer sees them. Received: mask tensor of shape "
                        f"{tuple(tensor.shape)}, {name}.shape={shape}. "
                        "Transpose or broadcast it to that shape."
                    )

    def relation(self, queries: Span, keys: Span) -> tuple[Any, Any]:
        """Say of each tile whether a pair and whether all pairs are allowed.

        The tensors of the mask are cut into the same tiles when this is
        called: `(tiles, batch, tile length, ...)` each. A last tile that is
        not full is padded with zeros.

        Args:
            queries: positions of the query tiles.
            keys: positions of the key tiles.

        Returns:
            `(nonempty, full)`: `nonempty` is false only if no pair of a tile is
            allowed, `full` is true only if all are. Python bools where that
            is all there is to say, else boolean arrays that broadcast to
            `(query tiles, key tiles)`.
        """
        del queries, keys
        return True, False

    def reach(self) -> tuple[float, float]:
        """Return how many positions back and ahead of itself a query may see
        at most; `math.inf` where the mask sets no limit."""
        return math.inf, math.inf

    def grows(self) -> bool:
        """Return True if later queries see more keys than earlier ones, so
        that the members of a ring have different amounts of work."""
        return False

    def band(self) -> Band | None:
        """Return the pairs, if they are those between two diagonals; None if
        they are not. Kernels skip the others and compare no positions."""
        return None

    def purely_causal(self) -> bool:
        """Return True if keys that are later are hidden, and no others."""
        band = self.band()
        return band is not None and band.known and band == Band(least=0)

    def parts(self) -> tuple["Mask", ...]:
        """Return masks that together allow what this one does: all must
        allow a pair."""
        return (self,)

    def has_tile(self) -> bool:
        """Return True if `tile` can be asked."""
        return type(self).tile is not Mask.tile and not self.carried().shared

    def tile(self, queries: Any, keys: Any, div: Callable) -> Any:
        """Compute `allowed` in operations that every compiler of kernels has.

        Those are comparisons, `&`, `|`, `+`, `-` and `div`. The tensors of
        the mask are those of one sample and one tile: `(queries,)` and
        `(keys,)`.

        Args:
            queries: int32 `(queries, 1)`, global positions.
            keys: int32 `(1, keys)`.
            div: quotient of integers that are not negative.

        Returns:
            Boolean, broadcastable to `(queries, keys)`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `tile`.")

    def needed(self, relation: Callable[["Mask"], tuple[Any, Any]]) -> "Mask":
        """Return the mask without parts that decide nothing in a tile.

        Args:
            relation: what `relation` answers for a mask in that tile.
        """
        del relation
        return self

    @abc.abstractmethod
    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Say of each pair whether the query may attend to the key.

        Args:
            query_positions: int32 `(queries,)`, global.
            key_positions: int32 `(keys,)`, global.

        Returns:
            Boolean, broadcastable to `(batch, heads, queries, keys)`.
        """

    # NumPy would go through an array on the other side element by element.
    __array_ufunc__ = None

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, _checked(other, "&"))

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, _checked(other, "|"))

    def __rand__(self, other: Any) -> "Mask":
        return And(_checked(other, "&"), self)

    def __ror__(self, other: Any) -> "Mask":
        return Or(_checked(other, "|"), self)

    def __bool__(self) -> bool:
        raise TypeError(
            "A mask is neither true nor false: Python's `and`, `or` and `not` "
            "would drop one of two masks. Received: "
            f"bool({type(self).__name__}). Combine masks with `&` and `|`, "
            "and ask `mask is None` for no mask."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Pair(Mask):
    """Two masks in one.

    Args:
        first: a mask.
        second: another.
    """

    first: Mask
    second: Mask

    def carried(self) -> Carried:
        return self.first.carried().join(self.second.carried())

    def by_head(self) -> Carried:
        return self.first.by_head().join(self.second.by_head())

    def replace(self, carried: Carried) -> "Mask":
        first, second = carried.split(self.first.carried())
        return type(self)(
            self.first.replace(first), self.second.replace(second)
        )

    def structure(self) -> Any:
        return type(self), self.first.structure(), self.second.structure()

    def check(self, query: Shape, key: Shape, all_keys: int | None) -> None:
        for mask in (self.first, self.second):
            _checked(mask, type(self).__name__).check(query, key, all_keys)

    def grows(self) -> bool:
        # Within limits on both sides every query sees about as many.
        return max(self.reach()) == math.inf and (
            self.first.grows() or self.second.grows()
        )

    def has_tile(self) -> bool:
        return self.first.has_tile() and self.second.has_tile()

    def _tiles(self, queries: Any, keys: Any, div: Callable) -> list[Any]:
        """`tile` of each of the two, over its own tensors."""
        return [m.tile(queries, keys, div) for m in (self.first, self.second)]

    def _without(
        self,
        idle: Callable[[Any, Any], bool],
        relation: Callable[[Mask], tuple[Any, Any]],
    ) -> Mask:
        """The mask without the operands whose `relation` is idle."""
        operands = [
            operand.needed(relation)
            for operand in (self.first, self.second)
            if not idle(*relation(operand))
        ]
        return operands[0] if len(operands) == 1 else type(self)(*operands)

    def _relations(
        self, combine: Callable[[Any, Any], Any], queries: Span, keys: Span
    ) -> tuple[Any, Any]:
        nonempty, full = zip(
            self.first.relation(queries, keys),
            self.second.relation(queries, keys),
            strict=True,
        )
        return combine(*nonempty), combine(*full)


class And(_Pair):
    """Pairs that both masks allow; what `first & second` makes.

    Args:
        first: a mask.
        second: another.
    """

    def relation(self, queries: Span, keys: Span) -> tuple[Any, Any]:
        return self._relations(both, queries, keys)

    def reach(self) -> tuple[float, float]:
        first, second = self.first.reach(), self.second.reach()
        return min(first[0], second[0]), min(first[1], second[1])

    def band(self) -> Band | None:
        first, second = self.first.band(), self.second.band()
        if first is None or second is None:
            return None
        return first.both(second)

    def parts(self) -> tuple[Mask, ...]:
        return self.first.parts() + self.second.parts()

    def tile(self, queries: Any, keys: Any, div: Callable) -> Any:
        first, second = self._tiles(queries, keys, div)
        return first & second

    def needed(self, relation: Callable[[Mask], tuple[Any, Any]]) -> Mask:
        return self._without(lambda nonempty, full: bool(full), relation)

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return ops.logical_and(
            self.first.allowed(query_positions, key_positions),
            self.second.allowed(query_positions, key_positions),
        )


class Or(_Pair):
    """Pairs that one of two masks allows; what `first | second` makes.

    `Causal() | Padding(is_prefix)` is a decoder that sees all of a prefix.

    Args:
        first: a mask.
        second: another.
    """

    def relation(self, queries: Span, keys: Span) -> tuple[Any, Any]:
        return self._relations(either, queries, keys)

    def reach(self) -> tuple[float, float]:
        first, second = self.first.reach(), self.second.reach()
        return max(first[0], second[0]), max(first[1], second[1])

    def tile(self, queries: Any, keys: Any, div: Callable) -> Any:
        first, second = self._tiles(queries, keys, div)
        return first | second

    def needed(self, relation: Callable[[Mask], tuple[Any, Any]]) -> Mask:
        return self._without(
            lambda nonempty, full: not bool(nonempty), relation
        )

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        return ops.logical_or(
            self.first.allowed(query_positions, key_positions),
            self.second.allowed(query_positions, key_positions),
        )


def both(first: Any, second: Any) -> Any:
    """`first and second` for bools, NumPy arrays and tensors alike."""
    if first is False or second is False:
        return False
    if first is True:
        return second
    if second is True:
        return first
    if _is_plain(first) and _is_plain(second):
        return first & second
    return ops.logical_and(first, second)


def either(first: Any, second: Any) -> Any:
    """`first or second` for bools, NumPy arrays and tensors alike."""
    if first is True or second is True:
        return True
    if first is False:
        return second
    if second is False:
        return first
    if _is_plain(first) and _is_plain(second):
        return first | second
    return ops.logical_or(first, second)


def _checked(mask: Any, operator: str) -> Mask:
    if isinstance(mask, Mask):
        return mask
    raise TypeError(
        f"`{operator}` combines two masks. Received: {shown(mask)} as one of "
        "them. Wrap a boolean array of valid keys in Padding(valid), one of "
        "pairs in Explicit(pairs), and make an object of a class: Causal()."
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_, np.ndarray))


def fits(shape: Any, wanted: Any) -> bool:
    """True if a shape is the wanted one, where both are known."""
    return len(shape) == len(wanted) and all(
        have == want or not isinstance(have, int) or want is None
        for have, want in zip(shape, wanted, strict=True)
    )
