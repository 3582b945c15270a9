"""A stock layer inside `Gathered` computes what it does on one device."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring as kr
from keras_ring.distribution.strategy import current
from tests import gradients
from tests.members import everyones, from_each, total

# On JAX the compiler does the gathering, the same for every size.
RINGS = (2, 4) if keras.backend.backend() == "jax" else (1, 2, 4)
BATCH, LENGTH, FEATURES = 2, 24, 4

# float32 rounding of sums over up to 24 positions in another order.
TOLERANCE = 1e-5

L = keras.layers
SEQUENCE = {
    "convolution": lambda: L.Conv1D(3, 5, padding="same", activation="tanh"),
    "strided": lambda: L.Conv1D(3, 3, strides=2, padding="same"),
    "causal": lambda: L.Conv1D(3, 4, padding="causal", dilation_rate=2),
    "batch-normalisation": L.BatchNormalization,
    "max-pooling": lambda: L.MaxPooling1D(3, strides=1, padding="same"),
    "recurrence": lambda: L.LSTM(3, return_sequences=True),
    "both-ways": lambda: L.Bidirectional(L.SimpleRNN(2, return_sequences=True)),
    "attention": lambda: L.MultiHeadAttention(2, 3),
    "composite": lambda: keras.Sequential([L.Conv1D(3, 3), L.ZeroPadding1D(1)]),
}
POOLED = {
    "average": L.GlobalAveragePooling1D,
    "last-state": lambda: L.GRU(3),
    "composite": lambda: keras.Sequential(
        [L.GlobalMaxPooling1D(), L.Dense(3, activation="tanh")]
    ),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def call(layer, values, x, options):
    """The layer as a function of its trainable weights and its input."""
    inputs = (x, x) if "MultiHead" in type(inner(layer)).__name__ else (x,)
    state = [v.value for v in layer.non_trainable_variables]
    return layer.stateless_call(list(values), state, *inputs, **options)


def inner(layer):
    return layer.layer if isinstance(layer, kr.layers.Gathered) else layer


def differentiate(layer, x, weight, options):
    """Result, gradients of weights and of the input, updated state."""
    values = [ops.convert_to_tensor(v.value) for v in layer.trainable_variables]
    out, grads = gradients.vjp(
        lambda *tensors: call(layer, tensors[:-1], tensors[-1], options)[0],
        [*values, x],
        weight,
    )
    state = []
    if "batch" in inner(layer).name:
        state = call(layer, values, x, options)[1]
    return out, grads[:-1], grads[-1], state


def run_layer(size, make, x, options, pooled):
    """Largest difference of everything between a ring and one device."""
    keras.utils.set_random_seed(0)  # Every process draws the same weights.
    alone = make()
    inputs = (x, x) if "MultiHead" in type(alone).__name__ else (x,)
    out = alone(*inputs)
    weight = normal(*out.shape, seed=5)
    expected = differentiate(alone, x, weight, options)

    strategy = kr.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        layer = kr.layers.Gathered(make())
        # Build it on a sequence of another length: no size may stick.
        layer(*[part[:, : LENGTH // 2] for part in inputs])
    assert len(layer.weights) == len(alone.weights)
    for to, value in zip(layer.weights, alone.weights, strict=True):
        to.assign(ops.convert_to_numpy(value))

    def function(x, weight_shard):
        share = weight_shard
        if pooled:
            inside = current().inside()
            share = weight / (size if inside else 1)
        out, grads, grad_x, state = differentiate(layer, x, share, options)
        return (
            everyones(out) if pooled else out,
            [from_each(grad) for grad in grads],
            grad_x,
            [everyones(s) for s in state],
        )

    placeholder = x if pooled else weight
    out, grads, grad_x, state = strategy.run(function, x, placeholder)
    numpy = ops.convert_to_numpy
    pairs = {
        "output": (numpy(out), expected[0]),
        "gradient of the input": (numpy(grad_x), expected[2]),
    }
    for place, grad in enumerate(grads):
        pairs[f"gradient of weight {place}"] = total(grad), expected[1][place]
    for place, value in enumerate(state):
        pairs[f"state {place}"] = numpy(value), expected[3][place]
    return {
        name: np.abs(mine - numpy(other)).max()
        for name, (mine, other) in pairs.items()
    }


def check(errors):
    wrong = {n: float(e) for n, e in errors.items() if not e <= TOLERANCE}
    assert not wrong, wrong


@pytest.mark.dealt(by="kind")
@pytest.mark.mostly(size=4, every=4)
@pytest.mark.parametrize("size", RINGS)
@pytest.mark.parametrize("kind", SEQUENCE)
def test_a_layer_over_the_sequence(on_devices, kind, size):
    x = normal(BATCH, LENGTH, FEATURES)
    options = {"training": True} if "batch" in kind else {}
    check(on_devices(size, run_kind, size, "SEQUENCE", kind, x, options, False))


@pytest.mark.dealt(by="kind")
@pytest.mark.mostly(size=4, every=3)
@pytest.mark.parametrize("size", RINGS)
@pytest.mark.parametrize("kind", POOLED)
def test_a_pooled_result_stays_whole(on_devices, kind, size):
    x = normal(BATCH, LENGTH, FEATURES)
    check(on_devices(size, run_kind, size, "POOLED", kind, x, {}, True))


def run_kind(size, table, kind, x, options, pooled):
    table = {"SEQUENCE": SEQUENCE, "POOLED": POOLED}[table]
    return run_layer(size, table[kind], x, options, pooled)


def run_masked(size, kind, tokens):
    """Both kinds of result of masked tokens, on a ring and on one device."""
    keras.utils.set_random_seed(1)
    alone = [L.Embedding(9, 4, mask_zero=True), make_masked(kind)]
    expected = alone[1](alone[0](tokens))
    strategy = kr.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        layers = [
            L.Embedding(9, 4, mask_zero=True),
            kr.layers.Gathered(make_masked(kind)),
        ]
        layers[1](layers[0](tokens))
    for to, source in zip(layers, alone, strict=True):
        to.set_weights(source.get_weights())

    def function(tokens):
        x = layers[0](tokens)
        out = layers[1](x)
        if kind == "pooled":
            return everyones(out)
        # What comes after sees the mask of its own part.
        pooled = kr.layers.Gathered(L.GlobalAveragePooling1D())(out)
        return out, everyones(pooled)

    result = strategy.run(function, tokens)
    numpy = ops.convert_to_numpy
    if kind == "pooled":
        return np.abs(numpy(result) - numpy(expected)).max()
    after = L.GlobalAveragePooling1D()(expected)
    return max(
        np.abs(numpy(result[0]) - numpy(expected)).max(),
        np.abs(numpy(result[1]) - numpy(after)).max(),
    )


def make_masked(kind):
    if kind == "pooled":
        return L.GlobalAveragePooling1D()
    return L.SimpleRNN(3, return_sequences=True)


@pytest.mark.parametrize("kind", ["pooled", "sequence"])
def test_masks_are_gathered_and_passed_on(on_devices, kind):
    tokens = np.random.default_rng(3).integers(1, 9, (2, 12)).astype("int32")
    tokens[0, 7:] = 0
    tokens[1, 3:] = 0
    assert on_devices(4, run_masked, 4, kind, tokens) <= TOLERANCE


def train(model, x, y):
    model.compile(keras.optimizers.SGD(0.1), "mse")
    # Two epochs: a wrong gradient or a wrong statistic shows in the second.
    history = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return history.history["loss"], model.predict(x, verbose=0)


def build_model(wrap):
    x = keras.Input((None, FEATURES))
    y = wrap(L.Conv1D(4, 3, padding="same"))(L.Dense(4)(x))
    y = wrap(L.BatchNormalization())(y)
    y = wrap(L.Bidirectional(L.SimpleRNN(3, return_sequences=True)))(y)
    y = wrap(L.GlobalAveragePooling1D())(y)
    return keras.Model(x, L.Dense(1)(y))


def run_training(size):
    keras.utils.set_random_seed(2)
    x, y = normal(8, 12, FEATURES), normal(8, 1, seed=1)
    alone = build_model(lambda layer: layer)
    strategy = kr.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        model = build_model(kr.layers.Gathered)
        model.set_weights(alone.get_weights())
        mine = train(model, x, y)
        again = keras.Model.from_config(model.get_config())
        again.set_weights(model.get_weights())
    other = train(alone, x, y)
    numpy = ops.convert_to_numpy
    errors = {
        "loss": np.abs(np.subtract(mine[0], other[0])).max(),
        "prediction": np.abs(mine[1] - other[1]).max(),
        "reload": np.abs(numpy(again(x)) - other[1]).max(),
    }
    for one, two in zip(model.weights, alone.weights, strict=True):
        errors[one.path] = np.abs(numpy(one.value) - numpy(two.value)).max()
    return errors


def test_training_is_that_of_one_device(on_devices):
    # Four steps in float32, each a sum in another order.
    errors = on_devices(4, run_training, 4)
    wrong = {n: float(e) for n, e in errors.items() if not e <= 5e-5}
    assert not wrong, wrong


def test_without_a_strategy_it_is_the_layer(tmp_path):
    layer = L.Conv1D(3, 3)
    gathered = kr.layers.Gathered(layer)
    x = keras.Input((None, FEATURES))
    model = keras.Model(x, gathered(x))
    assert tuple(model.output.shape) == (None, None, 3)
    assert gathered.compute_output_shape((2, 7, 4)) == (2, 5, 3)
    assert all(gathered.name in w.path for w in gathered.weights)
    given = normal(2, 7, FEATURES)
    expected = ops.convert_to_numpy(layer(given))
    np.testing.assert_array_equal(
        ops.convert_to_numpy(gathered(given)), expected
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(given)), expected)


def test_the_dtype_policy_is_that_of_the_layer():
    layer = L.BatchNormalization(dtype="float32")
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        gathered = kr.layers.Gathered(layer)
        kept = L.Conv1D(1, 1)
    finally:
        keras.config.set_dtype_policy("float32")
    assert gathered.dtype_policy.name == "float32"
    assert kr.layers.Gathered(kept).compute_dtype == "bfloat16"


class OwnRingAttention(kr.layers.RingAttention):
    pass


def test_a_ring_layer_inside_is_refused():
    with pytest.raises(ValueError, match="RingAttention"):
        kr.layers.Gathered(kr.layers.RingAttention(2, 4))
    with pytest.raises(ValueError, match="be, or contain, a layer of keras_r"):
        kr.layers.Gathered(L.TimeDistributed(OwnRingAttention(2, 4)))
    with pytest.raises(ValueError, match="must be a layer of Keras"):
        kr.layers.Gathered("conv")


def run_uneven(size, x):
    """A layer that makes another length, one that the ring cannot split."""
    strategy = kr.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        layer = kr.layers.Gathered(L.Conv1D(3, 2))
        expected = ops.convert_to_numpy(layer(x))
    result = ops.convert_to_numpy(strategy.run(layer, x))
    return result, expected


@pytest.mark.parametrize("length", [12, 9])
def test_a_result_of_any_length(on_devices, length):
    result, expected = on_devices(2, run_uneven, 2, normal(2, length, 4))
    assert result.shape == (2, length - 1, 3)
    np.testing.assert_allclose(result, expected, atol=TOLERANCE)


def run_refusal(size):
    """The message of what is refused where a layer sees a shard."""
    strategy = kr.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        state = kr.layers.Gathered(L.SimpleRNN(4))
        state(np.zeros((2, 12, 4), "float32"))
        message = ""
        try:
            strategy.run(
                lambda x: state(x, initial_state=x[:, 0]), normal(2, 12, 4)
            )
        except ValueError as error:
            message = str(error)
        return strategy.world.layers_see_shards, message


def test_what_cannot_be_split_is_refused(on_devices):
    see_shards, message = on_devices(2, run_refusal, 2)
    if not see_shards:
        return  # There the layer is given the whole, as without a strategy.
    assert "initial_state=a tensor" in message
