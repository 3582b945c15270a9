"""The devices that the examples run on, and what else they need.

Importing this splits the machine's CPU into devices, so it must come before
Keras is imported. On PyTorch every device is a process, and the examples are
started with torchrun.
"""

import importlib.util
import os
import sys
from pathlib import Path

BACKEND = os.environ.setdefault("KERAS_BACKEND", "jax")
# Simulated devices on a machine without accelerators.
SIMULATED = {"jax": 8, "tensorflow": 4, "torch": 2}[BACKEND]
RANK = int(os.environ.get("RANK", "0"))
OUT = Path(__file__).resolve().parent.parent / "out"


def check_installed() -> None:
    """Say before anything is trained that its plot could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit(
            "The examples draw plots with matplotlib, which is not installed. "
            "Install it with `pip install '.[examples]'` in "
            "the repository."
        )


def simulate_devices() -> None:
    """Split this machine's CPU into devices, before Keras is imported."""
    if BACKEND == "jax":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        flags = os.environ.get("XLA_FLAGS", "")
        if "host_platform_device_count" not in flags:
            flags += f" --xla_force_host_platform_device_count={SIMULATED}"
            # More devices than cores: some wait long for the others.
            for kind, seconds in (("warn_stuck", 300), ("terminate", 3600)):
                flags += (
                    f" --xla_cpu_collective_call_{kind}_timeout_seconds="
                    f"{seconds}"
                )
            os.environ["XLA_FLAGS"] = flags
    elif BACKEND == "tensorflow":
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        if len(tf.config.list_physical_devices("GPU")) < 2:
            tf.config.set_visible_devices([], "GPU")
            tf.config.set_logical_device_configuration(
                tf.config.list_physical_devices("CPU")[0],
                [tf.config.LogicalDeviceConfiguration()] * SIMULATED,
            )
    elif "WORLD_SIZE" not in os.environ:
        sys.exit(
            "On PyTorch every device is a process. Start this with\n"
            f"  torchrun --nproc-per-node {SIMULATED} {sys.argv[0]}"
        )


def say(*words: object) -> None:
    """Print once, also where there are several processes."""
    if RANK == 0:
        print(*words, flush=True)


check_installed()
simulate_devices()
