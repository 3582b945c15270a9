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
from tests.attention_layers import TOLERANCE, normal
from tests.thinning import extra_on

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
BOTH = ["sum", "cross"]
# What they add is in code that the backends share.
OTHERS = [["add", "window"], ["grouped", "gate"], ["causal", "dropout"]]


def branch(h, kind, ours):
    """Two or three attention layers after one another, over `h`."""
    join, layer, options, call = MODELS[kind]

    def attention(seed):
        made = stock(layer, seed, **options)
        return kr.layers.RingAttention.from_keras_layer(made) if ours else made

    h = Copy()(h)
    if join is None:
        # Other lengths, and a second reader of the tensor without its mask.
        short = kr.layers.Gathered(Short())(h)
        o = attention(1)(short, h, **call)
        o = kr.layers.Gathered(Long())(attention(2)(o, h, **call))
        return h + attention(3)(h, h, **call) + o
    for seed in (1, 2):
        h = join(h, attention(seed)(h, h, **call))
    return h


def build(kinds, ours):
    """One model of all of them, with weights of order one."""
    ids = keras.Input((None,), dtype="int32")
    h = L.Embedding(9, WIDTH, mask_zero=True)(ids)
    model = keras.Model(ids, [L.Dense(4)(branch(h, k, ours)) for k in kinds])
    model.set_weights(
        [
            w if w.dtype.kind in "ui" else normal(i, *w.shape) / 2
            for i, w in enumerate(model.get_weights())
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


class Copy(L.Layer):
    """Another tensor with the mask of the first."""

    sequence_parallel_safe = True

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def call(self, x):
        return x * 1.0


class Short(L.Layer):
    """Other, and fewer, positions than the keys have."""

    def call(self, x):
        return x[:, 2:-2]

    def compute_output_shape(self, shape):
        return (shape[0], None, shape[2])


class Long(Short):
    def call(self, x):
        return ops.pad(x, ((0, 0), (2, 2), (0, 0)))


def trained(model, ids):
    """The weights after a step. Ours drop the same, whatever the ring."""
    real = (ids != 0).astype("float32")
    outputs = len(model.outputs)
    labels = [normal(i, *ids.shape, 4) for i in range(outputs)]
    model.train_on_batch(ids, labels, [real] * outputs)
    return [w for w in model.get_weights() if w.dtype.kind == "f"]


def run(size, kinds):
    """For each kind how far predictions of ours are from those of stock
    layers on one device; and how far trained weights are from ours there."""
    ids = tokens()
    real = (ids != 0)[..., None]
    strategy = kr.DistributedStrategy(sequence_parallel=size)
    wanted = build(kinds, ours=False).predict(ids, verbose=0)
    alone = trained(build(kinds, ours=True), ids)
    with strategy.scope():
        found = build(kinds, ours=True).predict(ids, verbose=0)
        after = trained(build(kinds, ours=True), ids)
    errors = {}
    for kind, want, have in zip(kinds, wanted, found, strict=True):
        want = want * real
        errors[kind] = np.abs(have * real - want).max() / np.abs(want).max()
    for i, (one, two) in enumerate(zip(after, alone, strict=True)):
        errors[f"weight {i}"] = np.abs(one - two).max() / np.abs(two).max()
    return errors


def check(on_devices, size, kinds):
    errors = on_devices(size, run, size, kinds)
    wrong = {n: float(e) for n, e in errors.items() if not e <= TOLERANCE}
    assert not wrong, wrong


@pytest.mark.parametrize(
    "size",
    [
        # On TensorFlow the next test has it.
        pytest.param(2, marks=extra_on("tensorflow")),
        pytest.param(4, marks=extra_on("jax", "tensorflow")),
    ],
)
def test_real_positions_are_those_of_stock_layers(on_devices, size):
    check(on_devices, size, BOTH)


@pytest.mark.dealt
@pytest.mark.parametrize("kinds", OTHERS, ids="-".join)
def test_so_are_those_of_other_attention(on_devices, kinds):
    check(on_devices, 2, kinds)


def test_the_options_are_kept_and_checked():
    made = kr.layers.RingAttention.from_keras_layer
    for kind, strips in (("heads", True), ("grouped", False)):
        config = made(stock(kind, 0)).get_config()
        assert (config["empty_rows"], config["strip_masks"]) == (
            "stock",
            strips,
        )
        copy = kr.layers.RingAttention.from_config(config)
        assert copy.get_config() == config
    with pytest.raises(ValueError, match="Received: empty_rows='mean'"):
        kr.layers.RingAttention(2, 4, empty_rows="mean")
    with pytest.raises(ValueError, match="sinks=True"):
        kr.layers.RingAttention(2, 4, empty_rows="stock", sinks=True)
