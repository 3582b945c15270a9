"""The other side of `timing.Child`; not to be called by hand."""

import contextlib
import importlib
import json
import os
import sys
import time

from benchmarks.timing import MARK


def main():
    """Get ready, and then answer what is asked on standard input."""
    if sys.argv[1] == "accelerators":
        tell(accelerators(os.environ["KERAS_BACKEND"]))
        return
    given = json.loads(sys.argv[1])
    backend = given["backend"]
    if backend == "tensorflow" and given["simulated"]:
        from benchmarks import reports

        reports.simulate_devices(given["devices"])
    if backend == "torch":
        import torch

        torch.set_num_threads(given["threads"])
    module, _, name = given["make"].partition(":")
    step = getattr(importlib.import_module(module), name)(**given["arguments"])
    step()
    tell("ready")
    for line in sys.stdin:
        tell(timed(step) if line.strip() == "time" else peak_memory(backend))


def tell(value):
    """To the parent."""
    print(MARK + json.dumps(value), flush=True)


def timed(step):
    """Seconds of one call, of the slowest process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    import torch
    from torch import distributed

    distributed.barrier()
    start = time.perf_counter()
    step()
    own = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    if distributed.get_backend() == "nccl":
        own = own.cuda()
    distributed.all_reduce(own, distributed.ReduceOp.MAX)
    return own.item()


def peak_memory(backend):
    """Bytes that this process has held at most: of its accelerator, where
    there is one, else resident."""
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    if backend == "jax":
        import jax

        with contextlib.suppress(KeyError, TypeError):
            return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            info = tf.config.experimental.get_memory_info("GPU:0")
            return info["peak"]
    from benchmarks import memory

    return memory.peak_memory()


def accelerators(backend):
    """Devices other than CPUs that the framework sees."""
    if backend == "jax":
        import jax

        return sum(d.platform != "cpu" for d in jax.devices())
    if backend == "tensorflow":
        import tensorflow as tf

        return len(tf.config.list_physical_devices("GPU"))
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    main()
