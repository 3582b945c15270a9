"""Runtime of TensorFlow: replicas of a mirrored strategy.

Every device is a replica of one `tf.distribute` strategy, in one process or
in several (`TF_CONFIG`). Variables are mirrored, and each replica is fed its
part of every batch and sequence; see `training.py`. The world hangs on the
`tf.distribute` strategy, because that is what a replica's thread can find.
"""

import collections
import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from keras import tree

from keras_ring.attention import selection
from keras_ring.backends.tensorflow import programs, scope, trainer, training
from keras_ring.backends.tensorflow.kernels import native
from keras_ring.backends.tensorflow.member import Member
from keras_ring.backends.tensorflow.transport import (
    InstanceKeys,
    RingTransport,
    after,
)
from keras_ring.distribution import padding, scopes, shards
from keras_ring.distribution.mesh import AXES, SEQUENCE
from keras_ring.distribution.strategy import DistributedStrategy
from keras_ring.distribution.transport import LOCAL
from keras_ring.keras_internals import in_symbolic_scope
from keras_ring.training import step

_KEYS = InstanceKeys()
# Calls of `strategy.run` with a function from which on it should be compiled.
OFTEN = 3


class _RingReplicas:
    """Additions to both of the mirrored strategies."""

    ring_world: "World"

    def experimental_distribute_dataset(
        self, dataset: Any, options: Any = None
    ) -> Any:
        """While Keras' trainer runs, the world's steps split each batch."""
        if self.ring_world.model is not None:
            return dataset
        return super().experimental_distribute_dataset(  # type: ignore[misc]
            dataset, options
        )


class Mirrored(_RingReplicas, tf.distribute.MirroredStrategy):
    """The replicas of one process."""


class MultiWorkerMirrored(
    _RingReplicas, tf.distribute.MultiWorkerMirroredStrategy
):
    """The replicas of all processes that `TF_CONFIG` names."""


class World(Member):
    """A strategy on TensorFlow devices."""

    layers_see_shards = True

    def __init__(self, strategy: DistributedStrategy):
        self.strategy = strategy
        self.workers = _workers()
        if self.workers > 1:
            self._join_workers(strategy)
        else:
            self._take_devices(strategy)
        self.tf_strategy.ring_world = self
        # Placed copies are the faster way; see `transport`.
        self.placed = self.workers == 1
        # The places of the replicas that apply gradients now.
        self.applying: set[tuple[int, int]] = set()

    def _take_devices(self, strategy: DistributedStrategy) -> None:
        available = _device_names()
        names = tuple(n.lower() for n in strategy.devices or available)
        every = _device_names("GPU") + _device_names("CPU")
        unknown = [name for name in names if name not in every]
        if unknown:
            raise ValueError(
                "`devices` must name devices that TensorFlow sees. Received: "
                f"{', '.join(unknown)}. There are: {', '.join(every)}. To "
                "simulate several on a CPU, call "
                "tf.config.set_logical_device_configuration first."
            )
        self.layout = strategy.mesh(len(names))
        self.devices = names[: self.layout.size()]
        self._numbers = [
            512 * name.startswith("cpu") + int(name.split(":")[1])
            for name in self.devices
        ]
        # The collective all-reduce, TensorFlow's default, numbers its meetings
        # per strategy: two strategies in one process mix them up, and then
        # every collective fails. GPUs need its speed, a CPU does not.
        on_cpu = self.devices[0].startswith("cpu")
        self.tf_strategy = Mirrored(
            [name.upper() for name in self.devices],
            tf.distribute.ReductionToOneDevice() if on_cpu else None,
        )

    def _join_workers(self, strategy: DistributedStrategy) -> None:
        if strategy.devices is not None:
            raise ValueError(
                "With several workers every device of each worker is used. "
                f"Received: devices={strategy.devices} while TF_CONFIG names "
                f"{self.workers} workers. Leave `devices` out and limit what "
                "a worker sees with tf.config.set_visible_devices."
            )
        self._communication = tf.distribute.experimental.CommunicationOptions(
            timeout_seconds=strategy.timeout
        )
        self.tf_strategy = MultiWorkerMirrored(
            communication_options=self._communication
        )
        count = self.tf_strategy.num_replicas_in_sync
        self.layout = strategy.mesh(count)
        if self.layout.size() != count:
            raise ValueError(
                "With several workers the mesh must use every device. "
                f"Received: data_parallel={self.data_size} x "
                f"sequence_parallel={self.sequence_size} with {count} devices "
                f"on {self.workers} workers."
            )
        kind = _device_names()[0].split(":")[0]
        local = count // self.workers
        self._numbers = list(range(count))
        self.devices = tuple(
            f"worker:{replica // local}/{kind}:{replica % local}"
            for replica in range(count)
        )

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        # Here and not above: it imports this package.
        from keras_ring.training import wrappers

        wrappers.install()
        if tf.distribute.has_strategy():
            active = tf.distribute.get_strategy()
            if active is not self.tf_strategy:
                raise ValueError(
                    "Only one distribution can be active at a time. "
                    f"Received: a scope inside the scope of {active!r}. "
                    "Leave that scope first."
                )
        if tf.distribute.in_cross_replica_context() and (
            tf.distribute.has_strategy()
        ):
            yield
            return
        with scopes.entered(self), scope.scope_of(self.tf_strategy):
            yield

    def inside(self) -> bool:
        return (
            tf.distribute.has_strategy()
            and tf.distribute.get_strategy() is self.tf_strategy
            and not tf.distribute.in_cross_replica_context()
            and not in_symbolic_scope()
        )

    def ring(self) -> RingTransport:
        return self._members(SEQUENCE)

    @property
    def everyone(self) -> RingTransport:
        """All replicas as one ring; only where `inside()` is true."""
        return self._members(*AXES)

    def own_rank(self) -> int:
        return _replica()

    def _members(self, *axes: str) -> RingTransport:
        """The replicas that differ from the running one along some axes."""
        rank = self.own_rank()
        return RingTransport(
            rank,
            self.layout.group(rank, *axes),
            devices=self._numbers,
            timeout=self.strategy.timeout,
            keys=_KEYS,
            placed=self.placed,
        )

    def per_shard(
        self,
        function: Callable[..., Any],
        tensors: list[tf.Tensor],
        shared: Sequence[tf.Tensor] = (),
        by_sample: bool = False,
        by_head: Sequence[bool] = (),
    ) -> Any:
        # The code sees the samples of its part of the batch, and all heads.
        del by_sample, by_head
        if not self.inside():
            return function(LOCAL, *tensors, *shared)
        if padding.whole() and self.sequence_size > 1:
            return shards.of_whole(function, self.ring(), tensors, shared)
        return function(self.ring(), *tensors, *shared)

    def true_length(self, length: Any) -> Any:
        if not self.inside():
            return None
        return padding.true_length(length, self.sequence_size)

    def run(
        self,
        function: Callable[..., Any],
        tensors: list[Any],
        check: Callable[[Any], Any],
    ) -> Any:
        promised = isinstance(
            function, tf.types.experimental.PolymorphicFunction
        )
        if promised and function in self._programs:
            return self._programs[function](tensors)
        own = training.own_function(function)
        program = self.program(
            lambda *shards: tree.map_structure(check, own(*shards))
        )
        if promised:
            self._programs[function] = program
        else:
            self._tell_of_tracing(function)
        return program(tensors)

    def _tell_of_tracing(self, function: Callable[..., Any]) -> None:
        """Warn once of a function that is run, and so traced, often."""
        code = getattr(function, "__code__", None)
        self._runs[code] += 1
        if code is not None and self._runs[code] == OFTEN:
            warnings.warn(
                f"strategy.run traces {function.__qualname__} at each call, "
                "which takes time, and memory that TensorFlow does not give "
                "back. Decorate it with @tf.function: then it is traced once "
                "for each set of shapes.",
                stacklevel=5,
            )

    @functools.cached_property
    def _programs(self) -> dict[Any, Callable[[list[Any]], Any]]:
        """Of each `tf.function` that was run."""
        return {}

    @functools.cached_property
    def _runs(self) -> collections.Counter[Any]:
        """Number of runs of other functions, by their code."""
        return collections.Counter()

    def program(
        self, function: Callable[..., Any]
    ) -> Callable[[list[Any]], Any]:
        # Of the results of each trace, by what they look like.
        structures: dict[str, Any] = {}

        def on_replica(shards: Any, sizes: training.Sizes) -> Any:
            splits = [shard.shape.rank >= 2 for shard in shards]
            axes = training.axes_on_replica(self, shards, splits, sizes)
            own = training.Step(self, None, axes, (shards,), (splits,))
            with step.run(own):
                result = function(*shards)
                structure = tree.map_structure(
                    lambda t: None if t is None else 0, result
                )
                structures.setdefault(repr(structure), structure)
                number = list(structures).index(repr(structure))
                # The constant says which one a program was traced with.
                return tf.constant(number), training.result_on_replica(
                    self,
                    [
                        tf.convert_to_tensor(t)
                        for t in tree.flatten(result)
                        if t is not None
                    ],
                )

        compiled = programs.compiled(
            self, lambda *parts: self.tf_strategy.run(on_replica, parts)
        )

        def whole(value: Any, true: Any) -> tf.Tensor:
            pieces = self.everyones(value)
            rank = pieces[0].shape.rank
            if rank == 0:
                return tf.add_n(pieces) / len(pieces)
            return training.join(self, pieces, rank >= 2, true)

        def program(tensors: list[Any]) -> Any:
            tensors = [tf.convert_to_tensor(t) for t in tensors]
            parts = training.distribute(
                self, tensors, [len(t.shape) >= 2 for t in tensors]
            )
            with self.scope():
                number, (values, true) = compiled(*parts)
                joined = iter(
                    [whole(*pair) for pair in zip(values, true, strict=True)]
                )
            number = self.tf_strategy.experimental_local_results(number)[0]
            return tree.map_structure(
                lambda t: None if t is None else next(joined),
                list(structures.values())[int(number)],
            )

        return program

    def numbers_of_all(self, number: int) -> list[int]:
        """The number that each replica's worker gave, on every worker."""
        values = self.tf_strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(number, tf.int32)
        )
        return [int(n) for n in self.everyones(self._tell(values))]

    @functools.cached_property
    def _tell(self) -> Callable[..., Any]:
        return programs.compiled(
            self, lambda value: self.tf_strategy.run(self.gathered, (value,))
        )

    def as_in_a_step(self) -> contextlib.AbstractContextManager[None]:
        return native.replicas_of(self)

    def gathered(self, tensor: tf.Tensor) -> tf.Tensor:
        """On a replica: what `everyones` needs of a result."""
        if self.workers == 1:
            return tensor
        context = tf.distribute.get_replica_context()
        return context.all_gather(
            tensor[None], axis=0, options=self._communication
        )

    def everyones(self, value: Any) -> list[tf.Tensor]:
        """The results of all replicas, in mesh order, on every worker."""
        local = self.tf_strategy.experimental_local_results(value)
        if self.workers == 1:
            return list(local)
        return tf.unstack(local[0])

    def kernel_name(self, dtype: str) -> str:
        return selection.name_in_steps(self, dtype)

    def prepare(self, model: Any) -> None:
        trainer.prepare(self, model)


def _workers() -> int:
    """Number of worker processes that `TF_CONFIG` names, 1 without it."""
    try:
        cluster = json.loads(os.environ.get("TF_CONFIG") or "{}")
        cluster = cluster.get("cluster", {})
        return max(
            1, len(cluster.get("worker", [])) + len(cluster.get("chief", []))
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            "TF_CONFIG must be JSON with the addresses of the workers. "
            f"Received: TF_CONFIG={os.environ['TF_CONFIG']!r}."
        ) from error


def _device_names(kind: str | None = None) -> tuple[str, ...]:
    """Logical devices such as `"cpu:0"`, of the default kind if None."""
    if kind is None:
        return _device_names("GPU") or _device_names("CPU")
    devices = tf.config.list_logical_devices(kind)
    return tuple(
        f"{kind.lower()}:{device.name.rsplit(':', 1)[1]}" for device in devices
    )


def _replica() -> int:
    """The number of the replica whose code runs, in all workers."""
    context = tf.distribute.get_replica_context()
    replica = getattr(context, "_replica_id_in_sync_group", None)
    if not isinstance(replica, int):
        replica = tf.get_static_value(context.replica_id_in_sync_group)
    if replica is None:
        raise NotImplementedError(
            "This version of TensorFlow does not tell a replica its number "
            f"while a program is traced. Received: tensorflow {tf.__version__}."
        )
    return int(replica)


def current() -> World | None:
    """The world whose scope is active, or None."""
    if not tf.distribute.has_strategy():
        return None
    return getattr(tf.distribute.get_strategy(), "ring_world", None)


def custom_gradient(
    forward: Callable[..., tuple[Any, Any]], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """A function with its own gradient, natively.

    Args:
        forward: `tensors -> (outputs, residuals)`.
        backward: `(residuals, *output_gradients) -> input gradients`, None
            for an input that has no gradient.
    """

    @tf.custom_gradient
    def function(*tensors: tf.Tensor) -> Any:
        outputs, residuals = forward(*tensors)

        def pull_back(*grads: tf.Tensor) -> Any:
            # Without the order the backward's hops start with the forward
            # and keep every visiting chunk alive in between.
            return tuple(backward(after(residuals, grads), *grads))

        return outputs, pull_back

    # TensorFlow asks for the gradients of variables apart from the others.
    return lambda *tensors: function(*map(tf.convert_to_tensor, tensors))


def vjp(
    function: Callable[..., tuple[Any, ...]],
    tensors: Sequence[Any],
    cotangents: Sequence[Any],
) -> list[Any]:
    """Gradients of `sum(outputs * cotangents)` for floating-point tensors;
    zeros for one that no output depends on. Also inside a gradient, and in
    the body of a loop."""
    tensors = [tf.identity(tensor) for tensor in tensors]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        outputs = list(function(*tensors))
    gradients = tape.gradient(
        outputs,
        tensors,
        output_gradients=list(cotangents),
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    return [tf.convert_to_tensor(gradient) for gradient in gradients]


def exporting(tensor: Any) -> bool:
    """True if operations are being recorded for a program that cannot have them
    all; here loops and gradients travel."""
    del tensor
    return False
