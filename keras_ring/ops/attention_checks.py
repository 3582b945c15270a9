"""What `ring_attention` refuses, before anything runs."""

import math
from typing import Any

import keras
from keras import ops

from keras_ring.masks import Mask
from keras_ring.masks.by_tensor import check_pairs

Tensor = Any


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse shapes and dtypes that do not fit each other."""
    shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
    received = ", ".join(f"{n}.shape={tuple(s)}" for n, s in shapes.items())
    for name, shape in shapes.items():
        if len(shape) != 4:
            raise ValueError(
                f"`{name}` must have the rank 4: (batch, length, heads, "
                f"head_dim). Received: {received}."
            )
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            "`query` and `key` must have the same head_dim (axis 3). "
            f"Received: {received}."
        )
    if tuple(key.shape[1:3]) != tuple(value.shape[1:3]):
        raise ValueError(
            "`key` and `value` must have the same length and number of "
            f"heads (axes 1 and 2). Received: {received}."
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            "The number of query heads must be a multiple of the number of "
            f"key heads (axis 2). Received: {received}."
        )
    batches = {s[0] for s in shapes.values() if isinstance(s[0], int)}
    if len(batches) > 1:
        raise ValueError(
            "`query`, `key` and `value` must have the same batch size "
            f"(axis 0). Received: {received}."
        )
    dtypes = [
        keras.backend.standardize_dtype(t.dtype) for t in (query, key, value)
    ]
    if len(set(dtypes)) > 1 or "float" not in dtypes[0]:
        raise ValueError(
            "`query`, `key` and `value` must share one floating-point dtype. "
            f"Received: {', '.join(dtypes)}."
        )


def check_mask(
    mask: Mask, query: Tensor, key: Tensor, all_keys: int | None
) -> None:
    """Refuse what is no mask, and one over other tensors."""
    if not isinstance(mask, Mask):
        raise ValueError(
            "`mask` must be a keras_ring.masks.Mask, which says what it means "
            "on global positions. Wrap a boolean array of valid keys in "
            "Padding(valid) and a boolean array of pairs in Explicit(pairs). "
            f"Received: mask of type {type(mask).__name__}."
        )
    mask.check(tuple(query.shape), tuple(key.shape), all_keys)


def check_bias(
    bias: Tensor, query: Tensor, key: Tensor, all_keys: int | None
) -> None:
    """Refuse a bias that does not fit the scores."""
    _check_floating("bias", bias)
    shapes = tuple(query.shape), tuple(key.shape)
    check_pairs("`bias`", bias, *shapes, all_keys)


def by_head(name: str, numbers: Any, heads: int) -> Tensor | None:
    """One number for each head, as a tensor."""
    if numbers is None:
        return None
    if not (hasattr(numbers, "dtype") or ops.is_tensor(numbers)):
        numbers = ops.convert_to_tensor(numbers, dtype="float32")
    numbers = ops.convert_to_tensor(numbers)
    _check_floating(name, numbers)
    if tuple(numbers.shape) != (heads,):
        raise ValueError(
            f"`{name}` must have one number for each query head, ({heads},). "
            f"Received: {name}.shape={tuple(numbers.shape)}."
        )
    return numbers


def scale(value: float | None, query: Tensor) -> float:
    """The factor on the products."""
    if value is None:
        return 1.0 / math.sqrt(query.shape[3])
    if not math.isfinite(value):
        raise ValueError(
            f"`scale` must be a finite number. Received: scale={value}."
        )
    return float(value)


def soft_cap(value: float | None) -> float | None:
    """The bound on the scaled products."""
    if value is None:
        return None
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            "`soft_cap` must be a positive number, or None for no cap. "
            f"Received: soft_cap={value}."
        )
    return float(value)


def check_dropout(rate: float, seed: Tensor | None) -> bool:
    """Refuse a rate that is none; tell whether something is dropped."""
    if not 0 <= rate < 1:
        raise ValueError(
            "`dropout` must be at least 0 and below 1. Received: "
            f"dropout={rate}."
        )
    if not rate:
        return False
    if seed is None or tuple(seed.shape) != (2,):
        raise ValueError(
            "`dropout` needs a `dropout_seed` of the shape (2,), such as "
            "keras.random.SeedGenerator().next(). Received: "
            f"dropout_seed={seed}."
        )
    return True


def _check_floating(name: str, tensor: Tensor) -> None:
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    if "float" not in dtype:
        raise ValueError(
            f"`{name}` must be floating point. Received: {name}.dtype={dtype}."
        )
