"""JAX's cache of compiled programs on disk, which no mesh of CPUs may use."""

import warnings
from collections.abc import Iterable

import jax
from jax.experimental.compilation_cache import compilation_cache


def leave_out(devices: Iterable[jax.Device]) -> None:
    """Have every program compiled, if the devices are several CPUs.

    A program for several CPUs that XLA loads from the cache has lost the
    order of its collectives: two of them can meet as one, so that a step now
    and then returns other numbers, waits for ever or ends the process (seen
    with jaxlib 0.10.2). GPUs and TPUs run theirs one after the other.

    The cache stays off when a scope is left, because models go on to run.
    """
    cpus = [device for device in devices if device.platform == "cpu"]
    used = (
        jax.config.jax_enable_compilation_cache
        and jax.config.jax_compilation_cache_dir
    )
    if len(cpus) < 2 or not used:
        return
    jax.config.update("jax_enable_compilation_cache", False)
    # It remembers that it was on.
    compilation_cache.reset_cache()
    warnings.warn(
        "JAX's compilation cache is turned off in this process: programs for "
        "several CPU devices that are loaded from it can return wrong "
        f"results. Received: {len(cpus)} CPU devices and the cache "
        f"{used!r}. To silence this, set jax_enable_compilation_cache to "
        "False; on GPUs and TPUs the cache is used.",
        RuntimeWarning,
        stacklevel=2,
    )
