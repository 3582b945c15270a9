"""Chunked cross-entropy against float64 NumPy and the losses of Keras."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring.layers import LanguageModelHead
from keras_ring.losses import ChunkedCrossEntropy
from tests import worlds
from tests.attention_layers import normal
from tests.gradients import in_dtype, vjp
from tests.thinning import extra_on

BATCH, LENGTH, WIDTH, CLASSES = 2, 12, 6, 19
RINGS = [size for size in (2, 4) if size <= worlds.DEVICES]
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


@pytest.mark.mostly(chunk_size=5, every=2)
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
    r"labels.dtype=float32": {"labels": np.zeros((BATCH, LENGTH), "f")},
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


def language_model(chunked, ignore_class=None, mask_zero=False):
    """Features from a table, and logits or a head that has them inside."""
    tokens = keras.Input((None,), dtype="int32")
    table = keras.layers.Embedding(CLASSES, WIDTH, mask_zero=mask_zero)
    x = keras.layers.Dense(WIDTH, activation="tanh")(table(tokens))
    if chunked:
        head = LanguageModelHead(CLASSES)
        x = head(x)
        loss = ChunkedCrossEntropy(
            head, ignore_class=ignore_class, chunk_size=4
        )
        metrics = None
    else:
        x = keras.layers.Dense(CLASSES)(x)
        loss = keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=ignore_class
        )
        metrics = ["accuracy"]
    model = keras.Model(tokens, x)
    model.compile(keras.optimizers.SGD(0.3), loss, metrics=metrics)
    model.set_weights(
        [normal(70 + i, *w.shape) / 2 for i, w in enumerate(model.weights)]
    )
    return model


def batch():
    draw = np.random.default_rng(8)
    tokens = draw.integers(1, CLASSES, (2 * BATCH, LENGTH)).astype("int32")
    labels = np.roll(tokens, -1, 1)
    return tokens, labels


def train(model, x, y, **options):
    history = model.fit(
        x, y, batch_size=BATCH, epochs=2, verbose=0, shuffle=False, **options
    )
    logs = {k: np.array(v) for k, v in history.history.items()}
    evaluated = model.evaluate(x, y, batch_size=BATCH, verbose=0)
    return [logs["loss"], logs["accuracy"], evaluated, *model.get_weights()]


def check_training(size, weighted):
    x, y = batch()
    options = {}
    if weighted:
        options["sample_weight"] = abs(normal(9, *y.shape))
    want = train(language_model(False), x, y, **options)
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)
    with ring.scope():
        have = train(language_model(True), x, y, **options)
    for ours, theirs in zip(have, want, strict=True):
        close(ours, theirs)


@pytest.mark.mostly(size=4, every=2)
@pytest.mark.parametrize("size", [1, *RINGS])
def test_training_equals_stock_layers(on_devices, size):
    on_devices(size, check_training, size, False)


def test_training_with_sample_weights(on_devices):
    on_devices(2, check_training, 2, True)


def test_ignored_classes_and_masks_on_one_device():
    x, y = batch()
    x[:, 9:] = 0
    want = train(language_model(False, 5, True), x, y)
    have = train(language_model(True, 5, True), x, y)
    # The accuracy of Keras counts what its loss ignores.
    for ours, theirs in zip(
        have[:1] + have[3:], want[:1] + want[3:], strict=True
    ):
        close(ours, theirs)


def check_uneven(mesh, length, rows):
    """What counts differs from device to device."""
    x, y = (array[:rows, :length] for array in batch())
    x[:, 9:] = 0
    x[0, 2:] = 0
    y[1, :5] = 5
    want = train(language_model(True, 5, True), x, y)
    ring = keras_ring.DistributedStrategy(
        data_parallel=mesh[0], sequence_parallel=mesh[1]
    )
    with ring.scope():
        have = train(language_model(True, 5, True), x, y)
    for ours, theirs in zip(have, want, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize(
    ("mesh", "length", "rows"),
    [
        ((1, 2), LENGTH, 2 * BATCH),
        pytest.param((1, 4), LENGTH, 2 * BATCH, marks=pytest.mark.extra),
        pytest.param((1, 4), 7, 2 * BATCH, marks=pytest.mark.extra),
        pytest.param(
            *((1, 4), 3, 2 * BATCH), marks=extra_on("jax", "tensorflow")
        ),
        # In the last batch half of the devices have nothing.
        pytest.param((2, 2), 7, BATCH + 1, marks=extra_on("tensorflow")),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_ignored_classes_and_masks_on_a_ring(on_devices, mesh, length, rows):
    on_devices(mesh[0] * mesh[1], check_uneven, mesh, length, rows)


def test_save_and_load(tmp_path):
    x, y = batch()
    model = language_model(True)
    path = str(tmp_path / "model.keras")
    model.save(path)
    again = keras.saving.load_model(path)
    with pytest.raises(ValueError, match=r"model.loss.bind\(model\)"):
        again.evaluate(x, y, verbose=0)
    again.loss.bind(again)
    for ours, theirs in zip(
        train(again, x, y), train(model, x, y), strict=True
    ):
        close(ours, theirs)


def test_a_loss_without_a_head_says_how_to_get_one():
    model = language_model(True)
    loss = ChunkedCrossEntropy.from_config(model.loss.get_config())
    x, y = batch()
    with pytest.raises(ValueError, match=r"loss.bind\(model\)"):
        loss(y, model(x))
    want = model.loss(y, model(x))
    close(loss.bind(model)(y, model(x)), ops.convert_to_numpy(want))


def test_logits_for_inference():
    x, _ = batch()
    stock, ours = language_model(False), language_model(True)
    close(
        ours.layers[-1].logits(ours(x)[:, -1:]),
        ops.convert_to_numpy(stock(x)[:, -1:]),
    )


def test_rounded_labels_are_refused():
    """`ignore_class` is a label, too."""
    _, y = batch()
    head = language_model(True).layers[-1]
    for ignore_class, fits in ((-256, True), (-257, False), (257, False)):
        loss = ChunkedCrossEntropy(
            head, ignore_class=ignore_class, dtype="bfloat16"
        )
        features = normal(4, *y.shape, WIDTH)
        if fits:
            loss(y, features)
        else:
            with pytest.raises(ValueError, match=f"class={ignore_class}"):
                loss(y, features)


def test_float64_is_not_rounded_to_float32():
    options = OPTIONS["everything"]
    *inputs, labels, weight = problem(**options)
    *want, want_grads = reference(*inputs, labels, weight, **options)
    with in_dtype("float64"):
        have, have_grads = vjp(
            entropy(labels, weight, 5, **options),
            [t.astype("float64") for t in inputs],
            [weight.astype("float64")] + [np.zeros_like(weight, "float64")] * 2,
        )
    for ours, theirs in zip(
        (*have, *have_grads), (*want, *want_grads), strict=True
    ):
        close(ours, theirs, tolerance=1e-13)


def test_logits_in_float64():
    features = normal(4, 3, WIDTH).astype("float64")
    with in_dtype("float64"):
        head = LanguageModelHead(CLASSES, soft_cap=2.0, dtype="float64")
        head.build((None, None, WIDTH))
        kernel = ops.convert_to_numpy(head.kernel)
        have = ops.convert_to_numpy(head.logits(features))
    want = 2.0 * np.tanh(features @ kernel / 2.0)
    np.testing.assert_allclose(have, want, atol=1e-14)
