"""The processes of a PyTorch program: one per device, as torchrun starts
them, and the process groups of a mesh."""

import atexit
import datetime
import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import keras
import torch
import torch.distributed as dist

from keras_ring.backends.torch.processes import shared_memory
from keras_ring.backends.torch.processes.failures import Failures
from keras_ring.backends.torch.processes.shared_memory import SharedMemory
from keras_ring.backends.torch.transport import Reporting, RingTransport
from keras_ring.distribution.mesh import AXES, SEQUENCE, Mesh
from keras_ring.distribution.settings import Settings
from keras_ring.distribution.transport import LOCAL, Transport


class Groups(NamedTuple):
    """The process groups that one process belongs to.

    Attributes:
        everyone: all processes of the mesh.
        ring: those that share one sequence with this process.
        failures: of the processes; None where there is one.
        resets: how often there had been new groups when these were made.
    """

    everyone: Transport
    ring: Transport
    failures: Failures | None = None
    resets: int = 0

    @property
    def valid(self) -> bool:
        """True if these groups have not been replaced."""
        return self.failures is None or self.failures.resets == self.resets


def process_count() -> int:
    """Number of processes that this program was started as."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Rank of this process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def mesh(strategy: Settings) -> Mesh:
    """The mesh of these processes.

    Raises:
        ValueError: unless there is exactly one process per device.
    """
    started = process_count()
    data, sequence = strategy.data_parallel, strategy.sequence_parallel
    if sequence == -1:
        sequence = max(started // data, 1)
    needed = data * sequence
    if needed != started:
        fix = (
            f"Start the program with `torchrun --nproc-per-node {needed} "
            "script.py` (one process per device of this machine), or change "
            "`data_parallel` and `sequence_parallel`."
        )
        raise ValueError(
            "On PyTorch every device of the mesh is one process, and every "
            "process is one device of it. Received: data_parallel="
            f"{data} x sequence_parallel={sequence} = {needed} devices, with "
            f"{started} processes. {fix}"
        )
    if strategy.devices is not None and len(strategy.devices) != started:
        raise ValueError(
            "On PyTorch `devices` names one device per process. Received: "
            f"devices={strategy.devices} with {started} processes."
        )
    return strategy.mesh(started)


def device_names(strategy: Settings) -> tuple[str, ...]:
    """Names of the device of each process of the mesh.

    Raises:
        ValueError: if this process' device is unknown, or not of the kind
            that Keras puts tensors on.
    """
    kind = torch.get_default_device().type
    kind = keras_device().type if kind == "cpu" else kind
    if strategy.devices is None:
        return tuple(f"{kind}:{i}" for i in range(process_count()))
    own = _named_device(strategy)
    if own.type != kind:
        raise ValueError(
            "`devices` must name devices of the kind that Keras computes on. "
            f"Received: {strategy.devices[rank()]!r}, while Keras uses "
            f"{kind!r}. Set the environment variable KERAS_TORCH_DEVICE="
            f"{own.type} before Keras is imported, or change `devices`."
        )
    # As PyTorch calls them, which is what kernels are asked for.
    return tuple(name.replace("gpu", "cuda") for name in strategy.devices)


def _named_device(strategy: Settings) -> torch.device:
    """The device that `devices` names for this process."""
    assert strategy.devices is not None  # The callers have looked.
    name = strategy.devices[rank()]
    try:
        return torch.device(name.replace("gpu", "cuda"))
    except RuntimeError as error:
        raise ValueError(
            "`devices` must name devices that PyTorch knows, such as 'gpu:0' "
            f"or 'cpu'. Received: {name!r}."
        ) from error


def keras_device() -> torch.device:
    """The device on which Keras makes tensors."""
    return keras.ops.zeros(()).device


def connect(strategy: Settings, mesh: Mesh) -> Groups:
    """Join the process groups of a mesh; every process calls this.

    The default group is made if the program has none. Groups made from it
    do not inherit its timeout.

    Raises:
        RuntimeError: if the other processes do not come within the timeout.
    """
    if mesh.size() == 1:
        return Groups(LOCAL, LOCAL)
    cuda = keras_device().type == "cuda"
    if cuda:
        own = int(os.environ.get("LOCAL_RANK", rank()))
        if strategy.devices is not None:
            named = _named_device(strategy)
            own = own if named.index is None else named.index
        torch.cuda.set_device(own)
    kind = "nccl" if cuda else "gloo"
    limit = datetime.timedelta(seconds=strategy.timeout)
    with Reporting(strategy.timeout):
        if not dist.is_initialized():
            dist.init_process_group(kind, timeout=limit)
            _made_groups().append(dist.group.WORLD)
            atexit.register(_end)
        failures = _failures(dist.group.WORLD)
        everyone, own_ring = _process_groups(
            dist.group.WORLD, mesh, limit, kind
        )
    transports = [RingTransport(everyone, strategy.timeout, None, failures)]
    if mesh.size(SEQUENCE) > 1:
        with Reporting(strategy.timeout):
            memory = None if cuda else _memory(own_ring)
        transports.append(
            RingTransport(own_ring, strategy.timeout, memory, failures)
        )
    failures.watch(transports)
    ring = transports[1] if mesh.size(SEQUENCE) > 1 else LOCAL
    return Groups(transports[0], ring, failures, failures.resets)


def made_group() -> bool:
    """True if the program's default group was made here, and so is there for
    strategies alone."""
    return (
        dist.is_available()
        and dist.is_initialized()
        and any(dist.group.WORLD is group for group in _made_groups())
    )


@functools.cache
def _made_groups() -> list[dist.ProcessGroup]:
    """The default groups that `connect` has made."""
    return []


@functools.cache
def _failures(default: dist.ProcessGroup) -> Failures:
    """The failures of the processes of a default group."""
    del default
    store = dist.distributed_c10d._get_default_store()
    # A connection of its own: another thread asks it.
    store = store.clone() if hasattr(store, "clone") else store
    return Failures(dist.PrefixStore("keras_ring", store), _forget)


def _forget() -> None:
    """The next strategies have other groups."""
    _process_groups.cache_clear()
    _memory.cache_clear()


def _end() -> None:
    """End the default group, if the program has not."""
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def _memory(group: dist.ProcessGroup) -> SharedMemory | None:
    """Shared memory of the members of a ring, for as long as the group."""
    return shared_memory.connect(group)


@functools.cache
def _process_groups(
    default: dist.ProcessGroup,
    mesh: Mesh,
    limit: datetime.timedelta,
    kind: str,
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """All processes of a mesh, and those of this one's ring.

    Each group has threads and connections of its own for as long as the
    process lives, so strategies of one shape share theirs. (A program that
    ends its default group and makes another has other groups, too.)
    """
    del default

    def made(axes: Sequence[str]) -> dist.ProcessGroup:
        """This process' group; every process makes all of them."""
        groups = {
            tuple(ranks): dist.new_group(ranks, timeout=limit, backend=kind)
            for ranks in mesh.groups(*axes)
        }
        return groups[tuple(mesh.group(rank(), *axes))]

    return made(AXES), made((SEQUENCE,))
