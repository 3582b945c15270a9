"""Dtypes: the one in which sums are kept, and operations that keep theirs."""

from typing import Any

import keras
from keras import ops

Tensor = Any


def accumulation_dtype(dtype: str) -> str:
    """The dtype of sums, statistics and partial results for an input dtype.

    `float64` stays `float64`; everything else accumulates in `float32`.
    """
    return (
        "float64"
        if keras.backend.standardize_dtype(dtype) == "float64"
        else "float32"
    )


def is_floating(tensor: Tensor) -> bool:
    """True if a tensor has a floating-point dtype."""
    return "float" in keras.backend.standardize_dtype(tensor.dtype)


def larger(first: Tensor, second: Tensor) -> Tensor:
    """The elementwise maximum, in the dtype of both.

    `ops.maximum` turns float64 into float32 on some backends.
    """
    return ops.where(first > second, first, second)


def tanh(tensor: Tensor) -> Tensor:
    """The hyperbolic tangent, in the precision of the tensor.

    `ops.tanh` computes float64 in float32 on some backends.
    """
    if keras.backend.standardize_dtype(tensor.dtype) != "float64":
        return ops.tanh(tensor)
    # From here on it is 1 in float64, and the exponential does not overflow.
    growth = ops.expm1(2.0 * ops.clip(tensor, -20.0, 20.0))
    return growth / (growth + 2.0)


def mean(tensor: Tensor, axis: int, keepdims: bool = False) -> Tensor:
    """The mean over one axis, in the precision of the tensor.

    `ops.mean` computes float64 in float32 on some backends.
    """
    size = tensor.shape[axis]
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    # Where a size is not known `ops.mean` has the precision.
    if dtype != "float64" or size is None:
        return ops.mean(tensor, axis=axis, keepdims=keepdims)
    return ops.sum(tensor, axis=axis, keepdims=keepdims) / size


def matmul(tensor: Tensor, matrix: Tensor) -> Tensor:
    """The product of the last axis with a matrix, in the tensors' precision.

    `ops.matmul` turns float64 into float32 on some backends.
    """
    if keras.backend.standardize_dtype(tensor.dtype) != "float64":
        return ops.matmul(tensor, matrix)
    return ops.einsum("...d,de->...e", tensor, matrix)
