"""Options of an attention layer, validated once."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from keras_ring import arguments
from keras_ring.distribution.settings import WAYS

EMPTY_ROWS = ("zeros", "stock")


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Options of `RingAttention` that decide on its computation.

    The names are those of the constructor, where they are described.

    Attributes:
        heads: numbers and sizes of heads.
        slopes: of ALiBi, one for each query head; None for none.
    """

    heads: "Heads"
    dropout: float
    use_bias: bool
    output_shape: tuple[int, ...] | None
    attention_axes: tuple[int, ...] | None
    sliding_window: int | None
    flash_attention: bool | None
    use_gate: bool
    causal: bool
    scale: float | None
    soft_cap: float | None
    slopes: tuple[float, ...] | None
    sinks: bool
    empty_rows: str
    strip_masks: bool
    attention: str | None
    seed: int | None

    @classmethod
    def checked(
        cls,
        *,
        num_heads: Any,
        key_dim: Any,
        value_dim: Any,
        num_key_value_heads: Any,
        num_query_heads: Any,
        head_dim: Any,
        alibi: Any,
        **given: Any,
    ) -> "AttentionOptions":
        """Make the options of what a user gave.

        Args:
            num_heads, key_dim, value_dim, num_key_value_heads,
            num_query_heads, head_dim: see `heads`.
            alibi: see `alibi_slopes`.
            **given: all other attributes, by name.

        Raises:
            ValueError: naming the first argument that does not fit.
        """
        found = heads(
            num_heads,
            key_dim,
            value_dim,
            num_key_value_heads,
            num_query_heads,
            head_dim,
        )
        flash, dropout = given["flash_attention"], given["dropout"]
        if flash is not None:
            flash = arguments.flag("flash_attention", flash)
        scale = given["scale"]
        made = {
            "heads": found,
            "flash_attention": flash,
            "dropout": dropout_rate(dropout, flash),
            "scale": scale
            if scale is None
            else arguments.finite(
                "scale", scale, ", or None for 1 / sqrt(key_dim)"
            ),
            "soft_cap": soft_cap(given["soft_cap"]),
            "slopes": alibi_slopes(alibi, found.query),
            "empty_rows": empty_rows(given["empty_rows"], given["sinks"]),
            "sliding_window": optional_positive(
                "sliding_window", given["sliding_window"]
            ),
            "output_shape": output_shape(given["output_shape"]),
            "attention_axes": attention_axes(given["attention_axes"]),
            "attention": sharing(given["attention"]),
        }
        flags = "use_bias", "use_gate", "causal", "sinks", "strip_masks"
        made |= {name: arguments.flag(name, given[name]) for name in flags}
        return cls(**made, seed=arguments.seed("seed", given["seed"]))

    def of_call(self, seed: Any) -> dict[str, Any]:
        """The arguments of `ops.ring_attention` that follow from these.

        Args:
            seed: of the dropout of this call; None where nothing is dropped.
        """
        return {
            "scale": self.scale,
            "soft_cap": self.soft_cap,
            "alibi": self.slopes,
            "dropout": 0.0 if seed is None else self.dropout,
            "dropout_seed": seed,
            "attention": self.attention,
        }

    def config(self) -> dict[str, Any]:
        """The arguments that make the same options again."""
        made = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
        }
        sizes, slopes = made.pop("heads"), made.pop("slopes")
        return {
            "num_heads": sizes.query,
            "key_dim": sizes.key_dim,
            "value_dim": sizes.value_dim,
            "num_key_value_heads": sizes.key_value,
            "alibi": slopes,
            **made,
        }


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


def dropout_rate(dropout: Any, flash_attention: bool | None) -> float:
    """The rate, refused where flash attention rules it out."""
    dropout = arguments.rate("dropout", dropout)
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
    if isinstance(alibi, np.ndarray) and alibi.ndim == 0:
        alibi = alibi[()]
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


def sharing(attention: Any) -> str | None:
    """A way to share the attention of a sequence, or None as it is."""
    if attention is None:
        return None
    return arguments.choice("attention", attention, WAYS)


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


def empty_rows(value: Any, sinks: Any) -> str:
    """A choice of `EMPTY_ROWS`, refused where sinks rule it out."""
    if value not in EMPTY_ROWS:
        raise ValueError(
            f"`empty_rows` must be one of {', '.join(map(repr, EMPTY_ROWS))}. "
            f"Received: empty_rows={value!r}. Pass one of these."
        )
    if value == "stock" and sinks:
        raise ValueError(
            "Stock layers have no sinks, with which every query may attend "
            "to something. Received: empty_rows='stock', sinks=True. Use "
            "empty_rows='zeros'."
        )
    found: str = value
    return found
