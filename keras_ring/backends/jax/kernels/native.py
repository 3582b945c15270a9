"""The C++ attention on JAX: called by XLA's programs through its foreign
function interface.

Such a call is a program's own for one machine: it cannot be exported, and no
compiler splits it. So it is for CPUs that stand for several devices, where a
program is for these anyway and the call is made on each of them.
"""

import ctypes
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keras_ring.attention.kernel import Gradients, Inputs, Rows
from keras_ring.attention.native import kernel, library
from keras_ring.attention.native.kernel import NativeKernel
from keras_ring.attention.numerics import Partial
from keras_ring.attention.visit import Visit
from keras_ring.backends.jax.kernels import local
from keras_ring.distribution import strategy
from keras_ring.masks.band import Band

SOURCE = Path(__file__).with_name("native.cpp")
FORWARD, BACKWARD = "keras_ring_xla_forward", "keras_ring_xla_backward"


class JaxNativeKernel(NativeKernel):
    """One call of a program a visit, on each device."""

    def load(self) -> None:
        loaded()

    def preferred_here(self) -> bool:
        return local.several_cpus()

    def fits(
        self, inputs: Inputs, visit: Visit, rows: Rows | None = None
    ) -> bool:
        return (
            # By name it may be asked for on other devices.
            local.platform() == "cpu"
            and not any(_varying(tensor) for tensor in inputs)
            and super().fits(inputs, visit, rows)
        )

    def call_forward(
        self, inputs: Inputs, visit: Visit, band: Band, carry: Partial | None
    ) -> Partial:
        def call(starts: list[jax.Array], *tensors: jax.Array) -> Any:
            query, key, value, *before = tensors
            shape = *query.shape[:3], value.shape[3]
            return _call(
                FORWARD,
                (shape, shape[:3]),
                (query, key, value, *starts),
                before,
                visit,
                band,
            )

        tensors = [*inputs, *([] if carry is None else carry)]
        return Partial(*_on_each_device(call, tensors, visit))

    def call_backward(
        self,
        inputs: Inputs,
        rows: Rows,
        visit: Visit,
        band: Band,
        carry: jax.Array | None,
    ) -> Gradients:
        def call(starts: list[jax.Array], *tensors: jax.Array) -> Any:
            query, key, value, lse, delta, grad_out, *before = tensors
            return _call(
                BACKWARD,
                (query.shape, key.shape, value.shape),
                (query, key, value, *starts, lse, delta, grad_out),
                before,
                visit,
                band,
            )

        tensors = [*inputs, rows.lse, rows.delta, rows.grad_out]
        if carry is not None:
            tensors.append(carry)
        return Gradients(*_on_each_device(call, tensors, visit))


def _varying(tensor: jax.Array) -> Any:
    """The axes of a `shard_map` along which a tensor varies, if it checks
    that. The ring's does not; in somebody else's a call would have to say so
    of its results, and no two releases of JAX spell that alike."""
    kind: Any = jax.typeof(tensor)
    if hasattr(kind, "vma"):
        return kind.vma
    return getattr(getattr(kind, "mat", None), "varying", ())


def _load() -> Any:
    """The library, whose functions XLA knows from then on."""
    # Headers of another release may lie in the same folder later.
    flags = (
        f"-DKERAS_RING_JAX={metadata.version('jaxlib')}",
        *("-isystem", jax.ffi.include_dir()),
    )
    seconds = library.patience(strategy.current())
    sources = [SOURCE, library.ATTENTION]
    path = library.build("jax", sources, flags, seconds)
    found = ctypes.CDLL(str(path))
    for name in (FORWARD, BACKWARD):
        jax.ffi.register_ffi_target(
            name, jax.ffi.pycapsule(getattr(found, name)), platform="cpu"
        )
    return found


loaded = library.Once(_load)


def _on_each_device(
    call: Any, tensors: list[jax.Array], visit: Visit
) -> list[jax.Array]:
    """`call((query_starts, key_starts), *tensors)` with what each device
    holds of the tensors."""
    queries = len(visit.query_starts)

    def part(*arguments: Any) -> list[jax.Array]:
        own, starts = arguments[: len(tensors)], arguments[len(tensors) :]
        sides = starts[:queries], starts[queries:]
        found: list[jax.Array] = call(
            [jnp.stack([jnp.int32(s) for s in side]) for side in sides], *own
        )
        return found

    starts = [*visit.query_starts, *visit.key_starts]
    found: list[jax.Array] = local.on_each_device(part, tensors, starts)
    return found


def _call(
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    tensors: tuple[jax.Array, ...],
    before: list[jax.Array],
    visit: Visit,
    band: Band,
) -> list[jax.Array]:
    """Call a function of the library.

    Args:
        name: FORWARD or BACKWARD.
        shapes: of the results.
        tensors: its arguments.
        before: the first results so far, which are overwritten; none at the
            first visit.
        visit, band: see `NativeKernel.call_forward`.
    """
    loaded()
    function = jax.ffi.ffi_call(
        name,
        [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        # Maps over batches are rare, and threads share a call's work.
        vmap_method="sequential",
        input_output_aliases={len(tensors) + i: i for i in range(len(before))},
    )
    found: list[jax.Array] = function(
        *tensors,
        *before,
        least=np.int64(band.least),
        most=np.int64(band.most),
        stop=np.int64(band.stop),
        rows=np.int64(band.rows),
        scale=np.float32(visit.scoring.scale),
        threads=np.int32(_threads()),
    )
    return found


def _threads() -> int:
    """Of one call: each device of this process has one of its own."""
    return max(1, kernel.threads() // local.devices())
