"""Wrong calls of a model under a strategy: each is an error on every device,
and the model gives the loss that it gave before."""

import keras
import numpy as np
import pytest

import keras_ring as kr

CLASSES, WIDTH, ROWS, LENGTH = 7, 8, 4, 8

X = np.random.default_rng(0).integers(0, CLASSES, (ROWS, LENGTH), "int32")
Y = np.roll(X, -1, axis=1)
HOT = np.eye(CLASSES, dtype="int32")[Y]

EMPTY = "must have a row and a position"
# Where layers see shards the data are looked at, else the loss is.
LENGTHS = "must have the length of the inputs|must have the batch and the le"
RANK = "must be .batch, length, features"

# What is wrong: (method, its arguments, what the error says).
WRONG = {
    "labels that are no integers": ("fit", (X, Y / 2), "dtype=float"),
    "the same in an evaluation": ("evaluate", (X, Y + 0.0), "dtype=float"),
    "no rows to fit": ("fit", (X[:0], Y[:0]), EMPTY),
    "no rows to evaluate": ("evaluate", (X[:0], Y[:0]), EMPTY),
    "no rows to predict": ("predict", (X[:0],), EMPTY),
    "no rows in a batch": ("train_on_batch", (X[:0], Y[:0]), EMPTY),
    "no rows in a test batch": ("test_on_batch", (X[:0], Y[:0]), EMPTY),
    "no positions": ("fit", (X[:, :0], Y[:, :0]), EMPTY),
    "no positions to predict": ("predict_on_batch", (X[:, :0],), EMPTY),
    "fewer labels than rows": ("fit", (X, Y[:3]), "same number of samples"),
    "fewer labels in a batch": ("train_on_batch", (X, Y[:3]), "the batch"),
    "shorter labels": ("fit", (X, Y[:, :-1]), LENGTHS),
    # Each of two devices has as many positions.
    "half the labels": ("evaluate", (X, Y[:, : LENGTH // 2]), LENGTHS),
    "one label for a row": ("evaluate", (X, Y[:, 0]), RANK),
    "a vector for a label": ("fit", (X, HOT), RANK),
    "no labels": ("fit", (X,), "y_true=None"),
    "one row without its batch": ("fit", (X[0], Y[0]), "Expected shape"),
}
RUNS = {
    "nothing returned": (lambda x: None, X, "must return a tensor"),
    "nothing in a part": (lambda x: (x, None), X, "must return a tensor"),
    "text returned": (lambda x: "done", X, "must return a tensor"),
    "no rows to run": (lambda x: x, X[:0], "of 1 or more"),
    "an error of the user's": (lambda x: {}["mine"], X, "mine"),
}


def language_model():
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(CLASSES, WIDTH)(tokens)
    x = kr.layers.RingTransformerBlock(2, 16, causal=True)(x)
    head = kr.layers.LanguageModelHead(CLASSES)
    model = keras.Model(tokens, head(x))
    model.compile("sgd", kr.losses.ChunkedCrossEntropy(head))
    return model


def check_wrong_calls():
    strategy = kr.DistributedStrategy(sequence_parallel=2)
    with strategy.scope():
        model = language_model()
    before = model.evaluate(X, Y, verbose=0)
    weights = model.get_weights()
    for name, (method, arguments, message) in WRONG.items():
        quiet = {} if method.endswith("batch") else {"verbose": 0}
        with pytest.raises(ValueError, match=message) as error:
            getattr(model, method)(*arguments, **quiet)
        assert error.value, name
    for function, tensor, message in RUNS.values():
        with pytest.raises((ValueError, KeyError), match=message):
            strategy.run(function, tensor)
    for have, want in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(have, want)
    np.testing.assert_array_equal(model.evaluate(X, Y, verbose=0), before)
    # It trains on.
    history = model.fit(X, Y, verbose=0).history
    assert np.isclose(history["loss"][0], np.ravel(before)[0], rtol=1e-5)
    assert strategy.run(lambda x: x * 2, X).shape == X.shape


def test_a_model_survives_wrong_calls(on_devices):
    on_devices(2, check_wrong_calls)
