"""Checks of `ring_attention`'s arguments, before anything runs."""

import math
from typing import Any

from keras import ops

from keras_ring import arguments, tensor_arguments
from keras_ring.masks import Mask
from keras_ring.masks.by_tensor import check_pairs
from keras_ring.ops.positional_dropout import check_seed

Tensor = Any


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse shapes and dtypes that do not fit each other."""
    tensors = {"query": query, "key": key, "value": value}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    received = ", ".join(f"{n}.shape={tuple(s)}" for n, s in shapes.items())
    for name, shape in shapes.items():
        if len(shape) != 4:
            raise ValueError(
                f"`{name}` must have the rank 4: (batch, length, heads, "
                f"head_dim). Received: {received}. Split the features into "
                "heads with keras.ops.reshape."
            )
        axes = {1: "length", 2: "number of heads", 3: "head_dim"}
        tensor_arguments.no_empty_axis(name, tensors[name], axes, received)
        if None in (shape[2], shape[3]):
            raise ValueError(
                f"`{name}` must have a known number of heads and head_dim "
                f"(axes 2 and 3). Received: {received}. Give it its shape "
                "with keras.ops.reshape."
            )
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            "`query` and `key` must have the same head_dim (axis 3). "
            f"Received: {received}. Project them to one size."
        )
    if tuple(key.shape[1:3]) != tuple(value.shape[1:3]):
        raise ValueError(
            "`key` and `value` must have the same length and number of "
            f"heads (axes 1 and 2). Received: {received}. Make both of one "
            "tensor."
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            "The number of query heads must be a multiple of the number of "
            f"key heads (axis 2). Received: {received}. Use a divisor of "
            f"{query.shape[2]} key heads."
        )
    batches = {s[0] for s in shapes.values() if isinstance(s[0], int)}
    if len(batches) > 1:
        raise ValueError(
            "`query`, `key` and `value` must have the same batch size "
            f"(axis 0). Received: {received}. Repeat the smaller one with "
            "keras.ops.repeat(tensor, times, axis=0)."
        )
    tensor_arguments.one_floating_dtype(tensors)


def check_mask(
    mask: Mask, query: Tensor, key: Tensor, all_keys: int | None
) -> None:
    """Refuse what is no mask, and one over other tensors."""
    if not isinstance(mask, Mask):
        raise ValueError(
            "`mask` must be a keras_ring.masks.Mask, which says what it means "
            "on global positions. Received: mask="
            f"{arguments.shown(mask)}. Wrap a boolean array of valid keys in "
            "Padding(valid), one of pairs in Explicit(pairs), and make an "
            "object of a class: Causal()."
        )
    mask.check(tuple(query.shape), tuple(key.shape), all_keys)


def check_bias(
    bias: Tensor, query: Tensor, key: Tensor, all_keys: int | None
) -> None:
    """Refuse a bias that does not fit the scores."""
    tensor_arguments.floating("bias", bias)
    shapes = tuple(query.shape), tuple(key.shape)
    check_pairs("`bias`", bias, *shapes, all_keys)


def by_head(name: str, numbers: Any, heads: int) -> Tensor | None:
    """One number for each head, as a tensor."""
    if numbers is None:
        return None
    if isinstance(numbers, (list, tuple)):
        numbers = ops.convert_to_tensor(
            [arguments.finite(name, number) for number in numbers],
            dtype="float32",
        )
    numbers = tensor_arguments.tensor(name, numbers)
    tensor_arguments.floating(name, numbers)
    if tuple(numbers.shape) != (heads,):
        raise ValueError(
            f"`{name}` must have one number for each query head, ({heads},). "
            f"Received: {name}.shape={tuple(numbers.shape)}. Give it that "
            "shape."
        )
    return numbers


def scale(value: float | None, query: Tensor) -> float:
    """The factor on the products."""
    if value is None:
        return 1.0 / math.sqrt(query.shape[3])
    return arguments.finite("scale", value, ", or None for 1 / sqrt(head_dim)")


def soft_cap(value: float | None) -> float | None:
    """The bound on the scaled products."""
    if value is None:
        return None
    return arguments.positive("soft_cap", value, ", or None for no cap")


def dropout_seed(rate: float, seed: Tensor | None) -> Tensor | None:
    """The seed of the dropout as a tensor, or None where nothing is dropped."""
    if not arguments.rate("dropout", rate):
        return None
    return check_seed("dropout_seed", seed)
