"""`DistributedStrategy`: how a model is spread over devices."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import keras

from keras_ring import backends, kernels
from keras_ring.placement import Choice

if TYPE_CHECKING:
    from keras_ring.world import World


@dataclasses.dataclass(frozen=True)
class DistributedStrategy:
    """Spread every sequence, and optionally the batch, over devices.

    Models are built, compiled and trained inside `scope()`; `fit`,
    `evaluate` and `predict` then keep only a part of every sequence on each
    device, and `keras_ring.layers.RingAttention` attends over the whole of
    it. The mesh has the axes `"batch"`, `"seq"` and `"model"`.

    JAX and TensorFlow use the devices of this process: `python train.py`.
    PyTorch uses one process per device:
    `torchrun --nproc-per-node N train.py`.

    Args:
        sequence_parallel: number of devices that share one sequence, or -1
            for all the devices that are left.
        data_parallel: number of groups that each take a part of the batch.
        model_parallel: number of devices that share the weights. Only 1 is
            supported so far.
        devices: device names such as `"gpu:0"`, in mesh order; all devices
            of the framework's default kind if None. On PyTorch one name per
            process.
        balance: whether attention under a causal mask exchanges half chunks
            first, so that every device has the same work; what goes in and
            comes out stays in natural order. "auto" does so where it pays
            (chunks of 256 positions and more), True wherever the length of
            a chunk is known and even, False never.
        timeout: seconds after which a transfer that does not finish ends
            the run with an error (PyTorch, TensorFlow).

    Raises:
        ValueError: for sizes that are no positive integers, or that do not
            fit the devices (when the strategy is first used).
        NotImplementedError: for `model_parallel` other than 1.

    Example:

    ```python
    strategy = keras_ring.DistributedStrategy(sequence_parallel=8)
    with strategy.scope():
        model = build_model()
        model.compile("adam", "mse")
        model.fit(x, y)
    ```

    Reference:
        Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers
        for Near-Infinite Context", 2023, https://arxiv.org/abs/2310.01889
    """

    sequence_parallel: int = -1
    data_parallel: int = 1
    model_parallel: int = 1
    devices: tuple[str, ...] | None = None
    balance: Choice = "auto"
    timeout: float = 300.0

    def __post_init__(self) -> None:
        for name in ("sequence_parallel", "data_parallel", "model_parallel"):
            value = getattr(self, name)
            rest = name == "sequence_parallel"
            allowed = "a positive integer"
            if rest:
                allowed += ", or -1 for all the devices that are left"
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not (value >= 1 or (rest and value == -1)):
                raise ValueError(
                    f"`{name}` must be {allowed}. Received: {name}={value!r}."
                )
        if self.model_parallel != 1:
            raise NotImplementedError(
                "Sharding the weights over devices is not supported yet. "
                f"Received: model_parallel={self.model_parallel}. Use 1."
            )
        if self.devices is not None:
            if isinstance(self.devices, str) or not all(
                isinstance(name, str) for name in self.devices
            ):
                raise ValueError(
                    "`devices` must be a sequence of device names such as "
                    f"'gpu:0'. Received: devices={self.devices!r}."
                )
            names = tuple(self.devices)
            if len(set(names)) != len(names) and not self._shared_names():
                raise ValueError(
                    "`devices` must not name a device twice. Received: "
                    f"devices={names}."
                )
            object.__setattr__(self, "devices", names)
        if not isinstance(self.balance, bool) and self.balance != "auto":
            raise ValueError(
                '`balance` must be True, False or "auto". Received: '
                f"balance={self.balance!r}."
            )
        if not (
            isinstance(self.timeout, (int, float))
            and not isinstance(self.timeout, bool)
            and math.isfinite(self.timeout)
            and self.timeout > 0
        ):
            raise ValueError(
                "`timeout` must be a positive number of seconds. Received: "
                f"timeout={self.timeout!r}."
            )

    @staticmethod
    def _shared_names() -> bool:
        """On PyTorch every process may call its own device 'cpu'."""
        return keras.backend.backend() == "torch"

    def mesh_shape(self, available: int) -> tuple[int, int]:
        """The sizes of the data and the sequence axis on some devices.

        Args:
            available: number of devices there are.

        Raises:
            ValueError: if the mesh does not fit.
        """
        data, sequence = self.data_parallel, self.sequence_parallel
        if sequence == -1:
            if available % data:
                raise ValueError(
                    "The devices must divide evenly into `data_parallel` "
                    f"groups. Received: data_parallel={data} with "
                    f"{available} devices. Choose a divisor of {available}, "
                    "or set `sequence_parallel` to use fewer devices."
                )
            sequence = available // data
        needed = data * sequence * self.model_parallel
        if needed > available:
            raise ValueError(
                "A strategy cannot use more devices than there are: "
                f"data_parallel={data} x sequence_parallel={sequence} x "
                f"model_parallel={self.model_parallel} = {needed} devices. "
                f"Received: {available} devices. {_HOW_TO_GET_DEVICES}"
            )
        return data, sequence

    @functools.cached_property
    def world(self) -> "World":
        """This strategy on the devices of the running backend."""
        return backends.load().runtime.World(self)

    def scope(self) -> AbstractContextManager[None]:
        """Make this strategy the one under which models are built and used.

        Raises:
            ValueError: if the devices do not suffice or another strategy is
                active.
        """
        return self.world.scope()

    def run(self, function: Callable[..., Any], *tensors: Any) -> Any:
        """Run a function of tensors under the strategy.

        Inside, `function` sees what a layer sees: on JAX the global tensors
        (sharded over the devices), on TensorFlow and PyTorch its own shard.

        Args:
            function: takes as many tensors as are given here, returns a
                tensor or a nested structure of tensors.
            *tensors: global arrays, the same on every process. Those of rank
                2 and more, `(batch, length, ...)`, are split over batch and
                length, rank 1 over the batch; rank 0 is given to all.

        Returns:
            What `function` returns as global tensors in natural order, on
            every process: results of rank 2 and more are joined along batch
            and length, rank 1 along the batch; scalars are averaged over
            the devices. Batches and lengths that the devices cannot split
            equally are padded, by copies of the last element, while
            `function` runs, and results come without the padding.
        """
        return self.world.run(function, list(tensors))

    def summary(self, print_fn: Callable[[str], Any] = print) -> None:
        """Print the mesh, the devices and the kernel that is used.

        Args:
            print_fn: called once per line.
        """
        world, backend = self.world, backends.load()
        with world.as_in_a_step():
            kernel = kernels.choose(
                keras.config.floatx(), world.devices[0].partition(":")[0]
            )
        total = world.data_size * world.sequence_size
        lines = [
            "DistributedStrategy",
            f"  backend            {backend.name}",
            f"  data parallel      {world.data_size}",
            f"  sequence parallel  {world.sequence_size}",
            f"  model parallel     {self.model_parallel}",
            f"  devices            {total}",
            f"  kernel             {kernel.name}",
            "  a layer sees       "
            + ("its shard" if world.layers_see_shards else "the whole sequence")
            + f" (each device holds 1/{world.sequence_size})",
        ]
        for group in range(world.data_size):
            first = group * world.sequence_size
            ring = world.devices[first : first + world.sequence_size]
            lines.append(f"  ring {group}             " + " -> ".join(ring))
        for line in lines:
            print_fn(line)


_HOW_TO_GET_DEVICES = (
    "Lower the sizes, or provide more devices: on PyTorch start one process "
    "per device with `torchrun --nproc-per-node N`; to simulate them on a "
    "CPU set XLA_FLAGS=--xla_force_host_platform_device_count=N (JAX) or "
    "logical devices (TensorFlow)."
)


_SUSPENDED: ContextVar[bool] = ContextVar("keras_ring_suspended", default=False)


def current() -> "World | None":
    """The world of the strategy that is active here, or None."""
    if _SUSPENDED.get():
        return None
    return backends.load().runtime.current()


@contextmanager
def suspended() -> Iterator[None]:
    """Run code that was given the whole sequence: to it there is no
    strategy, so that nothing in it takes the whole for a shard."""
    token = _SUSPENDED.set(True)
    try:
        yield
    finally:
        _SUSPENDED.reset(token)
