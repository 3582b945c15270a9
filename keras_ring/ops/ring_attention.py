"""`keras_ring.ops.ring_attention`: exact attention around a ring."""

import functools
import math
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_ring import backends, strategy
from keras_ring.attention import Ring
from keras_ring.masks import Mask
from keras_ring.world import LOCAL, World

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
    return_lse: bool = False,
) -> Any:
    """Exact softmax attention with the sequence sharded over devices.

    Under a `DistributedStrategy` every device keeps its queries while the
    chunks of keys and values travel around the ring; without one it is
    blockwise attention on one device. The result is that of
    `softmax(scale * query @ key^T + mask) @ value` over the whole sequence,
    to rounding, and no device ever holds a score row of full length.

    A query that may attend to nothing gives zeros (stock Keras gives the
    mean of the values).

    Args:
        query: `(batch, query_length, heads, head_dim)`, floating point, as
            the layer sees it: global on JAX, the own shard on TensorFlow
            and PyTorch.
        key: `(batch, key_length, key_heads, head_dim)`. `heads` must be a
            multiple of `key_heads` (grouped-query attention); keys and
            values are never repeated.
        value: `(batch, key_length, key_heads, value_dim)`.
        mask: `keras_ring.masks.Mask` on global positions, such as
            `Causal() & Padding(valid)`, or None.
        scale: factor on the scores; `1 / sqrt(head_dim)` if None.
        return_lse: return the log-sum-exp of the scores as well. With it
            results over disjoint sets of keys can be merged. Both parts are
            differentiable.

    Returns:
        `(batch, query_length, heads, value_dim)`, dtype of the query; with
        `return_lse` an `AttentionResult(out, lse)`.

    Raises:
        ValueError: for shapes, dtypes or lengths that do not fit.

    Example:

    ```python
    out = ring_attention(q, k, v, mask=keras_ring.masks.Causal())
    ```

    Reference:
        Liu, Zaharia and Abbeel 2023, https://arxiv.org/abs/2310.01889
    """
    query, key, value = (ops.convert_to_tensor(t) for t in (query, key, value))
    world = strategy.current()
    scale = _checked_scale(query, key, value, mask, scale, world)
    query_tensors = mask.query_tensors() if mask is not None else ()
    key_tensors = mask.key_tensors() if mask is not None else ()
    function = functools.partial(
        _attend, mask=mask, scale=scale, query_tensors=len(query_tensors)
    )
    tensors = [query, key, value, *query_tensors, *key_tensors]
    if world is None:
        out, lse = function(LOCAL, *tensors)
    else:
        out, lse = world.per_shard(function, tensors)
    return AttentionResult(out, lse) if return_lse else out


def _checked_scale(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None,
    scale: float | None,
    world: World | None,
) -> float:
    """Refuse arguments that do not fit; return the scale."""
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
    if mask is not None and not isinstance(mask, Mask):
        raise ValueError(
            "`mask` must be a keras_ring.masks.Mask, which says what it means "
            "on global positions. Wrap a boolean array of valid keys in "
            "Padding(valid) and a boolean array of pairs in Explicit(pairs). "
            f"Received: mask of type {type(mask).__name__}."
        )
    if mask is not None:
        ring = 1
        if world is not None and world.inside():
            ring = world.sequence_size
        mask.check(tuple(query.shape), tuple(key.shape), ring)
    if scale is None:
        return 1.0 / math.sqrt(query.shape[3])
    if not math.isfinite(scale):
        raise ValueError(
            f"`scale` must be a finite number. Received: scale={scale}."
        )
    return float(scale)


def _attend(
    transport: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *ids: Tensor,
    mask: Mask | None,
    scale: float,
    query_tensors: int,
) -> tuple[Tensor, Tensor]:
    """Attention on one member of the ring, with its native gradient."""
    backend = backends.load()
    ring = Ring(transport, backend.kernel.KERNEL, scale, mask)
    dtype = query.dtype

    def forward(query, key, value, *ids):
        sides = ids[:query_tensors], ids[query_tensors:]
        out, lse = ring.forward(query, key, value, *sides)
        out = ops.cast(out, dtype)
        return (out, lse), (query, key, value, *ids, out, lse)

    def backward(residuals, grad_out, grad_lse):
        query, key, value, *ids, out, lse = residuals
        sides = tuple(ids[:query_tensors]), tuple(ids[query_tensors:])
        grads = ring.backward(
            query, key, value, *sides, out, lse, grad_out, grad_lse
        )
        inputs = (query, key, value)
        cast = [
            ops.cast(g, t.dtype) for g, t in zip(grads, inputs, strict=True)
        ]
        return (*cast, *(None for _ in ids))

    def heads_first(tensor):
        return ops.transpose(tensor, (0, 2, 1, 3))

    attend = backend.runtime.custom_gradient(forward, backward)
    out, lse = attend(
        heads_first(query), heads_first(key), heads_first(value), *ids
    )
    return heads_first(out), ops.transpose(lse, (0, 2, 1))
