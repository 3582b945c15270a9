"""Runtime of JAX: one mesh, global arrays, one program.

A layer sees the global sequence; the compiler keeps `1 / sequence_size` of
it on each device because data and constraints say so. Only the ring itself
is written per device, in `jax.shard_map` with the sequence axis manual.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from keras import tree

from keras_ring import precision
from keras_ring.attention import selection
from keras_ring.backends.jax import (
    compilation_cache,
    layouts,
    trainer,
    weights,
)
from keras_ring.backends.jax.transport import Place, RingTransport, at, place
from keras_ring.distribution import scopes, world
from keras_ring.distribution.mesh import AXES, BATCH, MODEL, SEQUENCE
from keras_ring.distribution.settings import checked_rules
from keras_ring.distribution.strategy import DistributedStrategy
from keras_ring.distribution.transport import LOCAL
from keras_ring.keras_internals import in_symbolic_scope, without_values
from keras_ring.training import batches, wrappers


class Distribution(keras.distribution.ModelParallel):
    """The Keras distribution that a `World` sets: data split over batch and
    sequence, variables whole on every device unless they are sharded."""

    def __init__(self, ring_world: "World"):
        mesh = keras.distribution.DeviceMesh(
            shape=ring_world.layout.shape,
            axis_names=AXES,
            devices=np.array(ring_world.devices),
        )
        super().__init__(
            layout_map=keras.distribution.LayoutMap(mesh),
            batch_dim_name=BATCH,
            auto_shard_dataset=False,
        )
        self.ring_world = ring_world
        given = ring_world.strategy.layout_map
        if callable(given):
            given = checked_rules(given(mesh))
        self.rules = layouts.Rules(given or (), ring_world.layout)

    def get_data_layout(self, data_shape: Any) -> Any:
        """By shape alone; `World.place_batch` knows more and goes first."""
        spec = self.ring_world.partition_spec(tuple(data_shape), split=False)
        axes = list(spec) + [None] * (len(data_shape) - len(spec))
        return keras.distribution.TensorLayout(axes, self.device_mesh)

    def get_variable_layout(self, variable: Any) -> Any:
        layout = super().get_variable_layout(variable)
        axes = self.rules.axes(variable.path, tuple(variable.shape))
        if axes is not None:
            layout = keras.distribution.TensorLayout(axes, self.device_mesh)
        # Counters and states of random numbers are of no use in parts.
        if self.ring_world.strategy.shard == "weights" and (
            variable.trainable or len(variable.shape) > 1
        ):
            return self.in_parts(layout, variable.shape)
        return layout

    def in_parts(self, layout: Any, shape: Sequence[int]) -> NamedSharding:
        """The layout of what devices keep in parts.

        Args:
            layout: without that; None for one that is whole.
            shape: of the variable.
        """
        mesh = self.device_mesh.backend_mesh
        layout = getattr(layout, "backend_layout", layout)
        spec = PartitionSpec() if layout is None else layout.spec
        if self.ring_world.strategy.shard == "none" or weights.is_shared(
            layout
        ):
            return NamedSharding(mesh, spec)
        return NamedSharding(mesh, weights.split(shape, spec, mesh))


class World(world.World):
    """A strategy on JAX devices."""

    layers_see_shards = False

    @property
    def gathers_weights(self) -> bool:
        """True if weights may lie in parts that no layer can use."""
        # A rule of the user's may name the data axis, as KerasHub's do.
        given = self.strategy.layout_map is not None
        return given or self.strategy.shard == "weights"

    def __init__(self, strategy: DistributedStrategy):
        names = _device_names(strategy.devices)
        self.strategy = strategy
        self.layout = strategy.mesh(len(names))
        self.devices = names[: self.layout.size()]
        self.distribution = Distribution(self)
        self.mesh = self.distribution.device_mesh.backend_mesh

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        with scopes.entered(self) as outermost:
            if not outermost:
                yield
                return
            wrappers.install()
            self.keep()
            compilation_cache.leave_out(self.mesh.devices.flat)
            try:
                yield
            finally:
                keras.distribution.set_distribution(None)

    def keep(self) -> None:
        """Let Keras lay variables out on the mesh; it forgets that when its
        session is cleared.

        Raises:
            ValueError: if another distribution of Keras is active.
        """
        active = keras.distribution.distribution()
        if active is self.distribution:
            return
        if active is not None:
            raise ValueError(
                "Only one distribution can be active at a time. Received: the "
                f"distribution {active!r} beside the scope of "
                f"{self.strategy!r}. Leave one of them, or call "
                "keras.distribution.set_distribution(None), first."
            )
        keras.distribution.set_distribution(self.distribution)

    def inside(self) -> bool:
        return False

    def ring(self) -> RingTransport:
        return RingTransport(SEQUENCE, self.sequence_size)

    def per_shard(
        self,
        function: Callable[..., Any],
        tensors: list[jax.Array],
        shared: Sequence[jax.Array] = (),
        by_sample: bool = False,
        by_head: Sequence[bool] = (),
    ) -> Any:
        if (
            self.sequence_size * self.model_size == 1
            or any(map(without_values, tensors))
            or in_symbolic_scope()
        ):
            return function(LOCAL, *tensors, *shared)
        # The batch as well where it is split evenly: of collectives over the
        # sequence alone the compiler gathers the batch around some.
        splits = not by_sample and self._splits_rows(tensors)
        rows = BATCH if splits else None
        flags = list(by_head) or [False] * (len(tensors) + len(shared))
        first, rest = flags[: len(tensors)], flags[len(tensors) :]
        heads = MODEL if self._splits_heads(tensors, shared, flags) else None
        if self.sequence_size == 1 and heads is None:
            return function(LOCAL, *tensors, *shared)
        dtypes = [tensor.dtype for tensor in shared]

        def on_member(
            own_place: jax.Array,
            own_rows: jax.Array,
            own_heads: jax.Array,
            *shards: jax.Array,
        ) -> Any:
            own = shards[: len(tensors)]
            same = zip(shards[len(tensors) :], dtypes, strict=True)
            same_dtypes = (t.astype(d) for t, d in same)
            here = Place(
                own_place[0],
                own_rows[0] if rows else 0,
                own_heads[0] if heads else 0,
            )
            ring = self.ring() if self.sequence_size > 1 else LOCAL
            with at(here):
                return function(ring, *own, *same_dtypes)

        mapped = jax.shard_map(
            on_member,
            mesh=self.mesh,
            in_specs=(
                PartitionSpec(SEQUENCE),
                PartitionSpec(rows),
                PartitionSpec(heads),
                *(
                    PartitionSpec(
                        None if t.shape[0] == 1 else rows,
                        SEQUENCE,
                        *([heads] if flag else []),
                    )
                    for t, flag in zip(tensors, first, strict=True)
                ),
                *(PartitionSpec(*([heads] if flag else [])) for flag in rest),
            ),
            out_specs=PartitionSpec(
                rows, SEQUENCE, *([heads] if any(flags) else [])
            ),
            axis_names={SEQUENCE, rows, heads} - {None},
            check_vma=False,
        )
        # Where the step is not compiled, its gradient fails without this.
        results = jax.jit(mapped)(
            jnp.arange(self.sequence_size, dtype="int32"),
            jnp.arange(self.data_size, dtype="int32"),
            jnp.arange(self.model_size, dtype="int32"),
            *(self._padded(tensor) for tensor in tensors),
            *(_summed_widely(tensor) for tensor in shared),
        )
        length = tensors[0].shape[1]
        if length % self.sequence_size == 0:
            return results
        return tree.map_structure(lambda result: result[:, :length], results)

    def data_index(self) -> Any:
        own = place()
        return 0 if own is None else own.batch

    def head_index(self) -> Any:
        own = place()
        return 0 if own is None else own.model

    def _splits_heads(
        self,
        tensors: Sequence[jax.Array],
        shared: Sequence[jax.Array],
        by_head: Sequence[bool],
    ) -> bool:
        """True if there are heads, a part of each tensor's for each device
        that shares them."""
        sizes = [t.shape[2] if t.ndim > 2 else 1 for t in tensors]
        sizes += [t.shape[0] if t.ndim else 1 for t in shared]
        having = [n for n, flag in zip(sizes, by_head, strict=True) if flag]
        return (
            self.model_size > 1
            and bool(having)
            and all(n % self.model_size == 0 for n in having)
        )

    def _splits_rows(self, tensors: list[jax.Array]) -> bool:
        """True if the batch of all tensors, or a row that all its rows share,
        is there for each part of it."""
        batch = tensors[0].shape[0]
        return (
            self.data_size > 1
            and batch % self.data_size == 0
            and all(tensor.shape[0] in (1, batch) for tensor in tensors)
        )

    def true_length(self, length: Any) -> int | None:
        whole = isinstance(length, int) and length % self.sequence_size == 0
        return None if whole or not isinstance(length, int) else length

    def run(
        self,
        function: Callable[..., Any],
        tensors: list[Any],
        check: Callable[[Any], Any],
    ) -> Any:
        def checked(*arguments: Any) -> Any:
            return tree.map_structure(check, function(*arguments))

        return self.program(checked)(tensors)

    def program(
        self, function: Callable[..., Any]
    ) -> Callable[[list[Any]], Any]:
        @jax.jit
        def compiled(*arguments: jax.Array) -> Any:
            return tree.map_structure(
                lambda t: jax.lax.with_sharding_constraint(
                    t, NamedSharding(self.mesh, self._run_spec(t.shape))
                ),
                function(*arguments),
            )

        def program(tensors: list[Any]) -> Any:
            placed = [
                jax.device_put(
                    t, NamedSharding(self.mesh, self._run_spec(np.shape(t)))
                )
                for t in tensors
            ]
            with self.scope():
                return compiled(*placed)

        return program

    def kernel_name(self, dtype: str) -> str:
        return selection.name_in_steps(self, dtype)

    def prepare(self, model: Any) -> None:
        compilation_cache.leave_out(self.mesh.devices.flat)
        trainer.prepare(self, model)

    def recover(self, model: Any) -> None:
        trainer.recover(model)

    def partition_spec(
        self, shape: tuple[int, ...], split: bool
    ) -> PartitionSpec:
        """Partition of one array of a batch over the mesh."""
        axes: list[str | None] = []
        if shape:
            axes.append(BATCH if shape[0] % self.data_size == 0 else None)
        if split and shape[1] % self.sequence_size == 0:
            axes.append(SEQUENCE)
        return PartitionSpec(*axes)

    def place_batch(self, batch: Any, stacked: bool = False) -> Any:
        """Put a global batch of host arrays onto the mesh. Every process
        gives the same batch and places its own parts of it.

        Args:
            batch: nested arrays or None.
            stacked: each array has a leading axis of several batches, which
                stays whole.
        """
        first = batch
        if stacked:
            first = tree.map_structure(
                lambda leaf: None if leaf is None else leaf[0], batch
            )
        splits = batches.split_batch(self, self.model, first)

        def place(leaf: Any, split: bool | None) -> Any:
            if leaf is None:
                return None
            spec = self.partition_spec(
                tuple(leaf.shape[int(stacked) :]), bool(split)
            )
            if stacked:
                spec = PartitionSpec(None, *spec)
            sharding = NamedSharding(self.mesh, spec)
            if jax.process_count() == 1:
                return jax.device_put(leaf, sharding)
            leaf = np.asarray(leaf)
            return jax.make_array_from_callback(
                leaf.shape, sharding, lambda index: leaf[index]
            )

        return tree.map_structure(place, batch, splits)

    def _padded(self, tensor: jax.Array) -> jax.Array:
        """Zeros, or false, up to a length that the ring can split."""
        missing = -tensor.shape[1] % self.sequence_size
        if missing == 0:
            return tensor
        rest = [(0, 0)] * (tensor.ndim - 2)
        return jnp.pad(tensor, [(0, 0), (0, missing), *rest])

    def _run_spec(self, shape: Sequence[int]) -> PartitionSpec:
        """Partition of a tensor of `run` over the mesh: an axis that the mesh
        cannot split is whole on every device."""
        names, sizes = (BATCH, SEQUENCE), (self.data_size, self.sequence_size)
        return PartitionSpec(
            *(
                name if have % size == 0 else None
                for name, size, have in zip(names, sizes, shape, strict=False)
            )
        )


def _device_names(asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The devices that were asked for, or all of the default kind."""

    def existing(kind: str | None = None) -> list[str]:
        try:
            return [f"{d.platform}:{d.id}" for d in jax.devices(kind)]
        except RuntimeError:  # JAX has no devices of this kind.
            return []

    if asked is None:
        return tuple(existing())
    unknown = [n for n in asked if n not in existing(n.partition(":")[0])]
    if unknown:
        raise ValueError(
            "`devices` must name devices that JAX sees. Received: "
            f"{', '.join(unknown)}. There are: {', '.join(existing())}. To "
            "simulate several on a CPU, set XLA_FLAGS="
            "--xla_force_host_platform_device_count=N."
        )
    return asked


def _summed_widely(tensor: jax.Array) -> jax.Array:
    """A tensor that all members get, in a dtype in which the sum of their
    gradients is exact enough; on a CPU, XLA ends the process when it meets
    that sum in bfloat16."""
    if jnp.issubdtype(tensor.dtype, jnp.floating):
        return tensor.astype(precision.accumulation_dtype(tensor.dtype))
    return tensor


def current() -> World | None:
    """The world whose scope is active, or None."""
    active = scopes.active()
    if not isinstance(active, World):
        return None
    active.keep()
    return active


def custom_gradient(
    forward: Callable[..., tuple[Any, Any]], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """A function with its own gradient, natively.

    Args:
        forward: `tensors -> (outputs, residuals)`.
        backward: `(residuals, *output_gradients) -> input gradients`, None
            for an input that has no gradient.
    """

    # The backward is another program than the forward: the place in the ring
    # is an argument here, and a residual there.
    @jax.custom_vjp
    def function(where: Place | None, *tensors: jax.Array) -> Any:
        with at(where):
            return forward(*tensors)[0]

    def remembering(where: Place | None, *tensors: jax.Array) -> Any:
        with at(where):
            outputs, residuals = forward(*tensors)
        return outputs, (where, residuals)

    def pull_back(kept: Any, grads: Any) -> Any:
        where, residuals = kept
        # Without the barrier the compiler merges the backward's hops with
        # the forward's and keeps every visiting chunk alive in between.
        residuals = jax.lax.optimization_barrier(residuals)
        with at(where):
            return (None, *backward(residuals, *grads))

    function.defvjp(remembering, pull_back)
    return lambda *tensors: function(place(), *tensors)


def vjp(
    function: Callable[..., tuple[Any, ...]],
    tensors: Sequence[Any],
    cotangents: Sequence[Any],
) -> list[Any]:
    """Gradients of `sum(outputs * cotangents)` for floating-point tensors;
    zeros for one that no output depends on. Also inside a gradient, and in
    the body of a loop."""
    _, pull_back = jax.vjp(lambda *t: tuple(function(*t)), *tensors)
    return list(pull_back(tuple(cotangents)))


def exporting(tensor: Any) -> bool:
    """True if operations are being recorded for a program that cannot have them
    all: for sizes that are left open, of which tiles and loops know nothing."""
    return not all(isinstance(size, int) for size in tensor.shape)
