"""Pairs of positions between two diagonals."""

from typing import Any, NamedTuple

from keras import ops

# Further apart than any two positions.
FAR = 2**40


class Band(NamedTuple):
    """The pairs with `least <= query position - key position <= most`, a key
    before the position `stop` and a query before the position `rows`.

    Attributes:
        least: integer, at most `FAR` from 0.
        most: integer, likewise.
        stop: integer, or an int32 scalar that only the device knows.
        rows: as `stop`.
    """

    least: int = -FAR
    most: int = FAR
    stop: Any = FAR
    rows: Any = FAR

    @property
    def known(self) -> bool:
        """True if no limit is a tensor."""
        return isinstance(self.stop, int) and isinstance(self.rows, int)

    def both(self, other: "Band") -> "Band":
        """The pairs of both."""
        return Band(
            max(self.least, other.least),
            min(self.most, other.most),
            _lower(self.stop, other.stop),
            _lower(self.rows, other.rows),
        )


def _lower(first: Any, second: Any) -> Any:
    """The lower of two limits."""
    if isinstance(first, int) and isinstance(second, int):
        return min(first, second)
    # A number as large as FAR fits into no tensor of limits.
    tensors = [n for n in (first, second) if not isinstance(n, int) or n < FAR]
    return tensors[0] if len(tensors) == 1 else ops.minimum(*tensors)
