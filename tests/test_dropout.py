"""Dropout that is the same however the work is spread, and dropout that
must not be."""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring import random_bits
from tests import worlds

MESHES = [
    mesh
    for mesh in ((1, 2), (1, 3), (2, 2), (1, 8))
    if mesh[0] * mesh[1] <= worlds.DEVICES
]
LENGTH, WIDTH = 12, 8


def keep(seed, coordinates, rate):
    """`random_bits.keep` from its documentation, in NumPy's uint32."""

    def mix(x):
        x = x ^ (x >> np.uint32(16))
        x = x * np.uint32(0x7FEB352D)
        x = x ^ (x >> np.uint32(15))
        x = x * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    seed = np.array(seed, "int32").view("uint32")
    state = mix(seed[:1] ^ mix(seed[1:] ^ np.uint32(0x9E3779B9)))
    for coordinate in coordinates:
        coordinate = np.asarray(coordinate, "int32").view("uint32")
        state = mix(state + coordinate * np.uint32(0x9E3779B1))
    return state.view("int32") >= round(rate * 2**32) - 2**31


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [(0, 0), (-5, 2**31 - 1)])
def test_bits_are_those_of_the_documentation(seed, rate):
    coordinates = np.ix_(range(3), range(-40, 40), range(2**20, 2**20 + 90))
    have = random_bits.keep(
        ops.convert_to_tensor(seed, "int32"),
        [ops.convert_to_tensor(c, "int32") for c in coordinates],
        rate,
    )
    have = ops.convert_to_numpy(have)
    np.testing.assert_array_equal(have, keep(seed, coordinates, rate))
    # 21,600 draws: five standard deviations.
    assert abs(have.mean() - (1 - rate)) <= 5 * (0.25 / have.size) ** 0.5


def test_bits_of_neighbours_have_nothing_in_common():
    coordinates = [
        ops.convert_to_tensor(c, "int32")
        for c in np.ix_(range(400), range(500))
    ]
    seeds = [(1, 0), (1, 1), (2, 0)]
    draws = [
        ops.convert_to_numpy(
            random_bits.keep(
                ops.convert_to_tensor(seed, "int32"), coordinates, 0.5
            )
        ).astype(float)
        for seed in seeds
    ]
    first = draws[0]
    pairs = [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1])]
    pairs += [(first, other) for other in draws[1:]]
    for one, other in pairs:
        correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        # Of 200,000 independent pairs: five standard deviations.
        assert abs(correlation) < 5 / one.size**0.5


def attention_model():
    """Attention with dropout, trained on something."""
    inputs = keras.Input((None, WIDTH))
    layer = keras_ring.layers.RingAttention(
        2, 4, causal=True, dropout=0.4, seed=11
    )
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    draw = np.random.default_rng(3)
    model.set_weights(
        [
            w if w.dtype.kind in "iu" else draw.normal(size=w.shape) / 2
            for w in model.get_weights()
        ]
    )
    return model


def trained(model):
    draw = np.random.default_rng(4)
    x = draw.normal(size=(8, LENGTH, WIDTH)).astype("float32")
    y = draw.normal(size=x.shape).astype("float32")
    history = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    weights = [w for w in model.get_weights() if w.dtype.kind == "f"]
    return history.history["loss"], weights


def check_training_with_dropout(data_size, sequence_size):
    losses, weights = trained(attention_model())
    strategy = keras_ring.DistributedStrategy(sequence_size, data_size)
    with strategy.scope():
        have, have_weights = trained(attention_model())
    # The same entries are dropped, so only rounding differs. With others the
    # losses would differ in their second digit.
    np.testing.assert_allclose(have, losses, rtol=1e-5)
    for one, other in zip(have_weights, weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.mostly(mesh=(2, 2))
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
def test_training_with_dropout_equals_one_device(on_devices, mesh):
    on_devices(mesh[0] * mesh[1], check_training_with_dropout, *mesh)


def test_dropout_changes_from_step_to_step():
    layer = keras_ring.layers.RingAttention(2, 4, dropout=0.4, seed=11)
    x = np.random.default_rng(5).normal(size=(1, LENGTH, WIDTH))
    first, second = (
        ops.convert_to_numpy(layer(x, training=True)) for _ in range(2)
    )
    assert not np.allclose(first, second)


def mean_of_predictions(targets, predictions):
    del targets
    return ops.mean(predictions, axis=-1)


def dropped_in_fit():
    """What stock dropout keeps in one training step, by position.

    The gradient of each position's vector is what came through."""
    inputs = keras.Input((None, WIDTH))
    positions = keras_ring.layers.PositionEmbedding(
        LENGTH, initializer="zeros", name="vectors"
    )
    x = keras.layers.Dropout(0.5, seed=2)(inputs + positions(inputs))
    model = keras.Model(inputs, x)
    model.compile(keras.optimizers.SGD(1.0), mean_of_predictions)
    zeros = np.zeros((1, LENGTH, WIDTH), "float32")
    model.fit(zeros, zeros, epochs=1, verbose=0)
    vectors = model.get_layer("vectors").get_weights()[0]
    return vectors < 0


def check_stock_dropout(size):
    drawn = []
    for _ in range(2):
        strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
        with strategy.scope():
            drawn.append(dropped_in_fit())
    np.testing.assert_array_equal(*drawn)
    shards = np.split(drawn[0], size)
    for shard in shards:
        assert 0 < shard.mean() < 1
    for one, other in zip(shards[1:], shards[:-1], strict=True):
        assert (one != other).any(), "shards share one dropout mask"


@pytest.mark.mostly(size=2)
@pytest.mark.parametrize("size", [2, 4])
def test_hidden_dropout_differs_between_shards(on_devices, size):
    on_devices(size, check_stock_dropout, size)


class Always(keras.layers.Dropout):
    """Dropout in inference, too."""

    sequence_parallel_safe = True

    def call(self, inputs):
        return super().call(inputs, training=True)


def check_drawing_in_predict(size):
    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        inputs = keras.Input((None, WIDTH))
        model = keras.Model(inputs, Always(0.5, seed=2)(inputs))
        predicted = model.predict(np.ones((1, LENGTH, WIDTH)), verbose=0)
    shards = np.split(predicted, size, axis=1)
    for one, other in zip(shards[1:], shards[:-1], strict=True):
        assert (one != other).any(), "shards share one dropout mask"


def test_draws_in_predict_differ_between_shards(on_devices):
    on_devices(2, check_drawing_in_predict, 2)


def scores_in_fit(strategy=None):
    """Weights after training through the scores, with dropout on them."""
    with strategy.scope() if strategy else contextlib.nullcontext():
        inputs = keras.Input((LENGTH, WIDTH))
        layer = keras_ring.layers.RingAttention(2, 4, dropout=0.4, seed=11)
        out, _ = layer(inputs, return_attention_scores=True)
        model = keras.Model(inputs, out)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        draw = np.random.default_rng(3)
        model.set_weights(
            [
                w if w.dtype.kind in "iu" else draw.normal(size=w.shape) / 2
                for w in model.get_weights()
            ]
        )
        return trained(model)


def check_dropout_of_scores():
    losses, weights = scores_in_fit()
    strategy = keras_ring.DistributedStrategy(1, 2)
    have, have_weights = scores_in_fit(strategy)
    # As with `test_training_with_dropout_equals_one_device`.
    np.testing.assert_allclose(have, losses, rtol=1e-5)
    for one, other in zip(have_weights, weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_groups_drop_scores_of_their_own_samples(on_devices):
    on_devices(2, check_dropout_of_scores)
