"""A visit cut into rectangles that one fused call computes each.

A fused operation knows no masks but its causal one and a tensor that is
added to the scores. So a chunk is halved along queries and keys until a
rectangle is empty, whole or the corner of a causal mask, or too small to
gain anything. What no mask touches stays as large as it can be.

All of this is decided on the host: what a mask carries is copied there once,
so that no rectangle waits for a device.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import torch

from keras_ring.attention.visit import Visit
from keras_ring.masks import Carried, Mask, Span


class Grain(NamedTuple):
    """Sizes into which a visit is cut.

    Attributes:
        small: rectangles up to this side are not halved any more.
        masked: up to this side, one that needs its mask everywhere is
            computed at once.
    """

    small: int
    masked: int


# On CPUs a call costs next to nothing, and on GPUs as much as the products of
# a rectangle that does not fill them.
FINE, COARSE = Grain(256, 1024), Grain(1024, 2048)


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A rectangle of the scores of a visit.

    Attributes:
        queries: its rows in the chunk.
        keys: its columns in the visiting chunk.
        query_start: global position of its first row.
        key_start: global position of its first column.
        mask: over the tensors of this rectangle, on the host except for those
            that hold every pair; or None.
        causal: whether row `i` sees the columns 0 to `i` only, where no mask
            is left.
        count: of how many equal rectangles this is the first. Each of the
            others lies `step` rows below and `step` columns behind the one
            before it.
        step: see `count`.
    """

    queries: slice
    keys: slice
    query_start: int
    key_start: int
    mask: Mask | None
    causal: bool = False
    count: int = 1
    step: int = 0

    @property
    def rows(self) -> int:
        return self.queries.stop - self.queries.start

    @property
    def columns(self) -> int:
        return self.keys.stop - self.keys.start

    def covers(self, queries: int, keys: int) -> bool:
        """True if every query and every key of the chunks is in exactly one of
        the `count` rectangles."""
        start = self.queries.start, self.keys.start
        side_by_side = self.count == 1 or (
            self.step == self.rows == self.columns
        )
        lengths = self.count * self.rows, self.count * self.columns
        return side_by_side and (start, lengths) == ((0, 0), (queries, keys))

    def spans(self) -> tuple[Span, Span]:
        """The positions of the rectangle as one tile."""
        return (
            Span(self.query_start, self.query_start + self.rows - 1),
            Span(self.key_start, self.key_start + self.columns - 1),
        )

    def allowed(self, device: torch.device) -> torch.Tensor:
        """Boolean (B or 1, H or 1, rows or 1, columns)."""
        positions = [
            torch.arange(
                span.first, span.last + 1, dtype=torch.int32, device=device
            )
            for span in self.spans()
        ]
        mask: Any = self.mask
        allowed = _on(device, mask).allowed(*positions)
        return allowed.expand(*allowed.shape[:3], self.columns)

    def part(self, rows: slice, columns: slice) -> "Piece":
        """A rectangle in this one, by its own rows and columns."""
        mask = self.mask
        if mask is not None:
            query, key, shared = mask.carried()
            mask = mask.replace(
                Carried(
                    tuple(t[:, rows] for t in query),
                    tuple(t[:, columns] for t in key),
                    shared,
                )
            )
        return Piece(
            _within(self.queries, rows),
            _within(self.keys, columns),
            self.query_start + rows.start,
            self.key_start + columns.start,
            mask,
        )


def pieces(
    visit: Visit, query_length: int, key_length: int, grain: Grain = FINE
) -> list[Piece]:
    """The rectangles of a visit in which some pair is allowed.

    Args:
        visit: where the chunks lie, and what makes the scores.
        query_length: queries in the chunk, at least one.
        key_length: keys in the chunk, at least one.
        grain: how finely it is cut.

    Returns:
        Rectangles that do not overlap: a single one where one call can
        compute the visit. Equal ones along a diagonal are one `Piece`; the
        first comes first that covers all queries and all keys, if any does.
    """
    whole = Piece(
        slice(0, query_length), slice(0, key_length), 0, 0, visit.scoring.mask
    )
    nonempty, full = visit.relation(query_length, key_length)
    if bool(full):
        return [dataclasses.replace(whole, mask=None)]
    if not bool(nonempty):
        return []
    mask: Any = whole.mask
    whole = dataclasses.replace(whole, mask=_on("cpu", mask))
    # Keras puts what it makes, and what it is given, on the device in use.
    with keras.device("cpu"):
        found = [
            piece
            for part in _contiguous(whole, visit)
            for piece in _simplest(part, grain)
        ]
    return sorted(
        _diagonals(found),
        key=lambda piece: not piece.covers(query_length, key_length),
    )


def _on(device: Any, mask: Mask) -> Mask:
    """The mask with its tensors on a device; those that hold every pair stay
    where they are, since nobody looks at them before they are needed."""

    def moved(tensor: Any) -> Any:
        small = isinstance(tensor, torch.Tensor) and tensor.ndim <= 2
        return tensor.to(device) if small else tensor

    sides = (tuple(moved(t) for t in side) for side in mask.carried())
    return mask.replace(Carried(*sides))


def _contiguous(whole: Piece, visit: Visit) -> Iterator[Piece]:
    """The parts of a visit whose queries and whose keys are neighbours."""
    for row, query_start in enumerate(visit.query_starts):
        for column, key_start in enumerate(visit.key_starts):
            yield dataclasses.replace(
                whole.part(
                    _nth(row, whole.rows // len(visit.query_starts)),
                    _nth(column, whole.columns // len(visit.key_starts)),
                ),
                query_start=int(query_start),
                key_start=int(key_start),
            )


def _nth(number: int, length: int) -> slice:
    """The `number`-th of equal parts."""
    return slice(number * length, (number + 1) * length)


def _simplest(piece: Piece, grain: Grain) -> list[Piece]:
    """The rectangle in as few parts as do without a mask where they can."""
    mask: Any = piece.mask
    nonempty, full = (bool(entry) for entry in _relation(mask, *piece.spans()))
    if not nonempty:
        return []
    if full:
        return [dataclasses.replace(piece, mask=None)]
    mask = mask.needed(lambda part: _relation(part, *piece.spans()))
    piece = dataclasses.replace(piece, mask=mask)
    if mask.purely_causal() and piece.query_start == piece.key_start:
        return [dataclasses.replace(piece, mask=None, causal=True)]
    if max(piece.rows, piece.columns) <= grain.small:
        return [piece]
    parts = [
        part
        for rows in _halves(piece.rows, grain.small)
        for columns in _halves(piece.columns, grain.small)
        for part in _simplest(piece.part(rows, columns), grain)
    ]
    gained = any(p.mask is None for p in parts) or (
        sum(p.rows * p.columns for p in parts) < piece.rows * piece.columns
    )
    small = max(piece.rows, piece.columns) <= grain.masked
    return [piece] if small and not gained else parts


def _diagonals(found: list[Piece]) -> list[Piece]:
    """The same rectangles; equal ones along a diagonal are put together."""
    groups: dict[Any, list[Piece]] = {}
    for piece in found:
        # One that has a mask of its own stays alone.
        alone = None if piece.mask is None else len(groups)
        across = piece.queries.start - piece.keys.start
        key = alone, piece.rows, piece.columns, piece.causal, across
        groups.setdefault(key, []).append(piece)
    return [row for same in groups.values() for row in _evenly(same)]


def _evenly(same: list[Piece]) -> Iterator[Piece]:
    """Equal rectangles along a diagonal as rows of equal steps."""
    same = sorted(same, key=lambda piece: piece.queries.start)
    while same:
        starts = [piece.queries.start - same[0].queries.start for piece in same]
        step, count = (starts[1] if len(starts) > 1 else 0), 1
        # Those whose rows or columns overlap are not added to at once.
        if step >= max(same[0].rows, same[0].columns):
            while count < len(same) and starts[count] == count * step:
                count += 1
        yield dataclasses.replace(
            same[0], count=count, step=step if count > 1 else 0
        )
        same = same[count:]


def _relation(mask: Mask, queries: Span, keys: Span) -> tuple[Any, Any]:
    """`mask.relation` of a rectangle that is one tile."""
    query, key, shared = mask.carried()
    nonempty, full = mask.replace(
        Carried(
            tuple(t[None] for t in query), tuple(t[None] for t in key), shared
        )
    ).relation(queries, keys)
    return nonempty, full


def _halves(length: int, small: int) -> list[slice]:
    """One half or two, the first a multiple of the smallest side."""
    if length <= small:
        return [slice(0, length)]
    middle = -(-length // (2 * small)) * small
    return [slice(0, middle), slice(middle, length)]


def _within(outer: slice, inner: slice) -> slice:
    return slice(outer.start + inner.start, outer.start + inner.stop)


def rows_of(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """(B, H, Q, ...) -> the rows of a piece (B, H, count, rows, ...), or (B,
    H, rows, ...) if it is one rectangle. What is written there is in the
    tensor."""
    return _along(tensor, piece.queries, piece)


def columns(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """(B, K, S, ...) -> the columns of a piece, likewise."""
    return _along(tensor, piece.keys, piece)


def _along(tensor: torch.Tensor, first: slice, piece: Piece) -> torch.Tensor:
    if piece.count == 1:
        return tensor[:, :, first]
    length = first.stop - first.start
    stop = first.stop + (piece.count - 1) * piece.step
    found = tensor[:, :, first.start : stop].unfold(2, length, piece.step)
    return found if tensor.ndim == 3 else found.transpose(3, 4)


def samples(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """(B, H, count, n, ...) -> (B * count, H, n, ...)."""
    if piece.count == 1:
        return tensor
    return tensor.transpose(1, 2).flatten(0, 1)


def apart(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """(B * count, H, n, ...) -> (B, H, count, n, ...)."""
    if piece.count == 1:
        return tensor
    return tensor.unflatten(0, (-1, piece.count)).transpose(1, 2)


def joined(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """(B * count, H, n, ...) -> (B, H, count * n, ...), of a piece that
    covers everything."""
    if piece.count == 1:
        return tensor
    # In the order in which the operations lay their results: heads last.
    tensor = tensor.transpose(1, 2).unflatten(0, (-1, piece.count))
    return tensor.flatten(1, 2).transpose(1, 2)


def squared(piece: Piece) -> list[Piece]:
    """A causal rectangle as a square and what is whole below it."""
    if not piece.causal or piece.rows == piece.columns:
        return [piece]
    side = min(piece.rows, piece.columns)
    start = piece.keys.start
    top = dataclasses.replace(
        piece,
        queries=slice(piece.queries.start, piece.queries.start + side),
        keys=slice(start, start + side),
    )
    if piece.rows == side:
        return [top]
    below = dataclasses.replace(
        piece,
        queries=slice(top.queries.stop, piece.queries.stop),
        query_start=piece.query_start + side,
        causal=False,
    )
    return [top, below]
