"""The programs that visits become on TensorFlow."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import keras_ring
from keras_ring import config, masks
from tests import reference

LOOPS = {"While", "StatelessWhile", "If", "StatelessIf"}
CAUSAL = masks.Causal()


def attention(query, key, value, grad_out, mask=CAUSAL):
    with tf.GradientTape() as tape:
        tape.watch([query, key, value])
        out = keras_ring.ops.ring_attention(query, key, value, mask=mask)
    return out, *tape.gradient(out, [query, key, value], grad_out)


def types_of(program):
    """Types of all operations of a program and of what it calls."""
    definition = program.graph.as_graph_def()
    nodes = list(definition.node)
    for function in definition.library.function:
        nodes += function.node_def
    return {node.op for node in nodes}


@pytest.fixture
def blockwise():
    config.set_kernel("blockwise")
    yield
    config.set_kernel("auto")


@pytest.mark.parametrize(
    ("length", "loops"),
    [(300, False), (512, False), (1000, False), (1600, True)],
)
def test_short_sequences_on_one_device_have_no_loops(length, loops, blockwise):
    """Nor lists of tiles, which are laid out anew."""
    draw = np.random.default_rng(0)
    arrays = [draw.normal(size=(2, length, 2, 4)) for _ in range(4)]
    tensors = [tf.constant(a, tf.float32) for a in arrays]
    program = tf.function(attention, autograph=False).get_concrete_function(
        *tensors
    )
    types = types_of(program)
    assert bool(types & LOOPS) == loops
    assert any(name.startswith("TensorList") for name in types) == loops
    want = reference.attention(
        *arrays, allowed=reference.causal(length, length)
    )
    for have, name in zip(
        program(*tensors),
        ("out", "grad_query", "grad_key", "grad_value"),
        strict=True,
    ):
        np.testing.assert_allclose(
            have, getattr(want, name), 1e-5, 1e-4, err_msg=name
        )


def test_what_a_tensor_hides_is_not_known_to_a_program(blockwise):
    """Another padding of the same shape has the same program."""
    length, draw = 1000, np.random.default_rng(0)
    arrays = [draw.normal(size=(2, length, 2, 4)) for _ in range(4)]
    tensors = [tf.constant(a, tf.float32) for a in arrays]

    def padded(valid, *tensors):
        return attention(*tensors, mask=CAUSAL & masks.Padding(valid))

    program = tf.function(padded, autograph=False).get_concrete_function(
        tf.TensorSpec((2, length), tf.bool), *tensors
    )
    assert types_of(program) & {"If", "StatelessIf"}
    for ends in (1000, 300), (700, 1):
        valid = np.arange(length) < np.array(ends)[:, None]
        want = reference.attention(
            *arrays,
            allowed=reference.causal(length, length) & valid[:, None, None, :],
        )
        for have, name in zip(
            program(tf.constant(valid), *tensors),
            ("out", "grad_query", "grad_key", "grad_value"),
            strict=True,
        ):
            np.testing.assert_allclose(
                have, getattr(want, name), 1e-5, 1e-4, err_msg=name
            )


def test_places_of_a_ring_are_not_taken_for_those_of_one_device(blockwise):
    """After one device has its program for a kind of visit, a ring has
    another."""
    draw = np.random.default_rng(0)
    arrays = [
        draw.normal(size=(1, 64, 2, 4)).astype("float32") for _ in range(4)
    ]
    # A window, so that what a visit sees depends on where its keys are.
    windowed = functools.partial(
        attention, mask=CAUSAL & masks.SlidingWindow(20)
    )
    alone = windowed(*map(tf.constant, arrays))
    strategy = keras_ring.DistributedStrategy(sequence_parallel=2)
    for have, want in zip(strategy.run(windowed, *arrays), alone, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-5)
