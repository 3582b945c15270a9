"""What reads some positions of a sequence reads those of the whole."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring as kr
from tests.thinning import extra_on

L = keras.layers
BATCH, WIDTH = 4, 8

# Sums of a few dozen products in another order, over four steps.
TOLERANCE = 2e-5


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


class Reader(L.Layer):
    """A layer of one's own."""

    sequence_parallel_safe = True

    def call(self, x):
        return kr.ops.take_position(x, -2)


def classifier():
    """Reads positions in every way, each a part of the result."""
    tokens = keras.Input((None,), dtype="int32")
    x = L.Embedding(9, WIDTH)(tokens)
    x = kr.layers.RingTransformerBlock(2, 16, causal=True, remat="block")(x)
    read = [
        x[:, 0, :],
        x[:, -1],
        x[..., 2, :],
        x[:, 3, None, 2:6][:, 0],
        ops.take(x, -3, axis=1),
        L.Flatten()(ops.take(x, [0, 6, -1], axis=1)),
        kr.ops.take_position(x, 1),
        Reader()(x),
        ops.cast(tokens[:, 0, None], "float32") / 9.0,
    ]
    pooled = L.Concatenate()(read)
    return keras.Model(tokens, [L.Dense(3)(pooled), L.Dense(2)(x)])


def trained(model, length):
    tokens = np.random.default_rng(1).integers(0, 9, size=(BATCH, length))
    labels = [normal(BATCH, 3, seed=2), normal(BATCH, length, 2, seed=3)]
    model.compile(keras.optimizers.SGD(0.01), "mse")
    losses = [model.train_on_batch(tokens, labels) for _ in range(2)]
    return [
        np.float64(losses),
        *model.predict(tokens, verbose=0),
        *model.get_weights(),
    ]


def run(size, length):
    """How far a ring is from one device, the model reloaded as well."""
    keras.utils.set_random_seed(0)
    alone = classifier()
    strategy = kr.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        model = keras.Model.from_config(
            classifier().get_config(), custom_objects={"Reader": Reader}
        )
        model.set_weights(alone.get_weights())
        found = trained(model, length)
    wanted = trained(alone, length)
    return {
        i: float(np.abs(one - two).max())
        for i, (one, two) in enumerate(zip(found, wanted, strict=True))
    }


# The ring cannot split 7.
@pytest.mark.parametrize(
    "length", [7, pytest.param(12, marks=extra_on("jax", "tensorflow"))]
)
def test_training_is_that_of_one_device(on_devices, length):
    errors = on_devices(2, run, 2, length)
    wrong = {n: e for n, e in errors.items() if not e <= TOLERANCE}
    assert not wrong, wrong


def test_positions_without_a_strategy():
    x = normal(2, 5, 3)
    take = kr.ops.take_position
    for index in (0, -1, [1, -2]):
        have = ops.convert_to_numpy(take(x, index))
        np.testing.assert_array_equal(have, x[:, index])
    symbol = take(keras.Input((None, 3)), [1, -2])
    assert tuple(symbol.shape) == (None, 2, 3)
    for index in (1.0, [], [[0]], slice(0, 2)):
        with pytest.raises(ValueError, match="Received: index="):
            take(x, index)
    with pytest.raises(ValueError, match="index=-6 for a length of 5"):
        take(x, -6)
    with pytest.raises(ValueError, match=r"tensor.shape=\(5,\)"):
        take(x[0, :, 0], 0)
