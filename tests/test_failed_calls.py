"""After an error that all devices have alike, the next call works."""

import contextlib
import dataclasses

import keras
import numpy as np
import pytest

import keras_ring
from keras_ring import masks, ops
from tests.language_model import batch, initial_weights

TIMEOUT = 20.0
ERROR = "of the user's own"


class Trouble(keras.layers.Layer):
    """Raises where it is told to, between two layers of attention."""

    sequence_parallel_safe = True
    on = False

    def call(self, x):
        if Trouble.on:
            raise KeyError(ERROR)
        return x


@dataclasses.dataclass(frozen=True)
class Broken(masks.Mask):
    """Raises when a tile is masked: chunks are under way by then."""

    def relation(self, queries, keys):
        del queries, keys
        return True, False

    def allowed(self, query_positions, key_positions):
        raise ZeroDivisionError(ERROR)


class At(keras.callbacks.Callback):
    """Raises in one of its methods."""

    def __init__(self, method):
        super().__init__()

        def fail(*arguments, **named):
            raise FileNotFoundError(ERROR)

        setattr(self, method, fail)


def troubled_model():
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(16, 16)(tokens)
    x = x + keras_ring.layers.RingAttention(2, 8, causal=True)(x, x)
    x = Trouble()(x)
    x = x + keras_ring.layers.RingAttention(2, 8, causal=True)(x, x)
    model = keras.Model(tokens, keras.layers.Dense(16)(x))
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def errors_in_calls():
    """The loss before any error, and after each."""
    strategy = keras_ring.DistributedStrategy(
        sequence_parallel=2, timeout=TIMEOUT
    )
    x, y, _ = batch(2, 8)
    no_x, no_y = x[:0], y[:0]
    found = {}
    with strategy.scope():
        model = troubled_model()
        model.set_weights(initial_weights(model))

        def loss():
            return float(model.test_on_batch(x, y))

        def fails(name, kind, method, *arguments, **named):
            with pytest.raises(kind, match=ERROR):
                method(*arguments, **named)
            Trouble.on = False
            found[name] = loss()

        found["before"] = loss()
        if keras.backend.backend() == "torch":
            # Elsewhere it is compiled, and the layer asked no more.
            for name in ("fit", "test_on_batch", "predict"):
                Trouble.on = True
                arguments = (x,) if name == "predict" else (x, y)
                fails(name, KeyError, getattr(model, name), *arguments)
        for name in ("on_test_begin", "on_test_batch_end", "on_test_end"):
            kind = FileNotFoundError
            fails(name, kind, model.evaluate, x, y, callbacks=[At(name)])
        for name in ("evaluate", "predict"):
            # It differs by backend what comes of no samples.
            with contextlib.suppress(Exception):
                getattr(model, name)(no_x, verbose=0)
            found[f"{name} nothing"] = loss()
        for name in ("test_on_batch", "predict_on_batch", "train_on_batch"):
            arguments = (no_x,) if name == "predict_on_batch" else (no_x, no_y)
            with contextlib.suppress(Exception):
                getattr(model, name)(*arguments)
            found[f"{name} nothing"] = loss()
    return found


def errors_in_rings():
    """What a ring gives after an error while chunks were under way, and what
    it should give."""
    strategy = keras_ring.DistributedStrategy(
        sequence_parallel=2, timeout=TIMEOUT
    )
    draw = np.random.default_rng(0)
    shape = (1, 64, 2, 32)
    results = []
    for _ in range(2):
        query, key, value = draw.normal(size=(3, *shape)).astype("float32")
        with pytest.raises(ZeroDivisionError, match=ERROR):
            strategy.run(
                lambda q, k, v: ops.ring_attention(q, k, v, mask=Broken()),
                *(query, key + 1, value + 1),
            )
        out = strategy.run(
            lambda q, k, v: ops.ring_attention(q, k, v), query, key, value
        )
        results.append(keras.ops.convert_to_numpy(out))
        results.append((query, key, value))
    return results


def test_calls_work_after_errors(on_devices):
    found = on_devices(2, errors_in_calls)
    before = found.pop("before")
    assert found == dict.fromkeys(found, pytest.approx(before, rel=1e-6))


def test_nothing_of_a_failed_call_reaches_the_next(on_devices):
    found = on_devices(2, errors_in_rings)
    for out, tensors in zip(found[::2], found[1::2], strict=True):
        query, key, value = (
            np.moveaxis(t, 2, 1).astype("float64") for t in tensors
        )
        scores = query @ np.swapaxes(key, -1, -2) / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights / weights.sum(-1, keepdims=True) @ value
        np.testing.assert_allclose(
            np.moveaxis(out, 2, 1), expected, rtol=1e-4, atol=1e-5
        )
