"""`RingTransformerBlock` equals a block of stock layers."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring.layers import RingAttention, RingTransformerBlock
from tests import worlds
from tests.attention_layers import call, normal
from tests.gradients import vjp
from tests.thinning import extra_on

BATCH, LENGTH, WIDTH, HEADS, HIDDEN = 2, 12, 8, 2, 20
RINGS = [size for size in (2, 4) if size <= worlds.DEVICES]
CASES = {
    "pre-layer": {},
    "pre-rms-gated-causal": {
        "norm": "rms",
        "gated": True,
        "activation": "silu",
        "causal": True,
        "use_bias": False,
    },
    "post-layer-causal": {"norm_placement": "post", "causal": True},
}
# Some twenty products of order one in float32, in another order, through
# two norms that divide by what is left.
TOLERANCE = 5e-5


def close(have, want, name="", tolerance=TOLERANCE):
    np.testing.assert_allclose(
        ops.convert_to_numpy(have),
        ops.convert_to_numpy(want),
        rtol=tolerance,
        atol=tolerance,
        err_msg=name,
    )


def filled(layer, shape):
    """With weights of order one half, seeds left as they are."""
    layer.build(shape)
    for i, weight in enumerate(layer.trainable_variables):
        weight.assign(normal(70 + i, *weight.shape) / 2)
    return layer


class Stock(keras.layers.Layer):
    """The same of stock layers."""

    def __init__(
        self,
        norm="layer",
        norm_placement="pre",
        gated=False,
        activation="gelu",
        causal=False,
        use_bias=True,
    ):
        super().__init__()
        kinds = {
            "layer": keras.layers.LayerNormalization,
            "rms": keras.layers.RMSNormalization,
        }
        self.first, self.second = (kinds[norm](epsilon=1e-6) for _ in "12")
        self.attention = keras.layers.MultiHeadAttention(
            HEADS, WIDTH // HEADS, use_bias=use_bias
        )
        self.parts = [
            keras.layers.Dense(HIDDEN, use_bias=use_bias)
            for _ in range(1 + gated)
        ]
        self.down = keras.layers.Dense(WIDTH, use_bias=use_bias)
        self.activation = keras.activations.get(activation)
        self.causal = causal
        self.before = norm_placement == "pre"

    def build(self, shape):
        self.first.build(shape)
        self.attention.build(shape, shape)
        self.second.build(shape)
        for part in self.parts:
            part.build(shape)
        self.down.build((*shape[:-1], HIDDEN))

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        def attend(x):
            return self.attention(x, x, use_causal_mask=self.causal)

        def feed(x):
            hidden = self.activation(self.parts[0](x))
            if len(self.parts) > 1:
                hidden = hidden * self.parts[1](x)
            return self.down(hidden)

        if self.before:
            x = x + attend(self.first(x))
            return x + feed(self.second(x))
        x = self.first(x + attend(x))
        return self.second(x + feed(x))


def by_role(layer):
    """Trainable weights in one order for both kinds of block."""
    if isinstance(layer, Stock):
        parts = [layer.first, layer.attention, layer.second]
        parts += [*layer.parts, layer.down]
    else:
        feed = layer.feed_forward
        parts = [layer.attention_norm, layer.attention]
        parts += [layer.feed_forward_norm]
        parts += [p for p in (feed.gate, feed.up, feed.down) if p is not None]
    return [v for part in parts for v in part.trainable_variables]


def filled_by_role(layer, shape):
    layer.build(shape)
    for i, weight in enumerate(by_role(layer)):
        weight.assign(normal(70 + i, *weight.shape) / 2 + (weight.ndim == 1))
    return layer


def gradients(layer, x, cotangent):
    """Output, gradient of the input and of the weights by role."""
    weights = [v.value for v in layer.trainable_variables]
    out, (grad, *grads) = vjp(
        lambda x, *weights: call(layer, [x], list(weights), {}),
        [x, *weights],
        cotangent,
    )
    named = {
        id(v): g for v, g in zip(layer.trainable_variables, grads, strict=True)
    }
    return [out, grad, *(named[id(v)] for v in by_role(layer))]


@pytest.mark.dealt
@pytest.mark.parametrize("remat", ["feed_forward", "block"])
@pytest.mark.parametrize("name", CASES)
def test_it_equals_stock_layers(name, remat):
    x, cotangent = (normal(i, BATCH, LENGTH, WIDTH) for i in range(2))
    options = CASES[name]
    want = gradients(filled_by_role(Stock(**options), x.shape), x, cotangent)
    block = RingTransformerBlock(
        HEADS, HIDDEN, remat=remat, chunk_size=5, **options
    )
    have = gradients(filled_by_role(block, x.shape), x, cotangent)
    for ours, theirs in zip(have, want, strict=True):
        close(ours, theirs)


def train(layer, mixed=False):
    inputs = keras.Input((None, WIDTH))
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.02), "mse")
    filled_by_role(layer, (BATCH, LENGTH, WIDTH)) if not layer.built else None
    for i, weight in enumerate(by_role(layer)):
        weight.assign(normal(70 + i, *weight.shape) / 2 + (weight.ndim == 1))
    x, y = (normal(i, 2 * BATCH, LENGTH, WIDTH) for i in (3, 4))
    history = model.fit(
        x, y, batch_size=BATCH, epochs=2, verbose=0, shuffle=False
    )
    predicted = model.predict(x, batch_size=BATCH, verbose=0)
    weights = [ops.convert_to_numpy(v) for v in by_role(layer)]
    return [history.history["loss"], predicted, *weights]


def check_training(size, name, remat):
    want = train(Stock(**CASES[name]))
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)
    with ring.scope():
        have = train(
            RingTransformerBlock(
                HEADS, HIDDEN, remat=remat, chunk_size=4, **CASES[name]
            )
        )
    for ours, theirs in zip(have, want, strict=True):
        close(ours, theirs)


@pytest.mark.mostly(size=2)
@pytest.mark.parametrize("size", RINGS)
@pytest.mark.parametrize(
    ("name", "remat"),
    [("pre-rms-gated-causal", "block"), ("post-layer-causal", "feed_forward")],
)
def test_training_on_a_ring_equals_one_device(on_devices, size, name, remat):
    on_devices(size, check_training, size, name, remat)


COMBINED = {
    "num_key_value_heads": 1,
    "causal": True,
    "sliding_window": 5,
    "soft_cap": 3.0,
    "rotary": True,
    "sinks": True,
    "alibi": (0.25, 0.125),
}


def combined(parts, remat="feed_forward"):
    """Outputs and weights after steps with all options, documents and a
    mask; `parts` has the block's parts in place of the block."""
    inputs = keras.Input((None, WIDTH))
    ids = keras.Input((None,), dtype="int32")
    x = keras.layers.Masking()(inputs)
    if parts:
        first, second = (
            keras.layers.LayerNormalization(epsilon=1e-6) for _ in "12"
        )
        attention = RingAttention(HEADS, WIDTH // HEADS, **COMBINED)
        up = keras.layers.Dense(HIDDEN, activation="gelu")
        down = keras.layers.Dense(WIDTH)
        h = first(x)
        # The sum as a layer, which hands the mask on to the loss.
        x = keras.layers.Add()([x, attention(h, h, segment_ids=ids)])
        x = keras.layers.Add()([x, down(up(second(x)))])
    else:
        block = RingTransformerBlock(
            HEADS, HIDDEN, remat=remat, chunk_size=3, **COMBINED
        )
        x = block(x, segment_ids=ids)
        first, attention = block.attention_norm, block.attention
        second, feed = block.feed_forward_norm, block.feed_forward
        up, down = feed.up, feed.down
    model = keras.Model([inputs, ids], x)
    model.compile(keras.optimizers.SGD(0.02), "mse")
    weights = [
        weight
        for part in (first, attention, second, up, down)
        for weight in part.trainable_variables
    ]
    for i, weight in enumerate(weights):
        value = normal(70 + i, *weight.shape) / 2 + (weight.ndim == 1)
        weight.assign(value)
    x, y = (normal(i, BATCH, 7, WIDTH) for i in (3, 4))
    x[1, 1:3] = 0  # Later positions would see them.
    ids = np.array([[0] * 3 + [1] * 4, [2] * 7], "int32")
    history = model.fit([x, ids], y, batch_size=BATCH, epochs=2, verbose=0)
    predicted = model.predict([x, ids], batch_size=BATCH, verbose=0)
    return [
        history.history["loss"],
        predicted,
        *(ops.convert_to_numpy(weight) for weight in weights),
    ]


def check_combined(mesh, remat):
    want = combined(True)
    data, sequence = mesh
    ring = keras_ring.DistributedStrategy(
        data_parallel=data, sequence_parallel=sequence
    )
    with ring.scope():
        have = combined(False, remat)
    for ours, theirs in zip(have, want, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        # On TensorFlow the other one takes twice as long.
        ((1, 2), "block"),
        pytest.param(
            *((2, 2), "feed_forward"), marks=extra_on("jax", "tensorflow")
        ),
    ],
)
def test_all_options_and_an_odd_length(on_devices, mesh, remat):
    on_devices(mesh[0] * mesh[1], check_combined, mesh, remat)


def check_dropout(size, remat):
    """Dropout of a block does not depend on ring or recomputation."""
    options = {"dropout": 0.3, "attention_dropout": 0.2, "rotary": True}
    x, y = (normal(i, BATCH, LENGTH, WIDTH) for i in (3, 4))

    def outcome(remat):
        layer = RingTransformerBlock(
            HEADS, HIDDEN, remat=remat, seed=11, causal=True, **options
        )
        inputs = keras.Input((None, WIDTH))
        model = keras.Model(inputs, layer(inputs))
        model.compile(keras.optimizers.SGD(0.02), "mse")
        for i, weight in enumerate(by_role(layer)):
            value = normal(70 + i, *weight.shape) / 2
            weight.assign(value + (weight.ndim == 1))
        # Rows in order: what is dropped depends on them.
        model.fit(x, y, batch_size=BATCH, epochs=2, verbose=0, shuffle=False)
        return [ops.convert_to_numpy(v) for v in by_role(layer)]

    want = outcome("feed_forward")
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)
    with ring.scope():
        have = outcome(remat)
    for ours, theirs in zip(have, want, strict=True):
        close(ours, theirs)


@pytest.mark.mostly(size=2)
@pytest.mark.parametrize("size", [1, 2])
def test_dropout_is_that_of_one_device(on_devices, size):
    on_devices(size, check_dropout, size, "block")


def test_a_block_is_saved_and_loaded(tmp_path):
    inputs = keras.Input((None, WIDTH))
    layer = RingTransformerBlock(
        HEADS, HIDDEN, rotary=True, dropout=0.1, alibi=True, sinks=True
    )
    model = keras.Model(inputs, layer(inputs))
    path = str(tmp_path / "block.keras")
    model.save(path)
    x = normal(0, BATCH, LENGTH, WIDTH)
    close(keras.saving.load_model(path)(x), model(x))
