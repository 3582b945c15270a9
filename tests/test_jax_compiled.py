"""What the compiler makes of a train step on 8 devices."""

import contextlib
import re

import jax
import keras
import numpy as np
import pytest

import keras_ring
from tests import jax_programs

DEVICES = 8
CHUNK = 52
LENGTH = DEVICES * CHUNK  # 416: no other size in the model.


def compiled_step(attention, data=1, heads=2, key_heads=2):
    """The optimised program of one device for one train step."""
    strategy = keras_ring.DistributedStrategy(
        sequence_parallel=DEVICES // data,
        data_parallel=data,
        attention="ring" if attention == "stock" else attention,
    )
    with strategy.scope():
        tokens = keras.Input((None,), dtype="int32")
        x = keras.layers.Embedding(32, 16)(tokens)
        if attention != "stock":
            x = x + keras_ring.layers.RingAttention(
                heads, 8, num_key_value_heads=key_heads, causal=True
            )(x)
        else:
            stock = keras.layers.MultiHeadAttention(2, 8)
            x = x + stock(x, x, use_causal_mask=True)
        model = keras.Model(tokens, keras.layers.Dense(32)(x))
        model.compile(
            "adam",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        batch = np.zeros((2 * data, LENGTH), "int32")
        return jax_programs.train_step(strategy, model, (batch, batch))


def full_length_shapes(text):
    """Every shape in the program that has an axis of the full length."""
    shapes = set(re.findall(r"\w+\[([\d,]+)\]", text))
    return {s for s in shapes if str(LENGTH) in s.split(",")}


@pytest.fixture(scope="module")
def ring_program():
    return compiled_step("ring").as_text()


def test_no_tensor_has_the_full_length(ring_program):
    assert f",{CHUNK}" in ring_program
    assert full_length_shapes(ring_program) == set()


def test_no_activation_is_gathered(ring_program):
    assert "collective-permute" in ring_program
    assert "all-gather" not in ring_program
    assert "all-to-all" not in ring_program


@pytest.mark.parametrize(
    "attention",
    [
        # The mix has it in it.
        pytest.param("all_to_all", marks=pytest.mark.extra),
        "mixed",
        "all_gather",
    ],
)
def test_other_ways_gather_keys_and_values_alone(attention):
    """And the batch, which is split as well, stays split."""
    text = compiled_step(attention, data=2, heads=4).as_text()
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    # Batch, key heads, length, size.
    keys = {f"2,2,{LENGTH},8"} if attention == "all_gather" else set()
    assert set(gathered) == keys
    assert " all-to-all(" in text
    assert attention != "mixed" or " collective-permute" in text


def test_stock_attention_is_what_these_tests_would_catch():
    text = compiled_step("stock").as_text()
    assert full_length_shapes(text)
    assert "all-gather" in text


def test_hops_are_those_of_the_algorithm(ring_program):
    """Keys and values travel size - 1 hops in each direction of the pass,
    their gradients size: the ones in the loop appear once in the text."""
    hops = re.findall(r"= .* collective-permute(?:-start)?\(", ring_program)
    # Forward: k, v in the loop. Backward: k, v before and in the loop, and
    # dk, dv in the loop, before the last visit and on the way home.
    assert 0 < len(hops) <= 2 + 2 * 2 + 3 * 2


def losses_of_blocks(strategy, batches):
    """Losses of steps of three recomputed blocks."""
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        inputs = x = keras.Input((None, 8))
        for _ in range(3):
            x = keras_ring.layers.RingTransformerBlock(
                1, hidden_dim=8, causal=True, remat="block"
            )(x)
        model = keras.Model(inputs, keras.layers.Dense(1)(x))
        model.compile("sgd", "mse")
        return [model.train_on_batch(*batch) for batch in batches]


def test_blocks_that_are_computed_again_split_the_batch_too():
    """The compiler refuses such a program where it asks for the number of a
    device, at some depths."""
    generator = np.random.default_rng(0)
    # One that can be split, and one that cannot.
    batches = [
        [generator.normal(size=(rows, 8, n)).astype("float32") for n in (8, 1)]
        for rows in (2, 3)
    ]
    strategy = keras_ring.DistributedStrategy(
        data_parallel=2, sequence_parallel=4
    )
    np.testing.assert_allclose(
        losses_of_blocks(strategy, batches),
        losses_of_blocks(None, batches),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("kernel", "length"), [("native", 16), ("by_head", 16), ("blockwise", 14)]
)
def test_a_ring_does_not_ask_for_the_number_of_its_device(kernel, length):
    """At no depth then is there something to refuse."""
    strategy = keras_ring.DistributedStrategy(
        data_parallel=2, sequence_parallel=4
    )

    def attend(tensor):
        out = keras_ring.ops.ring_attention(
            tensor, tensor, tensor, mask=keras_ring.masks.Causal()
        )
        return (out**2).sum()

    keras_ring.config.set_kernel(kernel)
    try:
        with strategy.scope():
            lowered = jax.jit(jax.grad(attend)).lower(
                jax.ShapeDtypeStruct((4, length, 2, 8), "float32")
            )
    finally:
        keras_ring.config.set_kernel("auto")
    assert "collective_permute" in lowered.as_text()
    assert "partition_id" not in lowered.as_text()


def test_several_batches_in_one_keep_their_axis():
    """As Keras 3.16 hands them over: each is cut as it is by itself."""
    strategy = keras_ring.DistributedStrategy(
        data_parallel=2, sequence_parallel=2
    )
    with strategy.scope():
        inputs = keras.Input((None, 3))
        strategy.world.model = keras.Model(
            inputs, keras.layers.Dense(1)(inputs)
        )
        # Three batches: their number is neither a batch nor a length.
        arrays = np.random.default_rng(0).normal(size=(3, 4, 8, 3))
        x = arrays.astype("float32")
        together, none = strategy.world.place_batch((x, None), stacked=True)
        alone, _ = strategy.world.place_batch((x[1], None))
    assert none is None
    np.testing.assert_array_equal(together, x)
    assert tuple(together.sharding.spec) == (None, *alone.sharding.spec)
    assert together.addressable_shards[0].data.shape == (3, 2, 4, 3)
