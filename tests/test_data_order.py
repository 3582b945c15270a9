"""Data come in the order of one device, however they are fed."""

import contextlib

import keras
import numpy as np
import pytest

import keras_ring
from tests.language_model import initial_weights

BACKEND = keras.backend.backend()
ROWS, BATCHES, EPOCHS = 2, 5, 3
# The order of sums differs; another batch differs in the second digit.
TOLERANCE = 1e-5


def samples():
    draw = np.random.default_rng(0)
    x = draw.integers(0, 8, (ROWS * BATCHES, 4)).astype("int32")
    return x, (3 * x + 1) % 8


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        rows = slice(ROWS * index, ROWS * (index + 1))
        return tuple(array[rows] for array in samples())


def arrays():
    x, y = samples()
    return {"x": x, "y": y, "batch_size": ROWS}


def py_dataset():
    return {"x": Batches()}


def workers():
    return {"x": Batches(workers=2)}


def generator():
    batches = Batches()
    return {"x": (batches[i] for i in range(BATCHES)), "epochs": 1}


def tf_data():
    import tensorflow as tf

    whole = tf.data.Dataset.from_tensor_slices(samples())
    return {"x": whole.shuffle(ROWS * BATCHES, seed=3).batch(ROWS)}


def loader():
    import torch

    whole = torch.utils.data.TensorDataset(*map(torch.tensor, samples()))
    return {"x": torch.utils.data.DataLoader(whole, ROWS, shuffle=True)}


FEEDS = {
    "jax": (arrays, py_dataset, workers, generator),
    "tensorflow": (arrays, py_dataset, workers, generator, tf_data),
    "torch": (arrays, py_dataset, workers, generator, loader),
}[BACKEND]


class Losses(keras.callbacks.Callback):
    """The loss after every batch."""

    def on_train_begin(self, logs=None):
        self.found = []

    def on_train_batch_end(self, batch, logs=None):
        self.found.append(float(logs["loss"]))


def fitted(strategy):
    """The losses of a fit with each of the feeds."""
    found = {}
    with strategy.scope() if strategy else contextlib.nullcontext():
        tokens = keras.Input((None,), dtype="int32")
        x = keras.layers.Embedding(8, 4)(tokens)
        x = x + keras_ring.layers.RingAttention(1, 4, causal=True)(x, x)
        model = keras.Model(tokens, keras.layers.Dense(8)(x))
        weights = initial_weights(model)
        for feed in FEEDS:
            # A seed for each, and a model that has seen no data.
            keras.utils.set_random_seed(7)
            model.compile(
                keras.optimizers.SGD(0.5),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                # One device needs no program, which takes TensorFlow longer
                # to trace than these few steps to run.
                run_eagerly=not strategy and BACKEND == "tensorflow",
            )
            model.set_weights(weights)
            losses = Losses()
            given = {"epochs": EPOCHS, "verbose": 0} | feed()
            model.fit(**given, callbacks=[losses])
            found[feed.__name__] = losses.found
    return found


def both():
    one = fitted(None)
    return one, fitted(keras_ring.DistributedStrategy(sequence_parallel=2))


def test_losses_are_those_of_one_device(on_devices):
    one, ring = on_devices(2, both)
    for feed, losses in one.items():
        count = BATCHES * (1 if feed == "generator" else EPOCHS)
        assert len(losses) == count
        assert ring[feed] == pytest.approx(losses, rel=TOLERANCE), feed
