"""Rows of a table with a dense gradient."""

from typing import Any

from keras import ops

from keras_ring import backends
from keras_ring.precision import accumulation_dtype

Tensor = Any


def dense_take(table: Tensor, indices: Tensor) -> Tensor:
    """The rows of a table at some indices, with a dense gradient.

    The native lookup of TensorFlow has a sparse gradient whose repeated rows
    optimizers with moments do not merge when replicas train together. Here
    rows that are taken several times are summed on every backend, in float32
    or wider.

    Args:
        table: floating point `(rows, features)`.
        indices: integers of any shape, `0 <= index < rows`.

    Returns:
        `(*indices.shape, features)`, dtype of the table.
    """
    rows, features = table.shape
    dtype = table.dtype

    def forward(table, indices):
        return (ops.take(table, indices, axis=0),), (indices,)

    def backward(residuals, grad):
        (indices,) = residuals
        total = ops.segment_sum(
            ops.cast(
                ops.reshape(grad, (-1, features)), accumulation_dtype(dtype)
            ),
            ops.cast(ops.reshape(indices, (-1,)), "int32"),
            num_segments=rows,
        )
        return ops.cast(total, dtype), None

    custom_gradient = backends.load().runtime.custom_gradient
    return custom_gradient(forward, backward)(table, indices)[0]
