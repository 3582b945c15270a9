"""`fit`, `evaluate`, `predict` under a strategy against one device."""

import functools

import keras
import numpy as np
import pytest

import keras_ring
from tests import worlds
from tests.language_model import (
    batch,
    initial_weights,
    language_model,
    numpy_loss,
)
from tests.thinning import extra_on

# (data, sequence): the meshes that the backend has devices for.
MESHES = [
    mesh
    for mesh in ((1, 3), (1, 2), (2, 2), (1, 4), (1, 8))
    if mesh[0] * mesh[1] <= worlds.DEVICES
]
LENGTH = 24
BATCH = 4


class Losses(keras.callbacks.Callback):
    """The running mean of the loss after every step."""

    def on_train_begin(self, logs=None):
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(logs["loss"]))


def train(model, data, validation, **options):
    """Ten Adam steps and everything that comes of them."""
    model.set_weights(initial_weights(model))
    losses = Losses()
    history = model.fit(
        data[0],
        data[1],
        sample_weight=data[2],
        batch_size=BATCH,
        epochs=2,
        shuffle=True,
        verbose=0,
        validation_data=validation,
        callbacks=[losses],
        **options,
    )
    evaluated = model.evaluate(
        *validation[:2],
        sample_weight=validation[2],
        batch_size=BATCH,
        verbose=0,
    )
    return {
        "losses": np.array(losses.values),
        "history": np.array(
            [history.history[k] for k in sorted(history.history)]
        ),
        "evaluated": np.array(evaluated),
        "predicted": np.asarray(
            model.predict(validation[0], batch_size=BATCH, verbose=0)
        ),
        "weights": model.get_weights(),
    }


def compare(got, want):
    np.testing.assert_allclose(got["losses"], want["losses"], rtol=1e-5)
    np.testing.assert_allclose(
        got["history"], want["history"], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        got["evaluated"], want["evaluated"], rtol=1e-5, atol=1e-6
    )
    assert got["predicted"].shape == want["predicted"].shape
    np.testing.assert_allclose(got["predicted"], want["predicted"], atol=1e-4)
    for have, target in zip(got["weights"], want["weights"], strict=True):
        np.testing.assert_allclose(have, target, atol=1e-4)


@functools.cache
def one_device(samples, optimizer):
    """Training with stock attention on one device, once per process."""
    keras.utils.set_random_seed(7)
    return train(
        language_model("stock", optimizer=optimizer),
        batch(samples, LENGTH),
        batch(BATCH, LENGTH, seed=1),
    )


def check_parity(data_size, sequence_size, samples, optimizer):
    want = one_device(samples, optimizer)
    assert len(want["losses"]) == 10
    assert want["losses"][-1] < want["losses"][0]
    keras.utils.set_random_seed(7)
    strategy = keras_ring.DistributedStrategy(
        data_parallel=data_size, sequence_parallel=sequence_size
    )
    with strategy.scope():
        got = train(
            language_model("ring", optimizer=optimizer),
            batch(samples, LENGTH),
            batch(BATCH, LENGTH, seed=1),
        )
    compare(got, want)


# On TensorFlow the test below does all of it, with SGD.
@pytest.mark.mostly(mesh=(2, 2))
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(
            mesh, marks=extra_on("tensorflow"), id=f"{mesh[0]}x{mesh[1]}"
        )
        for mesh in MESHES
    ],
)
def test_training_equals_one_device(on_devices, mesh):
    on_devices(mesh[0] * mesh[1], check_parity, *mesh, 5 * BATCH, "adam")


@pytest.mark.parametrize(
    "mesh", [pytest.param((2, 2), marks=extra_on("tensorflow"))], ids=["2x2"]
)
def test_training_with_a_smaller_last_batch(on_devices, mesh):
    """On TensorFlow `test_lengths` has such batches."""
    on_devices(4, check_parity, *mesh, 5 * BATCH - 2, "sgd")


def check_same_loss(sequence_size):
    """The loss is that of NumPy in float64, so it is that of every backend."""
    tokens, labels, weights = batch(4, LENGTH)
    strategy = keras_ring.DistributedStrategy(sequence_parallel=sequence_size)
    with strategy.scope():
        model = language_model("ring", dense=True, optimizer="sgd")
        model.set_weights(initial_weights(model))
        loss = model.evaluate(
            tokens, labels, sample_weight=weights, batch_size=4, verbose=0
        )[0]
        stepped = model.train_on_batch(tokens, labels, sample_weight=weights)
    want = numpy_loss(initial_weights(model), tokens, labels, weights)
    np.testing.assert_allclose(float(loss), want, rtol=1e-5)
    np.testing.assert_allclose(float(stepped[0]), want, rtol=1e-5)


@pytest.mark.parametrize(
    "size", [pytest.param(1, marks=extra_on("tensorflow")), 3]
)
def test_loss_is_the_same_on_every_backend(on_devices, size):
    on_devices(size, check_same_loss, size)


def check_small_model():
    """All that Keras' trainer is used for, in as few and small programs as
    can be."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(6, 5, 2)).astype("float32")
    y = (draw.normal(size=(6, 5, 1)) > 0).astype("float32")

    def outcome():
        inputs = keras.Input((None, 2))
        h = keras_ring.layers.RingAttention(1, 2, causal=True)(inputs, inputs)
        outputs = keras.layers.Dense(1, "sigmoid")(h)
        model = keras.Model(inputs, outputs)
        model.set_weights(initial_weights(model))
        hits = keras.metrics.TruePositives(name="hits")
        model.compile("sgd", "binary_crossentropy", metrics=[hits])
        history = model.fit(
            x, y, batch_size=3, epochs=2, verbose=0, validation_data=(x, y)
        )
        logs = [history.history[name][-1] for name in sorted(history.history)]
        predicted = model.predict(x, batch_size=6, verbose=0)
        return [logs, predicted, *model.get_weights()]

    keras.utils.set_random_seed(7)
    want = outcome()
    keras.utils.set_random_seed(7)
    with keras_ring.DistributedStrategy(sequence_parallel=2).scope():
        got = outcome()
    for have, target in zip(got, want, strict=True):
        np.testing.assert_allclose(have, target, rtol=1e-5, atol=1e-6)


# One of those that `python -m tests --quick` runs.
@pytest.mark.extra
def test_a_small_model_from_fit_to_predict(on_devices):
    on_devices(2, check_small_model)


def sources(data):
    """The same batches from everything that `fit` takes."""
    import tensorflow as tf

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(data[0]) // BATCH

        def __getitem__(self, index):
            rows = slice(index * BATCH, (index + 1) * BATCH)
            return tuple(part[rows] for part in data)

    def generator():
        for i in range(0, len(data[0]), BATCH):
            yield tuple(part[i : i + BATCH] for part in data)

    known = tf.data.Dataset.from_tensor_slices(data).batch(BATCH)
    unknown = tf.data.Dataset.from_generator(
        generator,
        output_signature=(
            tf.TensorSpec((None, None), tf.int32),
            tf.TensorSpec((None, None), tf.int32),
            tf.TensorSpec((None, None), tf.float32),
        ),
    )
    return {
        "tf.data": known,
        "tf.data of unknown shape": unknown,
        "PyDataset": Batches(),
        "generator": generator(),
    }


def check_sources(data_size, sequence_size):
    data = batch(8, LENGTH)
    strategy = keras_ring.DistributedStrategy(
        data_parallel=data_size, sequence_parallel=sequence_size
    )
    with strategy.scope():
        model = language_model("ring", optimizer="sgd")
        weights = initial_weights(model)

        def outcome(source, **options):
            model.set_weights(weights)
            history = model.fit(source, verbose=0, shuffle=False, **options)
            return history.history["loss"], model.get_weights()

        want_loss, want_weights = outcome(
            data[0], y=data[1], sample_weight=data[2], batch_size=BATCH
        )
        for name, source in sources(data).items():
            got_loss, got_weights = outcome(source)
            np.testing.assert_allclose(
                got_loss, want_loss, rtol=1e-6, err_msg=name
            )
            for have, want in zip(got_weights, want_weights, strict=True):
                np.testing.assert_allclose(have, want, atol=1e-6, err_msg=name)
        inputs = sources(data)["tf.data"].map(lambda x, y, w: x)
        np.testing.assert_allclose(
            model.predict(inputs, verbose=0),
            model.predict(data[0], batch_size=BATCH, verbose=0),
            atol=1e-6,
        )
        np.testing.assert_allclose(
            model.predict_on_batch(data[0][:BATCH]),
            model.predict(data[0][:BATCH], verbose=0),
            atol=1e-6,
        )
        np.testing.assert_allclose(
            model.test_on_batch(*data),
            model.evaluate(*data[:2], sample_weight=data[2], verbose=0),
            rtol=1e-5,
        )


# Each replica is traced on TensorFlow.
@pytest.mark.mostly(
    mesh=(1, 2) if keras.backend.backend() == "tensorflow" else (2, 2)
)
@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=["1x2", "2x2"])
def test_every_source_of_data(on_devices, mesh):
    on_devices(mesh[0] * mesh[1], check_sources, *mesh)


def check_save_and_load(size, folder):
    data = batch(4, LENGTH)
    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        model = language_model("ring")
        model.set_weights(initial_weights(model))
        model.fit(*data[:2], batch_size=4, epochs=2, verbose=0)
        path = f"{folder}/model.keras"
        model.save(path)
        want = model.predict(data[0], verbose=0)
        again = keras.saving.load_model(path)
        np.testing.assert_allclose(
            again.predict(data[0], verbose=0), want, atol=1e-6
        )
        model.fit(*data[:2], batch_size=4, verbose=0)
        again.fit(*data[:2], batch_size=4, verbose=0)
        for have, target in zip(
            again.get_weights(), model.get_weights(), strict=True
        ):
            np.testing.assert_allclose(have, target, atol=1e-6)
    alone = keras.saving.load_model(path)
    np.testing.assert_allclose(
        alone.predict(data[0], verbose=0), want, atol=1e-5
    )


@pytest.mark.mostly(size=2)
@pytest.mark.parametrize("size", [1, 2])
def test_save_and_load(on_devices, size, tmp_path):
    on_devices(size, check_save_and_load, size, str(tmp_path))


class OwnStep(keras.Model):
    """A model that computes its steps itself, so that nothing of them can be
    kept from padding."""

    def train_step(self, *args):
        return super().train_step(*args)


def own_step_model():
    model = language_model("ring")
    own = OwnStep(model.inputs, model.outputs)
    own.compile(
        "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return own


def check_refusals():
    """Bad input is refused with its values, and the model goes on working."""
    strategy = keras_ring.DistributedStrategy(
        data_parallel=2, sequence_parallel=2
    )
    data = batch(8, LENGTH)
    odd = data[0][:, :23], data[1][:, :23]
    outside = language_model("ring")
    with strategy.scope():
        with pytest.raises(ValueError, match="outside any scope"):
            outside.fit(*data, batch_size=4, verbose=0)
        model = own_step_model()
        before = model.get_weights()
        # Where a layer sees the whole sequence nothing is padded.
        calls = [
            lambda: model.fit(*odd, batch_size=4, verbose=0),
            lambda: model.train_on_batch(*odd),
            lambda: model.fit(*data[:2], batch_size=3, verbose=0),
            lambda: model.fit(data[0][:5], data[1][:5], verbose=0),
            lambda: model.fit(
                *data[:2],
                batch_size=4,
                verbose=0,
                validation_data=(data[0][:5], data[1][:5]),
            ),
        ]
        for call in calls if strategy.world.layers_see_shards else []:
            with pytest.raises(NotImplementedError, match="own train_step"):
                call()
        for have, want in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(have, want)
        history = model.fit(*data[:2], batch_size=4, verbose=0)
        assert np.isfinite(history.history["loss"]).all()


def test_bad_input_is_refused_and_the_model_goes_on(on_devices):
    on_devices(4, check_refusals)


def check_too_many_devices():
    strategy = keras_ring.DistributedStrategy(sequence_parallel=64)
    with pytest.raises(ValueError, match="64 devices"):
        strategy.world  # noqa: B018


def test_more_devices_than_there_are(on_devices):
    on_devices(2, check_too_many_devices)


def check_bad_second_batch():
    """A generator's batches are checked one by one, as they come."""
    strategy = keras_ring.DistributedStrategy(sequence_parallel=2)
    data = batch(8, LENGTH)

    def generator(first):
        if first:
            yield data[0][:4], data[1][:4]
        yield data[0][:4, :23], data[1][:4, :23]

    with strategy.scope():
        model = own_step_model()
        for first in (False, True):
            if strategy.world.layers_see_shards:
                with pytest.raises(NotImplementedError, match="own train_step"):
                    model.fit(generator(first), verbose=0)
            history = model.fit(*data[:2], batch_size=4, verbose=0)
            assert np.isfinite(history.history["loss"]).all()


def test_a_bad_batch_of_a_generator_is_refused(on_devices):
    on_devices(2, check_bad_second_batch)
