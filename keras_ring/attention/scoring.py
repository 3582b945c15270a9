"""From the product of a query and a key to what the softmax is taken of.

    score = cap(scale * query . key) - slope * |i - j| + bias
    cap(x) = soft_cap * tanh(x / soft_cap)

Pairs that the mask hides have a score of `-inf`. After the softmax some
probabilities are dropped and the others divided by `1 - dropout`; the
log-sum-exp knows nothing of that.
"""

import dataclasses
from typing import Any

from keras_ring.masks import Carried, Mask

Tensor = Any


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout on the attention probabilities.

    Attributes:
        rate: probability of dropping, above 0 and below 1.
        seed: int32 `(2,)`; see `random_bits` for what it decides.
        first_row: global number of the first sample of the batch; int or
            int32 scalar.
        first_head: global number of the first head, likewise.
    """

    rate: float
    seed: Tensor
    first_row: Any = 0
    first_head: Any = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Scoring:
    """Everything that decides on a score beside query and key.

    Attributes:
        scale: factor on the products.
        mask: the pairs that count, or None for all.
        soft_cap: bound on the size of the scaled products, or None.
        bias: `(batch or 1, query_length, heads or 1, all_keys)` or None.
        slopes: `(heads,)` or None.
        dropout: or None.
    """

    scale: float
    mask: Mask | None = None
    soft_cap: float | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    dropout: Dropout | None = None

    @property
    def only_products(self) -> bool:
        """True if scores are scaled products, masked or not, and no more."""
        return (
            self.soft_cap is None
            and self.bias is None
            and self.slopes is None
            and self.dropout is None
        )

    def carried(self) -> Carried:
        """All tensors; those with a gradient stand first on their side."""
        own = Carried(
            query=() if self.bias is None else (self.bias,),
            shared=() if self.slopes is None else (self.slopes,),
        )
        if self.dropout is not None:
            drop = self.dropout
            places = drop.first_row, drop.first_head
            own = own.join(Carried(shared=(drop.seed, *places)))
        return own if self.mask is None else own.join(self.mask.carried())

    def by_head(self) -> Carried:
        """True for each tensor of `carried` that has the heads: on axis 2, a
        shared one on axis 0."""
        own = Carried(
            query=() if self.bias is None else (self.bias.shape[2] > 1,),
            shared=() if self.slopes is None else (True,),
        )
        if self.dropout is not None:
            own = own.join(Carried(shared=(False, False, False)))
        return own if self.mask is None else own.join(self.mask.by_head())

    def replace(self, carried: Carried) -> "Scoring":
        """The same over other tensors in the same places."""
        query, key, shared = (list(side) for side in carried)
        bias = None if self.bias is None else query.pop(0)
        slopes = None if self.slopes is None else shared.pop(0)
        dropout, mask = self.dropout, self.mask
        if dropout is not None:
            dropout = Dropout(dropout.rate, *shared[:3])
            del shared[:3]
        if mask is not None:
            mask = mask.replace(
                Carried(tuple(query), tuple(key), tuple(shared))
            )
        return dataclasses.replace(
            self, mask=mask, bias=bias, slopes=slopes, dropout=dropout
        )

    def structure(self) -> Any:
        """The scoring without its tensors, hashable."""
        return (
            self.scale,
            None if self.mask is None else self.mask.structure(),
            self.soft_cap,
            self.bias is not None,
            self.slopes is not None,
            None if self.dropout is None else self.dropout.rate,
        )
