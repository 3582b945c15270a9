"""Visits that are computed part by part, for kernels that know no positions."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from keras_ring.attention.kernel import Inputs
from keras_ring.attention.visit import Visit


def by_place(inputs: Inputs, visit: Visit) -> bool:
    """True if a visit, of sizes that are known, has scores that are scaled
    products and are masked by their places: what a mask carries would have to
    be cut along with the tensors."""
    mask = visit.scoring.mask
    sizes = [size for tensor in inputs for size in tensor.shape]
    return (
        all(isinstance(size, int) and size for size in sizes)
        and visit.scoring.only_products
        and (mask is None or not any(mask.carried()))
    )


def add(sums: dict[int, Any], place: int, share: Any) -> None:
    """Add what belongs to a part of a chunk to the sum that is there."""
    have = sums.get(place)
    sums[place] = share if have is None else have + share


def joined(parts: Sequence[jax.Array]) -> jax.Array:
    """(B, H, part, ...) -> (B, H, length, ...)."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 2)
