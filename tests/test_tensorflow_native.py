"""The C++ attention on TensorFlow: what its operations compute and refuse,
and which programs have them."""

import warnings

import numpy as np
import pytest
import tensorflow as tf

import keras_ring
from keras_ring import backends, config, masks
from keras_ring.attention import selection
from keras_ring.attention.kernel import Inputs, Rows
from keras_ring.attention.native import library
from keras_ring.attention.native.library import UnavailableError
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.backends.tensorflow import kernel as tensorflow_kernel
from keras_ring.backends.tensorflow.kernels import native
from keras_ring.backends.tensorflow.kernels.native import TensorFlowNativeKernel
from keras_ring.masks.band import Band
from keras_ring.masks.by_position import Before
from tests import reference
from tests.conformance import KernelConformance
from tests.native_library import needed
from tests.visits import CASES, TOLERANCE, Refusing

KERNEL = TensorFlowNativeKernel(Refusing())
pytestmark = needed(native.loaded)
FIT = ("full", "causal", "window", "window-causal", "padded-queries")
ATOL = TOLERANCE["float32"]
OPERATIONS = {"KerasRingForward", "KerasRingBackward"}


def fits(case):
    return case.kind in FIT and case.dtype == "float32"


class TestNative(KernelConformance):
    """Of float32, with the pairs of a band."""

    cases = {n: c for n, c in CASES.items() if fits(c)}  # noqa: RUF012
    left = {n: c for n, c in CASES.items() if not fits(c)}  # noqa: RUF012

    def make(self, fallback):
        return TensorFlowNativeKernel(fallback)


def drawn(*shapes):
    draw = np.random.default_rng(0)
    return [tf.constant(draw.normal(size=s), tf.float32) for s in shapes]


def at(mask, queries=(0,), keys=(0,), scale=0.3):
    return Visit(queries, keys, Scoring(scale=scale, mask=mask))


def wanted(tensors, positions, least=0, stop=10**6):
    """What the oracle says of heads-first tensors at given positions."""
    queries, keys = (np.asarray(side) for side in positions)
    allowed = queries[:, None] - keys[None] >= least
    allowed = allowed & (keys < stop)[None]
    found = reference.attention(
        *(np.swapaxes(np.asarray(t, "float64"), 1, 2) for t in tensors),
        allowed=allowed[None, None],
        scale=0.3,
    )
    return [np.swapaxes(array, 1, 2) for array in found]


def both(kernel, tensors, visit, pieces=1):
    """Forward and backward, over as many pieces of the keys one after the
    other as the visit's keys have parts, if there is more than one."""
    query, key, value, grad_out = tensors
    visits = list(
        zip(
            tf.split(key, pieces, axis=2),
            tf.split(value, pieces, axis=2),
            np.split(np.asarray(visit.key_starts), pieces)
            if pieces > 1
            else [visit.key_starts],
            strict=True,
        )
    )
    visits = [
        (
            Inputs(query, k, v),
            Visit(visit.query_starts, tuple(s), visit.scoring),
        )
        for k, v, s in visits
    ]
    partial = grad_query = None
    grads = []
    for inputs, piece in visits:
        partial = kernel.forward(inputs, piece, partial)
    delta = kernel.row_delta(partial.out, grad_out, tf.zeros_like(partial.lse))
    rows = Rows(*partial, delta, grad_out)
    for inputs, piece in visits:
        share = kernel.backward(inputs, rows, piece, grad_query)
        grad_query = share.query
        grads.append(share)
    return [
        *partial,
        grad_query,
        tf.concat([g.key for g in grads], 2),
        tf.concat([g.value for g in grads], 2),
    ]


def agree(found, want):
    for name, have, array in zip(
        ("out", "lse", "grad_query", "grad_key", "grad_value"),
        found,
        want,
        strict=True,
    ):
        np.testing.assert_allclose(have, array, ATOL, ATOL, err_msg=name)


HALVES = [(1, 2, 600, 16), (1, 1, 600, 16), (1, 1, 600, 8), (1, 2, 600, 8)]


def test_halves_whose_places_are_tensors():
    """The balanced chunks of members 0 and 2 of a ring of 3: the first is
    told its place when the program runs."""
    tensors = drawn(*HALVES)

    @tf.function(autograph=False)
    def program(first, second, *tensors):
        starts = (first, second), (600, 900)
        return both(KERNEL, tensors, at(masks.Causal(), *starts))

    found = program(tf.constant(0), tf.constant(1500), *tensors)
    queries = [*range(300), *range(1500, 1800)]
    agree(found, wanted(tensors, (queries, np.arange(600, 1200))))


@pytest.mark.parametrize("compiled", [False, True])
def test_visits_go_on(compiled):
    """Over the later half of the keys first, which some rows do not see."""
    tensors = drawn(*HALVES)
    case = at(masks.Causal() & Before(550), (0,), (300, 0))

    def program(*tensors):
        return both(KERNEL, tensors, case, pieces=2)

    if compiled:
        program = tf.function(program, autograph=False)
    keys = [*range(300, 600), *range(300)]
    agree(program(*tensors), wanted(tensors, (range(600), keys), stop=550))


@pytest.mark.parametrize("compiled", [False, True])
def test_what_somebody_holds_is_not_overwritten(compiled):
    query, key, value, grad_out = drawn(*HALVES)
    case = at(None)

    def program(query, key, value, grad_out):
        inputs = Inputs(query, key, value)
        first = KERNEL.forward(inputs, case, None)
        before = [tf.identity(first.out) * 1, tf.identity(first.lse) * 1]
        with tf.control_dependencies(before):
            second = KERNEL.forward(inputs, case, first)
        grad = query * 2
        rows = Rows(*second, second.lse, grad_out)
        share = KERNEL.backward(inputs, rows, case, grad)
        with tf.control_dependencies([*second, *share[:3]]):
            return before, [tf.identity(t) for t in first], second, grad

    if compiled:
        program = tf.function(program, autograph=False)
    before, first, second, grad = program(query, key, value, grad_out)
    for have, want in zip(first, before, strict=True):
        np.testing.assert_array_equal(have, want)
    np.testing.assert_array_equal(grad, query * 2)
    # Twice the same keys: half as much for each.
    np.testing.assert_allclose(second.out, first[0], ATOL, ATOL)
    np.testing.assert_allclose(second.lse, first[1] + np.log(2), ATOL, ATOL)


GOOD = {
    "query": (2, 4, 6, 3),
    "key": (2, 2, 8, 3),
    "value": (2, 2, 8, 5),
    "query_starts": (2,),
    "key_starts": (1,),
    "limits": (2,),
    "lse": (2, 4, 6),
    "delta": (2, 4, 6),
    "grad_out": (2, 4, 6, 5),
    "out": (2, 4, 6, 5),
    "grad_query": (2, 4, 6, 3),
}
DTYPES = {
    "query_starts": tf.int32,
    "key_starts": tf.int32,
    "limits": tf.int64,
}


def call(direction, count=None, **shapes):
    """One operation with zeros of the shapes, as far as they differ from
    good ones; `count` of what is there before."""
    given = {
        name: tf.zeros(shape, DTYPES.get(name, tf.float32))
        for name, shape in (GOOD | shapes).items()
    }
    names = ["query", "key", "value", "query_starts", "key_starts", "limits"]
    before = ["out", "lse"]
    if direction == "backward":
        names += ["lse", "delta", "grad_out"]
        before = ["grad_query"]
    before = before if count is None else (before * 3)[:count]
    operation = getattr(native.loaded(), f"keras_ring_{direction}")
    return operation(
        **{name: given[name] for name in names},
        before=[given[name] for name in before],
        **{"least": 0, "most": 9, "scale": 1.0, "threads": 1},
    )


def test_good_shapes_are_taken():
    assert [t.shape for t in call("forward")] == [GOOD["out"], GOOD["lse"]]
    assert [t.shape for t in call("backward", 0)] == [
        GOOD[name] for name in ("query", "key", "value")
    ]


@pytest.mark.parametrize(
    ("direction", "options"),
    [
        ("forward", {"query": (4, 6, 3)}),
        ("forward", {"query": (2, 4, 6, 0)}),
        ("forward", {"query": (2, 3, 6, 3), "out": (2, 3, 6, 5)}),
        ("forward", {"key": (2, 2, 8, 4)}),
        ("forward", {"key": (1, 2, 8, 3)}),
        ("forward", {"value": (2, 2, 7, 5)}),
        ("forward", {"value": (2, 1, 8, 5)}),
        ("forward", {"value": (3, 2, 8, 5)}),
        ("forward", {"query_starts": (4,)}),
        ("forward", {"query_starts": (0,)}),
        ("forward", {"query_starts": ()}),
        ("forward", {"key_starts": (3,)}),
        ("forward", {"limits": (1,)}),
        ("forward", {"out": (2, 4, 6, 4)}),
        ("forward", {"lse": (2, 4, 5)}),
        ("forward", {"count": 1}),
        ("forward", {"count": 3}),
        ("backward", {"lse": (2, 4, 6, 1)}),
        ("backward", {"delta": (2, 4, 5)}),
        ("backward", {"grad_out": (2, 4, 6, 3)}),
        ("backward", {"grad_query": (2, 4, 6, 5)}),
        ("backward", {"count": 2}),
    ],
)
def test_wrong_shapes_are_refused(direction, options):
    with pytest.raises(tf.errors.InvalidArgumentError, match="Received: "):
        call(direction, **options)


def test_nobody_differentiates_the_operations():
    """Attention has a gradient of its own."""
    query, key, value, _ = drawn(*HALVES)
    with tf.GradientTape() as tape:
        tape.watch(query)
        out = KERNEL.forward(Inputs(query, key, value), at(None), None).out
    with pytest.raises(LookupError, match="KerasRingForward"):
        tape.gradient(out, query)


def attention(mask, types):
    """Attention with its gradients, which leaves there what operations the
    program that is traced has."""

    def function(query, key, value, grad_out):
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            out = keras_ring.ops.ring_attention(query, key, value, mask=mask)
        grads = tape.gradient(out, [query, key, value], grad_out)
        graph = tf.compat.v1.get_default_graph()
        types.update(operation.type for operation in graph.get_operations())
        return (out, *grads)

    return function


MASKS = {
    "full": (None, np.ones((1024, 1024), bool)),
    "causal": (masks.Causal(), reference.causal(1024, 1024)),
    "window": (
        masks.Causal() & masks.SlidingWindow(100),
        reference.causal(1024, 1024) & reference.window(1024, 1024, 100),
    ),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("placed", [True, False], ids=["placed", "broadcast"])
@pytest.mark.parametrize("name", MASKS)
def test_replicas_attend_with_it(size, placed, name, automatic):
    mask, allowed = MASKS[name]
    draw = np.random.default_rng(0)
    shapes = [(1, 1024, heads, 8) for heads in (4, 2, 2, 4)]
    arrays = [draw.normal(size=s).astype("float32") for s in shapes]
    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    strategy.world.placed = placed
    types = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # It agrees.
        found = strategy.run(attention(mask, types), *arrays)
    assert types >= OPERATIONS
    assert "While" not in types
    want = reference.attention(*arrays, allowed=allowed)
    for have, what in zip(
        found, ("out", "grad_query", "grad_key", "grad_value"), strict=True
    ):
        np.testing.assert_allclose(
            have, getattr(want, what), ATOL, ATOL, err_msg=what
        )


def test_a_program_for_one_device_is_without_it(automatic):
    """It can be saved, and loaded where there is no compiler."""
    tensors = drawn(*[(1, 64, 2, 8)] * 4)
    types = set()
    tf.function(attention(None, types))(*tensors)
    keras_ring.DistributedStrategy(sequence_parallel=1).run(
        attention(None, types), *tensors
    )
    assert types
    assert not types & OPERATIONS


@pytest.mark.parametrize("automatically", [False, True])
def test_by_name_it_is_there_without_a_strategy(automatically, automatic):
    """Also where TensorFlow rewrites Python."""
    tensors = drawn(*[(1, 64, 2, 8)] * 4)
    config.set_kernel("native")
    types = set()
    function = attention(masks.Causal(), types)
    found = tf.function(function, autograph=automatically)(*tensors)
    assert types >= OPERATIONS
    want = reference.attention(*tensors, allowed=reference.causal(64, 64))
    np.testing.assert_allclose(found[0], want.out, ATOL, ATOL)
    np.testing.assert_allclose(found[1], want.grad_query, ATOL, ATOL)


def test_xla_gets_another_kernel(automatic):
    tensors = drawn(*[(1, 64, 2, 8)] * 4)
    config.set_kernel("native")
    types = set()
    function = attention(masks.Causal(), types)
    found = tf.function(function, jit_compile=True)(*tensors)
    assert not types & OPERATIONS
    want = reference.attention(*tensors, allowed=reference.causal(64, 64))
    np.testing.assert_allclose(found[0], want.out, ATOL, ATOL)


def test_the_error_says_what_is_missing(automatic, monkeypatch):
    config.set_kernel("native")

    def load():
        raise UnavailableError("There is no C++ compiler: none was found.")

    monkeypatch.setattr(native, "loaded", library.Once(load))
    with pytest.raises(UnavailableError, match="no C\\+\\+ compiler"):
        keras_ring.ops.ring_attention(*drawn(*[(1, 64, 2, 8)] * 3))
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        config.set_kernel("native")
    # By default the reference computes, and nobody is told.
    config.set_kernel("auto")
    types = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras_ring.DistributedStrategy(sequence_parallel=2).run(
            attention(None, types), *drawn(*[(1, 64, 2, 8)] * 4)
        )
    assert types
    assert not types & OPERATIONS


@pytest.mark.parametrize("size", [1, 2])
def test_the_summary_names_what_replicas_use(size, automatic):
    lines = []
    keras_ring.DistributedStrategy(sequence_parallel=size).summary(
        print_fn=lines.append
    )
    name = {1: "blockwise", 2: "native"}[size]
    assert f"  kernel             {name}" in lines
    assert selection.choose("float32") is backends.load().kernel.KERNEL


def test_threads_are_shared_by_the_replicas(monkeypatch):
    monkeypatch.setattr(native.native, "threads", lambda: 5)

    def used():
        inputs = Inputs(*drawn((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)))
        found = native._operands(inputs, at(None), Band())
        return found["threads"]

    counts = []

    def function(tensor):
        counts.append(used())
        return tensor

    for size in (2, 4):
        keras_ring.DistributedStrategy(sequence_parallel=size).run(
            function, np.zeros((1, 4), "float32")
        )
    assert counts == [2, 2, 1, 1, 1, 1]
    assert used() == 5


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches_that_are_open(batch):
    """The last one of an epoch is smaller, and opens the axis."""
    types = set()

    @tf.function(
        autograph=False,
        input_signature=[tf.TensorSpec((None, 2, 40, 8))] * 4,
    )
    def visit(query, key, value, grad_out):
        inputs = Inputs(query, key, value)
        part = KERNEL.forward(inputs, at(masks.Causal()), None)
        late = at(masks.Causal(), keys=(900,))
        again = KERNEL.forward(inputs, late, part)
        rows = Rows(part.out, part.lse, part.lse, grad_out)
        grads = KERNEL.backward(inputs, rows, at(masks.Causal()), None)
        graph = tf.compat.v1.get_default_graph()
        types.update(operation.type for operation in graph.get_operations())
        return again.out, *grads[:3]

    tensors = drawn(*[(batch, 2, 40, 8)] * 4)
    found = visit(*tensors)
    assert types >= OPERATIONS
    assert {tensor.shape for tensor in found} == {(batch, 2, 40, 8)}
    if batch:
        want = reference.attention(
            *(tf.transpose(t, (0, 2, 1, 3)).numpy() for t in tensors),
            allowed=reference.causal(40, 40),
            scale=0.3,
        )
        np.testing.assert_allclose(
            found[0], np.swapaxes(want.out, 1, 2), ATOL, ATOL
        )


@pytest.mark.parametrize(
    ("keys", "queries"), [(40, 40), (37, 37), (30, 33), (1, 1), (0, 0)]
)
def test_lengths_that_are_open(keys, queries):
    """With padding from a place on that the program is told."""
    types = set()

    @tf.function(
        autograph=False,
        input_signature=[
            *[tf.TensorSpec((2, 2, None, 8))] * 4,
            *[tf.TensorSpec((), tf.int32)] * 2,
        ],
    )
    def visit(query, key, value, grad_out, keys, queries):
        mask = masks.Causal() & Before(keys) & Before(queries, queries=True)
        found = both(KERNEL, (query, key, value, grad_out), at(mask))
        graph = tf.compat.v1.get_default_graph()
        types.update(operation.type for operation in graph.get_operations())
        return found

    limits = tf.constant(keys), tf.constant(queries)
    tensors = drawn(*[(2, 2, 40, 8)] * 4)
    rows, columns = np.arange(40)[:, None], np.arange(40)[None]
    allowed = (rows >= columns) & (columns < keys) & (rows < queries)
    want = reference.attention(
        *(np.swapaxes(np.asarray(t, "float64"), 1, 2) for t in tensors),
        allowed=allowed[None, None],
        scale=0.3,
    )
    agree(visit(*tensors, *limits), [np.swapaxes(a, 1, 2) for a in want])
    nothing = visit(*[tf.zeros((2, 2, 0, 8))] * 4, *limits)
    assert [t.shape[2] for t in nothing] == [0] * 5
    assert types >= OPERATIONS
    assert "While" not in types


def test_its_proof_needs_no_program(automatic, monkeypatch):
    """Tracing took five times as long as the proof itself."""
    programs = {}
    monkeypatch.setattr(tensorflow_kernel, "_PROGRAMS", programs)
    assert selection.agrees(*tensorflow_kernel.KERNELS, "float32", None)
    assert not programs
