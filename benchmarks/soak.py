"""Whether anything grows over many small steps of training.

    KERAS_BACKEND=jax python -m benchmarks.soak --devices 4 --steps 10000
    KERAS_BACKEND=tensorflow python -m benchmarks.soak --devices 2 --steps 3000
    KERAS_BACKEND=torch python -m benchmarks.soak --devices 2 --steps 10000

Prints, for every process and at even distances, the steps so far, resident
memory in MiB, open file descriptors, and files and KiB in `/dev/shm`.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

LOOKS = 10
MARK = "BENCHMARK_SOAK"


def main():
    """Start the processes, or be one of them."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--devices", type=int, default=2)
    given.add_argument("--steps", type=int, default=10_000)
    given = given.parse_args()
    backend = os.environ.setdefault("KERAS_BACKEND", "torch")
    if backend == "torch" and MARK not in os.environ:
        sys.exit(start(given.devices))
    if backend == "jax":
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "")
            + f" --xla_force_host_platform_device_count={given.devices}"
        )
    if backend == "tensorflow":
        from benchmarks import reports

        reports.simulate_devices(given.devices)
    train(given.devices, given.steps)


def start(devices):
    """This command once for each device, as torchrun would do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **{"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1"},
        **{"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", MARK: "1"},
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak", *sys.argv[1:]],
            env=os.environ | common | {"RANK": str(rank)},
        )
        for rank in range(devices)
    ]
    return max(abs(process.wait()) for process in processes)


def train(devices, steps):
    """A tiny model, one small batch for each step."""
    import keras
    import numpy as np

    import keras_ring

    class Look(keras.callbacks.Callback):
        """Prints what the process takes."""

        def __init__(self):
            super().__init__()
            self.done, self.begun = 0, time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            self.done += 1
            if self.done % max(steps // LOOKS, 1) == 0 or self.done == 100:
                seconds = time.perf_counter() - self.begun
                print(
                    f"rank {os.environ.get('RANK', 0)} "
                    f"step {self.done:6d} {seconds:7.0f} s  {taken()}",
                    flush=True,
                )

    strategy = keras_ring.DistributedStrategy(sequence_parallel=devices)
    with strategy.scope():
        tokens = keras.Input((None,), dtype="int32")
        x = keras.layers.Embedding(32, 16)(tokens)
        x = keras_ring.layers.RingTransformerBlock(
            2, hidden_dim=32, causal=True
        )(x)
        model = keras.Model(tokens, keras.layers.Dense(32)(x))
        model.compile(
            "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        x = np.random.default_rng(0).integers(0, 32, (100, 512))
        look = Look()
        while look.done < steps:
            count = min(len(x), steps - look.done)
            model.fit(
                *(x[:count], x[:count]),
                batch_size=1,
                verbose=0,
                callbacks=[look],
            )


def taken():
    """Resident memory, descriptors and shared memory, in words."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    descriptors = len(os.listdir("/proc/self/fd"))
    shared = list(Path("/dev/shm").iterdir())
    size = 0
    for file in shared:
        # Of another process, and gone by now.
        if file.exists():
            size += file.stat().st_size
    return (
        f"resident {resident:8.1f} MiB  descriptors {descriptors:4d}  "
        f"shared memory {len(shared):3d} files {size // 2**10:8d} KiB"
    )


if __name__ == "__main__":
    main()
