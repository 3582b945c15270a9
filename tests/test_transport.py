"""The laws of transports, on real devices of each backend: see
`keras_ring.distribution.transport`."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring import backends
from keras_ring.distribution import strategy
from keras_ring.distribution.transport import LocalTransport, check_permutation
from tests import worlds

SIZES = [size for size in (1, 2, 3, 4, 8) if size <= worlds.DEVICES]
DTYPES = ["float32", "bfloat16", "int32"]


def on_ring(size, function, *tensors):
    """`function(transport, *shards)` on every member of one ring; the
    results joined along axis 1."""
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)

    def body(*shards):
        return strategy.current().per_shard(function, list(shards))

    return np.asarray(
        ops.convert_to_numpy(ops.cast(ring.run(body, *tensors), "float32"))
    )


def chunks_of(size):
    """(1, 2 * size, 3): chunk i holds values that no other chunk holds."""
    return np.arange(6 * size, dtype="float32").reshape(1, 2 * size, 3)


def moved(array, size, targets):
    """The chunks of `array` with chunk i at place `targets[i]`."""
    chunks = np.split(array, size, axis=1)
    result = [None] * size
    for chunk, target in zip(chunks, targets, strict=True):
        result[target] = chunk
    return np.concatenate(result, axis=1)


def check_shift(size, by, times, dtype):
    array = chunks_of(size)

    def shift(transport, shard):
        shard = ops.cast(shard, dtype)
        for _ in range(times):
            (shard,) = transport.shift([shard], by)
            assert keras.backend.standardize_dtype(shard.dtype) == dtype
        return shard

    result = on_ring(size, shift, array)
    targets = [(i + by * times) % size for i in range(size)]
    np.testing.assert_array_equal(result, moved(array, size, targets))


@pytest.mark.mostly(size=3, every=3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_size_shifts_are_the_identity(on_devices, size, dtype):
    on_devices(size, check_shift, size, 1, size, dtype)


@pytest.mark.mostly(size=3, every=3)
@pytest.mark.parametrize("by", [1, -1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_shift_moves_to_index_plus_by(on_devices, size, by):
    on_devices(size, check_shift, size, by, 1, "float32")


def check_there_and_back(size):
    array = chunks_of(size)

    def body(transport, shard):
        return transport.shift(transport.shift([shard], 1), -1)[0]

    np.testing.assert_array_equal(on_ring(size, body, array), array)


@pytest.mark.parametrize("size", SIZES)
def test_shift_back_undoes_shift(on_devices, size):
    on_devices(size, check_there_and_back, size)


def check_structure(size):
    """Tensors of several shapes and dtypes in one shift keep their places."""
    array = chunks_of(size)

    def body(transport, shard):
        ids = ops.cast(shard[:, :, 0], "int32")
        pending = transport.start_shift([shard, ids, shard[:, :, :2] * 2.0])
        first, second, third = pending.wait()
        assert tuple(first.shape) == (1, 2, 3)
        assert tuple(second.shape) == (1, 2)
        assert keras.backend.standardize_dtype(second.dtype) == "int32"
        return ops.concatenate(
            [first, ops.cast(second, "float32")[:, :, None], third], axis=2
        )

    result = on_ring(size, body, array)
    shifted = moved(array, size, [(i + 1) % size for i in range(size)])
    expected = np.concatenate(
        [shifted, shifted[:, :, :1], shifted[:, :, :2] * 2], axis=2
    )
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("size", SIZES)
def test_shift_keeps_the_structure(on_devices, size):
    on_devices(size, check_structure, size)


def check_exchange(size):
    array = chunks_of(size)
    permutation = list(np.random.default_rng(size).permutation(size))

    def body(transport, shard):
        return transport.exchange([shard], [int(p) for p in permutation])[0]

    np.testing.assert_array_equal(
        on_ring(size, body, array), moved(array, size, permutation)
    )


@pytest.mark.parametrize("size", SIZES)
def test_exchange_permutes_the_chunks(on_devices, size):
    on_devices(size, check_exchange, size)


def check_collectives(size):
    array = chunks_of(size)
    chunks = np.split(array, size, axis=1)

    def gather(transport, shard):
        everything = transport.all_gather(shard, axis=1)
        weights = ops.arange(1, 2 * size + 1, dtype="float32")[None, :, None]
        # Every member must hold all chunks in order: a weighted sum tells.
        return shard * 0 + ops.sum(everything * weights, axis=1, keepdims=True)

    weights = np.arange(1, 2 * size + 1, dtype="float32")[None, :, None]
    whole = np.sum(array * weights, axis=1, keepdims=True)
    np.testing.assert_array_equal(
        on_ring(size, gather, array), np.broadcast_to(whole, array.shape)
    )

    def total(transport, shard):
        return transport.sum(shard)

    np.testing.assert_array_equal(
        on_ring(size, total, array), np.tile(sum(chunks), (1, size, 1))
    )

    wide = np.arange(2 * size * size, dtype="float32")
    wide = wide.reshape(1, 2 * size, size)

    def swap(transport, shard):
        swapped = transport.all_to_all(shard, split_axis=2, concat_axis=1)
        assert tuple(swapped.shape) == (1, 2 * size, 1)
        # Member i holds feature i of the whole sequence: its own number
        # is in every value, and the way back restores the chunk.
        back = transport.all_to_all(swapped, split_axis=1, concat_axis=2)
        return ops.concatenate(
            [back, shard * 0 + ops.mean(swapped, axis=1, keepdims=True)], 2
        )

    result = on_ring(size, swap, wide)
    np.testing.assert_array_equal(result[:, :, :size], wide)
    means = np.repeat(wide.mean(axis=1)[0], 2)
    np.testing.assert_allclose(result[0, :, size], means, rtol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_gather_sum_and_all_to_all(on_devices, size):
    on_devices(size, check_collectives, size)


def check_index(size):
    def body(transport, shard):
        index = ops.cast(ops.convert_to_tensor(transport.index()), "float32")
        assert transport.size == size
        return shard * 0 + index

    result = on_ring(size, body, np.zeros((1, size), "float32"))
    np.testing.assert_array_equal(result[0], np.arange(size))


@pytest.mark.parametrize("size", SIZES)
def test_every_member_knows_its_index(on_devices, size):
    on_devices(size, check_index, size)


def check_rings_of_a_mesh():
    """On a 2 x 2 mesh each data group is a ring of its own."""
    mesh = keras_ring.DistributedStrategy(data_parallel=2, sequence_parallel=2)
    array = np.arange(8, dtype="float32").reshape(2, 4)

    def body(shards):
        return strategy.current().per_shard(
            lambda transport, shard: transport.shift([shard])[0], [shards]
        )

    result = ops.convert_to_numpy(mesh.run(body, array))
    np.testing.assert_array_equal(result, array[:, [2, 3, 0, 1]])


def test_rings_of_a_mesh_are_separate(on_devices):
    on_devices(4, check_rings_of_a_mesh)


def check_bad_permutation():
    def body(transport, shard):
        return transport.exchange([shard], [0, 0])[0]

    with pytest.raises(ValueError, match="every index from 0 to 1"):
        on_ring(2, body, np.zeros((1, 2), "float32"))


def test_a_wrong_permutation_is_refused(on_devices):
    on_devices(2, check_bad_permutation)


def test_a_ring_of_one_moves_nothing():
    local = LocalTransport()
    tensor = ops.ones((2, 3))
    assert local.index() == 0
    assert local.shift([tensor])[0] is tensor
    assert local.exchange([tensor], [0])[0] is tensor
    assert local.all_gather(tensor, 1) is tensor
    assert local.all_to_all(tensor, 0, 1) is tensor
    assert local.sum(tensor) is tensor
    with pytest.raises(ValueError, match="exactly once"):
        check_permutation([1], 1)


def test_the_backend_is_the_one_keras_runs_on():
    assert backends.load().name == keras.backend.backend()
