"""`keras_ring.ops.ring_attention`: exact attention around a ring."""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

from keras import ops

from keras_ring import arguments, backends, precision, tensor_arguments
from keras_ring.attention import selection, sharing
from keras_ring.attention.dense import dense_attention
from keras_ring.attention.kernel import Inputs
from keras_ring.attention.scoring import Dropout, Scoring
from keras_ring.distribution import strategy, trials
from keras_ring.distribution.settings import WAYS, Settings
from keras_ring.distribution.transport import LOCAL, Transport
from keras_ring.masks import Carried, Mask
from keras_ring.masks.by_position import Before
from keras_ring.ops import attention_checks as checks
from keras_ring.ops.sequence import true_length, whole_length
from keras_ring.shapes import sizes

Tensor = Any


class AttentionResult(NamedTuple):
    """Attention and the log-sum-exp of its scores.

    Attributes:
        out: `(batch, query_length, heads, value_dim)`, dtype of the query.
        lse: `(batch, query_length, heads)`, float32 (float64 for float64);
            `-inf` for a query that may attend to nothing.
    """

    out: Tensor
    lse: Tensor


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    attention: str | None = None,
) -> Any:
    """Compute exact softmax attention, the sequence sharded over devices.

    Under a `DistributedStrategy` every device keeps its queries while the
    chunks of keys and values travel around the ring; without one it is
    blockwise attention on one device. The result is that of
    `softmax(score) @ value` over the whole sequence, to rounding, and no
    device ever holds a score row of full length. The score of the query at
    position `i` and the key at position `j` in head `h` is

        cap(scale * query_i . key_j) - alibi_h * |i - j| + bias_ij
        cap(x) = soft_cap * tanh(x / soft_cap)

    and `-inf` for a pair that the mask hides. A query that may attend to
    nothing gives zeros (stock Keras gives the mean of the values).

    Args:
        query: `(batch, query_length, heads, head_dim)`, floating point, as
            the layer sees it: global on JAX, this device's shard on
            TensorFlow and PyTorch.
        key: `(batch, key_length, key_heads, head_dim)`. `heads` must be a
            multiple of `key_heads` (grouped-query attention); keys and
            values are never repeated.
        value: `(batch, key_length, key_heads, value_dim)`.
        mask: `keras_ring.masks.Mask` on global positions, such as
            `Causal() & Padding(valid)`, or None.
        scale: factor on the products; `1 / sqrt(head_dim)` if None.
        soft_cap: positive bound on the size of the scaled products, as in
            Gemma 2; none if None.
        bias: added to the scores: floating point `(batch or 1,
            query_length, heads or 1, all_keys)`, where `all_keys` are those
            of every device. It has a gradient. Like `masks.Explicit` it is
            as large as the scores; its rows are spread with the queries.
        alibi: slopes `(heads,)`, floating point. They have a gradient.
        sinks: logits `(heads,)` of one more key that every query sees and
            that has no value, as learned by gpt-oss; floating point. They
            have a gradient.
        dropout: probability of dropping an attention probability; those
            that stay are divided by `1 - dropout`.
        dropout_seed: int32 `(2,)`, needed for dropout. Which entries are
            dropped depends on the seed, the sample, the head and the two
            global positions only (see `keras_ring.random_bits`): it is the
            same for every ring size and on every backend.
        return_lse: return the log-sum-exp of the scores as well. With it
            results over disjoint sets of keys can be merged. Both parts are
            differentiable. The sinks are part of it, dropout is not.
        attention: how devices share the attention of the sequence, as of
            `keras_ring.DistributedStrategy`; as that says if None.

    Returns:
        `(batch, query_length, heads, value_dim)`, dtype of the query; with
        `return_lse` an `AttentionResult(out, lse)`.

    Raises:
        ValueError: for shapes, dtypes, lengths or numbers that do not fit.

    Example:

    ```python
    out = ring_attention(q, k, v, mask=keras_ring.masks.Causal())
    ```

    Reference:
        Liu, Zaharia and Abbeel 2023, https://arxiv.org/abs/2310.01889;
        Press, Smith and Lewis (ALiBi) 2021, https://arxiv.org/abs/2108.12409;
        Xiao et al. (attention sinks) 2023, https://arxiv.org/abs/2309.17453
    """
    given = {"query": query, "key": key, "value": value}
    query, key, value = (
        tensor_arguments.tensor(*pair) for pair in given.items()
    )
    checks.check_tensors(query, key, value)
    return_lse = arguments.flag("return_lse", return_lse)
    if attention is not None:
        attention = arguments.choice("attention", attention, WAYS)
    if trials.place() is not None:
        result = _made_up(query, value)
        return result if return_lse else result.out
    world = strategy.current()
    keys = sizes(key)[1]
    all_keys = whole_length(keys)
    known = all_keys if isinstance(all_keys, int) else None
    if mask is not None:
        checks.check_mask(mask, query, key, known)
    if bias is not None:
        bias = tensor_arguments.tensor("bias", bias)
        checks.check_bias(bias, query, key, known)
    limit = true_length(keys)
    if world is not None and limit is not None:
        hidden = Before(limit)
        mask = hidden if mask is None else mask & hidden
    rows = true_length(sizes(query)[1])
    if world is not None and rows is not None:
        # A gradient that arrives at a padded query must not reach the keys.
        real = Before(rows, queries=True)
        mask = real if mask is None else mask & real
    heads = query.shape[2]
    slopes = checks.by_head("alibi", alibi, heads)
    sinks = checks.by_head("sinks", sinks, heads)
    scoring = Scoring(
        scale=checks.scale(scale, query),
        mask=mask,
        soft_cap=checks.soft_cap(soft_cap),
        bias=bias,
        slopes=slopes,
        dropout=_dropout(dropout, dropout_seed),
    )
    if world is None and backends.load().runtime.exporting(query):
        # Tiles, loops and a gradient of its own do not travel.
        whole = dense_attention(query, key, value, scoring, sinks)
        return AttentionResult(whole.out, whole.lse) if return_lse else whole[0]
    carried = scoring.carried()
    shared = [ops.convert_to_tensor(t) for t in carried.shared]
    function = functools.partial(
        _attend,
        scoring=scoring,
        counts=tuple(len(side) for side in carried),
        attention=attention,
    )
    if world is not None:
        key, value = (
            _for_each(world.model_size, query, t) for t in (key, value)
        )
    tensors = [query, key, value, *carried.query, *carried.key]
    if world is None:
        out, lse = function(LOCAL, *tensors, *shared)
    else:
        flags = scoring.by_head()
        out, lse = world.per_shard(
            function,
            tensors,
            shared,
            _has_samples(mask, sizes(query)[0]),
            [True] * 3 + [*flags.query, *flags.key, *flags.shared],
        )
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks)
    return AttentionResult(out, lse) if return_lse else out


def _for_each(devices: int, query: Tensor, side: Tensor) -> Tensor:
    """Keys or values with a head for each of the devices that share the heads
    of the queries, if they share these evenly."""
    heads = side.shape[2]
    if query.shape[2] % devices or heads % devices == 0:
        return side
    return ops.repeat(side, math.lcm(heads, devices) // heads, axis=2)


def _made_up(query: Tensor, value: Tensor) -> AttentionResult:
    """Stand-in for attention in a trial: of the values at its own position, or
    of nothing where there are others."""
    shape = tuple(sizes(query)[:3])
    out = ops.zeros((*shape, value.shape[3]), dtype=query.dtype)
    if query.shape[1] == value.shape[1]:
        out = out + ops.repeat(value, shape[2] // value.shape[2], axis=2)
    lse = ops.zeros(shape, dtype=precision.accumulation_dtype(query.dtype))
    return AttentionResult(out, lse)


def _has_samples(mask: Mask | None, batch: Any) -> bool:
    """True if a tensor of a mask that has no sequence axis, as the lengths of
    prefixes, may have an entry for each sample."""
    shared = () if mask is None else mask.carried().shared
    shapes = [tuple(getattr(tensor, "shape", ())) for tensor in shared]
    return any(shape and shape[0] == batch for shape in shapes)


def _dropout(rate: float, seed: Tensor | None) -> Dropout | None:
    """The dropout of a whole batch and of all heads."""
    seed = checks.dropout_seed(rate, seed)
    if seed is None:
        return None
    # Not Python's: in 64 bits the hash of a place would be another one.
    zero = ops.convert_to_tensor(0, dtype="int32")
    return Dropout(float(rate), seed, zero, zero)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple:
    """Attention with one more logit for each head that has no value."""
    # Cast once, or the parts of the gradient are rounded before they meet.
    sinks = ops.broadcast_to(ops.cast(sinks, lse.dtype), sizes(lse))
    above = lse - sinks
    # What the keys have of a softmax over themselves and the sink. A row
    # without keys is 0, and so is its gradient: both come from sigmoid.
    share = ops.sigmoid(above)[..., None]
    # The larger of both and what the other adds: so that the gradient of
    # the smaller is its small share and no difference of two numbers near 1.
    # Not softplus: PyTorch's is the identity above 20, too early for float64.
    below = above < 0
    lse = ops.where(below, sinks, lse) - ops.log_sigmoid(
        ops.where(below, -above, above)
    )
    return ops.cast(ops.cast(out, lse.dtype) * share, out.dtype), lse


def _attend(
    transport: Transport,
    *tensors: Tensor,
    scoring: Scoring,
    counts: tuple[int, ...],
    attention: str | None,
) -> tuple[Tensor, Tensor]:
    """Attention on one member of the ring, with its own gradient.

    `tensors` are query, key and value and then what the scoring carries,
    side by side, `counts` of each. `attention` is the way to share the
    sequence; None for the strategy's.
    """
    inputs, carried = tensors[:3], iter(tensors[3:])
    sides = (tuple(itertools.islice(carried, n)) for n in counts)
    scoring = scoring.replace(Carried(*sides))
    query, key, _ = inputs
    reference = backends.load().kernel.KERNEL
    world = strategy.current()
    if world is not None and scoring.dropout is not None:
        places = (
            world.data_index() * sizes(query)[0],
            world.head_index() * query.shape[2],
        )
        dropout = dataclasses.replace(
            scoring.dropout,
            **{
                name: ops.convert_to_tensor(first, dtype="int32")
                for name, first in zip(
                    ("first_row", "first_head"), places, strict=True
                )
            },
        )
        scoring = dataclasses.replace(scoring, dropout=dropout)
    settings = Settings() if world is None else world.strategy
    shared = sharing.choose(
        transport,
        selection.choose(query.dtype, reference.device(query)),
        scoring,
        (sizes(query)[1], sizes(key)[1]),
        sharing.Heads(query.shape[2], key.shape[2]),
        settings.balance,
        attention or settings.attention,
        settings.heads_parallel,
    )
    out, lse = shared.attend(
        Inputs(*(ops.transpose(t, (0, 2, 1, 3)) for t in inputs)), scoring
    )
    return ops.transpose(out, (0, 2, 1, 3)), ops.transpose(lse, (0, 2, 1))
