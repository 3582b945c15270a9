"""A stock layer inside `Gathered` computes what it does on one device."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring as kr
from tests import gradients, worlds
from tests.members import everyones, from_each, total

RINGS = [size for size in (1, 2, 4, 8) if size <= worlds.DEVICES]
BATCH, LENGTH, FEATURES = 2, 24, 4

# float32 rounding of sums over up to 24 positions in another order.
TOLERANCE = 1e-5

L = keras.layers
SEQUENCE = {
    "convolution": lambda: L.Conv1D(3, 5, padding="same", activation="tanh"),
    "strided": lambda: L.Conv1D(3, 3, strides=2, padding="same"),
    "causal": lambda: L.Conv1D(3, 4, padding="causal", dilation_rate=2),
    "batch-normalisation": L.BatchNormalization,
    "max-pooling": lambda: L.MaxPooling1D(3, strides=1, padding="same"),
    "recurrence": lambda: L.LSTM(3, return_sequences=True),
    "both-ways": lambda: L.Bidirectional(L.SimpleRNN(2, return_sequences=True)),
    "attention": lambda: L.MultiHeadAttention(2, 3),
    "composite": lambda: keras.Sequential([L.Conv1D(3, 3), L.ZeroPadding1D(1)]),
}
POOLED = {
    "average": L.GlobalAveragePooling1D,
    "last-state": lambda: L.GRU(3),
    "composite": lambda: keras.Sequential(
        [L.GlobalMaxPooling1D(), L.Dense(3, activation="tanh")]
    ),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def call(layer, values, x, options):
    """The layer as a function of its trainable weights and its input."""
    inputs = (x, x) if "MultiHead" in type(inner(layer)).__name__ else (x,)
    state = [v.value for v in layer.non_trainable_variables]
    return layer.stateless_call(list(values), state, *inputs, **options)


def inner(layer):
    return layer.layer if isinstance(layer, kr.layers.Gathered) else layer


def differentiate(layer, x, weight, options):
    """Result, gradients of weights and of the input, updated state."""
    values = [ops.convert_to_tensor(v.value) for v in layer.trainable_variables]
    out, grads = gradients.vjp(
        lambda *tensors: call(layer, tensors[:-1], tensors[-1], options)[0],
        [*values, x],
        weight,
    )
    state = []
    if "batch" in inner(layer).name:
        state = call(layer, values, x, options)[1]
    return out, grads[:-1], grads[-1], state


def run_layer(size, make, x, options, pooled):
    """Largest difference of everything between a ring and one device."""
    keras.utils.set_random_seed(0)  # Every process draws the same weights.
    alone = make()
    inputs = (x, x) if "MultiHead" in type(alone).__name__ else (x,)
    out = alone(*inputs)
    weight = normal(*out.shape, seed=5)
    expected = differentiate(alone, x, weight, options)

    strategy = kr.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        layer = kr.layers.Gathered(make())
        # Build it on a sequence of another length: no size may stick.
        layer(*[part[:, : LENGTH // 2] for part in inputs])
    assert len(layer.weights) == len(alone.weights)
    for to, value in zip(layer.weights, alone.weights, strict=True):
        to.assign(ops.convert_to_numpy(value))

    def function(x, weight_shard):
        share = weight_shard
        if pooled:
            inside = kr.strategy.current().inside()
            share = weight / (size if inside else 1)
        out, grads, grad_x, state = differentiate(layer, x, share, options)
        return (
            everyones(out) if pooled else out,
            [from_each(grad) for grad in grads],
            grad_x,
            [everyones(s) for s in state],
        )

    placeholder = x if pooled else weight
    out, grads, grad_x, state = strategy.run(function, x, placeholder)
    numpy = ops.convert_to_numpy
    pairs = {
        "output": (numpy(out), expected[0]),
        "gradient of the input": (numpy(grad_x), expected[2]),
    }
    for place, grad in enumerate(grads):
        pairs[f"gradient of weight {place}"] = total(grad), expected[1][place]
    for place, value in enumerate(state):
        pairs[f"state {place}"] = numpy(value), expected[3][place]
    return {
        name: np.abs(mine - numpy(other)).max()
        for name, (mine, other) in pairs.items()
    }


def check(errors):
    wrong = {n: float(e) for n, e in errors.items() if not e <= TOLERANCE}
    assert not wrong, wrong


@pytest.mark.parametrize("size", RINGS)
@pytest.mark.parametrize("kind", SEQUENCE)
def test_a_layer_over_the_sequence(on_devices, kind, size):
    if kind == "strided" and LENGTH // 2 % size:
        pytest.skip("12 does not divide by 8; refused, tested below")
    x = normal(BATCH, LENGTH, FEATURES)
    options = {"training": True} if "batch" in kind else {}
    check(on_devices(size, run_kind, size, "SEQUENCE", kind, x, options, False))


@pytest.mark.parametrize("size", RINGS)
@pytest.mark.parametrize("kind", POOLED)
def test_a_pooled_result_stays_whole(on_devices, kind, size):
    x = normal(BATCH, LENGTH, FEATURES)
    check(on_devices(size, run_kind, size, "POOLED", kind, x, {}, True))


def run_kind(size, table, kind, x, options, pooled):
    table = {"SEQUENCE": SEQUENCE, "POOLED": POOLED}[table]
    return run_layer(size, table[kind], x, options, pooled)
