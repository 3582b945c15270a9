"""Training in half precision: a ring of two against one device."""

import collections
import unittest.mock

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring import backends
from keras_ring.layers import (
    LanguageModelHead,
    RingAttention,
    RingTransformerBlock,
)
from keras_ring.losses import ChunkedCrossEntropy
from tests.attention_layers import GQA, call, fill, normal
from tests.gradients import vjp
from tests.language_model import VOCABULARY, WIDTH, batch, initial_weights
from tests.thinning import extra_on

HIDDEN = 24
LENGTH, BATCH, STEPS = 12, 2, 5
# Relative error of one rounding.
UNIT = {"mixed_bfloat16": 2.0**-9, "mixed_float16": 2.0**-12}


def decoder(policy, chunked, scale=None):
    """A compiled decoder of one block, with weights that are known."""
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH, dtype=policy)(tokens)
    x = RingTransformerBlock(
        2,
        HIDDEN,
        num_key_value_heads=1,
        causal=True,
        rotary=True,
        remat="block" if chunked else "feed_forward",
        chunk_size=4,
        dtype=policy,
    )(x)
    if chunked:
        head = LanguageModelHead(VOCABULARY, dtype=policy)
        x = head(x)
        loss = ChunkedCrossEntropy(head, chunk_size=4)
    else:
        x = keras.layers.Dense(VOCABULARY, dtype=policy)(x)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = keras.Model(tokens, x)
    optimizer = keras.optimizers.SGD(0.01)
    if scale is not None:
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer, initial_scale=scale, dynamic_growth_steps=3
        )
    model.compile(optimizer, loss)
    model.set_weights(initial_weights(model))
    return model


class Scales(keras.callbacks.Callback):
    """The loss scale after every step."""

    def on_train_begin(self, logs=None):
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        scale = getattr(self.model.optimizer, "dynamic_scale", 1.0)
        self.values.append(float(ops.convert_to_numpy(scale)))


def train(model, only=None):
    """Losses of each step, loss scales, weights after the last step."""
    x, y, _ = batch(BATCH, LENGTH)
    weight = np.ones(y.shape, "float32")
    if only is not None:
        weight[:, only:] = 0
    scales = Scales()
    history = model.fit(
        x,
        y,
        sample_weight=weight,
        batch_size=BATCH,
        epochs=STEPS,
        verbose=0,
        callbacks=[scales],
    )
    return history.history["loss"], scales.values, model.get_weights()


def check_training(policy, chunked):
    # Far below the scale at which anything overflows: there a device may
    # find one at half or twice the scale that is too much for another.
    scale = 2.0**9 if policy == "mixed_float16" else None
    model = decoder(policy, chunked, scale)
    start = model.get_weights()
    want, want_scales, want_weights = train(model)
    ring = keras_ring.DistributedStrategy(sequence_parallel=2)
    with ring.scope():
        model = decoder(policy, chunked, scale)
        have, scales, weights = train(model)
    assert np.isfinite(have).all()
    assert have[-1] < have[0]
    assert scales == want_scales
    if scale is not None:
        assert scales[-1] == 2 * scale
    assert {w.dtype for w in weights} == {np.dtype("float32")}
    # Some ten results in a row are rounded, each relative to values of order
    # one, and what is summed in another order is rounded another way.
    unit = UNIT[policy]
    np.testing.assert_allclose(have, want, rtol=10 * unit)
    # Of weights of order one the moves are compared: the sum of the steps,
    # each with the errors of a forward and a backward.
    moved, wanted = (
        np.concatenate(
            [(b - a).ravel() for a, b in zip(start, end, strict=True)]
        )
        for end in (weights, want_weights)
    )
    error = np.linalg.norm(moved - wanted) / np.linalg.norm(wanted)
    assert error < 20 * unit


# float16 is the harder one of both: it has a scale of the loss as well.
@pytest.mark.parametrize(
    ("policy", "chunked"),
    [
        pytest.param(
            *("mixed_bfloat16", False), marks=extra_on("jax", "tensorflow")
        ),
        # What overflows there, below, is trained in it too.
        pytest.param(*("mixed_float16", True), marks=extra_on("tensorflow")),
    ],
)
def test_training_in_half_precision(on_devices, policy, chunked):
    on_devices(2, check_training, policy, chunked)


def check_overflow():
    """Only the first device's gradients overflow: the labels of the other
    have no weight, and later positions no part in earlier losses."""
    only = LENGTH // 2
    *_, start = train(decoder("mixed_float16", True, 2.0**40), only)
    _, want_scales, _ = train(decoder("mixed_float16", True, 2.0**19), only)
    ring = keras_ring.DistributedStrategy(sequence_parallel=2)
    with ring.scope():
        model = decoder("mixed_float16", True, 2.0**19)
        _, scales, weights = train(model, only)
        _, falling, kept = train(decoder("mixed_float16", True, 2.0**40), only)
    # What a device of two has before the mean is up to twice or half of it:
    # the largest scale that it can bear may differ that much.
    ratios = np.array(scales) / want_scales
    assert set(ratios) <= {0.5, 1.0, 2.0}
    assert scales[0] == 2.0**18
    assert all(np.isfinite(w).all() for w in weights)
    # No step was made with what overflows, by no device.
    assert falling == [2.0 ** (39 - i) for i in range(STEPS)]
    for ours, theirs in zip(kept, start, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_overflow_on_one_device_is_one_on_all(on_devices):
    on_devices(2, check_overflow)


def position_wise(scale):
    """A model in which no device has a part in another one's gradients."""
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH, dtype="mixed_float16")(tokens)
    x = keras.layers.Dense(VOCABULARY, dtype="mixed_float16")(x)
    model = keras.Model(tokens, x)
    model.compile(
        keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.01), initial_scale=scale
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.set_weights(initial_weights(model))
    return model


def check_overflow_of(index):
    """Whichever device it is whose gradients alone overflow."""
    x, y, _ = batch(BATCH, LENGTH)
    weight = np.zeros((2, BATCH, LENGTH // 2), "float32")
    weight[index] = 1
    ring = keras_ring.DistributedStrategy(sequence_parallel=2)
    with ring.scope():
        model = position_wise(2.0**40)
        start = model.get_weights()
        model.train_on_batch(x, y, sample_weight=np.concatenate(weight, 1))
        scale = ops.convert_to_numpy(model.optimizer.dynamic_scale)
        for ours, theirs in zip(model.get_weights(), start, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert scale == 2.0**39


@pytest.mark.parametrize("index", [0, 1])
def test_an_overflow_of_any_device(on_devices, index):
    on_devices(2, check_overflow_of, index)


def check_transit():
    """Keys and values travel in the dtype of the layer, their gradients in
    that of the sums that they are."""
    sent = []
    transport = backends.load().transport.RingTransport
    start_shift = transport.start_shift

    def recorded(self, tensors, by=1):
        dtypes = [keras.backend.standardize_dtype(t.dtype) for t in tensors]
        sent.append(tuple(dtypes))
        return start_shift(self, tensors, by)

    x = normal(0, BATCH, LENGTH, WIDTH)
    ring = keras_ring.DistributedStrategy(sequence_parallel=3)
    with ring.scope():
        layer = RingAttention(**GQA, causal=True, dtype="mixed_bfloat16")
        fill(layer, x.shape)
    weights = [v.value for v in layer.trainable_variables]

    def attend(x):
        out = call(layer, [x], weights, {})
        return ops.cast(out, "float32")

    def differentiate(x):
        return vjp(attend, [x], x)

    keys_and_values, gradients = ("bfloat16",) * 2, ("float32",) * 2
    with unittest.mock.patch.object(transport, "start_shift", recorded):
        ring.run(attend, x)
        assert set(sent) == {keys_and_values}
        sent.clear()
        ring.run(differentiate, x)
        assert set(sent) == {keys_and_values, gradients}
    if keras.backend.backend() != "jax":
        # Two hops of the one in each direction, and two and the way home of
        # the other, or one less where the own ones stay at home. (On JAX a
        # loop has one hop, whose dtypes stay the same.)
        counts = collections.Counter(sent)
        hops = 2 if transport.eager else 3
        assert counts[keys_and_values] * hops == counts[gradients] * 4


def test_keys_and_values_travel_in_half_precision(on_devices):
    on_devices(3, check_transit)
