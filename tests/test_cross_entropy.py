"""Chunked cross-entropy against float64 NumPy and the losses of Keras."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from tests.attention_layers import normal
from tests.gradients import vjp

BATCH, LENGTH, WIDTH, CLASSES = 2, 12, 6, 19
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "ignore": {"ignore_index": -1},
    "everything": {
        "label_smoothing": 0.2,
        "ignore_index": 3,
        "z_loss": 0.01,
        "soft_cap": 2.0,
    },
}
# Sums of some twenty terms of order one in float32, in another order.
TOLERANCE = 1e-5


def reference(
    features,
    kernel,
    bias,
    labels,
    weight,
    label_smoothing=0.0,
    ignore_index=None,
    z_loss=0.0,
    soft_cap=None,
):
    """Loss, log-sum-exp, accuracy and the gradients of `sum(weight * loss)`
    in float64."""
    features, kernel, bias, weight = (
        np.asarray(t, np.float64) for t in (features, kernel, bias, weight)
    )
    raw = features @ kernel + bias
    logits = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    top = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    counts = np.ones_like(lse)
    if ignore_index is not None:
        counts = (labels != ignore_index).astype("float64")
    target = np.eye(CLASSES)[np.clip(labels, 0, CLASSES - 1)]
    target = (1 - label_smoothing) * target + label_smoothing / CLASSES
    loss = lse - (target * logits).sum(-1) + z_loss * lse**2
    share = np.exp(logits - lse[..., None])
    grad = share * (1 + 2 * z_loss * lse)[..., None] - target
    grad = grad * (weight * counts)[..., None]
    if soft_cap is not None:
        grad = grad * (1 - (logits / soft_cap) ** 2)
    correct = (logits.argmax(-1) == labels) * counts
    grads = (
        grad @ kernel.T,
        np.einsum("btd,btv->dv", features, grad),
        grad.sum((0, 1)),
    )
    return loss * counts, lse, correct, grads


def problem(ignore_index=None, **_):
    draw = np.random.default_rng(5)
    labels = draw.integers(0, CLASSES, (BATCH, LENGTH)).astype("int32")
    if ignore_index is not None:
        labels[draw.random(labels.shape) < 0.4] = ignore_index
    features, kernel, bias = (
        normal(0, BATCH, LENGTH, WIDTH),
        normal(1, WIDTH, CLASSES),
        normal(2, CLASSES),
    )
    return features, kernel, bias, labels, normal(3, BATCH, LENGTH)


def close(have, want, name="", tolerance=TOLERANCE):
    np.testing.assert_allclose(
        ops.convert_to_numpy(have),
        want,
        rtol=tolerance,
        atol=tolerance,
        err_msg=name,
    )


def entropy(labels, weight, chunk_size=256, **options):
    """The loss as a function of what has a gradient, weighted."""

    def function(features, kernel, bias):
        result = keras_ring.ops.chunked_cross_entropy(
            features,
            kernel,
            labels,
            bias=bias,
            chunk_size=chunk_size,
            **options,
        )
        return list(result)

    return function


@pytest.mark.parametrize("chunk_size", [1, 5, 256])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_equals_float64(name, chunk_size):
    options = OPTIONS[name]
    *inputs, labels, weight = problem(**options)
    *want, want_grads = reference(*inputs, labels, weight, **options)
    have, have_grads = vjp(
        entropy(labels, weight, chunk_size, **options),
        inputs,
        [weight, np.zeros_like(weight), np.zeros_like(weight)],
    )
    for ours, theirs, part in zip(
        (*have, *have_grads),
        (*want, *want_grads),
        ("loss", "lse", "correct", "features", "kernel", "bias"),
        strict=True,
    ):
        close(ours, theirs, part)


def test_the_log_sum_exp_has_a_gradient():
    *inputs, labels, weight = problem()
    zeros = np.zeros_like(weight)
    *_, plain = reference(*inputs, labels, weight)
    *_, squared = reference(*inputs, labels, weight, z_loss=1.0)
    lse = reference(*inputs, labels, weight)[1].astype("float32")
    _, have = vjp(
        entropy(labels, weight, 5), inputs, [zeros, 2 * lse * weight, zeros]
    )
    for ours, with_square, without in zip(have, squared, plain, strict=True):
        close(ours, with_square - without)


def test_half_precision_features_have_float32_statistics():
    *inputs, labels, weight = problem()
    half = [ops.cast(t, "bfloat16") for t in inputs]
    rounded = [ops.convert_to_numpy(ops.cast(t, "float32")) for t in half]
    want = reference(*rounded, labels, weight)[0]
    loss = entropy(labels, weight)(*half)[0]
    assert keras.backend.standardize_dtype(loss.dtype) == "float32"
    # The logits, of order five, are rounded to eight bits.
    close(loss, want, tolerance=3e-2)


def test_large_logits_are_finite():
    *inputs, labels, weight = problem()
    inputs[0] = inputs[0] * 1e5
    (loss, lse, _), grads = vjp(
        entropy(labels, weight, 5),
        inputs,
        [weight, np.zeros_like(weight), np.zeros_like(weight)],
    )
    for tensor in (loss, lse, *grads):
        assert np.isfinite(ops.convert_to_numpy(tensor)).all()


def test_a_label_that_is_no_class_is_not_a_number():
    *inputs, labels, weight = problem()
    labels[1, 3] = CLASSES
    loss = ops.convert_to_numpy(entropy(labels, weight, 5)(*inputs)[0])
    assert np.isnan(loss[1, 3])
    assert np.isnan(loss).sum() == 1


REFUSED = {
    r"labels of dtype float32": {"labels": np.zeros((BATCH, LENGTH), "f")},
    r"labels.shape=\(2, 11\)": {"labels": np.zeros((BATCH, 11), "int32")},
    r"kernel.shape=\(5, 19\)": {"kernel": np.zeros((5, CLASSES), "f")},
    r"bias.shape=\(3,\)": {"bias": np.zeros(3, "f")},
    r"label_smoothing=1.5": {"label_smoothing": 1.5},
    r"z_loss=-1": {"z_loss": -1},
    r"soft_cap=0": {"soft_cap": 0},
    r"chunk_size=0": {"chunk_size": 0},
}


@pytest.mark.parametrize("received", REFUSED)
def test_what_does_not_fit_is_refused(received):
    features, kernel, bias, labels, _ = problem()
    arguments = {
        "features": features,
        "kernel": kernel,
        "labels": labels,
        "bias": bias,
        **REFUSED[received],
    }
    with pytest.raises(ValueError, match=received):
        keras_ring.ops.chunked_cross_entropy(**arguments)
