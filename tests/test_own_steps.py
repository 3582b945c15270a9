"""Steps, loops and optimizers of the user's own against one device."""

import contextlib
import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ring
from tests.thinning import extra_on

BACKEND = keras.backend.backend()
WIDTH, CLASSES = 4, 3


def outputs_of(x, classes=CLASSES):
    h = layers.Dense(WIDTH)(x)
    h = h + keras_ring.layers.RingAttention(2, 2)(h, h)
    return layers.Dense(classes)(h)


def initialised(model):
    generator = np.random.default_rng(5)
    model.set_weights(
        [generator.normal(0, 0.4, w.shape) for w in model.get_weights()]
    )
    return model


def data(rows=4, length=8):
    generator = np.random.default_rng(length)
    x = generator.normal(size=(rows, length, WIDTH)).astype("float32")
    y = generator.normal(size=(rows, length, CLASSES)).astype("float32")
    return x, y


class OwnLoss(keras.Model):
    """A loss of a mask, of the inputs and of what layers add."""

    def compute_loss(self, x, y, y_pred, sample_weight=None):
        stock = super().compute_loss(x, y, y_pred, sample_weight)
        counts = ops.cast(y > 0, "float32")
        squares = ops.square(y - y_pred) * counts
        own = ops.sum(squares) / ops.sum(counts) * ops.exp(ops.mean(x))
        return stock + own

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        self.furthest.update_state(ops.max(ops.abs(y - y_pred)))
        return results | {"furthest": self.furthest.result()}


class OwnStep(keras.Model):
    """Keras' documented way to write a step, on each backend."""

    def train_step(self, *arguments):
        return getattr(self, f"_{BACKEND}_step")(*arguments)

    def loss_of(self, x, y):
        predictions = self(x, training=True)
        plain = ops.mean(ops.square(y - predictions))
        # In a step a loss object knows what the model has given.
        known = keras.losses.MeanAbsoluteError()(y, predictions)
        whole = keras_ring.ops.gather_batch(predictions)
        return plain + known + 0.1 * ops.exp(ops.mean(whole))

    def _tensorflow_step(self, data):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = self.loss_of(*data)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply(gradients, self.trainable_weights)
        self.tracked.update_state(loss)
        return {"loss": self.tracked.result()}

    def _torch_step(self, data):
        import torch

        self.zero_grad()
        loss = self.loss_of(*data)
        loss.backward()
        variables = self.trainable_weights
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in variables], variables)
        self.tracked.update_state(loss)
        return {"loss": self.tracked.result()}

    def _jax_step(self, state, data):
        import jax

        weights, fixed, slots, counts = state

        def loss_and_fixed(weights):
            mapping = zip(self.trainable_variables, weights, strict=True)
            with keras.StatelessScope(mapping):
                return self.loss_of(*data)

        loss, gradients = jax.value_and_grad(loss_and_fixed)(weights)
        weights, slots = self.optimizer.stateless_apply(
            slots, gradients, weights
        )
        state = zip(self.metrics_variables, counts, strict=True)
        with keras.StatelessScope(state) as scope:
            self.tracked.update_state(loss)
            logs = {"loss": self.tracked.result()}
        counts = [scope.get_current_value(v) for v in self.metrics_variables]
        return logs, (weights, fixed, slots, counts)


def own_loss():
    x = keras.Input((None, WIDTH))
    model = OwnLoss(x, outputs_of(x))
    model.furthest = keras.metrics.Sum(name="furthest")
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return model


def own_step():
    x = keras.Input((None, WIDTH))
    model = OwnStep(x, outputs_of(x))
    model.tracked = keras.metrics.Mean(name="tracked")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def with_optimizer(**options):
    """Clipping sees the accumulated gradient; an embedding's is sparse on
    TensorFlow."""
    tokens = keras.Input((None,), dtype="int32")
    h = layers.Embedding(5, WIDTH)(tokens)
    model = keras.Model(tokens, outputs_of(h))
    # Not Adam, which makes whole steps of the noise in the keys' biases.
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9, **options), "mse")
    return model


OPTIMIZERS = {
    "accumulated": {"gradient_accumulation_steps": 3, "global_clipnorm": 0.1},
    "averaged": {"use_ema": True, "ema_momentum": 0.5},
    "overwritten": {
        "use_ema": True,
        "ema_momentum": 0.5,
        "ema_overwrite_frequency": 2,
        "weight_decay": 0.01,
    },
    "both": {
        "gradient_accumulation_steps": 2,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
    },
}


def fitted(build, x, y, steps=4):
    """What a model logs, and its weights after some steps."""
    model = initialised(build())
    logs = model.fit(
        x, y, batch_size=len(x), epochs=steps, verbose=0, shuffle=False
    ).history
    logs["evaluated"] = model.evaluate(x, y, verbose=0, batch_size=len(x))
    return logs, model.get_weights()


def compare(have, want):
    logs, weights = have
    assert set(logs) == set(want[0])
    for name, values in want[0].items():
        np.testing.assert_allclose(
            np.ravel(logs[name]), np.ravel(values), rtol=1e-5, err_msg=name
        )
    for got, wanted in zip(weights, want[1], strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-6)


def scope(mesh):
    return keras_ring.DistributedStrategy(
        data_parallel=mesh[0], sequence_parallel=mesh[1]
    ).scope()


def check_own_loss(mesh, rows, length):
    x, y = data(rows, length)
    want = fitted(own_loss, x, y)
    with scope(mesh):
        have = fitted(own_loss, x, y)
    compare(have, want)


@pytest.mark.filterwarnings("ignore:.*may look at several:UserWarning")
@pytest.mark.parametrize(
    ("mesh", "rows", "length"),
    [
        pytest.param((1, 2), 2, 8, marks=extra_on("tensorflow")),
        ((2, 2), 3, 7),
    ],
)
def test_compute_loss_of_the_models_own(on_devices, mesh, rows, length):
    on_devices(mesh[0] * mesh[1], check_own_loss, mesh, rows, length)


def check_own_step(mesh):
    x, y = data()
    want = fitted(own_step, x, y)
    with (
        scope(mesh),
        pytest.warns(UserWarning, match="gather_batch")
        if (BACKEND != "jax")
        else contextlib.nullcontext(),
    ):
        have = fitted(own_step, x, y)
    compare(have, want)


@pytest.mark.parametrize(
    "mesh", [(1, 2), pytest.param((2, 2), marks=extra_on("tensorflow"))]
)
def test_train_step_of_the_models_own(on_devices, mesh):
    on_devices(mesh[0] * mesh[1], check_own_step, mesh)


def check_optimizer(mesh, name):
    x = np.arange(4 * 8).reshape(4, 8) % 5
    _, y = data()
    build = functools.partial(with_optimizer, **OPTIMIZERS[name])
    want = fitted(build, x, y, steps=5)
    with scope(mesh):
        have = fitted(build, x, y, steps=5)
    compare(have, want)


# The others do what these do, and more.
SIMPLE = extra_on("tensorflow")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("accumulated", marks=SIMPLE),
        pytest.param("averaged", marks=SIMPLE),
        pytest.param("overwritten", marks=extra_on("tensorflow")),
        "both",
    ],
)
def test_accumulated_gradients_and_moving_averages(on_devices, name):
    on_devices(2, check_optimizer, (1, 2), name)


def sparse():
    """Rows of an embedding that are asked for many times: what squares their
    gradients must see what one device sees."""
    tokens = keras.Input((None,), dtype="int32")
    h = layers.Dense(7, activation="relu")(layers.Embedding(5, WIDTH)(tokens))
    model = keras.Model(tokens, layers.Dense(CLASSES)(h))
    model.compile(keras.optimizers.Adam(0.05), "mse")
    return model


def check_sparse(mesh):
    x = np.arange(4 * 8).reshape(4, 8) % 5
    _, y = data()
    want = fitted(sparse, x, y)
    with scope(mesh):
        have = fitted(sparse, x, y)
    compare(have, want)


def test_gradients_of_rows_that_come_many_times(on_devices):
    on_devices(2, check_sparse, (1, 2))


def step_of(model, optimizer, loss_of):
    """One step of a loop of one's own, for `strategy.run`."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function
        def step(x, y):
            with tf.GradientTape() as tape:
                loss = loss_of(y, model(x, training=True))
                scaled = optimizer.scale_loss(loss)
            gradients = tape.gradient(scaled, model.trainable_weights)
            # Keras takes variables that can be gone through once.
            optimizer.apply(gradients, iter(model.trainable_weights))
            return loss

        return step
    import torch

    def step(x, y):
        model.zero_grad()
        loss = loss_of(y, model(x, training=True))
        optimizer.scale_loss(loss).backward()
        variables = model.trainable_weights
        with torch.no_grad():
            gradients = [v.value.grad for v in variables]
            optimizer.apply(gradients, iter(variables))
        return loss.detach()

    return step


def looped(run, losses, x, y):
    inputs = keras.Input((None, WIDTH))
    model = initialised(keras.Model(inputs, outputs_of(inputs)))
    optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
    optimizer.build(model.trainable_variables)
    values = [
        float(keras.ops.convert_to_numpy(run(step, x, y)))
        for step in (step_of(model, optimizer, loss) for loss in losses)
        # What was compiled for the first time serves the second.
        for _ in range(2)
    ]
    return {"loss": values}, model.get_weights()


def check_loop(mesh, rows, length, in_run):
    x, y = (ops.convert_to_tensor(part) for part in data(rows, length))
    losses = [keras.losses.MeanSquaredError()]
    if in_run:  # A loss of one's own is a function of the whole batch.
        losses.append(
            lambda y, p: ops.exp(
                ops.mean(
                    ops.abs(
                        keras_ring.ops.gather_batch(p)
                        - keras_ring.ops.gather_batch(y)
                    )
                )
            )
        )
    plain = looped(lambda step, x, y: step(x, y), losses, x, y)
    strategy = keras_ring.DistributedStrategy(
        data_parallel=mesh[0], sequence_parallel=mesh[1]
    )
    with strategy.scope():
        run = strategy.run if in_run else lambda step, x, y: step(x, y)
        have = looped(run, losses, x, y)
    compare(have, plain)


def check_metrics_in_run():
    """What counts a part is told of; what is gathered is right."""
    strategy = keras_ring.DistributedStrategy(sequence_parallel=2)
    x = np.arange(8.0, dtype="float32").reshape(1, 8)
    with strategy.scope():
        own, whole = keras.metrics.Mean(name="part"), keras.metrics.Mean()

        def step(x, gather):
            metric = whole if gather else own
            metric.update_state(keras_ring.ops.gather_batch(x) if gather else x)
            return ops.mean(x)

        with pytest.warns(UserWarning, match="'part'.*this device's part"):
            strategy.run(functools.partial(step, gather=False), x)
        strategy.run(functools.partial(step, gather=True), x)
        assert float(whole.result()) == x.mean()


@pytest.mark.skipif(
    BACKEND != "torch", reason="metrics count everything, or are added up"
)
def test_a_metric_that_counts_a_part_is_told_of(on_devices):
    on_devices(2, check_metrics_in_run)


@pytest.mark.skipif(
    BACKEND != "tensorflow", reason="compiled at each call, or never"
)
def test_a_tf_function_is_traced_once(on_devices):
    on_devices(2, check_traces)


def check_traces():
    import tensorflow as tf

    seen = []

    def step(x):
        seen.append(x.shape)
        return ops.mean(x)

    strategy = keras_ring.DistributedStrategy(sequence_parallel=2)
    compiled = tf.function(step)
    short, long = np.ones((2, 4, 3)), np.ones((2, 8, 3))
    # Each of two replicas traces.
    for x, traces in ((short, 2), (short, 2), (long, 4), (long, 4), (short, 4)):
        assert float(strategy.run(compiled, x)) == 1.0
        assert len(seen) <= traces
    with pytest.raises(ValueError, match="jit_compile=True in strategy"):
        strategy.run(tf.function(step, jit_compile=True), short)
    for _ in range(2):
        strategy.run(step, short)
    with pytest.warns(UserWarning, match=r"at each call.*@tf\.function"):
        strategy.run(step, short)


@pytest.mark.skipif(
    BACKEND == "jax", reason="on JAX a loop sees whole tensors, as on a device"
)
@pytest.mark.parametrize(
    ("mesh", "rows", "length", "in_run"),
    [
        pytest.param((1, 2), 2, 8, True, id="run"),
        pytest.param((2, 2), 3, 7, True, id="run-padded"),
        pytest.param(
            (1, 2),
            2,
            8,
            False,
            id="scope",
            marks=pytest.mark.skipif(
                BACKEND == "tensorflow",
                reason="TensorFlow has gradients of mirrored variables on "
                "replicas only",
            ),
        ),
    ],
)
def test_a_loop_of_ones_own(on_devices, mesh, rows, length, in_run):
    on_devices(mesh[0] * mesh[1], check_loop, mesh, rows, length, in_run)


def classifier():
    x = keras.Input((None, WIDTH))
    h = layers.Dense(WIDTH)(x)
    h = h + keras_ring.layers.RingAttention(2, 2)(h, h)
    h = keras_ring.layers.Gathered(layers.GlobalAveragePooling1D())(h)
    model = keras.Model(x, layers.Dense(CLASSES, activation="softmax")(h))
    model.compile(
        keras.optimizers.SGD(0.1),
        "categorical_crossentropy",
        metrics=[
            keras.metrics.F1Score(name="f1"),
            keras.metrics.R2Score(name="r2"),
            keras.metrics.AUC(thresholds=[0.4], name="auc"),
        ],
    )
    return model


def check_classifier(mesh, rows):
    """Rows in batches of four: the last batch of seven has 3, one device
    fewer than the other; that of five has 1, which leaves one without."""
    x, _ = data(rows, 6)
    y = np.eye(CLASSES, dtype="float32")[np.arange(rows) % CLASSES]
    results = []
    for context in (None, mesh):
        with scope(context) if context else keras.name_scope("alone"):
            model = initialised(classifier())
            results.append(
                model.fit(x, y, batch_size=4, verbose=0, shuffle=False).history
                | model.evaluate(
                    x, y, batch_size=4, verbose=0, return_dict=True
                )
            )
    for name, want in results[0].items():
        np.testing.assert_allclose(
            np.ravel(results[1][name]), np.ravel(want), rtol=1e-5, err_msg=name
        )


FEWER = extra_on("jax", "tensorflow")


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [
        ((2, 1), 5),
        pytest.param((2, 1), 7, marks=FEWER),
        pytest.param((1, 2), 5, marks=FEWER),
        pytest.param((1, 2), 7, marks=pytest.mark.extra),
    ],
)
def test_devices_without_a_row(on_devices, mesh, rows):
    on_devices(2, check_classifier, mesh, rows)


def check_overflow(mesh):
    """The largest scale at which no gradient overflows is that of one
    device."""
    scales = []
    for context in (None, mesh):
        with scope(context) if context else keras.name_scope("alone"):
            x = keras.Input((None, WIDTH))
            h = layers.Dense(WIDTH, dtype="mixed_float16")(x)
            h = keras_ring.layers.RingAttention(2, 2, dtype="mixed_float16")(
                h, h
            )
            h = layers.Dense(CLASSES, dtype="mixed_float16")(h)
            model = keras.Model(x, h)
            optimizer = keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(1e-4), initial_scale=2.0**22
            )
            model.compile(optimizer, "mse")
            initialised(model)
            inputs, labels = data()
            found = []
            for _ in range(8):
                model.train_on_batch(inputs, labels)
                found.append(float(optimizer.dynamic_scale.numpy()))
            scales.append(found)
    assert len(set(scales[0])) > 2  # There were overflows.
    assert scales[0] == scales[1]


def test_float16_overflows_where_one_device_does(on_devices):
    on_devices(2, check_overflow, (1, 2))
