"""Checks of arguments that are tensors, and the errors that refuse them.

Dtypes decide here and values never: they are known before anything runs, on
every backend, and nothing waits for a device.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ring.arguments import shown

Tensor = Any


def tensor(name: str, value: Any) -> Tensor:
    """A value as a tensor of the running backend.

    Raises:
        ValueError: for what no array of numbers can be made of.
    """
    if ops.is_tensor(value):
        return value
    numeric(name, value)
    return ops.convert_to_tensor(value)


def numeric(name: str, value: Any) -> None:
    """Refuse what no array of numbers can be made of.

    Raises:
        ValueError: naming the value.
    """
    if ops.is_tensor(value) or isinstance(value, keras.Variable):
        return
    if isinstance(value, keras.KerasTensor):
        raise ValueError(
            f"`{name}` must be a tensor with values. Received: {name}="
            f"{shown(value)}, which is symbolic. Call this inside of a "
            "layer's `call`, or use one of keras_ring.layers."
        )
    try:
        kind = np.asarray(value).dtype.kind
    except (TypeError, ValueError):
        kind = "O"  # Lists of different lengths, for one.
    # "V" is how NumPy sees bfloat16.
    if value is None or kind not in "biufcV":
        raise ValueError(
            f"`{name}` must be a tensor, or an array of numbers. Received: "
            f"{name}={shown(value)}. Pass a NumPy array or a tensor."
        )


def dtype_of(value: Any) -> str:
    """The dtype of a tensor, as Keras names it."""
    try:
        return keras.backend.standardize_dtype(value.dtype)
    except ValueError:  # Strings, times and what else Keras has no name for.
        return str(value.dtype)


def floating(name: str, value: Tensor) -> None:
    """Refuse what is not floating point.

    Raises:
        ValueError: naming the dtype.
    """
    dtype = dtype_of(value)
    if "float" not in dtype:
        raise ValueError(
            f"`{name}` must be floating point. Received: {name}.dtype={dtype}, "
            f"{name}.shape={tuple(value.shape)}. Cast it with "
            "keras.ops.cast(..., 'float32'), and embed token ids with "
            "keras.layers.Embedding first."
        )


def one_floating_dtype(tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that do not share one floating-point dtype.

    Args:
        tensors: by the names of the arguments.

    Raises:
        ValueError: naming the dtypes.
    """
    dtypes = {name: dtype_of(value) for name, value in tensors.items()}
    first = next(iter(dtypes.values()))
    if set(dtypes.values()) != {first} or "float" not in first:
        names = [f"`{name}`" for name in dtypes]
        received = ", ".join(f"{name}.dtype={d}" for name, d in dtypes.items())
        raise ValueError(
            f"{', '.join(names[:-1])} and {names[-1]} must share one "
            f"floating-point dtype. Received: {received}. Cast them with "
            "keras.ops.cast(..., 'float32')."
        )


def integers(name: str, value: Tensor) -> None:
    """Refuse what are no integers.

    Raises:
        ValueError: naming the dtype.
    """
    dtype = dtype_of(value)
    if "int" not in dtype:
        raise ValueError(
            f"`{name}` must be integers. Received: {name}.dtype={dtype}, "
            f"{name}.shape={tuple(value.shape)}. Cast it with "
            "keras.ops.cast(..., 'int32')."
        )


def boolean(name: str, value: Tensor, added: str = "") -> None:
    """Refuse a mask that is neither boolean nor integers.

    A floating-point mask may be one of ones and zeros, or one of zeros and
    large negative numbers that is added to the scores: the two mean the
    opposite.

    Args:
        name: of the argument.
        value: the mask.
        added: what to do with one that is added to the scores.

    Raises:
        ValueError: naming the dtype.
    """
    dtype = dtype_of(value)
    if dtype != "bool" and "int" not in dtype:
        raise ValueError(
            f"`{name}` must be a boolean mask (or integers 0 and 1), true for "
            f"what is seen. Received: {name}.dtype={dtype}, {name}.shape="
            f"{tuple(value.shape)}. Cast a mask of 1 and 0 with "
            "keras.ops.cast(mask, 'bool'); of an additive mask of 0 and -1e9 "
            f"pass `mask == 0`{added}."
        )


def is_array(name: str, value: Any) -> None:
    """Refuse what has no shape and dtype, such as a list.

    Raises:
        ValueError: naming the value.
    """
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise ValueError(
            f"`{name}` must be a tensor or an array. Received: {name}="
            f"{shown(value)}. Pass it through numpy.asarray."
        )


def no_empty_axis(
    name: str, value: Tensor, axes: dict[int, str], received: str
) -> None:
    """Refuse a size of 0.

    Args:
        name: of the argument.
        value: the tensor.
        axes: what each axis that must not be empty is called.
        received: what the error says was given.

    Raises:
        ValueError: naming the axis.
    """
    for axis, what in axes.items():
        size = value.shape[axis]
        if isinstance(size, int) and size < 1:
            raise ValueError(
                f"`{name}` must have a {what} (axis {axis}) of 1 or more. "
                f"Received: {received}. Leave the call out where there is "
                "nothing to compute."
            )
