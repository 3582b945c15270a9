"""A function of what one device holds, where XLA splits the rest.

The ring is written per device along the sequence only; batches and heads are
split by the compiler. It cannot split a kernel that it does not know: it
would gather the whole batch, or refuse. So the axes that are still the
compiler's are taken over for the call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from keras_ring.distribution import strategy
from keras_ring.distribution.mesh import BATCH, MODEL


def on_each_device(
    function: Callable[..., Any],
    tensors: Sequence[jax.Array],
    scalars: Sequence[Any] = (),
) -> Any:
    """Call a function with the part of the tensors that a device holds.

    Args:
        function: `(*tensors, *scalars) -> tensors`, for each sample and head
            by itself. Results are (batch, heads, ...) as well.
        tensors: (batch, heads, ...), or (batch, length) where all heads have
            the same. Several numbers of heads are split alike, or not.
        scalars: the same on every device along these axes.
    """
    mesh, axes = _open_axes()
    if not axes:
        return function(*tensors, *scalars)
    batches = [tensor.shape[0] for tensor in tensors]
    heads = [tensor.shape[1] for tensor in tensors if tensor.ndim > 2]
    shape = mesh.shape
    batch = _split(BATCH, axes, shape, batches)
    model = _split(MODEL, axes, shape, heads)

    def spec(tensor: Any) -> PartitionSpec:
        return PartitionSpec(batch, *([model] if tensor.ndim > 2 else []))

    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(
            *(spec(tensor) for tensor in tensors),
            *(PartitionSpec() for _ in scalars),
        ),
        out_specs=PartitionSpec(batch, model),
        axis_names=axes,
        check_vma=False,
    )(*tensors, *scalars)


def platform() -> str:
    """The kind of devices that what is traced here will run on."""
    mesh = _mesh()
    if mesh is not None:
        kind: str = mesh.devices.flat[0].platform
        return kind
    device = jax.config.jax_default_device
    return getattr(device, "platform", None) or jax.default_backend()


def several_cpus() -> bool:
    """True if this process has CPUs that stand for several devices."""
    try:
        return len(jax.devices("cpu")) > 1
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out.
        return False


def devices() -> int:
    """Number of this process' devices on which what is traced here will run."""
    mesh = _mesh()
    return 1 if mesh is None else max(1, len(mesh.local_devices))


def _mesh() -> Any:
    """The mesh of the active strategy, or None."""
    return getattr(strategy.current(), "mesh", None)


def _open_axes() -> tuple[Any, set[str]]:
    """The mesh that code runs on, and those of its axes that XLA splits."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    manual = set(mesh.manual_axes)
    if manual:  # In the ring.
        return mesh, set(mesh.axis_names) - manual
    whole = _mesh()
    if whole is None or whole.size == 1:
        return mesh, set()
    return whole, set(whole.axis_names)


def _split(
    axis: str, axes: set[str], shape: Any, sizes: Sequence[int]
) -> str | None:
    """The axis of a mesh, if it can split all of the sizes."""
    if axis not in axes or any(size % shape[axis] for size in sizes):
        return None
    return axis
