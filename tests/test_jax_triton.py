"""The package's own kernel for GPUs on JAX, in Pallas' interpreter.

Where a GPU is, `JAX_PLATFORMS=cuda pytest` on this file runs it there.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import keras_ring
from keras_ring import backends, config, masks
from keras_ring.attention import selection
from keras_ring.attention.kernel import Inputs, Rows
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.backends.jax.kernels import local, triton, triton_programs
from keras_ring.masks.by_position import Before
from tests.gradients import vjp
from tests.visits import Case, CheckedVisit, Refusing

ON_GPU = jax.default_backend() == "gpu"
TOLERANCE = {"float32": None, "float16": 4e-3, "bfloat16": 3e-2}
SMALL = {"queries": 100, "keys": 100}
CASES = {
    "full": Case(queries=70, keys=130, batch=2, heads=4, key_heads=2),
    "causal": Case("causal", **SMALL),
    "one-query": Case(queries=1, keys=77),
    "one-key": Case(queries=77, keys=1),
    "wide-values": Case("causal", **SMALL, value_dim=20, key_heads=1),
    "narrow-values": Case(**SMALL, head_dim=72, value_dim=4),
    "causal-earlier-chunk": Case("causal", starts=(100, 0), **SMALL),
    "causal-later-chunk": Case("causal", starts=(0, 100), **SMALL),
    "causal-beside": Case("causal", starts=(70, 0), **SMALL),
    "causal-rows-without-keys": Case("causal", starts=(0, 50), **SMALL),
    "window": Case("window", queries=300, keys=300, heads=1, key_heads=1),
    "window-of-everything": Case("window-of-everything", **SMALL),
    "window-causal": Case(
        "window-causal", queries=130, keys=300, starts=(300, 100)
    ),
    "padding": Case("padding", queries=70, keys=130, batch=2),
    "padding-causal": Case("padding-causal", **SMALL),
    "segments": Case("segments", **SMALL, batch=2),
    "prefix": Case("prefix", **SMALL, starts=(100, 250)),
    "padded-queries": Case("padded-queries", **SMALL, starts=(500, 500)),
    "bfloat16": Case("causal", **SMALL, dtype="bfloat16"),
    "float16": Case("padding", **SMALL, dtype="float16"),
}


def kernel(fallback=None):
    return triton.TritonKernel(fallback or Refusing(), interpret=not ON_GPU)


# The log-sum-exp has a gradient of its own. It comes with delta, from outside:
# three cases show it where nothing is fast.
PULLED = CASES if ON_GPU else ("causal", "padding", "bfloat16")


# Pallas' interpreter is slow: half of the cases there, all with `--all`.
FAST = CASES if ON_GPU else list(CASES)[::2]


@pytest.mark.parametrize(
    ("name", "pull"),
    [
        pytest.param(
            name, False, marks=[] if name in FAST else [pytest.mark.extra]
        )
        for name in CASES
    ]
    + [(name, True) for name in PULLED],
    ids=lambda value: {False: "in-a-ring", True: "pulled"}.get(value, value),
)
def test_it_is_right(name, pull):
    visit = CheckedVisit(CASES[name], rest=0 if pull else 40, pull=pull)
    visit.check(kernel(), TOLERANCE[CASES[name].dtype])


def balanced():
    draw = np.random.default_rng(0)
    query = draw.normal(size=(2, 4, 96, 16))
    key, value = draw.normal(size=(2, 2, 2, 96, 16))
    mask = masks.Causal() & masks.Padding(
        jnp.asarray(draw.random((2, 96)) > 0.2)
    )
    return [jnp.asarray(t, "float32") for t in (query, key, value)], Scoring(
        scale=0.25, mask=mask
    )


def test_places_may_be_traced():
    """Balanced chunks of a member that the program does not know."""
    arrays, scoring = balanced()

    def visit(kernel):
        @jax.jit
        def compute(queries, keys):
            visit = Visit(tuple(queries), tuple(keys), scoring)
            inputs = Inputs(*arrays)
            part = kernel.forward(inputs, visit, None)
            rows = Rows(*part, part.lse, part.out)
            grads = kernel.backward(inputs, rows, visit, None)
            return *part, *grads[:3]

        return compute(jnp.array([0, 336]), jnp.array([336, 0]))

    reference = backends.load().kernel.KERNEL
    for have, want in zip(visit(kernel()), visit(reference), strict=True):
        np.testing.assert_allclose(have, want, 2e-5, 2e-5)


@pytest.mark.parametrize(
    "mask",
    [
        masks.BlockCausal(7),
        masks.PrefixLM(40) & Before(90),
        masks.Causal() | masks.SlidingWindow(5),
        Before(120, queries=True) & masks.SlidingWindow(30),
        masks.SlidingWindow(2**40),
        masks.BlockCausal(2**40),
        masks.PrefixLM(2**40),
    ],
    ids=str,
)
def test_pairs_are_those_of_the_mask(mask):
    queries, keys = jnp.arange(60, 140), jnp.arange(20, 150)
    np.testing.assert_array_equal(
        np.broadcast_to(
            mask.tile(queries[:, None], keys[None], jax.lax.div), (80, 130)
        ),
        np.broadcast_to(mask.allowed(queries, keys)[0, 0], (80, 130)),
    )


class Mine(masks.Mask):
    """A mask that a user wrote."""

    def allowed(self, query_positions, key_positions):
        return masks.Causal().allowed(query_positions, key_positions)


@pytest.mark.parametrize(
    "change",
    [
        {"soft_cap": 5.0},
        {"slopes": jnp.ones(2)},
        {"bias": jnp.ones((1, 8, 1, 8))},
        {"mask": Mine()},
        {"mask": masks.Explicit(jnp.ones((1, 8, 1, 8), bool))},
        {"mask": masks.Causal() & masks.PrefixLM(jnp.ones(1, int))},
        {"dtype": "float64"},
        {"width": 136},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_fit_is_left_to_the_reference(change):
    change = dict(change)
    dtype, width = change.pop("dtype", "float32"), change.pop("width", 16)
    array = jax.ShapeDtypeStruct((1, 2, 8, width), dtype)
    visit = Visit((0,), (0,), dataclasses.replace(Scoring(1.0), **change))
    fits = kernel().fits
    assert not fits(Inputs(array, array, array), visit)
    plain = jax.ShapeDtypeStruct((1, 2, 8, 16), "float32")
    inputs = Inputs(plain, plain, plain)
    assert fits(inputs, Visit((0,), (0,), Scoring(1.0)))


@pytest.fixture
def offered(monkeypatch):
    """The kernel, there by name."""
    module = backends.load().kernel
    found = kernel(module.KERNEL)
    monkeypatch.setattr(module, "KERNELS", (found, module.KERNEL))
    yield found
    config.set_kernel("auto")


@pytest.mark.mostly(data=2)
@pytest.mark.parametrize("data", [1, 2])
def test_around_a_ring(data, offered, monkeypatch):
    """Balanced causal chunks, a padded length, and batches split by XLA."""
    if len(jax.devices()) < 2 * data:
        pytest.skip("needs as many devices")
    shapes = []
    forward = triton_programs.Program.forward

    def spy(self, query, *rest):
        shapes.append(query.shape)
        return forward(self, query, *rest)

    monkeypatch.setattr(triton_programs.Program, "forward", spy)
    draw = np.random.default_rng(0)
    arrays = [
        draw.normal(size=(2, 123, heads, 16)).astype("float32")
        for heads in (4, 2, 2, 4)
    ]
    valid = draw.random((2, 123)) > 0.2

    def attend(query, key, value, pull, valid):
        def function(*inputs):
            return keras_ring.ops.ring_attention(
                *inputs, mask=masks.Causal() & masks.Padding(valid)
            )

        out, grads = vjp(function, [query, key, value], pull)
        return out, *grads

    results = {}
    strategy = keras_ring.DistributedStrategy(
        sequence_parallel=2, data_parallel=data, balance=True
    )
    for name in ("triton", "blockwise"):
        config.set_kernel(name)
        results[name] = strategy.run(attend, *arrays, valid)
        # Every device has its own samples: two parts of 31 positions.
        assert set(shapes) == {(2 // data, 4, 32, 16)}
    for have, want in zip(*results.values(), strict=True):
        np.testing.assert_allclose(have, want, 2e-5, 2e-5)


def test_batches_are_not_gathered(offered):
    """Nor where there is no ring at all."""
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    config.set_kernel("triton")
    for sequence in (1, 4):
        strategy = keras_ring.DistributedStrategy(
            sequence_parallel=sequence, data_parallel=8 // sequence
        )
        mesh = strategy.world.mesh
        array = jax.ShapeDtypeStruct(
            (8, 64, 2, 16),
            "float32",
            sharding=jax.sharding.NamedSharding(
                mesh, jax.sharding.PartitionSpec("batch", "seq")
            ),
        )
        with strategy.scope():
            text = (
                jax.jit(keras_ring.ops.ring_attention)
                .lower(array, array, array)
                .compile()
                .as_text()
            )
        assert "all-gather" not in text


def test_it_is_there_by_name_only(automatic, monkeypatch):
    """Until it has run on a GPU."""
    assert triton.TritonKernel(Refusing()).available() == ON_GPU
    monkeypatch.setattr(local, "platform", lambda: "gpu")
    there = triton.TritonKernel(Refusing())
    assert there.available()
    assert not there.preferred("gpu", "float32")
    assert not there.preferred(None, "float32")
    assert "triton" in [k.name for k in backends.load().kernel.KERNELS]
    assert selection.choose("float32", "cpu").name != "triton"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_lowers_to_triton(dtype, monkeypatch):
    """As far as that goes without a GPU."""
    monkeypatch.setattr(local, "platform", lambda: "gpu")
    there = triton.TritonKernel(Refusing())
    array = jax.ShapeDtypeStruct((1, 2, 100, 64), dtype)
    row = jax.ShapeDtypeStruct((1, 2, 100), "float32")
    ids = jax.ShapeDtypeStruct((1, 100), "int32")

    def visit(query, key, value, row, ids, start):
        every = masks.Causal() & masks.SlidingWindow(9) & masks.Padding(ids)
        every = every | masks.PrefixLM(3) | masks.BlockCausal(4)
        every = every & masks.Segments(ids, ids) & Before(90)
        visit = Visit((start,), (0,), Scoring(scale=1.0, mask=every))
        inputs = Inputs(query, key, value)
        part = there.forward(inputs, visit, None)
        rows = Rows(part.out, row, row, query)
        grads = there.backward(inputs, rows, visit, None)
        return *part, *grads[:3]

    text = (
        jax.jit(visit)
        .trace(array, array, array, row, ids, jax.ShapeDtypeStruct((), "int32"))
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    for name in ("forward", "grad_query", "grad_keys"):
        assert f"ring_attention_{name}" in text
