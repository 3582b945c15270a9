"""JAX's compilation cache is not used for a mesh of CPUs."""

import warnings

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import keras_ring
from tests.language_model import batch, language_model

SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_enable_compilation_cache": True,
}


@pytest.fixture
def cache(tmp_path):
    """A folder that JAX caches programs in."""
    settings = SETTINGS | {"jax_compilation_cache_dir": str(tmp_path)}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def entries(folder):
    return {path.name for path in folder.iterdir()}


def compile_something(factor):
    # A constant of its own: nothing in this process has compiled it.
    jax.jit(lambda x: x * factor)(np.ones(3, "float32"))


def test_no_program_of_a_mesh_is_cached(cache):
    compile_something(1.25)
    before = entries(cache)
    assert before
    scope = keras_ring.DistributedStrategy(sequence_parallel=2).scope()
    with pytest.warns(RuntimeWarning, match="cache is turned off"):
        scope.__enter__()
    try:
        model = language_model("ring", optimizer="sgd")
        model.train_on_batch(*batch(2, 8))
    finally:
        scope.__exit__(None, None, None)
    # Also what runs after the scope, on the same devices.
    model.predict_on_batch(batch(2, 8)[0])
    assert entries(cache) == before


def test_a_cache_that_is_set_in_the_scope(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with keras_ring.DistributedStrategy(sequence_parallel=2).scope():
            model = language_model("ring", optimizer="sgd")
            jax.config.update("jax_enable_compilation_cache", True)
            compilation_cache.reset_cache()
            model.train_on_batch(*batch(2, 8))
    assert not any("train_step" in name for name in entries(cache))


def test_one_device_keeps_it(cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with keras_ring.DistributedStrategy(
            sequence_parallel=1, devices=["cpu:0"]
        ).scope():
            compile_something(1.375)
    assert entries(cache)
