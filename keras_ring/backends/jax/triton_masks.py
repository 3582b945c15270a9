"""Masks by global position in the few operations that Triton has."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from keras_ring.masks import (
    And,
    BlockCausal,
    Causal,
    Mask,
    Or,
    Padding,
    PrefixLM,
    Segments,
    SlidingWindow,
)
from keras_ring.masks.by_position import Before

KNOWN = (
    *(Causal, SlidingWindow, BlockCausal, PrefixLM, Before),
    *(Padding, Segments),
)


def pairs(mask: Mask, queries: jax.Array, keys: jax.Array) -> jax.Array:
    """`Mask.allowed` of a tile, in few operations that Triton has.

    Args:
        mask: one of `KNOWN`, over the tensors (q,) and (s,) of the tile.
        queries: int32 (q, 1), global positions.
        keys: int32 (1, s).

    Returns:
        Boolean, broadcastable to (q, s).
    """
    match mask:
        case And():
            return pairs(mask.first, queries, keys) & pairs(
                mask.second, queries, keys
            )
        case Or():
            return pairs(mask.first, queries, keys) | pairs(
                mask.second, queries, keys
            )
        case Causal():
            return queries >= keys
        case SlidingWindow():
            distance = queries - keys
            return (distance < mask.size) & (distance > -mask.size)
        case BlockCausal():
            return lax.div(queries, mask.size) >= lax.div(keys, mask.size)
        case PrefixLM():
            return (queries >= keys) | (keys < mask.length)
        case Before():
            return (queries if mask.queries else keys) < mask.limit
        case Padding():
            return (mask.valid != 0)[None, :]
        case Segments():
            return mask.query_ids[:, None] == mask.key_ids[None, :]
    raise NotImplementedError(mask)


def known(mask: Mask | None) -> bool:
    """True if `pairs` can compute a mask."""
    if isinstance(mask, (And, Or)):
        return known(mask.first) and known(mask.second)
    if mask is None:
        return True
    return type(mask) in KNOWN and not mask.carried().shared


def within(
    first: Any, size: int, back: float, ahead: float, tile: int, length: int
) -> tuple[Any, Any]:
    """Tiles of one side that a tile of the other may reach.

    Args:
        first: where the other tile begins, counted from this side's start.
        size: of the other tile.
        back: how far before itself a position of it may reach.
        ahead: how far after itself.
        tile: size of the tiles of this side.
        length: of this side.
    """
    low: Any = jnp.int32(0)
    high: Any = jnp.int32(-(-length // tile))
    if back != math.inf:
        low = lax.div(jnp.maximum(first - int(back), 0), jnp.int32(tile))
    if ahead != math.inf:
        end = jnp.maximum(first + size + int(ahead), 0)
        high = jnp.minimum(high, lax.div(end + (tile - 1), jnp.int32(tile)))
    return low, high


def reach(mask: Mask | None) -> tuple[float, float]:
    return (math.inf, math.inf) if mask is None else mask.reach()
