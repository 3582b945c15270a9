"""Any length and any batch: training is that of one device."""

import functools

import keras
import numpy as np
import pytest

import keras_ring
from tests.language_model import batch, initial_weights, language_model
from tests.thinning import extra_on

# Losses are sums of some hundred float32 terms in another order.
LOSSES = {"rtol": 1e-5, "atol": 1e-7}
# Weights after a few steps of SGD, each with such a sum behind it.
WEIGHTS = {"atol": 1e-5}


class Losses(keras.callbacks.Callback):
    """The running mean of every number after every step."""

    def on_train_begin(self, logs=None):
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append([float(logs[name]) for name in sorted(logs)])


def outcome(model, batches, valid=None, epochs=2, predicted=slice(None)):
    """What two epochs over some batches, and an evaluation, give.

    Args:
        model: compiled.
        batches: list of `(x, y)` or `(x, y, sample_weight)`.
        valid: of an input, which positions have a prediction; None for all.
        epochs: of training.
        predicted: the batches that outputs are compared of.
    """
    losses = Losses()

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(batches)

        def __getitem__(self, index):
            return batches[index]

    history = model.fit(
        Batches(),
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[losses],
        validation_data=Batches(),
    )
    evaluated = model.evaluate(Batches(), verbose=0, return_dict=True)
    inputs = [each[0] for each in batches[predicted]]
    outputs = [
        keras.tree.map_structure(np.asarray, model.predict_on_batch(x))
        for x in inputs
    ]
    if valid is not None:
        outputs = [
            np.where(valid(x)[..., None], output, 0)
            for output, x in zip(outputs, inputs, strict=True)
        ]
    return {
        "losses": losses.values,
        "history": history.history,
        "evaluated": evaluated,
        "predicted": outputs,
        "weights": model.get_weights(),
    }


def compare(got, want):
    for name in ("losses", "history", "evaluated"):
        keras.tree.map_structure(
            functools.partial(
                np.testing.assert_allclose,
                err_msg=f"{got['history']} and not {want['history']}",
                **LOSSES,
            ),
            got[name],
            want[name],
        )
    for name in ("predicted", "weights"):
        for have, target in zip(
            keras.tree.flatten(got[name]),
            keras.tree.flatten(want[name]),
            strict=True,
        ):
            assert have.shape == target.shape
            np.testing.assert_allclose(have, target, **WEIGHTS)


def check(mesh, make, batches, valid=None, **options):
    """Train `make(kind)` on one device and over a mesh."""
    alone = make("stock")
    # It runs a few steps, which take TensorFlow less than a program of them.
    alone.run_eagerly = keras.backend.backend() == "tensorflow"
    weights = initial_weights(alone)
    alone.set_weights(weights)
    want = outcome(alone, batches, valid, **options)
    strategy = keras_ring.DistributedStrategy(
        data_parallel=mesh[0], sequence_parallel=mesh[1]
    )
    with strategy.scope():
        model = make("ring")
        model.set_weights(weights)
        got = outcome(model, batches, valid, **options)
    compare(got, want)


def check_language_model(mesh, sizes):
    check(
        mesh,
        functools.partial(language_model, optimizer="sgd"),
        [batch(*size, seed=i) for i, size in enumerate(sizes)],
        # Of each size of outputs there is a program more.
        predicted=slice(-1, None),
    )


# Programs of open lengths: tests/test_tensorflow_programs.py has a small one.
# Both ways at once, in batches of two sizes: tests/test_global_counts.py.
COVERED = extra_on("tensorflow")


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        pytest.param((1, 2), [(2, 7)], marks=pytest.mark.extra),
        pytest.param((1, 3), [(2, 7)], marks=pytest.mark.extra),
        pytest.param((1, 4), [(2, 7)], marks=pytest.mark.extra),
        pytest.param((1, 4), [(2, 2)], marks=pytest.mark.extra),
        ((1, 3), [(2, 1)]),
        pytest.param((1, 3), [(2, 12), (2, 7)], marks=COVERED),
        pytest.param(
            *((2, 2), [(4, 7), (3, 7), (1, 7)]),
            marks=extra_on("jax", "tensorflow"),
        ),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_any_length_and_batch(on_devices, mesh, sizes):
    on_devices(mesh[0] * mesh[1], check_language_model, mesh, sizes)
