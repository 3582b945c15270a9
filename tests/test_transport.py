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


def check_groups(size, inner):
    """Each of the two parts of a ring that is split is one of its own."""
    array = chunks_of(size)
    chunks = np.split(array, size, axis=1)
    places = np.arange(size).reshape(-1, inner)

    def body(transport, shard):
        results = []
        for part in transport.split(inner):
            (shifted,) = part.shift([shard])
            gathered = part.all_gather(shard, 1)
            weights = 1.0 + ops.arange(gathered.shape[1], dtype="float32")
            total = ops.sum(gathered * weights[None, :, None], 1, keepdims=True)
            wide = ops.tile(shard, (1, 1, part.size))
            (swapped,) = part.all_to_alls([wide], 2, 1)
            back = part.all_to_all(swapped, 1, 2)
            ok = ops.cast(ops.all(back == wide), "float32")
            index = ops.cast(ops.convert_to_tensor(part.index()), "float32")
            total = total + 0 * shard
            results += [shifted, total, part.sum(shard)]
            results += [shard * 0 + index, shard * 0 + ok]
        return ops.concatenate(results, axis=2)

    found = np.split(on_ring(size, body, array), 10, axis=2)
    for groups, own in ((places, found[:5]), (places.T, found[5:])):
        wanted = [[None] * size for _ in range(4)]
        for group in groups:
            whole = np.concatenate([chunks[i] for i in group], 1)
            weights = 1 + np.arange(whole.shape[1])[None, :, None]
            for place, member in enumerate(group):
                wanted[0][member] = chunks[group[place - 1]]
                wanted[1][member] = np.repeat(
                    np.sum(whole * weights, 1, keepdims=True), 2, 1
                )
                wanted[2][member] = sum(chunks[i] for i in group)
                wanted[3][member] = np.full_like(chunks[0], place)
        for have, want in zip(own, wanted, strict=False):
            np.testing.assert_array_equal(have, np.concatenate(want, 1))
        assert (own[4] == 1).all()


@pytest.mark.parametrize(
    ("size", "inner"),
    [(s, i) for s, i in ((4, 2), (8, 2), (8, 4)) if s <= worlds.DEVICES],
)
def test_groups_of_a_ring_are_rings(on_devices, size, inner):
    on_devices(size, check_groups, size, inner)


def test_groups_that_a_ring_has_not_are_refused():
    with pytest.raises(ValueError, match="groups of 3 in a ring of 1"):
        LocalTransport().split(3)


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
