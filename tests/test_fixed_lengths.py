"""Models of fixed lengths train as on one device, split where they can be."""

import functools
import types
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring as kr
from keras_ring.training import guard
from tests import fixed_cases

BACKEND = keras.backend.backend()
SHARDS = BACKEND != "jax"
# float32 sums in another order, and weights after two steps of them.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def outcome(model, data, weights):
    """Two steps of SGD, and the predictions before and after."""
    before = model.predict_on_batch(data[0])
    if weights is not None:
        model.set_weights(weights)
    return {
        "shapes": keras.tree.map_structure(np.shape, before),
        "losses": [model.train_on_batch(*data) for _ in range(2)],
        "predicted": model.predict_on_batch(data[0]),
        "weights": model.get_weights(),
    }


def drawn(model, data):
    """Weights of a model, the same on every process."""
    model.predict_on_batch(data[0])
    draw = np.random.default_rng(0)
    return [
        (draw.normal(size=w.shape) * 0.3).astype("float32")
        for w in model.get_weights()
    ]


def check(mesh, name, length, whole):
    make = functools.partial(getattr(fixed_cases, name), length)
    alone, data = make()
    weights = drawn(alone, data)
    want = outcome(alone, data, weights)
    strategy = kr.DistributedStrategy(
        data_parallel=mesh[0], sequence_parallel=mesh[1]
    )
    with strategy.scope(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, data = make()
        got = outcome(model, data, weights)
    told = [w for w in caught if "holds whole sequences" in str(w.message)]
    assert bool(told) == (whole and SHARDS), [str(w.message) for w in caught]
    assert got["shapes"] == want["shapes"]
    for have, target in zip(
        keras.tree.flatten(got), keras.tree.flatten(want), strict=True
    ):
        np.testing.assert_allclose(have, target, **CLOSE)


# Mesh, model, length, whether every device sees whole sequences; programs of
# several replicas take long to make.
CASES = [
    ((1, 2), "features", 7, False),
]
if BACKEND != "jax":
    CASES += [((1, 2), "images", 3, True)]
    CASES += [((1, 2), "unbuilt", 8, False)]
if BACKEND == "torch":
    CASES += [
        ((1, 2), "tokens", 7, False),
        ((2, 2), "crossed", 8, False),
        ((1, 2), "nested", 7, False),
        ((1, 2), "written", 8, False),
        ((1, 2), "unbuilt_flat", 7, True),
        ((2, 2), "mixing", 6, True),
        ((1, 4), "images", 2, True),
        ((1, 2), "written_images", 3, True),
    ]


@pytest.mark.parametrize(
    ("mesh", "name", "length", "whole"),
    CASES,
    ids=[f"{n}{s}-{m[0]}x{m[1]}" for m, n, s, _ in CASES],
)
def test_training_equals_one_device(on_devices, mesh, name, length, whole):
    on_devices(mesh[0] * mesh[1], check, mesh, name, length, whole)


# What splits a model and what keeps it whole, without computing anything.
WORLD = types.SimpleNamespace(layers_see_shards=True, sequence_size=2)
L = keras.layers


def lengths_of(inputs, outputs):
    """What the guard says of a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return guard.check(keras.Model(inputs, outputs), WORLD)


def block(x):
    return kr.layers.RingTransformerBlock(2, 8)(x)


SPLIT = {
    "functions of positions": lambda x: block(ops.gelu(x) * 2.0 + 1.0),
    "layers of positions": lambda x: block(L.LayerNormalization()(x)),
    "positions": lambda x: block(
        x + ops.cast(kr.ops.sequence_positions(x), "float32")[None, :, None]
    ),
    "gathered": lambda x: kr.layers.Gathered(L.Conv1D(8, 3, padding="same"))(x),
    "shortened": lambda x: block(
        kr.layers.Gathered(L.Conv1D(8, 2, strides=2))(x)
    ),
    "pooled": lambda x: L.Dense(2)(
        kr.layers.Gathered(L.GlobalAveragePooling1D())(block(x))
    ),
}
WHOLE = {
    "convolution": lambda x: block(L.Conv1D(8, 3, padding="same")(x)),
    "pooled": lambda x: L.GlobalAveragePooling1D()(block(x)),
    "sums": lambda x: block(L.Lambda(lambda x: ops.cumsum(x, axis=1))(x)),
    "a constant of this length": lambda x: block(
        x + np.ones((1, 12, 8), "float32")
    ),
    "reshaped": lambda x: block(
        ops.reshape(ops.reshape(x, (-1, 12, 2, 4)), (-1, 12, 8))
    ),
    "shortened": lambda x: block(x[:, 1:]),
    "flattened": lambda x: L.Flatten()(block(x)),
    "of no input": lambda x: block(L.Reshape((6, 16))(x)),
    "bias of each position": lambda x: block(
        L.EinsumDense("abc,cd->abd", (12, 8), bias_axes="bd")(x)
    ),
    "slopes of each position": lambda x: block(L.PReLU()(x)),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_what_is_split(kind):
    x = keras.Input((12, 8))
    output = SPLIT[kind](x)
    lengths = lengths_of(x, output)
    assert lengths.split(x)
    assert lengths.split(output) == (kind != "pooled")


@pytest.mark.parametrize("kind", WHOLE)
def test_what_stays_whole(kind):
    x = keras.Input((12, 8))
    assert lengths_of(x, WHOLE[kind](x)).whole


def test_features_are_no_sequence():
    """Also those of as many numbers as the sequence has positions."""
    x, sample = keras.Input((12, 8)), keras.Input((12,))
    y = block(x + L.Dense(8)(sample)[:, None])
    lengths = lengths_of([x, sample], y)
    assert lengths.split(x)
    assert not lengths.split(sample)
    lengths = lengths_of(sample, L.Dense(8)(sample))
    assert not lengths.split(sample)
    assert not lengths.whole


def test_a_sequence_of_numbers_is_one():
    x = keras.Input((12,))
    assert lengths_of(x, block(L.Dense(8)(x[..., None]))).split(x)


def test_latents_of_another_length_keep_an_open_one_whole():
    """Queries that come of no input meet a sequence."""
    x, sample = keras.Input((None, 8)), keras.Input((4,))
    latents = L.Reshape((3, 8))(L.Dense(24)(sample))
    y = kr.layers.RingAttention(2, 4)(latents, x)
    assert lengths_of([x, sample], y).whole


def check_lengths():
    """Another length than was declared is refused, as by Keras, and a model
    keeps its declared length afterwards."""
    strategy = kr.DistributedStrategy(sequence_parallel=2)
    with strategy.scope():
        model, (x, _) = fixed_cases.features(8)
        with pytest.raises(ValueError, match=r"length|shape"):
            model.predict_on_batch(x[:, :6])
        assert model.predict_on_batch(x).shape == (4, 8, fixed_cases.CLASSES)
    assert model.input_spec[0].shape == (None, 8, fixed_cases.WIDTH)


@pytest.mark.skipif(
    BACKEND != "torch",
    reason="TensorFlow is as PyTorch; on JAX nothing of Keras is changed",
)
def test_the_declared_length_is_checked(on_devices):
    on_devices(2, check_lengths)
