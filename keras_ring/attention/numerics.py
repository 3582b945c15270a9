"""Partial attention results and how two of them become one.

Attention over a set of keys is known by two arrays: `out`, the softmax
average of the values over those keys, and `lse`, the log-sum-exp of the
scores over those keys. Two partial results over disjoint sets of keys
merge exactly into the result over their union (Milakov and Gimelshein
2018, arXiv 1805.02867; Rabe and Staats 2021, arXiv 2112.05682). A row that
may attend to nothing has `out = 0` and `lse = -inf`.
"""

import math
from typing import Any, NamedTuple

from keras import ops

from keras_ring import precision

Tensor = Any


class Partial(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        out: `(batch, heads, length, value_dim)`, in the accumulation dtype.
        lse: `(batch, heads, length)`, in the accumulation dtype.
    """

    out: Tensor
    lse: Tensor


def merge(first: Partial, second: Partial) -> Partial:
    """Combine attention over two disjoint sets of keys.

    Written so that no difference of two infinities is ever taken and no
    exponential can overflow: both weights are relative to the larger of the
    two log-sum-exps.
    """
    top = precision.larger(first.lse, second.lse)
    empty = ops.isinf(top)
    reference = ops.where(empty, ops.zeros_like(top), top)
    weight_first = ops.exp(first.lse - reference)
    weight_second = ops.exp(second.lse - reference)
    total = weight_first + weight_second
    safe_total = ops.where(empty, ops.ones_like(total), total)
    lse = ops.where(
        empty, first.lse + second.lse, reference + ops.log(safe_total)
    )
    share_first = ops.expand_dims(weight_first / safe_total, -1)
    share_second = ops.expand_dims(weight_second / safe_total, -1)
    return Partial(first.out * share_first + second.out * share_second, lse)


def without_empty_rows(lse: Tensor) -> Tensor:
    """The log-sum-exp as a backward takes it, `inf` for `-inf`.

    A row that attends to nothing then has the probability `exp(score - inf)`,
    which is 0, everywhere and gives nothing to any gradient.
    """
    empty = ops.full_like(lse, math.inf)
    return ops.where(lse == -math.inf, empty, lse)


def row_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor) -> Tensor:
    """`rowsum(grad_out * out) - grad_lse`, part of the softmax gradient.

    With it `grad_score = p * (grad_p - delta)` (Dao et al. 2022, arXiv
    2205.14135, appendix B.2). All arguments and the result are in the
    accumulation dtype.
    """
    return ops.sum(grad_out * out, axis=-1) - grad_lse
