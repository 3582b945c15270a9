"""Partial attention results and how two of them become one.

Attention over a set of keys is known by two arrays: `out`, the softmax
average of the values over those keys, and `lse`, the log-sum-exp of the
scores over those keys. Two partial results over disjoint sets of keys
merge exactly into the result over their union (Milakov and Gimelshein
2018, arXiv 1805.02867; Rabe and Staats 2021, arXiv 2112.05682). A row that
may attend to nothing has `out = 0` and `lse = -inf`.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

Tensor = Any


class Partial(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        out: `(batch, heads, length, value_dim)`, in the accumulation dtype.
        lse: `(batch, heads, length)`, in the accumulation dtype.
    """

    out: Tensor
    lse: Tensor


def larger(first: Tensor, second: Tensor) -> Tensor:
    """The elementwise maximum, in the dtype of both.

    `ops.maximum` turns float64 into float32 on some backends.
    """
    return ops.where(first > second, first, second)


def tanh(tensor: Tensor) -> Tensor:
    """The hyperbolic tangent, in the dtype of the tensor.

    `ops.tanh` turns float64 into float32 on some backends.
    """
    if keras.backend.standardize_dtype(tensor.dtype) != "float64":
        return ops.tanh(tensor)
    decay = ops.expm1(-2.0 * ops.abs(tensor))
    return ops.sign(tensor) * (-decay / (decay + 2.0))


def merge(first: Partial, second: Partial) -> Partial:
    """Combine attention over two disjoint sets of keys.

    Written so that no difference of two infinities is ever taken and no
    exponential can overflow: both weights are relative to the larger of the
    two log-sum-exps.
    """
    top = larger(first.lse, second.lse)
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


def row_delta(out: Tensor, grad_out: Tensor, grad_lse: Tensor) -> Tensor:
    """`rowsum(grad_out * out) - grad_lse`, part of the softmax gradient.

    With it `grad_score = p * (grad_p - delta)` (Dao et al. 2022, arXiv
    2205.14135, appendix B.2). All arguments and the result are in the
    accumulation dtype.
    """
    return ops.sum(grad_out * out, axis=-1) - grad_lse
