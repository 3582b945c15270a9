"""`RingAttention` against the stock layers on one device.

The reference is the stock layer where it writes out its scores: that path
computes every combination of options on every backend, and gives zeros for
a query that may attend to nothing, as `RingAttention` does.
"""

import copy
import dataclasses
import pickle
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring.layers import RingAttention
from tests.attention_layers import (
    BATCH,
    GQA,
    KEYS,
    MHA,
    QUERIES,
    WIDTH,
    Halved,
    call,
    compare,
    fill,
    normal,
    some,
)
from tests.gradients import vjp


def stock(options, dtype=None):
    """A stock layer that has not drawn its weights: drawing them costs a
    compilation per shape on JAX. `fill` gives it some."""
    options = {"kernel_initializer": "zeros", **options}
    if "head_dim" in options:
        return keras.layers.GroupQueryAttention(**options, dtype=dtype)
    return keras.layers.MultiHeadAttention(**options, dtype=dtype)


def check_equals_stock(layer, inputs, options, ours=None, ours_options=None):
    """Output, scores and every gradient are those of the stock layer."""
    fill(layer, *(tensor.shape for tensor in inputs))
    if ours is None:
        ours = RingAttention.from_keras_layer(layer)
        # Where a stock layer writes scores out, rows that see nothing are zero.
        ours._options = dataclasses.replace(ours._options, empty_rows="zeros")
    ours_options = options if ours_options is None else ours_options
    scores = {"return_attention_scores": True}
    weights = [v.value for v in layer.trainable_variables]
    count = len(inputs)
    shape = ours.compute_output_shape(*(tensor.shape for tensor in inputs))
    cotangent = normal(99, *shape)

    def results(layer, options):
        """Output, gradients and scores."""

        def run(*tensors, **more):
            inputs, weights = tensors[:count], list(tensors[count:])
            return call(layer, inputs, weights, {**options, **more})

        def function(*tensors):
            # The stock layer is the reference where it writes scores out.
            return (
                run(*tensors) if layer is ours else run(*tensors, **scores)[0]
            )

        def everything(*tensors):
            output, gradients = vjp(function, list(tensors), cotangent)
            return [output, *gradients, run(*tensors, **scores)[1]]

        return compiled(everything)(*inputs, *weights)

    want, have = results(layer, options), results(ours, ours_options)
    names = ["output", *["query", "value", "key"][:count]]
    names += [*(v.path for v in layer.trainable_variables), "scores"]
    for name, ours_has, stock_has in zip(names, have, want, strict=True):
        compare(ours_has, stock_has, name)


def compiled(function):
    """One program on JAX, where thousands of small ones take their time."""
    if keras.backend.backend() == "jax":
        import jax

        # Compiling takes longer than running: as little of it as there is.
        quick = {
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
        }
        return jax.jit(function, compiler_options=quick)
    return function


X = normal(1, BATCH, QUERIES, WIDTH)
MEMORY = normal(2, BATCH, 7, WIDTH)
KEY = normal(3, BATCH, 7, 6)

# name: (constructor options, inputs, call options)
CASES = {
    "self": (MHA, [X, X], {}),
    "grouped": (GQA, [X, X], {}),
    "multi-query": ({**GQA, "num_key_value_heads": 1}, [X, X], {}),
    "no-bias": ({**MHA, "use_bias": False}, [X, X], {}),
    "gate": ({**MHA, "use_gate": True, "value_dim": 3}, [X, X], {}),
    "gate-grouped": ({**GQA, "use_gate": True}, [X, X], {}),
    "value-dim": ({**MHA, "value_dim": 7}, [X, X], {}),
    "output-shape": ({**MHA, "output_shape": (3, 2)}, [X, X], {}),
    "dropout-inference": ({**MHA, "dropout": 0.5}, [X, X], {}),
    "cross": (MHA, [X, MEMORY], {}),
    "cross-key-of-other-width": (MHA, [X, MEMORY, KEY], {}),
    "cross-longer": (GQA, [MEMORY, X], {}),
    "causal": (MHA, [X, X], {"use_causal_mask": True}),
    "causal-grouped": (GQA, [X, X], {"use_causal_mask": True}),
    "causal-cross": (MHA, [X, MEMORY], {"use_causal_mask": True}),
    "causal-cross-longer": (MHA, [MEMORY, X], {"use_causal_mask": True}),
    "value-mask": (MHA, [X, MEMORY], {"value_mask": some(4, BATCH, 7)}),
    "key-mask": (
        MHA,
        [X, MEMORY, KEY],
        {"key_mask": some(5, BATCH, 7), "value_mask": some(6, BATCH, 7)},
    ),
    "query-mask": (GQA, [X, MEMORY], {"query_mask": some(7, BATCH, QUERIES)}),
    "nothing-to-see": (
        GQA,
        [X, X],
        {"value_mask": np.zeros((BATCH, KEYS), bool)},
    ),
    "pairs-2": (MHA, [X, X], {"attention_mask": some(8, QUERIES, KEYS)}),
    "pairs-3": (GQA, [X, X], {"attention_mask": some(9, BATCH, QUERIES, KEYS)}),
    "pairs-one-for-the-batch": (
        MHA,
        [X, X],
        {"attention_mask": some(10, 1, QUERIES, KEYS)},
    ),
    "pairs-one-for-the-rows": (
        MHA,
        [X, X],
        {"attention_mask": some(11, BATCH, 1, KEYS)},
    ),
    "pairs-per-head": (
        MHA,
        [X, MEMORY],
        {"attention_mask": some(12, BATCH, 2, QUERIES, 7)},
    ),
    "pairs-of-numbers": (
        MHA,
        [X, X],
        {"attention_mask": some(13, BATCH, QUERIES, KEYS).astype("int32")},
    ),
    "window": ({**MHA, "sliding_window": 3}, [X, X], {}),
    "window-causal": (
        {**GQA, "sliding_window": 4},
        [X, X],
        {"use_causal_mask": True},
    ),
    "all-masks": (
        {**GQA, "sliding_window": 9},
        [X, X],
        {
            "use_causal_mask": True,
            "query_mask": some(14, BATCH, QUERIES),
            "value_mask": some(15, BATCH, KEYS),
            "key_mask": some(16, BATCH, KEYS),
            "attention_mask": some(17, BATCH, QUERIES, KEYS),
        },
    ),
    "axes-one-of-two": (
        {**MHA, "attention_axes": 2},
        [normal(18, 2, 3, 5, WIDTH), normal(19, 2, 3, 4, WIDTH)],
        {"attention_mask": some(20, 2, 3, 5, 4)},
    ),
    "axes-first-causal": (
        {**MHA, "attention_axes": (1,)},
        [normal(21, 2, 5, 3, WIDTH), normal(22, 2, 4, 3, WIDTH)],
        {"use_causal_mask": True},
    ),
    "axes-two": (
        MHA,
        [normal(23, 2, 3, 4, WIDTH), normal(24, 2, 2, 3, WIDTH)],
        {"attention_mask": some(25, 2, 3, 4, 2, 3)},
    ),
    "axes-reversed-per-head": (
        {**MHA, "attention_axes": (3, 1)},
        [normal(26, 2, 3, 2, 4, WIDTH), normal(27, 2, 2, 2, 3, WIDTH)],
        {"attention_mask": some(28, 2, 2, 2, 4, 3, 3, 2)},
    ),
}


@pytest.mark.dealt
@pytest.mark.parametrize("name", CASES)
def test_equals_the_stock_layer(name):
    options, inputs, call_options = CASES[name]
    check_equals_stock(stock(options), inputs, call_options)


def test_causal_at_construction_is_causal_in_every_call():
    ours = fill(RingAttention(**MHA, causal=True), X.shape)
    check_equals_stock(stock(MHA), [X, X], {"use_causal_mask": True}, ours, {})


def test_scale_multiplies_the_scores():
    layer = RingAttention(**MHA, scale=0.3)
    want = RingAttention(**MHA)
    for built in (layer, want):
        built.build(X.shape)
    weights = layer.get_weights()
    layer.set_weights(weights)
    weights[0] = weights[0] * 0.3 * 2.0  # 1 / sqrt(key_dim) is 1/2
    want.set_weights(weights)
    compare(layer(X), want(X), "output")
    scores = [
        attention(X, return_attention_scores=True)[1]
        for attention in (layer, want)
    ]
    compare(*scores, "scores")


def test_value_defaults_to_the_query_with_its_mask():
    x = X.copy()
    x[:, -4:] = 0.0
    masked = keras.layers.Masking()(x)
    layer = RingAttention(**GQA)
    want = layer(X, X)  # Builds the layer.
    valid = np.ones((BATCH, QUERIES), bool)
    valid[:, -4:] = False
    want = layer(x, x, query_mask=valid, value_mask=valid)
    with warnings.catch_warnings():
        # Keras warns where a layer loses a mask.
        warnings.simplefilter("error", UserWarning)
        compare(layer(masked), want, "output")
    assert np.any(ops.convert_to_numpy(layer(x)) != ops.convert_to_numpy(want))


class Mask(keras.layers.Layer):
    """Its input's Keras mask as numbers."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def call(self, inputs, mask=None):
        assert mask is not None
        return ops.cast(mask, "float32")

    def compute_output_spec(self, inputs, mask=None):
        return keras.KerasTensor(inputs.shape[:2], "float32")


@pytest.mark.parametrize("scores", [False, True])
def test_the_mask_of_the_query_stays_on_the_output(scores):
    tokens = np.array([[3, 1, 0, 0], [2, 2, 1, 0]])
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(4, WIDTH, mask_zero=True)(inputs)
    y = RingAttention(**MHA)(x, return_attention_scores=scores)
    model = keras.Model(inputs, Mask()(y[0] if scores else y))
    have = ops.convert_to_numpy(model(tokens))
    np.testing.assert_array_equal(have, tokens != 0)


def test_a_masked_query_is_finite_and_the_bias_alone():
    layer = RingAttention(**MHA, bias_initializer="ones")
    layer.build(X.shape)
    valid = np.zeros((BATCH, QUERIES), bool)
    have = layer(X, query_mask=valid)
    compare(have, np.ones_like(X), "output")


@pytest.mark.dealt
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # The rounding of a result of order one: 2^-8, 2^-11, 2^-53.
    [("mixed_bfloat16", 2e-2), ("float16", 4e-3), ("float64", 1e-12)],
)
def test_dtype_policies(dtype, tolerance):
    if dtype == "float64" and keras.backend.backend() == "jax":
        import jax

        with jax.enable_x64(True):
            check_dtype(dtype, tolerance)
    else:
        check_dtype(dtype, tolerance)


def check_dtype(dtype, tolerance):
    layer = fill(stock(GQA, dtype), X.shape, X.shape)
    ours = RingAttention.from_keras_layer(layer)
    options = {"use_causal_mask": True, "return_attention_scores": True}
    want = [ops.cast(t, "float64") for t in layer(X, X, **options)]
    have = [ours(X, use_causal_mask=True), ours(X, **options)[1]]
    policy = keras.dtype_policies.get(dtype)
    spec = ours.compute_output_spec(
        keras.KerasTensor(X.shape), return_attention_scores=True
    )
    for tensor, symbolic, wanted in zip(have, spec, want, strict=True):
        kind = keras.backend.standardize_dtype(tensor.dtype)
        assert kind == policy.compute_dtype == symbolic.dtype
        assert tuple(tensor.shape) == tuple(symbolic.shape)
        wanted = ops.convert_to_numpy(wanted)
        # Results are sums of numbers as large as the largest of them.
        np.testing.assert_allclose(
            ops.convert_to_numpy(ops.cast(tensor, "float64")),
            wanted,
            rtol=tolerance,
            atol=tolerance * max(1.0, np.abs(wanted).max()),
        )
    kinds = {keras.backend.standardize_dtype(w.dtype) for w in ours.weights}
    assert kinds == {policy.variable_dtype}


def test_a_symbolic_call_computes_nothing():
    """A sequence that nothing could compute, in no time."""
    x = keras.Input((10**9, WIDTH), batch_size=3)
    memory = keras.Input((10**8, 6), batch_size=3)
    layer = RingAttention(**GQA, output_shape=5)
    out, scores = layer(x, memory, return_attention_scores=True)
    assert out.shape == (3, 10**9, 5)
    assert scores.shape == (3, 4, 10**9, 10**8)
    assert layer.compute_output_shape(x.shape, memory.shape) == out.shape
    axes = RingAttention(**MHA, attention_axes=(2,))
    x = keras.Input((3, None, WIDTH))
    _, scores = axes(x, return_attention_scores=True)
    assert scores.shape == (None, 3, 2, None, None)


def test_a_shape_is_inferred_of_what_a_call_takes():
    import inspect

    call, spec = (
        list(inspect.signature(method).parameters)
        for method in (RingAttention.call, RingAttention.compute_output_spec)
    )
    assert call == spec


class Block(keras.layers.Layer):
    """A layer that leaves the inference of its shape to Keras."""

    def __init__(self, **options):
        super().__init__()
        self.attention = RingAttention(**options)

    def build(self, shape):
        self.attention.build(shape)

    def call(self, inputs):
        return inputs + self.attention(inputs)


def test_inside_a_layer_without_a_spec():
    inputs = keras.Input((None, WIDTH))
    outputs = Block(**GQA, causal=True, sliding_window=5)(inputs)
    assert outputs.shape == (None, None, WIDTH)
    model = keras.Model(inputs, outputs)
    # Two lengths and batches through one compiled function.
    for x in (X, normal(30, 3, 5, WIDTH)):
        want = x + ops.convert_to_numpy(model.layers[1].attention(x))
        compare(model.predict(x, verbose=0), want, "output")


def test_fit_trains_every_weight():
    inputs = keras.Input((None, WIDTH))
    layer = RingAttention(**GQA, use_gate=True, causal=True)
    model = keras.Model(inputs, layer(inputs))
    before = layer.get_weights()
    model.compile("sgd", "mse")
    model.fit(X, normal(31, *X.shape), verbose=0)
    for variable, old in zip(layer.weights, before, strict=True):
        # A bias of the keys moves all scores of a row alike: no gradient.
        moved = not np.array_equal(ops.convert_to_numpy(variable), old)
        assert moved or variable.path.endswith("key/bias"), variable.path


def test_with_scores_everything_is_the_same():
    """The path that writes out its scores knows every option."""
    options = {**GQA, "soft_cap": 1.5, "alibi": True, "sinks": True}
    options |= {"rotary": True, "dropout": 0.4, "seed": 9}
    given = {
        "attention_bias": normal(60, BATCH, QUERIES, KEYS),
        "segment_ids": np.sort(some(61, BATCH, QUERIES), axis=1).astype(int),
        "prefix_length": np.array([2, 5]),
        "training": True,
    }
    # Each call draws the next seed; a new layer starts with the first.
    out, scores = fill(RingAttention(**options), X.shape)(
        X, return_attention_scores=True, **given
    )
    compare(fill(RingAttention(**options), X.shape)(X, **given), out, "output")
    dropped = np.mean(ops.convert_to_numpy(scores) == 0)
    assert dropped > 0.4
    # What the sink takes is missing: rows sum to less than one on average.
    assert ops.convert_to_numpy(scores).sum(-1).mean() < 1


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (8, [2.0**-i for i in range(1, 9)]),
        # Of 4 heads, then every other one of 8.
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
    ],
)
def test_alibi_slopes(heads, slopes):
    layer = RingAttention(heads, 4, alibi=True)
    np.testing.assert_allclose(layer.get_config()["alibi"], slopes)


OPTIONS = {
    "num_heads": 4,
    "key_dim": 6,
    "value_dim": 5,
    "dropout": 0.1,
    "use_bias": False,
    "output_shape": (3, 2),
    "attention_axes": (1,),
    "sliding_window": 8,
    "flash_attention": False,
    "kernel_initializer": "he_normal",
    "bias_initializer": "ones",
    "kernel_regularizer": "l2",
    "bias_regularizer": "l1",
    "activity_regularizer": "l2",
    "kernel_constraint": "max_norm",
    "bias_constraint": "non_neg",
    "use_gate": True,
    "seed": 3,
    "num_key_value_heads": 2,
    "causal": True,
    "scale": 0.25,
    "soft_cap": 30.0,
    "alibi": (0.5, 0.25, 0.125, 0.0),
    "sinks": True,
    "rotary": True,
    "name": "attention",
    "dtype": "mixed_bfloat16",
}


def test_config_keeps_every_option():
    layer = RingAttention(**OPTIONS)
    config = layer.get_config()
    again = RingAttention.from_config(config)
    assert again.get_config() == config
    serialized = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(serialized)
    assert again.get_config() == config
    plain = RingAttention(8, 4).get_config()
    # Every option of the constructor is there, and none at its default.
    for name in OPTIONS:
        assert config[name] != plain[name], name


def test_config_names_every_argument():
    import inspect

    names = set(inspect.signature(RingAttention.__init__).parameters)
    assert names - {"self", "kwargs", "head_dim", "num_query_heads"} <= set(
        RingAttention(2, 4).get_config()
    )


def test_save_and_load(tmp_path):
    inputs = keras.Input((None, WIDTH))
    outputs = RingAttention(**GQA, use_gate=True, causal=True)(inputs)
    model = keras.Model(inputs, outputs)
    want = model.predict(X, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    compare(again.predict(X, verbose=0), want, "output")
    model.save_weights(tmp_path / "model.weights.h5")
    other = keras.models.clone_model(model)
    other.load_weights(tmp_path / "model.weights.h5")
    compare(other.predict(X, verbose=0), want, "output")


def test_copies_do_not_carry_the_world(tmp_path):
    ring = keras_ring.DistributedStrategy(
        sequence_parallel=1, devices=first_device()
    )
    with ring.scope():
        inputs = keras.Input((None, WIDTH))
        layer = RingAttention(**MHA)
        model = keras.Model(inputs, layer(inputs))
        want = ops.convert_to_numpy(layer(X))
    assert layer._ring_world is ring.world
    assert not any("world" in str(name) for name in layer.get_config())
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        keras.models.clone_model(model),
    ):
        attention = copied.layers[1]
        assert attention._ring_world is None
        attention.set_weights(layer.get_weights())
        compare(attention(X), want, "output")


def first_device():
    """The name of one device, where the backend has names for several."""
    if keras.backend.backend() == "torch":
        return ("cpu",)
    return (keras.distribution.list_devices("cpu")[0],)


@pytest.mark.parametrize("options", [MHA, GQA], ids=["multi-head", "grouped"])
def test_from_keras_layer(options):
    layer = stock({**options, "kernel_regularizer": "l2", "use_gate": True})
    unbuilt = RingAttention.from_keras_layer(layer)
    assert not unbuilt.built
    fill(layer, X.shape, MEMORY.shape, KEY.shape)
    layer.weights[0].trainable = False
    ours = RingAttention.from_keras_layer(layer)
    assert ours.name == layer.name
    assert [w.path for w in ours.weights] == [w.path for w in layer.weights]
    assert [w.trainable for w in ours.weights] == [
        w.trainable for w in layer.weights
    ]
    for have, want in zip(ours.weights, layer.weights, strict=True):
        np.testing.assert_array_equal(
            *(ops.convert_to_numpy(w) for w in (have, want))
        )
    config = layer.get_config()
    assert config.items() <= {**config, **ours.get_config()}.items()
    layer.trainable = False
    assert not RingAttention.from_keras_layer(layer).trainable


def test_from_keras_layer_refuses_what_it_cannot_take_over():
    class Changed(keras.layers.MultiHeadAttention):
        pass

    with pytest.raises(ValueError, match=r"subclass.*Received.*Changed"):
        RingAttention.from_keras_layer(Changed(**MHA))
    with pytest.raises(ValueError, match=r"itself.*Received.*Dense"):
        RingAttention.from_keras_layer(keras.layers.Dense(3))
    layer = stock(MHA)
    layer.build(X.shape, X.shape)
    layer.query_dense.enable_lora(2)
    with pytest.raises(ValueError, match="Merge or remove LoRA"):
        RingAttention.from_keras_layer(layer)
    with pytest.raises(NotImplementedError, match="activity_regularizer"):
        RingAttention.from_keras_layer(
            stock({**GQA, "activity_regularizer": "l2"})
        )


def test_an_overridden_attention_is_used():
    layer = fill(RingAttention(**MHA, causal=True, use_bias=False), X.shape)
    halved = Halved(**MHA, causal=True, use_bias=False)
    halved.build(X.shape)
    halved.set_weights(layer.get_weights())
    compare(halved(X) * 2, layer(X), "output")
