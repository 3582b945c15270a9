"""`BlockwiseFeedForward` equals the stock Dense layers it is made of."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring.layers import BlockwiseFeedForward
from tests import worlds
from tests.attention_layers import call, normal
from tests.gradients import vjp

BATCH, LENGTH, WIDTH, HIDDEN = 2, 12, 6, 20
RINGS = [size for size in (2, 4) if size <= worlds.DEVICES]
CASES = {
    "plain": {},
    "relu-no-bias": {"activation": "relu", "use_bias": False},
    "swiglu": {"activation": "silu", "gated": True},
}
# Both sides sum some twenty products of order one in float32, in another
# order.
TOLERANCE = 2e-5


def filled(layer, *shapes):
    """With weights of order one half, biases included."""
    layer.build(*shapes)
    layer.set_weights(
        [normal(70 + i, *w.shape) / 2 for i, w in enumerate(layer.weights)]
    )
    return layer


class Stock(keras.layers.Layer):
    """The same, of Dense layers."""

    def __init__(self, activation="gelu", gated=False, use_bias=True):
        super().__init__()
        self.parts = [
            keras.layers.Dense(HIDDEN, use_bias=use_bias)
            for _ in range(1 + gated)
        ]
        self.down = keras.layers.Dense(WIDTH, use_bias=use_bias)
        self.activation = keras.activations.get(activation)

    def build(self, shape):
        for part in self.parts:
            part.build(shape)
        self.down.build((*shape[:-1], HIDDEN))

    def call(self, inputs):
        hidden = self.activation(self.parts[0](inputs))
        if len(self.parts) > 1:
            hidden = hidden * self.parts[1](inputs)
        return self.down(hidden)


def gradients(layer, x, cotangent):
    weights = [v.value for v in layer.trainable_variables]
    return vjp(
        lambda x, *weights: call(layer, [x], list(weights), {}),
        [x, *weights],
        cotangent,
    )


def close(have, want, name=""):
    np.testing.assert_allclose(
        ops.convert_to_numpy(have),
        ops.convert_to_numpy(want),
        rtol=TOLERANCE,
        atol=TOLERANCE,
        err_msg=name,
    )


@pytest.mark.dealt
@pytest.mark.mostly(chunk_size=5, every=2)
@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
@pytest.mark.parametrize("name", CASES)
def test_it_equals_dense_layers(name, chunk_size):
    x, cotangent = (normal(i, BATCH, LENGTH, WIDTH) for i in range(2))
    stock = filled(Stock(**CASES[name]), x.shape)
    layer = filled(
        BlockwiseFeedForward(HIDDEN, chunk_size=chunk_size, **CASES[name]),
        x.shape,
    )
    assert [w.shape for w in layer.weights] == [w.shape for w in stock.weights]
    want, want_grads = gradients(stock, x, cotangent)
    have, have_grads = gradients(layer, x, cotangent)
    close(have, want)
    for ours, theirs, weight in zip(
        have_grads, want_grads, [None, *layer.weights], strict=True
    ):
        close(ours, theirs, "input" if weight is None else weight.path)


def train(layer, **options):
    """Some steps of plain gradient descent, and what comes of them."""
    inputs = keras.Input((None, WIDTH))
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.05), "mse", **options)
    for i, weight in enumerate(model.trainable_variables):
        weight.assign(normal(70 + i, *weight.shape) / 2)
    x, y = (normal(i, 2 * BATCH, LENGTH, WIDTH) for i in (3, 4))
    history = model.fit(
        x, y, batch_size=BATCH, epochs=2, verbose=0, shuffle=False
    )
    predicted = model.predict(x, batch_size=BATCH, verbose=0)
    weights = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    return [history.history["loss"], predicted, *weights]


def check_training(size, name):
    want = train(Stock(**CASES[name]))
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)
    with ring.scope():
        have = train(BlockwiseFeedForward(HIDDEN, chunk_size=4, **CASES[name]))
    for ours, theirs in zip(have, want, strict=True):
        close(ours, theirs)


@pytest.mark.mostly(size=4, every=2)
@pytest.mark.parametrize("size", RINGS)
@pytest.mark.parametrize("name", ["plain", "swiglu"])
def test_training_on_a_ring_equals_one_device(on_devices, size, name):
    on_devices(size, check_training, size, name)


def check_dropout(mesh):
    """The same for every mesh and chunk, and other than without."""
    options = {"dropout": 0.4, "seed": 5}
    plain = train(BlockwiseFeedForward(HIDDEN))
    want = train(BlockwiseFeedForward(HIDDEN, **options))
    ring = keras_ring.DistributedStrategy(
        data_parallel=mesh[0], sequence_parallel=mesh[1]
    )
    with ring.scope():
        have = train(BlockwiseFeedForward(HIDDEN, chunk_size=4, **options))
    for ours, theirs in zip(have, want, strict=True):
        close(ours, theirs)
    assert abs(want[-1] - plain[-1]).max() > 1e-3


def test_dropout_does_not_depend_on_mesh_and_chunks(on_devices):
    # Four replicas take TensorFlow long.
    mesh = (1, 2) if keras.backend.backend() == "tensorflow" else (2, 2)
    on_devices(mesh[0] * mesh[1], check_dropout, mesh)
