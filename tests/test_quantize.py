"""`model.quantize` of the package's layers: what the stock layers give that
are quantized alike, on one device and around a ring."""

import keras
import numpy as np
import pytest

import keras_ring
from tests.thinning import extra_on

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH, LENGTH = 8, 12


def features(seed=0):
    draw = np.random.default_rng(seed)
    return draw.standard_normal((2, LENGTH, WIDTH)).astype("float32")


def stock():
    """Attention and a gated feed-forward of Keras' own layers."""
    x = inputs = keras.Input((None, WIDTH))
    x = x + keras.layers.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True)
    gate = keras.layers.Dense(16, activation="silu")(x)
    hidden = gate * keras.layers.Dense(16)(x)
    return keras.Model(inputs, x + keras.layers.Dense(WIDTH)(hidden))


def ours(of, chunk_size=4):
    """The same of the package's layers, with the weights of a stock model."""
    x = inputs = keras.Input((None, WIDTH))
    x = x + keras_ring.layers.RingAttention(2, 4, causal=True)(x)
    x = x + keras_ring.layers.BlockwiseFeedForward(
        16, "silu", gated=True, chunk_size=chunk_size
    )(x)
    model = keras.Model(inputs, x)
    model.set_weights(of.get_weights())
    return model


def close(have, want):
    """Rounded activations may fall to the other side here and there."""
    error = np.abs(np.asarray(have) - np.asarray(want))
    scale = np.abs(np.asarray(want)).max()
    assert error.max() < 0.05 * scale
    assert np.mean(error > 1e-5 * scale) < 0.05


def run(model):
    return model.predict(features(), verbose=0)


@pytest.mark.dealt
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_it_is_that_of_the_stock_layers(mode):
    keras.utils.set_random_seed(0)
    theirs = stock()
    mine = ours(theirs)
    before = run(mine)
    for model in (theirs, mine):
        model.quantize(mode)
    _, attention, feed_forward = mine.layers
    for layer in (attention.query_dense, feed_forward.down):
        assert layer.quantization_mode == mode
    found = run(mine)
    close(found, run(theirs))
    # It is another computation than before, and not a far one.
    error = np.abs(found - before).max()
    assert 1e-4 < error < 0.5 * np.abs(before).max()


def test_some_projections_alone():
    keras.utils.set_random_seed(1)
    theirs = stock()
    mine = ours(theirs)
    theirs.layers[-1].quantize("int8")
    mine.quantize("int8", filters=lambda layer: layer.name == "down")
    assert mine.layers[-1].up.quantization_mode is None
    close(run(mine), run(theirs))


def block_model(remat):
    inputs = keras.Input((None, WIDTH))
    x = keras_ring.layers.RingTransformerBlock(
        2, 16, causal=True, rotary=True, remat=remat, dropout=0.2, seed=3
    )(inputs)
    model = keras.Model(inputs, x)
    model.compile("sgd", "mse")
    return model


def check_ring(size, remat, values, want, loss):
    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        model = block_model(remat)
        model.set_weights(values)
        model.quantize("int8")
        close(model.predict(features(), verbose=0), want)
        # What is not quantized still learns.
        found = model.train_on_batch(features(), features(1))
    np.testing.assert_allclose(found, loss, rtol=1e-2)


# To trace a block that is computed again takes TensorFlow long.
@pytest.mark.parametrize(
    "remat",
    [
        pytest.param("feed_forward", marks=extra_on("jax", "torch")),
        pytest.param("block", marks=extra_on("tensorflow")),
    ],
)
def test_around_a_ring_it_is_that_of_one_device(on_devices, remat):
    keras.utils.set_random_seed(2)
    model = block_model(remat)
    values = model.get_weights()
    model.quantize("int8")
    want = model.predict(features(), verbose=0)
    before = [np.array(weight) for weight in model.trainable_weights]
    loss = model.train_on_batch(features(), features(1))
    assert np.isfinite(loss)
    assert all(
        np.abs(np.asarray(weight) - old).max() > 0
        for weight, old in zip(model.trainable_weights, before, strict=True)
        if "key/bias" not in weight.path  # It has no gradient but rounding.
    )
    on_devices(2, check_ring, 2, remat, values, want, float(loss))


def check_float8(values, want, losses):
    strategy = keras_ring.DistributedStrategy(sequence_parallel=2)
    with strategy.scope():
        model = block_model("feed_forward")
        model.set_weights(values)
        model.quantize("float8")
        # Two steps: the first one's numbers scale those of the second.
        if strategy.world.layers_see_shards:
            with pytest.raises(ValueError, match=r"float8.*gradient over"):
                model.fit(features(), features(1), verbose=0)
        else:
            for loss in losses:
                found = model.train_on_batch(features(), features(1))
                np.testing.assert_allclose(found, loss, rtol=1e-5)
            return
        close(model.predict(features(), verbose=0), want)


def test_float8_is_trained_where_its_scales_are_right(on_devices):
    keras.utils.set_random_seed(2)
    model = block_model("feed_forward")
    values = model.get_weights()
    model.quantize("float8")
    want = model.predict(features(), verbose=0)
    losses = [
        float(model.train_on_batch(features(), features(1))) for _ in range(2)
    ]
    on_devices(2, check_float8, values, want, losses)
