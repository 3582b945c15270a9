"""Arguments that an attention layer accepts: its constructor's values and its
shapes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_ring import arguments, tensor_arguments

Shape = tuple[int | None, ...]
Tensor = Any


class Heads(NamedTuple):
    """Numbers of heads and their sizes.

    Attributes:
        query: heads of the queries.
        key_value: heads of the keys and values; divides `query`.
        key_dim: size of a query and of a key head.
        value_dim: size of a value head.
    """

    query: int
    key_value: int
    key_dim: int
    value_dim: int


def heads(
    num_heads: int | None,
    key_dim: int | None,
    value_dim: int | None,
    num_key_value_heads: int | None,
    num_query_heads: int | None,
    head_dim: int | None,
) -> Heads:
    """The heads in either of Keras' two spellings.

    `num_heads` and `key_dim` are those of `MultiHeadAttention`,
    `num_query_heads` and `head_dim` those of `GroupQueryAttention`.

    Raises:
        ValueError: unless each is given in exactly one spelling and is a
            positive integer, and key/value heads divide the query heads.
    """
    query_name, query = _one_spelling(
        ("num_heads", num_heads), ("num_query_heads", num_query_heads)
    )
    dim_name, dim = _one_spelling(("key_dim", key_dim), ("head_dim", head_dim))
    if value_dim is None:
        value_dim = dim
    if num_key_value_heads is None:
        num_key_value_heads = query
    query = arguments.integer(query_name, query)
    dim = arguments.integer(dim_name, dim)
    value_dim = arguments.integer("value_dim", value_dim)
    num_key_value_heads = arguments.integer(
        "num_key_value_heads", num_key_value_heads
    )
    if query % num_key_value_heads:
        raise ValueError(
            f"`{query_name}` must be divisible by `num_key_value_heads`, "
            "because every key/value head serves the same number of query "
            f"heads. Received: {query_name}={query}, "
            f"num_key_value_heads={num_key_value_heads}. Choose a divisor of "
            f"{query}."
        )
    return Heads(query, num_key_value_heads, dim, value_dim)


def _one_spelling(
    keras_name: tuple[str, int | None], grouped_name: tuple[str, int | None]
) -> tuple[str, Any]:
    given = [pair for pair in (keras_name, grouped_name) if pair[1] is not None]
    if len(given) == 1:
        return given[0]
    names = f"`{keras_name[0]}` or `{grouped_name[0]}`"
    received = f"{keras_name[0]}={keras_name[1]}, "
    received += f"{grouped_name[0]}={grouped_name[1]}"
    raise ValueError(
        f"Exactly one of {names} must be given: they are two spellings of the "
        f"same argument. Received: {received}. Pass one of them."
    )


def dropout_rate(dropout: Any, flash_attention: Any) -> float:
    """The rate, refused where flash attention rules it out."""
    dropout = arguments.rate("dropout", dropout)
    if flash_attention is not None:
        flash_attention = arguments.flag("flash_attention", flash_attention)
    if flash_attention and dropout > 0:
        raise ValueError(
            "Dropout is not supported when flash attention is enabled. "
            f"Received: dropout={dropout}, flash_attention={flash_attention}. "
            "Set dropout to 0.0, or flash_attention to None."
        )
    return dropout


def optional_positive(name: str, value: Any) -> int | None:
    """A positive integer, or None as it is."""
    return (
        None
        if value is None
        else arguments.integer(name, value, other=", or None")
    )


def soft_cap(value: Any) -> float | None:
    """A positive number, or None as it is."""
    return (
        None
        if value is None
        else arguments.positive("soft_cap", value, ", or None for no cap")
    )


def alibi_slopes(alibi: Any, heads: int) -> tuple[float, ...] | None:
    """The ALiBi slope of each head.

    Args:
        alibi: True for the slopes of the paper, a number for each head, or
            False or None for none.
        heads: number of query heads.

    Raises:
        ValueError: for another number of slopes.

    Reference:
        Press, Smith and Lewis 2021, https://arxiv.org/abs/2108.12409: the
        geometric sequence that starts at and has the ratio `2^(-8/heads)`.
        Where `heads` is no power of two, every other slope of twice the next
        lower power follows those of that power, as in the authors' code.
    """
    if alibi is None:
        return None
    if isinstance(alibi, (bool, np.bool_)):
        if not alibi:
            return None
        power = 2 ** math.floor(math.log2(heads))
        slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
        more = [2.0 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
        return tuple((slopes + more)[:heads])
    if isinstance(alibi, (list, tuple, np.ndarray)) and len(alibi) == heads:
        return tuple(arguments.finite("alibi", slope) for slope in alibi)
    raise ValueError(
        "`alibi` must be True, False, or one finite slope for each query "
        f"head. Received: alibi={arguments.shown(alibi)} for {heads} heads. "
        f"Pass a list of {heads} numbers."
    )


def output_shape(value: Any) -> tuple[int, ...] | None:
    """The shape of an output's features, or None for that of the query."""
    if value is None or value == ():
        return None
    sizes = value if isinstance(value, (tuple, list)) else (value,)
    try:
        return tuple(arguments.integer("output_shape", s) for s in sizes)
    except ValueError as error:
        raise ValueError(
            "Invalid `output_shape`: it must be a positive integer or a tuple "
            "or list of them. Received: output_shape="
            f"{arguments.shown(value)}. Pass None for the width of the query."
        ) from error


def attention_axes(value: Any) -> tuple[int, ...] | None:
    """The axes to attend over, or None for all between batch and features."""
    if value is None:
        return None
    axes = value if isinstance(value, (tuple, list)) else (value,)
    if not axes:
        raise ValueError(
            "`attention_axes` must name an axis. Received: attention_axes="
            f"{value!r}. Pass None for all axes between the batch and the "
            "features."
        )
    other = ", or a tuple of them, or None"
    return tuple(
        arguments.integer("attention_axes", axis, None, other) for axis in axes
    )


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
