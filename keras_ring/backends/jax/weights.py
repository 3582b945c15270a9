"""Sharded weights on JAX: where they lie, and how they are made whole for use.

With `shard="weights"` each weight, its gradient and what the optimizer keeps of
it lie in equal parts on the devices of the data and the sequence axis (ZeRO-3;
Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054). A step gathers a
weight where it is read. With `shard="optimizer"` (ZeRO-1) that holds for what
the optimizer keeps alone.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from keras_ring.distribution.mesh import BATCH, SEQUENCE

Axes = tuple[str, ...]
# Along these devices share weights.
SHARED: Axes = (BATCH, SEQUENCE)

_IN_PARTS: ContextVar[bool] = ContextVar("keras_ring_in_parts", default=False)


def split(
    shape: Sequence[int], base: PartitionSpec, mesh: jax.sharding.Mesh
) -> PartitionSpec:
    """Partition of a weight over the devices that share weights.

    Args:
        shape: of the weight.
        base: its partition without that, such as one over the model axis.
        mesh: with the axes "batch" and "seq".

    Returns:
        `base`, and the longest axis that it leaves whole split over as many
        devices as split it evenly.
    """
    taken: list[Any] = [*base, *[None] * (len(shape) - len(base))]
    free = [axis for axis in range(len(shape)) if taken[axis] is None]
    for axes in _by_size(mesh):
        size = _size(mesh, axes)
        fits = [axis for axis in free if shape[axis] % size == 0]
        if size > 1 and fits:
            taken[max(fits, key=lambda axis: shape[axis])] = axes
            break
    return PartitionSpec(*taken)


def _by_size(mesh: jax.sharding.Mesh) -> list[Axes]:
    """Sets of axes of devices that share weights, the largest first."""
    ways: list[Axes] = [SHARED, (SEQUENCE,), (BATCH,)]
    return sorted(ways, key=lambda axes: -_size(mesh, axes))


def _size(mesh: jax.sharding.Mesh, axes: Axes) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def without_sharing(sharding: NamedSharding) -> NamedSharding:
    """The partition of a weight where it is used: whole on all devices that
    share weights; along the model axis it stays as it is."""
    axes = [None if _is_shared(entry) else entry for entry in sharding.spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


def is_shared(sharding: Any) -> bool:
    """True if an array with this partition is not whole where it is used."""
    return isinstance(sharding, NamedSharding) and any(
        map(_is_shared, sharding.spec)
    )


def _is_shared(entry: Any) -> bool:
    """True for an entry of a partition that names an axis of `SHARED`."""
    names = entry if isinstance(entry, tuple) else (entry,)
    return any(name in SHARED for name in names)


def gathered(value: jax.Array, sharding: NamedSharding) -> jax.Array:
    """A weight for use, from the parts of it.

    Args:
        value: the weight in a program, of any shape and dtype.
        sharding: of the parts.

    Returns:
        The weight. Its gradient lies as the parts do.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return _whole(value, sharding)
    return _differentiable(value, sharding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _differentiable(value: jax.Array, sharding: NamedSharding) -> jax.Array:
    return _whole(value, sharding)


def _forward(
    value: jax.Array, sharding: NamedSharding
) -> tuple[jax.Array, None]:
    return _whole(value, sharding), None


def _backward(
    sharding: NamedSharding, kept: None, gradient: jax.Array
) -> tuple[jax.Array]:
    del kept
    # The whole first: or the compiler may split activations as the parts are.
    gradient = jax.lax.with_sharding_constraint(
        gradient, without_sharing(sharding)
    )
    return (jax.lax.with_sharding_constraint(gradient, sharding),)


_differentiable.defvjp(_forward, _backward)


def _whole(value: jax.Array, sharding: NamedSharding) -> jax.Array:
    # The parts first: or the compiler may take the parts from the whole.
    value = jax.lax.with_sharding_constraint(value, sharding)
    return jax.lax.with_sharding_constraint(value, without_sharing(sharding))


@contextlib.contextmanager
def in_parts() -> Iterator[None]:
    """Inside, variables have the parts of weights as values: an optimizer
    works on these."""
    token = _IN_PARTS.set(True)
    try:
        yield
    finally:
        _IN_PARTS.reset(token)


def reads_parts() -> bool:
    """True inside of `in_parts`."""
    return _IN_PARTS.get()
