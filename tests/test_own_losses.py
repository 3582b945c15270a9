"""Losses and metrics of every kind under a strategy against one device.

Each output of one model has a loss of its own, so that a single program tells
the value of each and their gradients together.
"""

import functools
import os
import re
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ring
from tests.thinning import extra_on

CLASSES = 7
WIDTH = 6
SCE = functools.partial(
    keras.losses.sparse_categorical_crossentropy, from_logits=True
)


def masked_mean(y, p):
    counts = ops.cast(y > 2, "float32")
    return ops.sum(SCE(y, p) * counts) / ops.sum(counts)


def shifted(y, p):
    return SCE(y[:, 1:], p[:, :-1])


def shifted_mean(y, p):
    return ops.mean(shifted(y, p))


def of_sequence(y, p):
    """The log-probability of a sample, as preference training needs it."""
    return ops.sum(SCE(y, p), -1)


def last_position(y, p):
    return SCE(y[:, -1], p[:, -1])


def mean(y, p):
    return ops.mean(SCE(y, p))


def worst_position(y, p):
    return ops.max(SCE(y, p), axis=1)


def between_samples(y, p):
    """Of pairs of samples, as a contrastive loss is."""
    pooled = ops.mean(p, axis=1)
    return ops.logsumexp(ops.matmul(pooled, ops.transpose(pooled)), -1)


def by_position(y, p):
    return SCE(y, p)


by_position.sequence_parallel_safe = True


class Perplexity(keras.losses.Loss):
    def call(self, y, p):
        return ops.exp(ops.mean(SCE(y, p)))


class SafeLoss(keras.losses.Loss):
    sequence_parallel_safe = True

    def call(self, y, p):
        return SCE(y, p)


# Name, the loss, and whether its labels are classes.
LOSSES = [
    ("stock", keras.losses.SparseCategoricalCrossentropy(True), True),
    ("masked", masked_mean, True),
    ("shifted", shifted, True),
    ("shifted_mean", shifted_mean, True),
    ("of_sequence", of_sequence, True),
    ("last", last_position, True),
    ("mean", mean, True),
    ("worst", worst_position, True),
    ("between", between_samples, True),
    ("safe", by_position, True),
    ("class", Perplexity(), True),
    ("safe_class", SafeLoss(), True),
    ("class_sum", Perplexity(reduction="sum"), True),
    ("sum", keras.losses.SparseCategoricalCrossentropy(True, reduction="sum"),
     True),
    ("partial", functools.partial(SCE, ignore_class=3), True),
    ("along_length", keras.losses.CosineSimilarity(axis=1), False),
    ("crossentropy_along_length",
     keras.losses.CategoricalCrossentropy(axis=1), False),
    ("cosine", keras.losses.CosineSimilarity(), False),
    ("dice", keras.losses.Dice(), False),
    ("tversky", "tversky", False),
    ("hinge", "hinge", False),
    ("mse", "mse", False),
    ("kl", keras.losses.KLDivergence(), False),
    ("huber", keras.losses.huber, False),
]  # fmt: skip


class Largest(keras.metrics.Metric):
    """The largest of all values: a state that does not add up."""

    def __init__(self, name="largest"):
        super().__init__(name=name)
        self.value = self.add_variable((), "zeros", name="value")
        self.start = self.add_variable((), "ones", name="start")

    def update_state(self, y, p, sample_weight=None):
        self.value.assign(ops.maximum(self.value, ops.max(ops.abs(p))))
        self.start.assign(self.start * 2.0)

    def result(self):
        return self.value + self.start

    def reset_state(self):
        self.value.assign(0.0)
        self.start.assign(1.0)


class Ratio(keras.metrics.Mean):
    """A mean that its own code computes."""

    def update_state(self, y, p, sample_weight=None):
        super().update_state(ops.sum(SCE(y, p), -1))


def perplexity(y, p):
    return ops.exp(ops.mean(SCE(y, p)))


def metrics():
    """Metrics by output, made anew: they have a state."""
    return {
        "stock": ["accuracy", "sparse_categorical_crossentropy"],
        "masked": [perplexity, masked_mean, last_position, of_sequence],
        "shifted": [shifted, Largest(), Ratio(name="ratio")],
        "along_length": [
            keras.metrics.CosineSimilarity(axis=1, name="along_length"),
            keras.metrics.CosineSimilarity(name="of_position"),
            keras.metrics.RootMeanSquaredError(name="rms"),
            keras.metrics.AUC(name="auc", thresholds=[0.3, 0.6]),
        ],
    }


def model_of(losses, **options):
    x = keras.Input((None, WIDTH))
    h = layers.Dense(WIDTH)(x)
    h = h + keras_ring.layers.RingAttention(2, 3)(h, h)
    logits = layers.Dense(CLASSES)(h)
    outputs, names = [], []
    for name, _, of_classes in losses:
        kind = "linear" if of_classes else "softmax"
        outputs.append(layers.Activation(kind, name=name)(logits))
        names.append(name)
    model = keras.Model(x, outputs)
    model.compile(
        keras.optimizers.SGD(1e-3),
        dict(zip(names, [loss for _, loss, _ in losses], strict=True)),
        metrics={k: v for k, v in metrics().items() if k in names},
        **options,
    )
    generator = np.random.default_rng(5)
    model.set_weights(
        [generator.normal(0, 0.4, w.shape) for w in model.get_weights()]
    )
    return model


def data(rows, length, losses=LOSSES):
    generator = np.random.default_rng(length)
    x = generator.normal(size=(rows, length, WIDTH)).astype("float32")
    classes = ((np.arange(rows * length) * 3) % CLASSES).reshape(rows, length)
    one_hot = np.eye(CLASSES, dtype="float32")[classes]
    y = {
        name: classes if of_classes else one_hot
        for name, _, of_classes in losses
    }
    return x, y


def trained(rows, length, evaluate, losses, **options):
    """The logs of two steps, or of an evaluation, and the weights."""
    model = model_of(losses, **options)
    x, y = data(rows, length, losses)
    if evaluate:
        logs = [model.evaluate(x, y, return_dict=True, verbose=0)]
    else:
        logs = [model.train_on_batch(x, y, return_dict=True) for _ in range(2)]
    return logs, model.get_weights()


def check(mesh, rows, length, evaluate, names):
    losses = [loss for loss in LOSSES if not names or loss[0] in names]
    # Eagerly, since it runs once.
    want_logs, want_weights = trained(
        rows, length, evaluate, losses, run_eagerly=True
    )
    strategy = keras_ring.DistributedStrategy(
        data_parallel=mesh[0], sequence_parallel=mesh[1]
    )
    with strategy.scope():
        logs, weights = trained(rows, length, evaluate, losses)
    wrong = []
    for step, (have, want) in enumerate(zip(logs, want_logs, strict=True)):
        assert set(have) == set(want)
        wrong += [
            f"{name} of {step}: {float(have[name])}, not {float(want[name])}"
            for name in want
            if not np.isclose(float(have[name]), float(want[name]), rtol=1e-5)
        ]
    assert not wrong, "\n".join(wrong)
    for have, want in zip(weights, want_weights, strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-5, atol=2e-6)


# On JAX losses see whole tensors: a few of them, split both ways, will do. On
# TensorFlow each loss is a program more, and which are gathered is decided in
# code that it shares with PyTorch.
WHOLE = extra_on("jax", "tensorflow")
FEW = ("masked", "shifted", "between", "safe", "stock", "along_length")


@pytest.mark.parametrize(
    ("mesh", "rows", "length", "evaluate", "names"),
    [
        pytest.param(
            *((1, 2), 2, 7, False, ()), id="sequence-padded", marks=WHOLE
        ),
        pytest.param(
            *((1, 2), 2, 8, True, FEW),
            id="sequence",
            marks=extra_on("jax", "tensorflow"),
        ),
        pytest.param(
            *((2, 1), 3, 5, False, FEW),
            id="batch-padded",
            marks=extra_on("jax", "tensorflow"),
        ),
        pytest.param((2, 2), 3, 7, True, FEW, id="both-padded"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*may look at several:UserWarning")
def test_any_loss_and_metric_is_that_of_one_device(
    on_devices, mesh, rows, length, evaluate, names
):
    on_devices(mesh[0] * mesh[1], check, mesh, rows, length, evaluate, names)


def gathered_by(loss):
    """The shapes of what is gathered in a step with a loss, and the warnings
    of it."""
    from keras_ring.backends import load

    transport = load().transport.RingTransport
    original, shapes = transport.all_gather, []

    def all_gather(self, tensor, axis):
        shapes.append(tuple(tensor.shape))
        return original(self, tensor, axis)

    model = model_of([("out", loss, True)])
    x, y = data(2, 8, [("out", loss, True)])
    transport.all_gather = all_gather
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                model.train_on_batch(x, y["out"])
    finally:
        transport.all_gather = original
    return shapes, [str(w.message) for w in caught if "gathers" in str(w)]


def check_what_is_gathered():
    with keras_ring.DistributedStrategy(sequence_parallel=2).scope():
        for loss in ("sparse_categorical_crossentropy", by_position):
            assert gathered_by(loss) == ([], [])
        shapes, told = gathered_by(masked_mean)
    # Predictions (2, 4, 7) and labels (2, 4) of each device.
    assert (1, 2, 4, CLASSES) in shapes
    first = int(os.environ.get("RANK", 0)) == 0
    assert len(told) == int(first)
    if first:
        size = 2 * 8 * (CLASSES + 1) * 4
        assert "masked_mean" in told[0]
        assert "sequence_parallel_safe = True" in told[0]
        # Labels may be of 8 bytes; of an open length those of a position.
        assert re.search(rf"({size}|{size + 64}|\d+) bytes", told[0])


@pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="on JAX losses see whole tensors, and nothing is gathered by us",
)
def test_only_what_is_not_position_wise_is_gathered(on_devices):
    on_devices(2, check_what_is_gathered)
