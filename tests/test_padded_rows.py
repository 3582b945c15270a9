"""Layers made from stock ones treat padded rows as those do.

Stock layers give the mean of all values for a query that may attend to
nothing, and `MultiHeadAttention` takes the Keras masks off its inputs. A
layer that comes later reads both: in `h + attention(h, h)` the sum has no
mask, so that the next layer attends to padded rows.
"""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring as kr
from tests import worlds
from tests.attention_layers import TOLERANCE, normal

L = keras.layers
BATCH, LENGTH, WIDTH = 3, 11, 8  # No ring divides the length.


def tokens():
    """Padding at the end, at the start, and nowhere."""
    ids = np.random.default_rng(0).integers(1, 9, size=(BATCH, LENGTH))
    ids[0, 6:] = 0
    ids[1, :4] = 0
    return ids.astype("int32")


def stock(kind, seed, **options):
    if kind == "grouped":
        return L.GroupQueryAttention(4, 4, 2, seed=seed, **options)
    return L.MultiHeadAttention(2, 4, seed=seed, **options)


# How the layers' results are joined, what they are, how they are called.
MODELS = {
    "sum": (lambda h, o: h + o, "heads", {}, {}),
    "add": (lambda h, o: L.Add()([h, o]), "heads", {}, {}),
    "grouped": (lambda h, o: L.Add()([h, o]), "grouped", {}, {}),
    "causal": (lambda h, o: h + o, "heads", {}, {"use_causal_mask": True}),
    "window": (lambda h, o: h + o, "grouped", {"sliding_window": 2}, {}),
    "dropout": (lambda h, o: h + o, "heads", {"dropout": 0.2}, {}),
    "gate": (lambda h, o: h + o, "heads", {"use_gate": True}, {}),
    "cross": (None, "heads", {}, {}),
}


def build(kind, ours):
    join, layer, options, call = MODELS[kind]

    def attention(seed):
        made = stock(layer, seed, **options)
        return kr.layers.RingAttention.from_keras_layer(made) if ours else made

    ids = keras.Input((None,), dtype="int32")
    h = L.Embedding(9, WIDTH, mask_zero=True)(ids)
    if join is None:
        # Other lengths, and a second reader of the tensor without its mask.
        short = kr.layers.Gathered(Short())(h)
        o = attention(1)(short, h, **call)
        o = kr.layers.Gathered(Long())(attention(2)(o, h, **call))
        h = h + attention(3)(h, h, **call) + o
    else:
        for seed in (1, 2):
            h = join(h, attention(seed)(h, h, **call))
    return keras.Model(ids, L.Dense(4)(h))


class Short(L.Layer):
    """Other, and fewer, positions than the keys have."""

    def call(self, x):
        return x[:, 2:-2]

    def compute_output_shape(self, shape):
        return (shape[0], None, shape[2])


class Long(Short):
    def call(self, x):
        return ops.pad(x, ((0, 0), (2, 2), (0, 0)))


def filled(model):
    """Give a model weights of order one."""
    weights = enumerate(model.get_weights())
    model.set_weights(
        [
            w if w.dtype.kind in "ui" else normal(i, *w.shape) / 2
            for i, w in weights
        ]
    )
    return model


def run(size, kinds):
    """For each model, how far predictions and trained weights of ours are
    from those of stock layers on one device."""
    ids = tokens()
    real = (ids != 0)[..., None]
    strategy = kr.DistributedStrategy(sequence_parallel=size)
    errors = {}
    for kind in kinds:
        want = filled(build(kind, ours=False)).predict(ids, verbose=0)
        with strategy.scope():
            model = filled(build(kind, ours=True))
            have = model.predict(ids, verbose=0)
            once = np.abs((have - want) * real).max()
            errors[kind] = once / np.abs(want * real).max()
    return errors


@pytest.mark.parametrize("size", [n for n in (1, 2, 4) if n <= worlds.DEVICES])
def test_real_positions_are_those_of_stock_layers(on_devices, size):
    errors = on_devices(size, run, size, list(MODELS))
    wrong = {n: float(e) for n, e in errors.items() if not e <= TOLERANCE}
    assert not wrong, wrong
