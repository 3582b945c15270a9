"""Keras infers shapes on PyTorch's "meta" device, which has no memory.

Where a layer fails there Keras computes for real instead, without a word: the
whole of a sequence on every process, while its shapes are inferred.
"""

import keras
import numpy as np
import pytest
import torch

import keras_ring
from keras_ring import layers, losses

BATCH, LENGTH, WIDTH = 2, 2050, 8
CLASSES = 16


class Real(torch.overrides.TorchFunctionMode):
    """Sees every operation and keeps the shapes that have memory."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        del types
        result = function(*args, **(kwargs or {}))
        for tensor in keras.tree.flatten(result):
            if (
                isinstance(tensor, torch.Tensor)
                and not tensor.is_meta
                and tensor.numel() >= LENGTH
            ):
                self.shapes.append((function, tuple(tensor.shape)))
        return result


class Inferred(keras.layers.Layer):
    """Has no shapes of its own, so that Keras calls it for them."""

    def __init__(self, layer, training):
        super().__init__()
        self.layer = layer
        self.training = training

    def call(self, x, **tensors):
        return self.layer(x, training=self.training, **tensors)


def features(length=LENGTH):
    return keras.KerasTensor((BATCH, length, WIDTH))


def places(*shape, dtype="bool"):
    return keras.KerasTensor(shape, dtype=dtype)


def attention(**options):
    return layers.RingAttention(2, 4, **options)


def block(**options):
    options = {"causal": True, "chunk_size": 512} | options
    return layers.RingTransformerBlock(2, 4 * WIDTH, **options)


# Name: a layer, what else than features it is called with.
CASES = {
    "plain": lambda: (attention(), {}),
    "causal": lambda: (attention(causal=True), {}),
    "window": lambda: (attention(sliding_window=100, causal=True), {}),
    "dropout": lambda: (attention(dropout=0.3, causal=True), {}),
    "everything": lambda: (
        attention(
            sinks=True, alibi=True, soft_cap=5.0, rotary=True, causal=True
        ),
        {},
    ),
    "padding": lambda: (
        attention(causal=True),
        {"query_mask": places(BATCH, LENGTH)},
    ),
    "documents": lambda: (
        attention(causal=True),
        {"segment_ids": places(BATCH, LENGTH, dtype="int32")},
    ),
    "prefixes": lambda: (
        attention(causal=True),
        {"prefix_length": places(BATCH, dtype="int32")},
    ),
    "explicit mask": lambda: (
        attention(),
        {"attention_mask": places(BATCH, LENGTH, LENGTH)},
    ),
    "bias": lambda: (
        attention(),
        {"attention_bias": places(1, 2, LENGTH, LENGTH, dtype="float32")},
    ),
    "cross": lambda: (attention(), {"value": features(LENGTH + 6)}),
    "block": lambda: (block(), {}),
    "block again": lambda: (block(remat="block", gated=True), {}),
    "block with dropout": lambda: (
        block(dropout=0.2, attention_dropout=0.2),
        {},
    ),
    "feed-forward": lambda: (
        layers.BlockwiseFeedForward(4 * WIDTH, chunk_size=512),
        {},
    ),
    "head": lambda: (layers.LanguageModelHead(CLASSES), {}),
    "rotary": lambda: (layers.RotaryEmbedding(), {}),
    "positions": lambda: (layers.PositionEmbedding(LENGTH), {}),
    "gathered": lambda: (
        layers.Gathered(keras.layers.GlobalAveragePooling1D()),
        {},
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_shapes_cost_no_memory(case, training):
    layer, tensors = CASES[case]()
    x = features()
    # Build it first: weights are real.
    layer(x, **tensors)
    with Real() as real:
        spec = Inferred(layer, training).compute_output_spec(x, **tensors)
    assert real.shapes == []
    assert isinstance(spec, keras.KerasTensor)
    whole = tuple(x.shape) if case != "gathered" else (BATCH, WIDTH)
    assert tuple(spec.shape) == whole


def check_step(policy, method):
    """The first step of a model infers shapes, of the own part where Keras
    computes to do so, as it does in mixed precision."""
    keras.config.set_dtype_policy(policy)
    strategy = keras_ring.DistributedStrategy(sequence_parallel=2)
    with strategy.scope():
        tokens = keras.Input((None,), dtype="int32")
        x = keras.layers.Embedding(CLASSES, WIDTH)(tokens)
        head = layers.LanguageModelHead(CLASSES)
        model = keras.Model(tokens, head(block()(x)))
        model.compile("sgd", losses.ChunkedCrossEntropy(head))
        keras.config.set_dtype_policy("float32")
        batch = np.zeros((1, LENGTH), "int32")
        with Real() as real:
            if method == "fit":
                model.fit(batch, batch, verbose=0)
            else:
                model.train_on_batch(batch, batch)
    chunk = LENGTH // 2
    assert any(chunk in shape for _, shape in real.shapes)
    whole = [(f, shape) for f, shape in real.shapes if LENGTH in shape]
    # The batch as it was given.
    assert all(shape == (1, LENGTH) for _, shape in whole), whole


@pytest.mark.parametrize("method", ["fit", "train_on_batch"])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_first_step_computes_on_chunks_alone(on_devices, policy, method):
    on_devices(2, check_step, policy, method)


def check_pairs(method):
    """A mask of pairs has the keys of all: the part of a batch is no batch."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    strategy = keras_ring.DistributedStrategy(sequence_parallel=2)
    with strategy.scope():
        inputs = (
            keras.Input((None, WIDTH)),
            keras.Input((None, None), dtype="bool"),
        )
        y = attention()(inputs[0], attention_mask=inputs[1])
        model = keras.Model(inputs, keras.layers.Dense(1)(y))
        model.compile("sgd", "mse")
        keras.config.set_dtype_policy("float32")
        x = np.ones((BATCH, 6, WIDTH), "float32")
        batch = [x, np.ones((BATCH, 6, 6), bool)], x[..., :1]
        if method == "fit":
            loss = model.fit(*batch, verbose=0).history["loss"][0]
        else:
            loss = model.train_on_batch(*batch)
    assert np.isfinite(loss)


@pytest.mark.parametrize("method", ["fit", "train_on_batch"])
def test_what_a_part_does_not_fit_sees_the_whole(on_devices, method):
    on_devices(2, check_pairs, method)
