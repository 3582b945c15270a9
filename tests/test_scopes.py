"""What belongs to a scope: models, what they are compiled with, and calls
from outside. Whatever is asked for, the result is that of one device, and
the strategy is used."""

import contextlib
import functools
import threading

import keras
import numpy as np
import pytest
from keras import ops

# Before any scope is entered, as users import it.
from keras.utils import clear_session

import keras_ring
from keras_ring.distribution import strategy as strategy_module

WORDS, WIDTH = 11, 8
X = np.arange(4 * 8).reshape(4, 8) * 7 % WORDS
Y = X * 3 % WORDS
# Sums of two halves round differently.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@keras.saving.register_keras_serializable(package="test_scopes")
class Seen(keras.layers.Layer):
    """Remembers the worlds in which it has computed."""

    sequence_parallel_safe = True

    def __init__(self, **options):
        super().__init__(**options)
        self.worlds = set()

    def call(self, inputs):
        self.worlds.add(strategy_module.current())
        return inputs

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, inputs.dtype)


def pair():
    return keras_ring.DistributedStrategy(sequence_parallel=2)


def uniform():
    return keras.initializers.RandomUniform(-1, 1, seed=3)


def parts():
    """The layers of a plain model."""
    return [
        keras.layers.Embedding(WORDS, WIDTH, embeddings_initializer=uniform()),
        Seen(),
        keras.layers.Dense(WORDS, kernel_initializer=uniform()),
    ]


def build(kind="plain"):
    embedding, seen, dense = parts()
    tokens = keras.Input((None,), dtype="int32")
    x = embedding(tokens)
    if kind == "ring":
        x = keras_ring.layers.RingAttention(
            1, WIDTH, causal=True, kernel_initializer=uniform()
        )(x, x)
    return keras.Model(tokens, dense(seen(x)))


def momentum():
    return keras.optimizers.SGD(0.1, momentum=0.5)


def compiled(model, optimizer=None, metrics=("sparse_categorical_accuracy",)):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or momentum(), loss, metrics=list(metrics))
    return model


def trained(model):
    """Losses and metrics of training and evaluation, and the weights."""
    history = model.fit(X, Y, batch_size=2, epochs=2, shuffle=False, verbose=0)
    again = model.evaluate(X, Y, batch_size=2, verbose=0)
    numbers = [*history.history.values(), again, *model.get_weights()]
    return [np.asarray(number) for number in numbers]


@functools.cache
def one_device(kind="plain"):
    """What `trained` gives without a strategy."""
    return trained(compiled(build(kind)))


def compare(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, **TOLERANCE)


def worlds_of(model):
    """In which worlds a model has computed since this was last asked."""
    seen = next(layer for layer in model.layers if isinstance(layer, Seen))
    worlds = set(seen.worlds)
    seen.worlds.clear()
    return worlds


def check_outside(kind):
    """Only built in the scope, and then used, compiled and trained."""
    metric = keras.metrics.SparseCategoricalAccuracy()
    strategy = pair()
    with strategy.scope():
        model = build(kind)
    worlds_of(model)
    # By hand it is one device that computes, on the whole sequence.
    by_hand = ops.convert_to_numpy(model(X))
    assert worlds_of(model) == {None}
    # It has never been compiled.
    methods = [model.predict_on_batch]
    if kind == "plain":
        methods.append(functools.partial(model.predict, verbose=0))
    for predict in methods:
        np.testing.assert_allclose(predict(X), by_hand, **TOLERANCE)
        assert worlds_of(model) == {strategy.world}
    compare(trained(compiled(model, metrics=[metric])), one_device(kind))
    assert worlds_of(model) == {strategy.world}
    if kind == "plain":
        loss = model.test_on_batch(X, Y)[0]
        assert model.train_on_batch(X, Y)[0] == pytest.approx(loss, rel=1e-5)
        assert worlds_of(model) == {strategy.world}
    assert strategy_module.current() is None


@pytest.mark.parametrize("kind", ["ring", "plain"])
def test_a_model_is_used_in_the_scope_that_it_was_built_in(on_devices, kind):
    on_devices(2, check_outside, kind)


def check_made_outside(case):
    """What is compiled in the scope, or with, was made outside."""
    strategy = pair()
    with strategy.scope():
        model = build()
    optimizer = momentum()
    if case == "built":
        optimizer.build(model.trainable_variables)
    if case == "loss scale":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    metric = keras.metrics.SparseCategoricalAccuracy()
    metric.update_state(Y, np.ones((4, 8, WORDS)))
    with strategy.scope():
        compiled(model, optimizer, [metric])
        worlds_of(model)
        compare(trained(model), one_device())
    assert worlds_of(model) == {strategy.world}
    assert ops.convert_to_numpy(optimizer.iterations) == 4


@pytest.mark.parametrize("case", ["new", "built", "loss scale"])
def test_optimizers_and_metrics_may_come_from_outside(on_devices, case):
    on_devices(2, check_made_outside, case)


def check_first_built_by_fit():
    strategy = pair()
    with strategy.scope():
        model = keras.Sequential(parts())
    compare(trained(compiled(model)), one_device())
    assert worlds_of(model) == {strategy.world}


def test_a_model_that_fit_builds_belongs_to_the_scope(on_devices):
    on_devices(2, check_first_built_by_fit)


def check_clear_session():
    strategy = pair()
    with strategy.scope():
        first = compiled(build())
        keras.backend.clear_session()
        assert strategy_module.current() is strategy.world
        second = compiled(build())
        compare(trained(second), one_device())
        assert worlds_of(second) == {strategy.world}
        with strategy.scope():
            clear_session()
            # Also what was made before.
            first.fit(X, Y, verbose=0)
            assert worlds_of(first) == {strategy.world}
        assert strategy_module.current() is strategy.world
        with pytest.raises(ValueError, match="Only one"), pair().scope():
            pass
    clear_session()
    assert strategy_module.current() is None
    check_one_device()


def check_one_device():
    """Nothing is left of a scope."""
    model = compiled(build())
    model.fit(X, Y, verbose=0)
    assert worlds_of(model) == {None}


def test_a_scope_outlives_a_cleared_session(on_devices):
    on_devices(2, check_clear_session)


def check_leaving():
    """After errors, for another strategy, in another thread."""
    first, second = pair(), pair()
    with first.scope(), first.scope():
        model = build("ring")
    with pytest.raises(ZeroDivisionError), first.scope():
        raise ZeroDivisionError
    assert strategy_module.current() is None
    with second.scope():
        other = build()
        # A model of another strategy is not taken over in silence.
        with pytest.raises(ValueError, match="another strategy"):
            model.predict(X, verbose=0)
        assert strategy_module.current() is second.world
    for of, world in ((model, first.world), (other, second.world)):
        of.predict(X, verbose=0)
        assert worlds_of(of) == {world}
    found = []

    def in_thread():
        found.append(strategy_module.current())
        with second.scope():
            found.append(strategy_module.current())
        found.append(strategy_module.current())

    with second.scope():
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
        assert strategy_module.current() is second.world
    assert found == [None, second.world, None]


def test_scopes_are_left_as_they_were_entered(on_devices):
    on_devices(2, check_leaving)


def check_copies(path):
    """Models that are loaded or cloned belong to where that is done."""
    strategy = pair()
    outside = build()
    with strategy.scope():
        inside = compiled(build())
        inside.save(path)
        for model in (
            keras.saving.load_model(path),
            keras.models.clone_model(outside),
        ):
            worlds_of(model)
            model.predict(X, verbose=0)
            assert worlds_of(model) == {strategy.world}
    for model in (
        keras.saving.load_model(path),
        keras.models.clone_model(inside),
    ):
        worlds_of(model)
        model.predict(X, verbose=0)
        assert worlds_of(model) == {None}


def test_copies_belong_to_where_they_are_made(on_devices, tmp_path):
    on_devices(2, check_copies, str(tmp_path / "model.keras"))


def check_built_outside():
    """A layer of the scope that was built outside of it is refused."""
    strategy = pair()
    with strategy.scope():
        model = keras.Sequential(
            [keras_ring.layers.BlockwiseFeedForward(8), *parts()[1:]]
        )
    model(np.ones((2, 8, WIDTH), "float32"))
    for scope in (contextlib.nullcontext(), strategy.scope()):
        with scope, pytest.raises(ValueError, match="outside any scope"):
            model.predict(np.ones((2, 8, WIDTH), "float32"), verbose=0)


def test_a_layer_that_was_built_outside_is_named(on_devices):
    on_devices(2, check_built_outside)
