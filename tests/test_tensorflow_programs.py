"""The programs that visits become on TensorFlow."""

import functools
import gc

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_ring
from keras_ring import config, masks
from keras_ring.backends.tensorflow.programs import compiled
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


def language_model(seen, optimizer):
    """A small model that notes the programs of its replicas."""

    def note(features):
        world = keras_ring.distribution.strategy.current()
        if world is not None and world.inside():
            seen.append(tf.compat.v1.get_default_graph())
        return features

    keras.utils.set_random_seed(0)
    tokens = keras.Input((None,), dtype="int32")
    features = keras.layers.Embedding(9, 4)(tokens)
    features = keras.layers.Activation(note)(features)
    features = keras_ring.layers.RingAttention(2, 2, causal=True)(features)
    model = keras.Model(tokens, keras.layers.Dense(9)(features))
    model.compile(
        optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def batches(lengths):
    draw = np.random.default_rng(0)
    for length in lengths:
        tokens = draw.integers(0, 9, (2, length)).astype("int32")
        yield tokens, tokens


@pytest.mark.parametrize(
    "placed",
    [True, pytest.param(False, marks=pytest.mark.extra)],
    ids=["placed", "broadcast"],
)
def test_lengths_that_vary_share_a_program(placed):
    """One of all lengths, and one more of those that are padded."""
    # Equal lengths of a shard, too: of 7 and 8, of 11 and 12.
    even, odd = (4, 8, 6), (7, 8, 11, 12, 4)
    alone = language_model([], keras.optimizers.SGD(0.5))
    strategy = keras_ring.DistributedStrategy(sequence_parallel=2)
    strategy.world.placed = placed
    seen = []
    with strategy.scope():
        split = language_model(seen, keras.optimizers.SGD(0.5))
    of_any_length = (tf.TensorSpec((None, None), tf.int32),) * 2
    for lengths, programs in (even, 1), (odd, 2):
        for batch in batches(lengths):
            alone.train_on_batch(*batch)
        split.fit(
            tf.data.Dataset.from_generator(
                functools.partial(batches, lengths),
                output_signature=of_any_length,
            ),
            verbose=0,
        )
        assert len(seen) == 2 * programs, "each replica traces each once"
    for have, want in zip(
        split.get_weights(), alone.get_weights(), strict=True
    ):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def test_the_second_length_opens_a_program():
    """Where nobody says that lengths vary the first is known."""
    seen = []
    with keras_ring.DistributedStrategy(sequence_parallel=2).scope():
        model = language_model(seen, keras.optimizers.SGD(0.5))
    for batch in batches((4, 4, 8, 6, 7, 9)):
        model.train_on_batch(*batch)
    assert len(seen) == 2 * 3
    seen.clear()
    for tokens, _ in batches((4, 4, 8, 6, 7, 9)):
        assert model.predict_on_batch(tokens).shape == (*tokens.shape, 9)
    assert len(seen) == 2 * 3


def test_replicas_share_the_program_of_their_updates():
    sizes = {}
    for replicas in 2, 4:
        seen = []
        strategy = keras_ring.DistributedStrategy(
            sequence_parallel=replicas,
            devices=[f"cpu:{i}" for i in range(replicas)],
        )
        with strategy.scope():
            model = language_model(seen, keras.optimizers.Adam(0.1))
        (batch,) = batches([8])
        model.train_on_batch(*batch)
        program = seen[0]
        sizes[replicas] = len(program.get_operations())
        names = [
            operation.get_attr("f").name
            for operation in program.get_operations()
            if operation.type == "StatefulPartitionedCall"
        ]
        assert len(names) == replicas
        assert len(set(names)) == 1
        assert not any(
            operation.type == "AssignSubVariableOp"
            for operation in program.get_operations()
        )
        (update,) = (
            function
            for function in program.as_graph_def().library.function
            if function.signature.name == names[0]
        )
        assert not any(node.device for node in update.node_def)
        # The update of a weight: one for all replicas.
        assigned = [
            node.op for node in update.node_def if node.op.startswith("Assign")
        ]
        assert len(assigned) >= 3 * len(model.trainable_variables)
        local = strategy.world.tf_strategy.experimental_local_results
        for variable in model.trainable_variables + model.optimizer.variables:
            first, *others = local(variable.value)
            for other in others:
                np.testing.assert_array_equal(other, first)
    # Twice the replicas, of twice the visits each.
    assert sizes[4] <= 2.5 * sizes[2]


def test_a_gradient_searches_no_other_replica_for_variables(monkeypatch):
    """TensorFlow looks for them in all that lies behind a result; behind what
    has arrived that would be the whole program of its sender."""
    from tensorflow.python.ops import op_selector

    search = op_selector.get_backward_walk_ops
    found = []

    def counted(*arguments, **options):
        operations = search(*arguments, **options)
        found.append(len(operations))
        return operations

    monkeypatch.setattr(op_selector, "get_backward_walk_ops", counted)
    most = {}
    for layers in 1, 4:

        def function(tensor, layers=layers):
            with tf.GradientTape() as tape:
                tape.watch(tensor)
                out = tensor
                for _ in range(layers):
                    out = keras_ring.ops.ring_attention(out, out, out)
            return tape.gradient(out, tensor)

        found.clear()
        keras_ring.DistributedStrategy(sequence_parallel=2).run(
            function, np.ones((1, 8, 2, 4), "float32")
        )
        most[layers] = max(found)
    assert most[1] == most[4]


@pytest.mark.parametrize(
    "threshold",
    [
        (700, 9, 8),
        pytest.param((200_000, 9, 8), marks=pytest.mark.extra),
        pytest.param((0, 9, 8), marks=pytest.mark.extra),
    ],
)
def test_garbage_is_searched_for_rarely_while_a_program_is_traced(threshold):
    """And as before afterwards, also where tracing fails."""
    seen = []

    def function(fails):
        seen.append(gc.get_threshold()[0])
        if fails:
            raise ArithmeticError
        return tf.constant(1.0)

    before = gc.get_threshold()
    gc.set_threshold(*threshold)
    try:
        world = keras_ring.DistributedStrategy(sequence_parallel=2).world
        compiled(world, lambda: function(False))()
        with pytest.raises(ArithmeticError):
            compiled(world, lambda: function(True))()
        assert gc.get_threshold() == threshold
    finally:
        gc.set_threshold(*before)
    fewer = max(threshold[0], 100_000) if threshold[0] else 0
    assert seen == [fewer, fewer]
