"""`DistributedStrategy`: what it refuses, and what it does by itself."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring.distribution import strategy as strategy_module

REFUSED = {
    "zero": ({"sequence_parallel": 0}, "positive integer"),
    "float": ({"sequence_parallel": 2.0}, "sequence_parallel=2.0"),
    "bool": ({"data_parallel": True}, "data_parallel=True"),
    "all-data": ({"data_parallel": -1}, "data_parallel=-1"),
    "device-name": ({"devices": "cpu:0"}, "devices='cpu:0'"),
    "device-type": ({"devices": [0, 1]}, "device names"),
    "timeout": ({"timeout": 0}, "timeout=0"),
    "endless": ({"timeout": float("inf")}, "timeout=inf"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_refused(name):
    arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        keras_ring.DistributedStrategy(**arguments)


def test_too_few_devices_are_those_of_a_backend():
    """With that backend's own way to more of them."""
    backend = keras.backend.backend()
    more = {
        "jax": "xla_force_host_platform_device_count=N",
        "tensorflow": "set_logical_device_configuration",
        "torch": "torchrun --nproc-per-node N",
    }[backend]
    strategy = keras_ring.DistributedStrategy(sequence_parallel=64)
    found = rf"Received: 1 device on the backend '{backend}'\..*{more}"
    with pytest.raises(ValueError, match=found):
        strategy.mesh_shape(1)


def test_devices_share_heads_on_jax():
    if keras.backend.backend() != "jax":
        with pytest.raises(NotImplementedError, match="model_parallel=2 on"):
            keras_ring.DistributedStrategy(model_parallel=2)
        return
    strategy = keras_ring.DistributedStrategy(model_parallel=2, data_parallel=2)
    assert strategy.mesh(8).shape == (2, 2, 2)
    with pytest.raises(ValueError, match="data_parallel=2, model_parallel=2"):
        strategy.mesh(6)


def test_tensorflow_shards_nothing():
    if keras.backend.backend() == "tensorflow":
        with pytest.raises(NotImplementedError, match="shard='optimizer'"):
            keras_ring.DistributedStrategy(shard="optimizer")
    strategy = keras_ring.DistributedStrategy(shard="none")
    assert strategy.shard == "none"
    with pytest.raises(ValueError, match="shard='zero'"):
        keras_ring.DistributedStrategy(shard="zero")


def test_it_is_frozen():
    strategy = keras_ring.DistributedStrategy(sequence_parallel=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.sequence_parallel = 4


def test_the_mesh_takes_the_devices_that_are_left():
    strategy = keras_ring.DistributedStrategy(data_parallel=2)
    assert strategy.mesh_shape(8) == (2, 4)
    with pytest.raises(ValueError, match="data_parallel=2 with 7 devices"):
        strategy.mesh_shape(7)
    strategy = keras_ring.DistributedStrategy(3, 2)
    with pytest.raises(ValueError, match="= 6 devices"):
        strategy.mesh_shape(4)


def check_run():
    strategy = keras_ring.DistributedStrategy(
        data_parallel=2, sequence_parallel=2
    )
    array = np.arange(48, dtype="float32").reshape(4, 6, 2)
    rows = np.arange(4, dtype="float32")
    factor = np.float32(3.0)

    def function(array, rows, factor):
        assert strategy_module.current() is strategy.world
        return {
            "scaled": array * factor,
            "rows": rows + 1.0,
            "mean": ops.mean(array),
            "pair": (array[:, :, 0], array[:, :, 1]),
        }

    result = strategy.run(function, array, rows, factor)
    result = keras.tree.map_structure(ops.convert_to_numpy, result)
    np.testing.assert_array_equal(result["scaled"], array * 3)
    np.testing.assert_array_equal(result["rows"], rows + 1)
    np.testing.assert_allclose(result["mean"], array.mean(), rtol=1e-6)
    np.testing.assert_array_equal(result["pair"][0], array[:, :, 0])
    np.testing.assert_array_equal(result["pair"][1], array[:, :, 1])
    assert strategy_module.current() is None
    # What the mesh cannot split comes back as it went in.
    odd = np.arange(15.0, dtype="float32").reshape(3, 5)
    np.testing.assert_array_equal(strategy.run(lambda t: t * 1, odd), odd)


def test_run_takes_and_gives_global_tensors(on_devices):
    on_devices(4, check_run)


def check_scope():
    strategy = keras_ring.DistributedStrategy(sequence_parallel=2)
    other = keras_ring.DistributedStrategy(sequence_parallel=2)
    with strategy.scope():
        assert strategy_module.current() is strategy.world
        with strategy.scope():
            assert strategy_module.current() is strategy.world
        assert strategy_module.current() is strategy.world
        with pytest.raises(ValueError, match="Only one"), other.scope():
            pass
        assert strategy_module.current() is strategy.world
    assert strategy_module.current() is None


def test_scopes_nest_only_in_themselves(on_devices):
    on_devices(2, check_scope)


def check_devices():
    names = ("cpu:0", "cpu:1")
    if keras.backend.backend() != "torch":  # There every process has a name.
        names = ("cpu:3", "cpu:1")
    strategy = keras_ring.DistributedStrategy(devices=list(names))
    assert strategy.world.devices == names
    assert strategy.world.sequence_size == 2
    array = np.arange(4.0, dtype="float32").reshape(1, 4)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(strategy.run(lambda t: t + 1.0, array)), array + 1
    )
    wrong = keras_ring.DistributedStrategy(devices=("warp:0", "warp:1"))
    with pytest.raises(ValueError, match="warp:"):
        wrong.world  # noqa: B018


def test_devices_are_named_in_mesh_order(on_devices):
    on_devices(2, check_devices)


def check_summary():
    lines = []
    keras_ring.DistributedStrategy(1, 2).summary(print_fn=lines.append)
    text = "\n".join(lines)
    assert keras.backend.backend() in text
    assert "data parallel      2" in text
    assert "sequence parallel  1" in text
    assert "kernel             " in text
    assert "ring 1" in text


def test_summary_names_mesh_and_kernel(on_devices):
    on_devices(2, check_summary)
