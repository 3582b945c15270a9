"""Devices that share heads and hidden units: the model axis of the mesh."""

import contextlib
import re

import keras
import numpy as np
import pytest

import keras_ring
from keras_ring.backends.jax.layouts import Rules
from keras_ring.distribution.mesh import Mesh
from tests import jax_programs
from tests.test_sharded_weights import held

VOCABULARY, WIDTH, LENGTH = 32, 16, 18


def build(**options):
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, WIDTH)(tokens)
    x = keras_ring.layers.RingTransformerBlock(
        4, 4 * WIDTH, causal=True, gated=True, seed=3, **options
    )(x)
    x = keras.layers.LayerNormalization()(x)
    head = keras_ring.layers.LanguageModelHead(VOCABULARY)
    model = keras.Model(tokens, head(x))
    model.compile(
        keras.optimizers.Adam(1e-2),
        keras_ring.losses.ChunkedCrossEntropy(head, chunk_size=8),
    )
    return model


def trained(strategy, **options):
    """Losses and predictions of some steps, and the model."""
    keras.utils.set_random_seed(0)
    draw = np.random.default_rng(0)
    x = draw.integers(0, VOCABULARY, (8, LENGTH)).astype("int32")
    y = np.roll(x, -1, 1)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = build(**options)
        fitted = model.fit(
            x, y, batch_size=4, epochs=2, shuffle=False, verbose=0
        )
        predicted = model.predict(x[:3], verbose=0)
    return fitted.history["loss"], predicted, model


@pytest.mark.parametrize(
    ("mesh", "given", "options"),
    [
        # By head: slopes, sinks, and which entries are dropped.
        (
            (2, 2, 2),
            {},
            {"alibi": True, "sinks": True, "attention_dropout": 0.2},
        ),
        # Fewer key heads than devices, and every position on each.
        ((2, 1, 4), {}, {"rotary": True, "num_key_value_heads": 1}),
        (
            (2, 2, 2),
            {"attention": "all_to_all", "shard": "weights"},
            {"rotary": True, "num_key_value_heads": 2},
        ),
        pytest.param(
            *((1, 4, 2), {"attention": "all_gather"}, {"rotary": True}),
            marks=pytest.mark.extra,
        ),
    ],
    ids=["ring", "key-heads", "all-to-all", "all-gather"],
)
def test_training_is_that_of_one_device(mesh, given, options):
    data, sequence, model = mesh
    strategy = keras_ring.DistributedStrategy(
        data_parallel=data,
        sequence_parallel=sequence,
        model_parallel=model,
        **given,
    )
    losses, predicted, one = trained(None, **options)
    found, outputs, spread = trained(strategy, **options)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    np.testing.assert_allclose(outputs, predicted, atol=2e-4)
    # Norms and the biases after a sum are whole on each device.
    shared = held([v for v in one.variables if len(v.shape) > 1])
    kept = held([v for v in spread.variables if len(v.shape) > 1])
    devices = model * (data * sequence if "shard" in given else 1)
    if options.get("num_key_value_heads", 4) % model == 0:
        assert kept <= 1.05 * shared / devices
    for own, other in zip(spread.variables, one.variables, strict=True):
        assert own.shape == other.shape == np.asarray(own).shape


def test_no_activation_is_gathered():
    length = 2 * 52
    strategy = keras_ring.DistributedStrategy(
        data_parallel=2, sequence_parallel=2, model_parallel=2
    )
    with strategy.scope():
        # One key head, of which each device has a copy.
        model = build(rotary=True, num_key_value_heads=1)
        batch = np.zeros((4, length), "int32")
        step = jax_programs.train_step(strategy, model, (batch, batch))
    text = step.as_text()
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", text)
    assert not {"52", "104"} & {n for s in gathered for n in s.split(",")}
    assert " all-to-all(" not in text
    # Keys and values of one head go around.
    assert re.search(r"f32\[2,1,52,4\]\S* collective-permute", text)


def test_layouts_of_the_users_own():
    """Before those of the package's layers; also as KerasHub's are made."""

    def layout_map(mesh):
        rules = keras.distribution.LayoutMap(mesh)
        rules["wide/kernel"] = (None, "model")
        return rules

    for given in ({"wide/kernel": (None, "model")}, layout_map):
        strategy = keras_ring.DistributedStrategy(
            sequence_parallel=2, model_parallel=4, layout_map=given
        )
        with strategy.scope():
            wide = keras.layers.Dense(8, name="wide")
            other = keras.layers.Dense(8, name="other")
            wide.build((None, None, 4))
            other.build((None, None, 4))
        assert {s.data.shape for s in wide.kernel.value.addressable_shards} == {
            (4, 2)
        }
        assert other.kernel.value.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"layout_map": {"a": (None, "model")}}, "model_parallel=1"),
        ({"model_parallel": 2, "layout_map": 3}, "layout_map=3"),
        (
            {"model_parallel": 2, "layout_map": {"a(": ("model",)}},
            "regular expressions",
        ),
        (
            {"model_parallel": 2, "layout_map": {"a": ("rows",)}},
            r"\('rows',\) for 'a'",
        ),
    ],
)
def test_rules_are_refused(given, match):
    with pytest.raises(ValueError, match=match):
        keras_ring.DistributedStrategy(**given)


def test_a_rule_that_does_not_fit_a_weight():
    rules = Rules([("wide/kernel", (None, "model"))], Mesh((1, 2, 4)))
    assert rules.axes("wide/kernel", (3, 8)) == (None, "model")
    with pytest.raises(ValueError, match=r"shape \(3, 6\)"):
        rules.axes("wide/kernel", (3, 6))
    with pytest.raises(ValueError, match=r"shape \(3, 8, 8\)"):
        rules.axes("wide/kernel", (3, 8, 8))
    assert rules.axes("block/attention/query/kernel", (8, 3, 4)) is None
    assert rules.axes("a/query/kernel", (8, 4, 2)) == (None, "model", None)
