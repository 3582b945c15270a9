"""Choice of the kernel that computes attention.

A backend lists its kernels from the one it prefers to the blockwise
reference. One that is not the reference is used only after it was seen to
agree with the reference on a small problem, on the device and in the dtype
in question: what it is made of may be private, may change with a release,
and may differ between processors.
"""

import functools
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_ring import backends, config, precision
from keras_ring.attention import numerics
from keras_ring.attention.kernel import Inputs, Kernel, Rows
from keras_ring.attention.numerics import Partial
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.distribution.world import World
from keras_ring.masks import Causal, Mask, Padding

Tensor = Any

# Largest difference, relative to the largest entry or to 1. Sums of some
# hundred products carry about 1e-6 in float32 and 1e-14 in float64; a kernel
# that rounds to half precision on the way has four units in the last place.
TOLERANCE = {
    "float64": 1e-12,
    "float32": 2e-5,
    "float16": 2.0**-8,
    "bfloat16": 2.0**-5,
}

# Keys for more than one block of every kernel known, and no multiple of one.
QUERIES, KEYS, HEADS, KEY_HEADS, DEPTH = 300, 520, 2, 1, 16


def choose(dtype: str, device: str | None = None) -> Kernel:
    """The kernel for tensors of a dtype on a device.

    Args:
        dtype: of query, key and value.
        device: its kind, such as "cpu"; None where the backend does not say.

    Returns:
        The one that `config.set_kernel` named; by default the first that is
        there and `agrees`.
    """
    kernels: tuple[Kernel, ...] = backends.load().kernel.KERNELS
    wanted = config.kernel()
    if wanted != "auto":
        return next(k for k in kernels if k.name == wanted)
    *others, reference = kernels
    dtype = keras.backend.standardize_dtype(dtype)
    for kernel in others:
        if kernel.preferred(device, dtype) and agrees(
            kernel, reference, dtype, device
        ):
            return kernel
    return reference


def name_in_steps(world: World, dtype: str) -> str:
    """Name of the kernel that `choose` gives to the steps of a world."""
    # With several workers of TensorFlow a name begins with "worker:0/".
    device = world.devices[0].rsplit("/", 1)[-1].partition(":")[0]
    with world.as_in_a_step():
        return choose(dtype, device).name


@functools.cache
def agrees(
    kernel: Kernel, reference: Kernel, dtype: str, device: str | None
) -> bool:
    """True if a kernel computes what the reference does. Asked once per
    process; if not, a warning says which kernel is left out and why."""
    try:
        # A thread of its own is not in the middle of tracing something.
        with ThreadPoolExecutor(1) as alone:
            why = alone.submit(
                _first_difference, kernel, reference, dtype, device
            ).result()
    except Exception as error:  # noqa: BLE001 - a private name may raise any
        why = f"it raised {type(error).__name__}: {error}"
    if why is not None:
        warnings.warn(
            f"The attention kernel {kernel.name!r} is not used for {dtype} on "
            f"{device}, but {reference.name!r}, which is slower: {why}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return why is None


def _first_difference(
    kernel: Kernel, reference: Kernel, dtype: str, device: str | None
) -> str | None:
    """First thing the two kernels disagree on, on a device; None if there is
    none."""
    with nullcontext() if device is None else keras.device(device):
        return next(_differences(kernel, reference, dtype), None)


def _differences(
    kernel: Kernel, reference: Kernel, dtype: str
) -> Iterator[str]:
    """Differences between the two kernels, in words."""
    draw = np.random.default_rng(0)

    def tensor(length: int, heads: int) -> Tensor:
        # Heads lie behind the length, as they do where layers call.
        array = draw.normal(size=(1, length, heads, DEPTH))
        return ops.transpose(ops.convert_to_tensor(array, dtype), (0, 2, 1, 3))

    query, grad_out = tensor(QUERIES, HEADS), tensor(QUERIES, HEADS)
    inputs = Inputs(query, tensor(KEYS, KEY_HEADS), tensor(KEYS, KEY_HEADS))
    accumulate = precision.accumulation_dtype(dtype)
    grad_lse = ops.cast(grad_out[..., 0], accumulate)
    # Keys that nobody sees at the start leave the first rows without any.
    valid = ops.convert_to_tensor(np.arange(KEYS)[None] >= 20)
    masks: dict[str, Mask | None] = {
        "full": None,
        "purely causal": Causal(),
        "causal": Causal() & Padding(valid),
    }
    limit = TOLERANCE[dtype if kernel.rounds(dtype) else accumulate]
    reference = reference.eager()
    for name, mask in masks.items():
        visit = Visit((0,), (0,), Scoring(scale=DEPTH**-0.5, mask=mask))
        if not kernel.fits(inputs, visit):
            continue
        parts = [k.forward(inputs, visit, None) for k in (kernel, reference)]
        # The log-sum-exp of a longer sequence, as a ring hands it over.
        whole = numerics.merge(
            parts[1],
            Partial(ops.zeros_like(parts[1].out), ops.zeros_like(grad_lse)),
        )
        delta = numerics.row_delta(
            whole.out, ops.cast(grad_out, accumulate), grad_lse
        )
        rows = Rows(whole.out, whole.lse, delta, grad_out)
        grads = [
            k.backward(inputs, rows, visit, None) for k in (kernel, reference)
        ]
        for what, have, want in (
            *zip(("out", "lse"), *parts, strict=True),
            *zip(("dq", "dk", "dv"), grads[0][:3], grads[1][:3], strict=True),
        ):
            error = _error(have, want)
            if not error <= limit:
                yield (
                    f"its {what} of {name} attention differs by {error:.1e}, "
                    f"more than {limit:.0e}"
                )


def _error(have: Tensor, want: Tensor) -> float:
    """The largest difference; infinite where the dtypes or what is infinite
    or not a number differ."""
    arrays = [ops.convert_to_numpy(t) for t in (have, want)]
    if arrays[0].dtype != arrays[1].dtype:
        return float("inf")
    have, want = (a.astype("float64") for a in arrays)
    finite = np.isfinite(want)
    if not np.array_equal(have[~finite], want[~finite]):
        return float("inf")
    error: Any = np.max(np.abs(have[finite] - want[finite]), initial=0.0)
    error /= max(1.0, np.max(np.abs(want[finite]), initial=0.0))
    return float("inf") if np.isnan(error) else float(error)
