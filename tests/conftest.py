"""Simulated devices for the backend that Keras runs on.

`KERAS_BACKEND=jax python -m pytest tests` runs the shared tests and those of
that backend on real collectives: 8 simulated CPU devices on JAX, 4 logical
CPU devices on TensorFlow, real gloo processes on PyTorch.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
BACKEND = os.environ["KERAS_BACKEND"]
if BACKEND == "jax":
    # `JAX_PLATFORMS=cuda` is for tests/test_jax_cudnn.py.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8"
        # More devices than cores: on a busy machine some wait long.
        + " --xla_cpu_collective_call_warn_stuck_timeout_seconds=120"
        + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
        # Tests compile thousands of small programs, each run a few times.
        + " --xla_backend_optimization_level=1"
    )
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest  # noqa: E402

from tests import worlds  # noqa: E402

collect_ignore_glob = [
    f"test_{other}_*.py"
    for other in ("jax", "tensorflow", "torch")
    if other != BACKEND
]


def pytest_configure(config):
    del config
    worlds.simulate_devices()


@pytest.fixture(scope="session")
def on_devices():
    """`on_devices(count, function, *arguments)`: run a function where
    `count` devices are, on every process that drives them, and return its
    result (that of the first process)."""
    pool = worlds.Worlds()
    yield pool.call
    pool.close()


@pytest.fixture
def automatic():
    """The kernel is chosen as by default, and nothing is proven yet."""
    from keras_ring import config, kernels

    kernels.agrees.cache_clear()
    config.set_kernel("auto")
    yield
    config.set_kernel("auto")
    kernels.agrees.cache_clear()


@pytest.fixture
def without_native(monkeypatch):
    """There is no C++ library."""
    from keras_ring.native.kernel import NativeKernel

    monkeypatch.setattr(NativeKernel, "loads", lambda self: False)
