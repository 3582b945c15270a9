"""What only PyTorch has: one process per device, each with a trainer of its
own. Parity with one device is in `test_training.py`."""

import contextlib
import io
import os
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from keras import ops

import keras_ring
from keras_ring.backends.torch import runtime
from keras_ring.distribution import padding
from tests.language_model import batch, language_model

LENGTH = 8


def rank():
    return int(os.environ["RANK"])


def pair(**options):
    return keras_ring.DistributedStrategy(sequence_parallel=2, **options)


def everyone(strategy, own):
    """What each rank has, on every rank."""
    return strategy.world.agreement.from_all(own)


# Launch.


def check_launch():
    fix = "torchrun --nproc-per-node"
    for strategy, needed in (
        (keras_ring.DistributedStrategy(sequence_parallel=3), 3),
        (keras_ring.DistributedStrategy(2, 2), 4),
        (keras_ring.DistributedStrategy(1, 1), 1),
        (keras_ring.DistributedStrategy(data_parallel=3), 3),
    ):
        with pytest.raises(
            ValueError, match=rf"{needed} devices, with 2 .*{fix} {needed}"
        ):
            strategy.world  # noqa: B018
    with pytest.raises(ValueError, match="one device per process"):
        pair(devices=("cpu:0",)).world  # noqa: B018
    with pytest.raises(ValueError, match="KERAS_TORCH_DEVICE=cuda"):
        pair(devices=("gpu:0", "gpu:1")).world  # noqa: B018
    world = pair(devices=("cpu", "cpu")).world
    assert (world.rank, world.place()) == (rank(), (0, rank()))


def test_launches_that_do_not_fit_are_refused(on_devices):
    on_devices(2, check_launch)


def check_without_processes():
    """A mesh of one device needs no process group."""
    strategy = keras_ring.DistributedStrategy()
    with strategy.scope():
        model = language_model("ring")
        model.fit(*batch(2, LENGTH)[:2], verbose=0)
    assert not torch.distributed.is_initialized()


def test_one_device_needs_no_process_group(on_devices):
    on_devices(1, check_without_processes)


# Data.


class Seen(keras.layers.Layer):
    """Keeps what it was called with in steps."""

    def call(self, x):
        if x.device.type != "meta":
            self.last = x.detach().clone()
        return x


def check_slices():
    strategy = keras_ring.DistributedStrategy(
        data_parallel=2, sequence_parallel=2
    )
    world = strategy.world
    x = np.arange(4 * 6, dtype="float32").reshape(4, 6, 1)
    row, column = divmod(rank(), 2)
    want = x[2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
    with strategy.scope():
        inputs = keras.Input((None, 1))
        seen = Seen()
        model = keras.Model(inputs, keras.layers.Dense(1)(seen(inputs)))
        model.compile("sgd", "mse")
        model.fit(x, x, batch_size=4, shuffle=False, verbose=0)
        np.testing.assert_array_equal(seen.last, want)
        predicted = model.predict(x, verbose=0)
        np.testing.assert_array_equal(seen.last, want)
        # By hand a model is called on the whole, on this process alone.
        np.testing.assert_allclose(model(x).detach(), predicted, rtol=1e-6)
        assert tuple(seen.last.shape) == x.shape
        dataset = torch.utils.data.TensorDataset(
            torch.tensor(x), torch.tensor(x)
        )
        loader = torch.utils.data.DataLoader(dataset, batch_size=2)
        model.fit(loader, verbose=0)
        np.testing.assert_array_equal(
            seen.last, x[2 + row : 3 + row, 3 * column : 3 * column + 3]
        )
        for split in (True, False):
            axes = padding.axis_of(2, [4]), padding.axis_of(2, [6])
            own = world.shard(torch.tensor(x), split, *axes)
            assert own.shape[1] == (3 if split else 6)
            np.testing.assert_array_equal(world.unshard(own, split, *axes), x)


def test_every_process_takes_its_part(on_devices):
    on_devices(4, check_slices)


def check_disagreement():
    """Other data or other weights on a rank are found and named."""
    strategy = pair()
    x, y, _ = batch(4, LENGTH)
    with strategy.scope():
        model = language_model("ring")
        with pytest.raises(RuntimeError, match=r"different data.*ranks \[1\]"):
            model.fit((x + rank()) % 16, y, verbose=0)
        # The weights of the first fit are those of rank 0.
        weights = everyone(strategy, model.get_weights())
        for ours, theirs in zip(*weights, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        model.fit(x, y, verbose=0)
        if rank() == 1:
            model.layers[1].set_weights(
                [w + 1e-3 for w in model.layers[1].get_weights()]
            )
        with pytest.raises(RuntimeError, match=r"weights .*ranks \[1\]"):
            model.fit(x, y, verbose=0)


def test_processes_that_disagree_are_named(on_devices):
    on_devices(2, check_disagreement)


# Random numbers.


def check_random():
    strategy = pair()
    keras.utils.set_random_seed(rank())  # Not the same: rank 0 decides.
    x = np.ones((8, LENGTH, 4), "float32")
    with strategy.scope():
        inputs = keras.Input((None, 4))
        seen = Seen()
        outputs = keras.layers.Dense(1)(seen(keras.layers.Dropout(0.5)(inputs)))
        model = keras.Model(inputs, outputs)
        model.compile("sgd", "mse")
        model.fit(x, x[..., :1], batch_size=4, epochs=3, verbose=0)
        first, second = everyone(strategy, seen.last.numpy())
        assert first.shape == (4, LENGTH // 2, 4)
        assert (first != second).any()
        states = everyone(
            strategy,
            (
                torch.get_rng_state().numpy().tobytes(),
                [w.tobytes() for w in model.get_weights()],
                [np.asarray(v).tobytes() for v in model.variables],
            ),
        )
        assert states[0] == states[1]

        def again():
            keras.utils.set_random_seed(3)
            layer = keras.layers.Dropout(0.5)
            model = keras.Sequential([layer, Seen(), keras.layers.Dense(1)])
            model.compile("sgd", "mse")
            model.fit(x, x[..., :1], batch_size=4, verbose=0)
            return model.layers[1].last.numpy()

        np.testing.assert_array_equal(again(), again())


def test_random_numbers_differ_over_the_ring_and_repeat(on_devices):
    on_devices(2, check_random)


# Losses and metrics.


def masked_model(loss):
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(16, 8, mask_zero=True)(tokens)
    outputs = keras.layers.Dense(16)(x)
    model = keras.Model(tokens, outputs)
    draw = np.random.default_rng(0)
    model.set_weights(
        [draw.normal(size=w.shape).astype("float32") for w in model.weights]
    )
    model.compile(
        keras.optimizers.SGD(0.1), loss, weighted_metrics=["accuracy"]
    )
    return model


def check_losses(data_size, sequence_size):
    """Losses whose denominator is not the same on every process."""
    strategy = keras_ring.DistributedStrategy(
        data_parallel=data_size, sequence_parallel=sequence_size
    )
    tokens, labels, weights = batch(4, LENGTH)
    tokens[:, 5:] = 0  # Hardly anything is left for the last of the ring.
    tokens[0] = 0

    def loss(reduction, **options):
        return keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction=reduction, **options
        )

    cases = [
        (loss("sum_over_batch_size"), None),
        (loss("sum_over_batch_size"), weights),
        (loss("mean_with_sample_weight"), weights),
        (loss("sum"), None),
        (loss("sum_over_batch_size", ignore_class=3), None),
    ]
    for case, sample_weight in cases:

        def outcome(case=case, sample_weight=sample_weight):
            model = masked_model(case)
            logs = model.train_on_batch(
                tokens, labels, sample_weight=sample_weight, return_dict=True
            )
            after = model.evaluate(
                tokens, labels, sample_weight=sample_weight, verbose=0
            )
            return logs, after, model.get_weights()

        want = outcome()
        with strategy.scope():
            got = outcome()
        name = f"{case.reduction}, weighted: {sample_weight is not None}"
        for key in want[0]:
            # Rounding of sums of 32 terms, and of the metrics' counts.
            np.testing.assert_allclose(
                float(got[0][key]), float(want[0][key]), rtol=1e-5, err_msg=name
            )
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5, err_msg=name)
        for have, target in zip(got[2], want[2], strict=True):
            np.testing.assert_allclose(
                have, target, rtol=1e-5, atol=1e-6, err_msg=name
            )


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=["1x2", "2x2"])
def test_losses_with_local_denominators(on_devices, mesh):
    on_devices(mesh[0] * mesh[1], check_losses, *mesh)


class OwnStep(keras.Model):
    """Reads a metric itself and reports a number of its own."""

    def train_step(self, data):
        x, y = data
        loss = ops.mean(ops.square(self(x, training=True) - y))
        self.zero_grad()
        loss.backward()
        variables = self.trainable_weights
        self.optimizer.apply([v.value.grad for v in variables], variables)
        self._loss_tracker.update_state(loss)
        return {
            "loss": self._loss_tracker.result(),
            "largest": ops.max(y) * 0 + ops.mean(y),
        }


def check_own_step():
    strategy = pair()
    x = np.arange(4 * 6, dtype="float32").reshape(4, 6, 1) / 24

    def outcome():
        inputs = keras.Input((None, 1))
        dense = keras.layers.Dense(1, kernel_initializer="ones")
        model = OwnStep(inputs, dense(inputs))
        model.compile("sgd", "mse")
        history = model.fit(
            x, 2 * x, batch_size=2, shuffle=False, verbose=0
        ).history
        return history["loss"] + history["largest"], model.get_weights()

    want = outcome()
    with strategy.scope():
        got = outcome()
        with pytest.raises(NotImplementedError, match="inside another"):
            nested_step(np.ones((4, 8, 1), "float32"))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for have, target in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(have, target, rtol=1e-5)


def nested_step(x):
    class Nested(keras.Model):
        def train_step(self, data):
            return {"loss": self.test_on_batch(*data)}

    inputs = keras.Input((None, 1))
    model = Nested(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)


def test_a_train_step_of_the_user(on_devices):
    on_devices(2, check_own_step)


def check_compiled():
    with pair().scope():
        model = language_model("ring")
        model.jit_compile = True
        with pytest.raises(ValueError, match="jit_compile=True"):
            model.fit(*batch(4, LENGTH)[:2], verbose=0)


def test_compiled_steps_are_refused(on_devices):
    on_devices(2, check_compiled)


# Callbacks.


def check_callbacks(folder):
    strategy = pair()
    own = Path(folder) / str(rank())
    own.mkdir()
    x, y, _ = batch(8, LENGTH)
    printed = io.StringIO()
    with strategy.scope(), contextlib.redirect_stdout(printed):
        model = language_model("ring")
        history = model.fit(
            x,
            y,
            batch_size=4,
            epochs=5,
            verbose=1,
            validation_data=(x, y),
            callbacks=[
                keras.callbacks.CSVLogger(str(own / "log.csv")),
                keras.callbacks.ModelCheckpoint(str(own / "best.keras")),
                keras.callbacks.EarlyStopping(
                    monitor="loss", mode="max", patience=1, verbose=1
                ),
            ],
        )
    files = {path.name for path in own.iterdir()}
    ranks = everyone(strategy, (files, printed.getvalue(), history.history))
    assert ranks[0][0] == {"log.csv", "best.keras"}
    assert ranks[1][0] == set()
    assert "early stopping" in ranks[0][1]
    assert ranks[1][1] == ""
    assert len(history.history["loss"]) == 2
    assert ranks[0][2] == ranks[1][2]


def test_rank_0_prints_and_writes(on_devices, tmp_path):
    on_devices(2, check_callbacks, str(tmp_path))


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise InterruptedError


def check_restore(folder):
    """A backup that only rank 0 can read brings all ranks back."""
    strategy = pair()
    x, y, _ = batch(4, LENGTH)

    def fit(model, *more):
        backup = keras.callbacks.BackupAndRestore(f"{folder}/{rank()}")
        return model.fit(
            x, y, epochs=4, verbose=0, shuffle=False, callbacks=[backup, *more]
        )

    with strategy.scope():
        model = language_model("ring")
        weights = model.get_weights()
        with pytest.raises(InterruptedError):
            fit(model, Interrupt())
        resumed = language_model("ring")
        history = fit(resumed)
        assert history.epoch == [2, 3]
        whole = language_model("ring")
        # The first fit takes the weights of rank 0, and so do these.
        whole.set_weights(strategy.world.agreement.from_rank_0(weights))
        whole.fit(x, y, epochs=4, verbose=0, shuffle=False)
        got = everyone(strategy, resumed.get_weights())
        for have, want in zip(got[1], whole.get_weights(), strict=True):
            np.testing.assert_allclose(have, want, atol=1e-6)


def test_every_rank_resumes_from_the_backup_of_rank_0(on_devices, tmp_path):
    on_devices(2, check_restore, str(tmp_path))


# What Keras' own trainer does with several processes, from 3.16 on.


class Spare(keras.layers.Layer):
    """Has a weight that no step uses."""

    def build(self, shape):
        self.spare = self.add_weight(shape=(2,), name="spare")

    def call(self, x):
        return x


def check_own_trainer():
    strategy = pair()
    x = np.linspace(-1, 1, 4 * 6, dtype="float32").reshape(4, 6, 1)
    y = (x > 0).astype("float32")
    with strategy.scope():
        inputs = keras.Input((None, 1))
        dense = keras.layers.Dense(
            1, "sigmoid", use_bias=False, kernel_initializer="ones"
        )
        model = keras.Model(inputs, dense(Spare()(inputs)))
        hits = keras.metrics.TruePositives(name="hits")
        model.compile("sgd", "binary_crossentropy", metrics=[hits])
        # A wrapper that waits for all gradients says so at the second step.
        history = model.fit(x, y, batch_size=2, epochs=2, verbose=0)
        logs = model.evaluate(x, y, verbose=0, return_dict=True)
    assert getattr(model, "ddp_model", None) is None
    counted = int(y.sum())
    assert history.history["hits"] == [counted, counted]
    assert logs["hits"] == counted
    # One process alone may ask, and outside of the scope.
    if rank() == 0:
        assert model.get_metrics_result()["hits"] == counted


def test_keras_neither_wraps_nor_counts_once_more(on_devices):
    on_devices(2, check_own_trainer)


def check_one_process_alone():
    """Without a strategy a model is one of its process, as before one."""
    strategy = pair()
    x = np.linspace(-1, 1, 4, dtype="float32").reshape(4, 1)
    y = np.ones_like(x)
    with strategy.scope():
        pass
    assert torch.distributed.is_initialized()
    if rank() == 0:
        inputs = keras.Input((1,))
        dense = keras.layers.Dense(
            1, "sigmoid", use_bias=False, kernel_initializer="ones"
        )
        model = keras.Model(inputs, dense(Spare()(inputs)))
        hits = keras.metrics.TruePositives(name="hits")
        model.compile("sgd", "mse", metrics=[hits])
        history = model.fit(x, y, epochs=2, verbose=0)
        assert history.history["hits"] == [2, 2]
    everyone(strategy, None)


def test_a_model_without_a_strategy_waits_for_no_other_process(on_devices):
    on_devices(2, check_one_process_alone)


def check_several_batches():
    strategy = pair()
    x, y, _ = batch(6, LENGTH)
    batches = [(x[i : i + 2], y[i : i + 2]) for i in (0, 2, 4)]
    with strategy.scope():
        one, several = (language_model("ring") for _ in range(2))
        several.set_weights(one.get_weights())
        history = one.fit(x, y, batch_size=2, shuffle=False, verbose=0)
        strategy.world.prepare(several)
        several.make_train_function()
        # As for `steps_per_execution=2`, with the rest at the end.
        several.train_function(batches[:2])
        logs = several.train_function(batches[2:])
        several.make_test_function()
        several.make_predict_function()
        several.reset_metrics()
        tested = several.test_function(batches)
        predicted = several.predict_function([(x,) for x, _ in batches])
        want = (
            one.evaluate(x, y, batch_size=2, verbose=0, return_dict=True),
            one.predict(x, verbose=0),
        )
    assert float(logs["loss"]) == pytest.approx(
        history.history["loss"][0], rel=1e-6
    )
    assert float(tested["loss"]) == pytest.approx(want[0]["loss"], rel=1e-6)
    np.testing.assert_allclose(predicted, want[1], rtol=1e-5, atol=1e-6)


def test_several_batches_in_one_execution(on_devices):
    on_devices(2, check_several_batches)


# The native gradient.


def test_custom_gradient_of_several_outputs():
    def forward(x, ids, y):
        return (x * y, ids + 1, x + y), (x, y, "kept", ids)

    def backward(residuals, grad_product, grad_ids, grad_sum):
        x, y, kept, ids = residuals
        assert kept == "kept"
        assert ids.dtype == torch.int32
        return (
            grad_product * y + grad_sum,
            None,
            grad_product * x + grad_sum,
        )

    function = runtime.custom_gradient(forward, backward)
    x, y = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    x, y = x.T.requires_grad_(), y.T.requires_grad_()
    ids = torch.arange(3, dtype=torch.int32)
    product, moved, total = function(x, ids, y)
    assert not moved.requires_grad
    # An expanded gradient has no memory of its own, a transposed one no order.
    loss = product.T.mul(torch.arange(4.0)).sum() + total.sum()
    got = torch.autograd.grad(loss, (x, y))
    scale = torch.arange(4.0, dtype=torch.float64)[:, None]
    np.testing.assert_allclose(got[0], (y * scale + 1).detach())
    np.testing.assert_allclose(got[1], (x * scale + 1).detach())


def check_no_silent_gradient():
    with pair().scope():
        ring = keras_ring.distribution.strategy.current().ring()
        tensor = torch.ones(2, 2, requires_grad=True)
        for move in (
            lambda: ring.shift([tensor]),
            lambda: ring.all_gather(tensor, 0),
            lambda: ring.all_to_all(tensor, 0, 1),
            lambda: ring.sum(tensor),
        ):
            with pytest.raises(RuntimeError, match="No gradient flows"):
                move()


def test_a_transfer_does_not_cut_a_gradient_silently(on_devices):
    on_devices(2, check_no_silent_gradient)
