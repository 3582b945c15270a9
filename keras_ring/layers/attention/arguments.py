"""Shapes and tensors that an attention layer accepts in a call."""

from collections.abc import Sequence
from typing import Any

from keras_ring import tensor_arguments

Shape = tuple[int | None, ...]
Tensor = Any


def check_shapes(
    query: Sequence[int | None],
    value: Sequence[int | None],
    key: Sequence[int | None],
    free_axes: tuple[int, ...] | None = None,
) -> None:
    """Refuse shapes that cannot attend to each other.

    Args:
        query: `(batch, query dims..., features)`; None for unknown sizes.
        value: `(batch, key dims..., features)`.
        key: `(batch, key dims..., features)`.
        free_axes: axes that are neither batch, attended over, nor features,
            where the layer's rank is known.

    Raises:
        ValueError: naming the shapes and the fix.
    """
    received = (
        f"query_shape={tuple(query)}, value_shape={tuple(value)}, "
        f"key_shape={tuple(key)}"
    )
    pairs = zip(value[1:-1], key[1:-1], strict=False)
    if len(value) != len(key) or any(_differ(v, k) for v, k in pairs):
        raise ValueError(
            "All dimensions of `value` and `key`, except the last one, must "
            f"be equal. Received: {received}. Make both of one tensor."
        )
    if len(query) < 3 or len(query) != len(value):
        raise ValueError(
            "`query`, `value` and `key` must have the same rank, 3 or more: "
            f"(batch, length, features). Received: {received}. Add the "
            "missing axes with keras.ops.expand_dims."
        )
    for name, shape in (("query", query), ("value", value), ("key", key)):
        if any(size == 0 for size in shape[1:]):
            raise ValueError(
                f"`{name}` must not be empty: its axes after the batch have "
                f"sizes of 1 or more. Received: {received}. Leave the call "
                "out where there is nothing to attend to."
            )
    if _differ(query[0], value[0]) or _differ(query[0], key[0]):
        raise ValueError(
            "`query`, `value` and `key` must have the same batch size. "
            f"Received: {received}. Repeat the smaller one with "
            "keras.ops.repeat(tensor, times, axis=0)."
        )
    for axis in free_axes or ():
        if _differ(query[axis], value[axis]):
            raise ValueError(
                "Axes that are not attended over must have the same size in "
                f"`query` and `value`. Received: {received}, which differ in "
                f"axis {axis}. Add it to `attention_axes`."
            )


def check_tensors(
    *,
    inputs: dict[str, Tensor],
    masks: dict[str, Tensor | None],
    ids: dict[str, Tensor | None],
    attention_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
) -> None:
    """Refuse tensors of a call whose dtype says something else than is meant.

    Args:
        inputs: by name; floating point.
        masks: by name, one value for each position; boolean.
        ids: by name; integers, Python's own included.
        attention_mask: boolean, one value for each score.
        attention_bias: floating point, likewise.

    Raises:
        ValueError: naming the tensor and its dtype.
    """
    for name, value in inputs.items():
        tensor_arguments.is_array(name, value)
        tensor_arguments.floating(name, value)
    for name, value in {**masks, "attention_mask": attention_mask}.items():
        if value is None:
            continue
        tensor_arguments.is_array(name, value)
        instead = ""
        if name == "attention_mask":
            instead = ", or give it as `attention_bias=`"
        tensor_arguments.boolean(name, value, instead)
    for name, value in ids.items():
        if value is None:
            continue
        tensor_arguments.is_array(name, value)
        tensor_arguments.integers(name, value)
    if attention_bias is not None:
        tensor_arguments.is_array("attention_bias", attention_bias)
        tensor_arguments.floating("attention_bias", attention_bias)


def _differ(first: int | None, second: int | None) -> bool:
    """True if two sizes are known and not the same."""
    return (
        isinstance(first, int) and isinstance(second, int) and first != second
    )
