"""Where tests find devices, on each backend.

On JAX and TensorFlow one process drives all devices and a function is
simply called. On PyTorch a pool of real processes per world size is started
once, each runs the function, and the first failure is raised here.
"""

import os


def _backend() -> str:
    """Keras' backend. Where the environment names it no framework is imported,
    as pytest-xdist's first process runs no test."""
    if "KERAS_BACKEND" not in os.environ:
        import keras

        return keras.backend.backend()
    return os.environ["KERAS_BACKEND"]


BACKEND = _backend()
# Devices that a test may ask for.
DEVICES = {"jax": 8, "tensorflow": 4, "torch": 4}[BACKEND]


def has_gpu() -> bool:
    """Whether tests run on a GPU: on JAX they do where they are told to."""
    if BACKEND == "jax":
        return "cuda" in os.environ.get("JAX_PLATFORMS", "")
    if BACKEND == "torch":
        import torch

        return torch.cuda.is_available()
    return False


def simulate_devices() -> None:
    """Split this machine's CPU into the devices of the tests."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * DEVICES,
        )


def rewrite_programs(rewritten: bool) -> None:
    """Whether TensorFlow rewrites programs before their first run, as it
    does by default. With small programs that run a few times it is a fifth
    of the time."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.config.optimizer.set_experimental_options(
            {"disable_meta_optimizer": not rewritten}
        )


class Worlds:
    """Runs functions where the devices are."""

    def __init__(self):
        self._pools = {}

    def call(self, count, function, *arguments):
        """Run `function(*arguments)` in a world of `count` devices."""
        if count > DEVICES:
            raise ValueError(f"no {count} devices, only {DEVICES}")
        if BACKEND != "torch":
            return function(*arguments)
        from tests.processes import Pool

        pool = self._pools.get(count)
        if pool is None or not pool.alive:
            pool = self._pools[count] = Pool(count)
        return pool.call(function, arguments)

    def close(self):
        """End the processes of the pools, if there are any."""
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
