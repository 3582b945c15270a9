"""What an attention layer accepts: its constructor's values and its shapes."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Shape = tuple[int | None, ...]


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
    for name, value in (
        (query_name, query),
        (dim_name, dim),
        ("value_dim", value_dim),
        ("num_key_value_heads", num_key_value_heads),
    ):
        check_positive(name, value)
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


def check_positive(name: str, value: Any) -> None:
    """Refuse what is no positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(
            f"The argument `{name}` must be a positive integer. Received: "
            f"{name}={value!r}. Pass 1 or more."
        )


def check_dropout(dropout: Any, flash_attention: Any) -> None:
    """Refuse a rate outside [0, 1), and what flash attention rules out."""
    if flash_attention not in (None, True, False):
        raise ValueError(
            "The argument `flash_attention` must be None, True or False. "
            f"Received: flash_attention={flash_attention!r}."
        )
    number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
    if not number or not 0 <= dropout < 1:
        raise ValueError(
            "The argument `dropout` must be a rate from 0 to less than 1. "
            f"Received: dropout={dropout!r}. Pass 0.0 for no dropout."
        )
    if flash_attention and dropout > 0:
        raise ValueError(
            "Dropout is not supported when flash attention is enabled. "
            f"Received: dropout={dropout}, flash_attention={flash_attention}. "
            "Set dropout to 0.0, or flash_attention to None."
        )


def check_scale(scale: Any) -> None:
    """Refuse a scale that is no finite number."""
    if scale is None:
        return
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not number or not math.isfinite(scale):
        raise ValueError(
            "The argument `scale` must be a finite number, or None for "
            f"1 / sqrt(key_dim). Received: scale={scale!r}."
        )


def check_soft_cap(soft_cap: Any) -> None:
    """Refuse a soft cap that is no positive number."""
    if soft_cap is None:
        return
    number = isinstance(soft_cap, (int, float))
    if not number or not math.isfinite(soft_cap) or soft_cap <= 0:
        raise ValueError(
            "The argument `soft_cap` must be a positive number, or None for "
            f"no cap. Received: soft_cap={soft_cap!r}."
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
    if alibi is None or alibi is False:
        return None
    if alibi is True:
        power = 2 ** math.floor(math.log2(heads))
        slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
        more = [2.0 ** (-4 * i / power) for i in range(1, 2 * power, 2)]
        return tuple((slopes + more)[:heads])
    slopes = [float(slope) for slope in alibi]
    if len(slopes) != heads or not all(map(math.isfinite, slopes)):
        raise ValueError(
            "`alibi` must be True, False, or one finite slope for each query "
            f"head. Received: alibi={alibi!r} for {heads} heads."
        )
    return tuple(slopes)


def output_shape(value: Any) -> tuple[int, ...] | None:
    """The shape of an output's features, or None for that of the query."""
    if value is None or value == ():
        return None
    sizes = (value,) if isinstance(value, int) else value
    if not isinstance(sizes, (tuple, list)) or not all(
        isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in sizes
    ):
        raise ValueError(
            f"Invalid `output_shape`: {value!r}. It must be a positive integer "
            "or a tuple or list of them. Pass None for the width of the query."
        )
    return tuple(sizes)


def attention_axes(value: Any) -> tuple[int, ...] | None:
    """The axes to attend over, or None for all between batch and features."""
    if value is None:
        return None
    axes = (value,) if isinstance(value, int) else value
    if (
        not isinstance(axes, (tuple, list))
        or not axes
        or not all(isinstance(a, int) for a in axes)
    ):
        raise ValueError(
            "`attention_axes` must be an int, or a list or tuple of ints. "
            f"Received: attention_axes={value!r}. Pass None for all axes "
            "between the batch and the features."
        )
    return tuple(axes)


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
            f"be equal. Received: {received}."
        )
    if len(query) < 3 or len(query) != len(value):
        raise ValueError(
            "`query`, `value` and `key` must have the same rank, 3 or more: "
            f"(batch, length, features). Received: {received}. Add the "
            "missing axes with keras.ops.expand_dims."
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


def _differ(first: int | None, second: int | None) -> bool:
    """Whether two sizes are known and not the same."""
    return (
        isinstance(first, int) and isinstance(second, int) and first != second
    )
