"""Weights, gradients and what an optimizer keeps, in parts on all devices."""

import contextlib
import re
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_ring
from tests.thinning import extra_on

BACKEND = keras.backend.backend()
VOCABULARY, WIDTH, LENGTH = 32, 16, 18
pytestmark = pytest.mark.skipif(
    BACKEND == "tensorflow",
    reason="TensorFlow keeps whole variables (tests/test_strategy.py)",
)

OWN_STEPS = pytest.mark.skipif(
    BACKEND == "jax", reason="the step is one of PyTorch's"
)


class OwnStep(keras.Model):
    """With a step of the user's on PyTorch, that changes the gradients."""

    def train_step(self, batch):
        import torch

        x, y = batch
        self.zero_grad()
        loss = self.compute_loss(x, y, self(x, training=True))
        loss.backward()
        weights = self.trainable_weights
        gradients = [v.value.grad * 2 for v in weights]
        with torch.no_grad():
            self.optimizer.apply(gradients, weights)
        self._loss_tracker.update_state(loss)
        return self.compute_metrics(x, y, None)


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(1e-2),
    "everything": lambda: keras.optimizers.AdamW(
        1e-2,
        weight_decay=0.1,
        global_clipnorm=0.5,
        use_ema=True,
        ema_momentum=0.9,
        ema_overwrite_frequency=3,
    ),
    "clipnorm": lambda: keras.optimizers.SGD(
        0.1, momentum=0.9, clipnorm=0.05, gradient_accumulation_steps=2
    ),
}


def build(
    optimizer="adam", head=False, model=keras.Model, remat="feed_forward"
):
    """A small language model, compiled."""
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH)(tokens)
    x = keras_ring.layers.RingTransformerBlock(
        4, 3 * WIDTH, causal=True, rotary=True, remat=remat, use_bias=False
    )(x)
    x = keras.layers.LayerNormalization()(x)
    if head:
        logits = keras_ring.layers.LanguageModelHead(VOCABULARY)
        made = model(tokens, logits(x))
        loss = keras_ring.losses.ChunkedCrossEntropy(logits, chunk_size=8)
    else:
        made = model(tokens, keras.layers.Dense(VOCABULARY)(x))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(OPTIMIZERS[optimizer](), loss)
    return made


def data():
    draw = np.random.default_rng(0)
    x = draw.integers(0, VOCABULARY, (8, LENGTH)).astype("int32")
    return x, np.roll(x, -1, 1)


def trained(strategy, **options):
    """A model after some steps, and what it tells of them."""
    keras.utils.set_random_seed(0)
    x, y = data()
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = build(**options)
        fitted = model.fit(
            x, y, batch_size=4, epochs=2, shuffle=False, verbose=0
        )
        found = [*fitted.history["loss"]]
        # Later some are gone on JAX, after moving averages: on one device too.
        size = held(model.variables), held(model.optimizer.variables)
        found.append(model.evaluate(x, y, batch_size=4, verbose=0))
        if options.get("head"):
            found[-1] = found[-1][0]
        predicted = np.asarray(model.predict(x[:3], verbose=0))
    return model, found, predicted, size


def held(variables):
    """Bytes of variables on the device that has most of them."""
    if BACKEND == "torch":
        return sum(
            v._value.numel() * v._value.element_size() for v in variables
        )
    by_device = {}
    for variable in variables:
        for shard in variable.value.addressable_shards:
            known = by_device.get(shard.device, 0)
            by_device[shard.device] = known + shard.data.nbytes
    return max(by_device.values())


def check_training(sizes, shard, options):
    data_size, ring, way = sizes
    strategy = keras_ring.DistributedStrategy(
        data_parallel=data_size,
        sequence_parallel=ring,
        attention=way,
        shard=shard,
    )
    one, losses, predicted, whole = trained(None, **options)
    model, found, outputs, size = trained(strategy, **options)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    np.testing.assert_allclose(outputs, predicted, atol=2e-4)
    devices = data_size * ring
    assert size[1] <= 1.05 * whole[1] / devices + 16  # Counters are whole.
    weights = whole[0] / (devices if shard == "weights" else 1)
    assert 0.95 * weights <= size[0] <= 1.05 * weights
    for own, other in zip(model.variables, one.variables, strict=True):
        assert own.shape == other.shape == np.asarray(own).shape


@pytest.mark.parametrize(
    ("sizes", "shard", "options"),
    [
        ((1, 2, "ring"), "weights", {"optimizer": "everything"}),
        ((1, 2, "ring"), "optimizer", {"optimizer": "clipnorm"}),
        pytest.param(
            *((1, 2, "ring"), "weights", {"optimizer": "clipnorm"}),
            marks=extra_on("jax"),
        ),
        ((2, 2, "all_to_all"), "weights", {"head": True, "remat": "block"}),
        pytest.param(
            *((2, 2, "all_gather"), "optimizer", {"optimizer": "everything"}),
            marks=extra_on("jax"),
        ),
        pytest.param(
            *((1, 2, "ring"), "weights", {"model": OwnStep}), marks=OWN_STEPS
        ),
        pytest.param(
            *((1, 2, "ring"), "optimizer", {"model": OwnStep}), marks=OWN_STEPS
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_training_is_that_of_one_device(on_devices, sizes, shard, options):
    count = sizes[0] * sizes[1]
    on_devices(count, check_training, sizes, shard, options)


def check_half_precision(policy):
    """Scaled losses overflow on one part of a weight or another at first."""
    keras.config.set_dtype_policy(policy)
    try:
        found = {
            shard: trained(
                keras_ring.DistributedStrategy(sequence_parallel=2, shard=shard)
            )[1]
            for shard in ("none", "optimizer", "weights")
        }
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(found["optimizer"], found["none"], rtol=1e-3)
    np.testing.assert_allclose(found["weights"], found["none"], rtol=1e-3)


@pytest.mark.parametrize(
    "policy", [pytest.param("mixed_float16", marks=extra_on("jax"))]
)
def test_half_precision(on_devices, policy):
    on_devices(2, check_half_precision, policy)


def check_files(folder, shard):
    """Whole files, that load on one device and on another mesh."""
    strategy = keras_ring.DistributedStrategy(sequence_parallel=2, shard=shard)
    other = keras_ring.DistributedStrategy(
        data_parallel=2, sequence_parallel=1, shard="weights"
    )
    x, y = data()
    path = Path(folder) / "whole.keras"
    model, *_ = trained(strategy)
    with strategy.scope():
        saving = keras.callbacks.ModelCheckpoint(str(path))
        model.fit(x, y, batch_size=4, verbose=0, callbacks=[saving])
        kept = [np.asarray(v) for v in model.variables]
        slots = [np.asarray(v) for v in model.optimizer.variables]
        losses = model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
        expected = losses.history["loss"]
    for where in (None, other, strategy):
        with where.scope() if where else contextlib.nullcontext():
            loaded = keras.saving.load_model(path)
            for own, value in zip(
                [*loaded.variables, *loaded.optimizer.variables],
                [*kept, *slots],
                strict=True,
            ):
                assert own.shape == value.shape
                np.testing.assert_array_equal(np.asarray(own), value)
            if where is None and BACKEND == "torch":
                continue  # Its file is what counts; the ring has no part in it.
            again = loaded.fit(x, y, batch_size=4, shuffle=False, verbose=0)
            np.testing.assert_allclose(
                again.history["loss"], expected, rtol=1e-5
            )
            loaded.load_weights(path)
            np.testing.assert_array_equal(
                np.asarray(loaded.variables[0]), kept[0]
            )


@pytest.mark.parametrize(
    "shard", [pytest.param("optimizer", marks=extra_on("jax")), "weights"]
)
def test_files_are_whole(on_devices, tmp_path, shard):
    on_devices(2, check_files, str(tmp_path), shard)


def check_refusals():
    """PyTorch: what cannot work on parts."""
    strategy = keras_ring.DistributedStrategy(
        sequence_parallel=2, shard="weights"
    )
    x, y = data()

    def refused(match, change=None, where=None, **fit):
        with where.scope() if where else contextlib.nullcontext():
            model = build()
        with strategy.scope():
            if change:
                change(model)
            with pytest.raises(ValueError, match=match):
                model.fit(x, y, verbose=0, **fit)

    refused("must be built inside")
    refused(
        "Received: Lamb with shard='weights'",
        lambda model: model.compile(keras.optimizers.Lamb(), "mse"),
        strategy,
    )

    def constrain(model):
        model.layers[-1].kernel.constraint = keras.constraints.MaxNorm()

    refused("the constraint MaxNorm", constrain, strategy)
    refused(
        "the callback BackupAndRestore",
        where=strategy,
        callbacks=[keras.callbacks.BackupAndRestore("unused")],
    )
    refused(
        "TensorBoard with histogram_freq",
        where=strategy,
        callbacks=[keras.callbacks.TensorBoard("unused", histogram_freq=1)],
    )

    class Centred(keras.optimizers.Adam):
        def apply(self, grads, trainable_variables=None):
            return super().apply(
                [g - g.mean() for g in grads], trainable_variables
            )

    for optimizer in (
        Centred(),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.Muon()),
    ):
        refused(
            "Received: (Centred|Muon) with",
            lambda model, used=optimizer: model.compile(used, "mse"),
            strategy,
        )

    def differ(model):
        rank = strategy.world.rank
        model.set_weights([w + rank for w in model.get_weights()])

    with strategy.scope():
        model = build()
        differ(model)
        with pytest.raises(RuntimeError, match="weights of the model"):
            model.fit(x, y, verbose=0)


def orthogonal():
    """A model with weights whose numbers do not lie in order."""
    inputs = keras.Input((None, 6))
    x = keras.layers.Dense(8, kernel_initializer="orthogonal")(inputs)
    x = keras.layers.Dense(3, kernel_initializer="orthogonal")(x)
    model = keras.Model(inputs, x)
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model


def check_what_users_do():
    """Steps beside Keras' own, and layers beside the model."""
    import torch

    draw = np.random.default_rng(1)
    x = draw.normal(size=(4, 8, 6)).astype("float32")
    y = draw.normal(size=(4, 8, 3)).astype("float32")

    def after(strategy, use):
        keras.utils.set_random_seed(0)
        with strategy.scope() if strategy else contextlib.nullcontext():
            model = orthogonal()
            with contextlib.ExitStack() as outside:
                use(model, outside)
            return model.get_weights()

    def fit(model, outside):
        del outside
        model.fit(x, y, epochs=3, verbose=0)

    def beside(model, outside):
        """A loss by another model, whose weights nobody trains."""
        del outside
        flat = keras.layers.Dense(3, use_bias=False)
        flat.build((None, None, 3))

        def loss(true, predicted):
            return keras.ops.mean((flat(true) - flat(predicted)) ** 2, -1)

        model.compile(keras.optimizers.Adam(1e-2), loss)
        model.fit(x, y, epochs=3, verbose=0)

    def by_hand(model, outside):
        """A loop outside of steps, on the whole batch."""
        del outside
        weights = model.trainable_weights
        for _ in range(3):
            model.zero_grad()
            loss = ((model(torch.tensor(x)) - torch.tensor(y)) ** 2).mean()
            loss.backward()
            gradients = [v.value.grad for v in weights]
            with torch.no_grad():
                model.optimizer.apply(gradients, weights)

    uses = (fit, beside, by_hand)
    for use in uses:
        want = after(None, use)
        for shard in ("optimizer", "weights"):
            strategy = keras_ring.DistributedStrategy(
                sequence_parallel=2, shard=shard
            )
            for have, one in zip(after(strategy, use), want, strict=True):
                np.testing.assert_allclose(
                    have, one, atol=1e-5, err_msg=f"{use.__name__}, {shard}"
                )
    # Norms of float64 are not those of float32.
    with strategy.scope():
        layer = keras.layers.Dense(4, use_bias=False, dtype="float64")
        layer.build((None, 3))
        before = np.array(layer.kernel)
        optimizer = keras.optimizers.SGD(1.0, clipnorm=1e-3)
        gradient = torch.tensor(draw.normal(size=(3, 4)))
        with torch.no_grad():
            optimizer.apply([gradient], [layer.kernel])
        gradient = gradient.numpy()
        want = before - gradient * (1e-3 / np.linalg.norm(gradient))
        np.testing.assert_allclose(np.array(layer.kernel), want, rtol=1e-14)
    # An overflow in one place is one in all parts of it.
    with strategy.scope():
        layer = keras.layers.Dense(4, use_bias=False)
        layer.build((None, 3))
        before = np.array(layer.kernel)
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
        gradient = torch.ones(3, 4)
        for place in ((0, 0), (2, 3)):
            overflown = gradient.clone()
            overflown[place] = torch.inf
            with torch.no_grad():
                optimizer.apply([overflown], [layer.kernel])
            np.testing.assert_array_equal(np.array(layer.kernel), before)
        assert float(optimizer.dynamic_scale.value) == 2.0**13
        with torch.no_grad():
            optimizer.apply([gradient], [layer.kernel])
        assert (np.array(layer.kernel) < before).all()
    # Outside of the scope that the model was made in.
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = orthogonal()
    by_hand(model, None)
    for have, one in zip(
        model.get_weights(), after(None, by_hand), strict=True
    ):
        np.testing.assert_allclose(have, one, atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="JAX has no parts to see")
def test_what_users_do(on_devices):
    on_devices(2, check_what_users_do)


def check_gathered_weights_go():
    """Between forward and backward nobody holds a gathered weight."""
    import torch

    from keras_ring.backends.torch import weights

    strategy = keras_ring.DistributedStrategy(
        sequence_parallel=2, shard="weights"
    )
    seen = []

    class Counts(keras.Model):
        sequence_parallel_safe = True

        def train_step(self, batch):
            x, y = batch
            self.zero_grad()
            loss = self.compute_loss(x, y, self(x, training=True))
            weights.forget()
            seen.append(len(weights._GATHERED))
            loss.backward()
            used = self.trainable_weights
            with torch.no_grad():
                self.optimizer.apply([v.value.grad for v in used], used)
            return {"loss": loss}

    with strategy.scope():
        model = build(model=Counts)
        x, y = data()
        model.fit(x, y, batch_size=4, verbose=0)
    assert seen == [0, 0]
    assert not weights._GATHERED


@pytest.mark.skipif(BACKEND != "torch", reason="JAX's are seen in programs")
def test_gathered_weights_go(on_devices):
    on_devices(2, check_gathered_weights_go)


@pytest.mark.skipif(BACKEND != "torch", reason="JAX takes all of these")
def test_what_cannot_work_on_parts_is_refused(on_devices):
    on_devices(2, check_refusals)


@pytest.mark.skipif(BACKEND != "jax", reason="other optimizers are JAX's")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Lamb", marks=pytest.mark.extra),
        pytest.param("Adafactor", marks=pytest.mark.extra),
        "Muon",
    ],
)
def test_optimizers_of_whole_matrices(monkeypatch, name):
    monkeypatch.setitem(
        OPTIMIZERS, name, lambda: getattr(keras.optimizers, name)(1e-2)
    )
    strategy = keras_ring.DistributedStrategy(
        data_parallel=2, sequence_parallel=2, shard="weights"
    )
    _, expected, *_ = trained(None, optimizer=name)
    _, found, *_ = trained(strategy, optimizer=name)
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def compiled(shard, length):
    """The program of a step on 2x4 devices."""
    from tests import jax_programs

    strategy = keras_ring.DistributedStrategy(
        data_parallel=2, sequence_parallel=4, shard=shard
    )
    with strategy.scope():
        model = build()
        batch = np.zeros((4, length), "int32")
        step = jax_programs.train_step(strategy, model, (batch, batch))
        return step.as_text()


@pytest.mark.skipif(BACKEND != "jax", reason="a program of JAX")
@pytest.mark.parametrize("shard", ["optimizer", "weights"])
def test_weights_alone_are_gathered(shard):
    """No activation is."""
    text = compiled(shard, 4 * 52)
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    assert gathered
    assert not {"52", "208"} & {n for s in gathered for n in s.split(",")}
    assert " all-to-all(" not in text
    assert f"{WIDTH},{3 * WIDTH}" in gathered
