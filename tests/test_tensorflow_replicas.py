"""What only TensorFlow has: two ways to move tensors, eager steps, sizes
that are known at run time only, and losses that replicas cannot share."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_ring
from keras_ring import masks
from keras_ring.distribution import strategy
from tests import reference
from tests.language_model import batch, initial_weights, language_model


def ring_of(size, placed=True, **options):
    ring = keras_ring.DistributedStrategy(sequence_parallel=size, **options)
    ring.world.placed = placed
    return ring


def shift(shard):
    return strategy.current().per_shard(
        lambda transport, s: transport.shift([s])[0], [shard]
    )


@pytest.mark.pairwise
@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "int32", "float16", "bfloat16", "float64"]
)
@pytest.mark.parametrize("placed", [True, False], ids=["placed", "broadcast"])
@pytest.mark.parametrize("size", [2, 3])
def test_both_ways_keep_every_dtype(size, placed, dtype):
    array = np.arange(2 * size).reshape(1, 2 * size) % 5
    result = ring_of(size, placed).run(
        lambda s: tf.cast(shift(tf.cast(s, dtype)), tf.float64), array
    )
    want = np.roll(array.astype(bool) if dtype == "bool" else array, 2, axis=1)
    np.testing.assert_array_equal(result, want.astype("float64"))


@pytest.mark.parametrize("placed", [True, False], ids=["placed", "broadcast"])
def test_sizes_known_at_run_time_only(placed):
    """One program, several sizes: each is its own meeting of the replicas."""
    world = ring_of(2, placed).world
    lengths = []

    @tf.function(input_signature=[tf.TensorSpec((None, None), tf.float32)])
    def program(array):
        def on_replica():
            index = strategy.current().ring().index()
            return shift(array + float(index))

        results = world.tf_strategy.run(on_replica)
        lengths.append(array.shape[1])
        return world.tf_strategy.experimental_local_results(results)

    for length in (4, 6, 4):
        first, second = program(np.zeros((1, length), "float32"))
        np.testing.assert_array_equal(first, np.ones((1, length)))
        np.testing.assert_array_equal(second, np.zeros((1, length)))
    assert lengths == [None]


def test_eager_replicas_move_by_placed_copies():
    world = ring_of(3).world

    def on_replica():
        index = strategy.current().ring().index()
        return shift(tf.fill((1, 2), float(index)))

    results = world.tf_strategy.run(on_replica)
    values = world.tf_strategy.experimental_local_results(results)
    assert [float(v[0, 0]) for v in values] == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("placed", [True, False], ids=["placed", "broadcast"])
def test_a_movement_has_the_transposed_movement_as_gradient(placed):
    array = np.arange(6, dtype="float32").reshape(1, 6)

    def gradient(shard, weight):
        with tf.GradientTape() as tape:
            tape.watch(shard)
            moved = shift(shard)
        return tape.gradient(moved, shard, weight)

    result = ring_of(3, placed).run(gradient, array * 0, array)
    np.testing.assert_array_equal(result, np.roll(array, -2, axis=1))


@pytest.mark.parametrize("placed", [True, False], ids=["placed", "broadcast"])
def test_members_that_keep_their_tensor_meet_the_others_later(placed):
    """The first halves of four chunks: the first of them stays at home."""

    def moves(shard):
        transport = strategy.current().ring()
        (moved,) = transport.exchange([shard], [0, 2, 3, 1])
        return moved, transport.shift([shard[:, :1]])[0]

    array = np.arange(8, dtype="float32").reshape(1, 8)
    moved, shifted = ring_of(4, placed, timeout=20).run(moves, array)
    np.testing.assert_array_equal(moved, [[0, 1, 6, 7, 2, 3, 4, 5]])
    np.testing.assert_array_equal(shifted, [[6, 0, 2, 4]])


def test_a_nested_function_is_refused():
    """One that is given itself is the program of all replicas."""
    nested, array = tf.function(shift), np.arange(4, dtype="float32")[None]
    ring = ring_of(2)
    with pytest.raises(NotImplementedError, match="nested in the step"):
        ring.run(lambda shard: nested(shard), array)
    np.testing.assert_array_equal(ring.run(nested, array), [[2, 3, 0, 1]])


def test_attention_with_unknown_sizes():
    """Tiles of a length that the program does not know, ragged at the end."""
    draw = np.random.default_rng(0)
    query, key, value, grad = (
        draw.normal(size=(2, 300, 2, 8)) for _ in range(4)
    )
    spec = tf.TensorSpec((None, None, 2, 8), tf.float64)

    @tf.function(input_signature=[spec] * 4)
    def program(query, key, value, grad):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            out = keras_ring.ops.ring_attention(
                query, key, value, mask=masks.Causal()
            )
        return out, *tape.gradient(out, [query, key, value], grad)

    want = reference.attention(
        query, key, value, grad, allowed=reference.causal(300, 300)
    )
    # Float64 sums over at most 300 keys.
    for got, name in zip(
        program(query, key, value, grad),
        ("out", "grad_query", "grad_key", "grad_value"),
        strict=True,
    ):
        np.testing.assert_allclose(
            got, getattr(want, name), atol=1e-12, err_msg=name
        )


def test_an_eager_step_equals_a_compiled_one():
    data = batch(4, 8)
    losses = []
    for eager in (False, True):
        with ring_of(2).scope():
            model = language_model("ring")
            model.set_weights(initial_weights(model))
            model.compile(
                "sgd",
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                run_eagerly=eager,
            )
            losses.append([model.train_on_batch(*data[:2]) for _ in range(2)])
    # Only fused kernels of the compiled program round differently.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_what_replicas_cannot_share_is_refused():
    data = batch(4, 8)

    def refused(match, error=NotImplementedError, **options):
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, **options.pop("loss", {})
        )
        model.compile("sgd", loss, **options)
        with pytest.raises(error, match=match):
            model.fit(*data[:2], verbose=0)

    with ring_of(2).scope():
        model = language_model("ring")
        refused("reduction='none'", loss={"reduction": "none"})
        refused("jit_compile=True", ValueError, jit_compile=True)


def test_unknown_devices_are_refused():
    with pytest.raises(ValueError, match="cpu:9"):
        keras_ring.DistributedStrategy(devices=("CPU:0", "CPU:9")).world  # noqa: B018


def test_a_strategy_within_another_is_refused():
    with (
        tf.distribute.MirroredStrategy(["CPU:0"]).scope(),
        pytest.raises(ValueError, match="Only one distribution"),
        ring_of(2).scope(),
    ):
        pass


def test_a_failed_eager_step_leaves_the_seeds():
    """The generators stand as they did, on the replicas that shift theirs."""

    def failing(targets, predictions):
        world = strategy.current()
        if world and world.inside() and world.own_rank() == 1:
            raise ArithmeticError
        return targets - predictions

    failing.sequence_parallel_safe = True
    ring = ring_of(2)
    with ring.scope():
        inputs = keras.Input((None, 4))
        model = keras.Model(inputs, keras.layers.Dropout(0.5, seed=2)(inputs))
        model.compile("sgd", failing, run_eagerly=True)
        zeros = np.zeros((1, 4, 4), "float32")
        with pytest.raises(ArithmeticError):
            model.train_on_batch(zeros, zeros)
    (state,) = (v for v in model.variables if v.name == "seed_generator_state")
    values = ring.world.tf_strategy.experimental_local_results(state.value)
    assert [int(value[0]) for value in values] == [2, 2]


def test_a_function_may_return_other_things_for_other_shapes():
    @tf.function
    def program(shard):
        if shard.shape[1] == 2:
            return {"doubled": shard * 2}
        return shard, shard + 1

    ring = ring_of(2)
    for length in (4, 6, 4):
        array = np.arange(length, dtype="float32")[None]
        result = ring.run(program, array)
        if length == 4:
            np.testing.assert_array_equal(result["doubled"], array * 2)
        else:
            np.testing.assert_array_equal(result[0], array)
            np.testing.assert_array_equal(result[1], array + 1)
