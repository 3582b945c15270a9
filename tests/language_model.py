"""A tiny causal language model, once with stock attention and once with the
ring, and its loss in naive float64 NumPy."""

import keras
import numpy as np

import keras_ring
from tests import reference

VOCABULARY = 16
WIDTH = 16
HEADS = 2
# TensorFlow traces a program for each replica, most of a test's time. Layers
# after one another are tried there by tests/test_padded_rows.py.
BLOCKS = 1 if keras.backend.backend() == "tensorflow" else 2


def language_model(attention, *, dense=False, optimizer="adam"):
    """A compiled decoder of `BLOCKS` blocks.

    Args:
        attention: "stock" for `keras.layers.MultiHeadAttention`, "ring" for
            `keras_ring.layers.RingAttention`.
        dense: embed by a matrix product, so that all gradients are dense.
        optimizer: "sgd", or "adam", which hides a gradient of the wrong
            scale and magnifies noise: the bias of the keys has no influence
            on the softmax, its gradient is rounding noise, and Adam makes
            whole steps of it. So with Adam attention has no biases. (Its
            rate is the default one: at ten times that, ten steps in float32
            and in float64 end 1e-4 apart on one device.)
    """
    size = WIDTH // HEADS
    bias = optimizer == "sgd"
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    if dense:
        hot = keras.ops.one_hot(tokens, VOCABULARY)
        x = keras.layers.Dense(WIDTH, use_bias=False, name="embed")(hot)
    else:
        x = keras.layers.Embedding(VOCABULARY, WIDTH, name="embed")(tokens)
    for i in range(BLOCKS):
        h = keras.layers.LayerNormalization(name=f"norm_a{i}")(x)
        if attention == "stock":
            layer = keras.layers.MultiHeadAttention(HEADS, size, use_bias=bias)
            h = layer(h, h, use_causal_mask=True)
        else:
            layer = keras_ring.layers.RingAttention(
                HEADS, size, causal=True, use_bias=bias
            )
            h = layer(h, h)
        x = x + h
        h = keras.layers.LayerNormalization(name=f"norm_f{i}")(x)
        h = keras.layers.Dense(2 * WIDTH, activation="relu")(h)
        x = x + keras.layers.Dense(WIDTH)(h)
    logits = keras.layers.Dense(VOCABULARY, name="logits")(x)
    model = keras.Model(tokens, logits)
    model.compile(
        keras.optimizers.Adam(1e-3)
        if optimizer == "adam"
        else keras.optimizers.SGD(0.03),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
    )
    return model


def initial_weights(model, seed=0):
    """Weights drawn by NumPy: the same on every backend and process."""
    draw = np.random.default_rng(seed)
    return [
        (draw.normal(size=w.shape) * 0.3 + (w.ndim == 1)).astype("float32")
        for w in model.get_weights()
    ]


def batch(samples, length, seed=0):
    """Token sequences with some structure, shifted labels and weights."""
    draw = np.random.default_rng(seed)
    stream = draw.integers(0, VOCABULARY, (samples, length + 1))
    stream[:, 2::3] = stream[:, 1:-1:3]  # Something to be learnt.
    weights = draw.random((samples, length)).astype("float32")
    return (
        stream[:, :-1].astype("int32"),
        stream[:, 1:].astype("int32"),
        weights,
    )


def numpy_loss(weights, tokens, labels, sample_weight):
    """The loss of `language_model` with these weights, in float64."""
    weights = iter(np.asarray(w, np.float64) for w in weights)

    def norm(x):
        scale, shift = next(weights), next(weights)
        mean = x.mean(-1, keepdims=True)
        variance = x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-3) * scale + shift

    def project(x, equation):
        kernel, bias = next(weights), next(weights)
        return np.einsum(equation, x, kernel) + bias

    x = next(weights)[tokens]
    length = tokens.shape[1]
    for _ in range(BLOCKS):
        h = norm(x)
        query, key, value = (
            project(h, "btd,dhk->bthk") for _ in ("query", "key", "value")
        )
        h = reference.attention(
            query,
            key,
            value,
            np.zeros_like(query),
            allowed=reference.causal(length, length),
        ).out
        x = x + project(h, "bthk,hkd->btd")
        h = np.maximum(project(norm(x), "btd,df->btf"), 0.0)
        x = x + project(h, "btf,fd->btd")
    logits = project(x, "btd,dv->btv")
    top = logits.max(-1, keepdims=True)
    lse = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    picked = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return np.mean((lse - picked) * sample_weight)
