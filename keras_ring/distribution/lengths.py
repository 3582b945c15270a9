"""Symbolic tensors of a model that carry a sequence that a step splits.

A length of `None` says so by itself. A fixed one can be split as well where
every layer that is given it treats positions one by one or knows the ring;
`guard.fixed_lengths` finds that out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Knowledge of the lengths of one model.

    Attributes:
        opened: the symbolic tensors, by their id, whose axis 1 has a fixed
            size and is split as if it were None.
        whole: whether nothing is split: then every member of a ring sees
            whole sequences, of which attention takes its own part.
    """

    opened: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    whole: bool = False

    def shape(self, symbol: Any) -> tuple[int | None, ...]:
        """The shape of a symbolic tensor, None where its length is split."""
        shape = tuple(symbol.shape)
        if id(symbol) in self.opened:
            return (shape[0], None, *shape[2:])
        return shape

    def split(self, symbol: Any) -> bool:
        """True if axis 1 of a symbolic tensor is a sequence that is split."""
        shape = self.shape(symbol)
        return not self.whole and len(shape) > 1 and shape[1] is None


OPEN = Lengths()
