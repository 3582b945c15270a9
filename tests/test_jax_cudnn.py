"""What is around the kernel of cuDNN on JAX, and when it is offered.

The kernel itself is tested where there is a GPU, in test_jax_gpu.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from keras_ring import backends, config, masks
from keras_ring.attention import selection
from keras_ring.attention.kernel import Gradients, Kernel, merged, summed
from keras_ring.attention.numerics import Partial
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.backends.jax.kernels import cudnn
from keras_ring.masks.by_position import Before
from tests.visits import CASES, Case, CheckedVisit, Refusing

TOLERANCE = {"float16": 4e-3, "bfloat16": 3e-2}


def traced(kernel):
    """The kernel as in a program that does not know where chunks lie."""

    class Traced(Kernel):
        name = description = "traced"
        available, preferred = kernel.available, kernel.preferred
        branch = kernel.branch

        def forward(self, inputs, visit, carry):
            def function(inputs, starts):
                return tuple(kernel.forward(inputs, at(visit, starts), None))

            found = jax.jit(function)(inputs, places(visit))
            return merged(carry, Partial(*found))

        def backward(self, inputs, rows, visit, carry):
            def function(inputs, rows, starts):
                moved = at(visit, starts)
                return kernel.backward(inputs, rows, moved, None)[:3]

            found = jax.jit(function)(inputs, rows, places(visit))
            return summed(carry, Gradients(*found))

    def places(visit):
        return [
            [jnp.int32(s) for s in starts]
            for starts in (visit.query_starts, visit.key_starts)
        ]

    def at(visit, starts):
        return dataclasses.replace(
            visit, query_starts=tuple(starts[0]), key_starts=tuple(starts[1])
        )

    return Traced()


class StandIn:
    """What cuDNN computes, by its arguments, on any device."""

    def __init__(self, backward):
        self.backward = backward
        self.kinds = []

    def bind(self, query, key, value, *rest, scale, mask_type, **options):
        assert query.shape[3] == value.shape[3]
        assert query.shape[3] % 8 == 0
        assert query.shape[3] <= cudnn.WIDEST
        assert str(query.dtype) in cudnn.HALF
        self.kinds.append(mask_type)
        group = query.shape[1] // key.shape[1]
        dtype = query.dtype
        q, k, v = (t.astype("float32") for t in (query, key, value))
        k, v = (jnp.repeat(t, group, axis=1) for t in (k, v))
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) * scale
        if mask_type == cudnn.CAUSAL:
            assert query.shape[2] == key.shape[2]
            square = jnp.tril(jnp.ones(scores.shape[2:], bool))
            scores = jnp.where(square, scores, -jnp.inf)
        if not self.backward:
            lse = jax.nn.logsumexp(scores, axis=-1)
            p = jnp.exp(scores - lse[..., None])
            return jnp.einsum("bhqk,bhkd->bhqd", p, v).astype(dtype), lse
        lse, out, pull = (t.astype("float32") for t in rest[7:])
        p = jnp.exp(scores - lse[..., None])
        grad_p = jnp.einsum("bhqd,bhkd->bhqk", pull, v)
        grad = p * (grad_p - jnp.sum(out * pull, -1)[..., None]) * scale
        grads = [
            jnp.einsum("bhqk,bhkd->bhqd", grad, k),
            jnp.einsum("bhqk,bhqd->bhkd", grad, q),
            jnp.einsum("bhqk,bhqd->bhkd", p, pull),
        ]
        grads[1:] = (
            t.reshape(*key.shape[:2], group, *t.shape[2:]).sum(2)
            for t in grads[1:]
        )
        return [t.astype(dtype) for t in grads]


@pytest.fixture
def stand_in(monkeypatch):
    """cuDNN's two operations as plain products, on a GPU that is none."""
    monkeypatch.setattr(cudnn.local, "platform", lambda: "gpu")
    pair = StandIn(backward=False), StandIn(backward=True)
    monkeypatch.setattr(cudnn, "FORWARD", pair[0])
    monkeypatch.setattr(cudnn, "BACKWARD", pair[1])
    return pair


@pytest.mark.pairwise
@pytest.mark.parametrize("known", [True, False], ids=["known", "traced"])
@pytest.mark.parametrize(
    "name", ["full", "causal-grouped", "wide-values", "causal-later-chunk"]
)
@pytest.mark.parametrize("pull", [False, True])
def test_what_is_around_a_call(name, pull, known, stand_in):
    case = dataclasses.replace(CASES[name], dtype="bfloat16")
    visit = CheckedVisit(case, rest=0 if pull else 40, pull=pull)
    if known:
        kernel = cudnn.CuDnnKernel(Refusing())
    else:
        kernel = traced(cudnn.CuDnnKernel(backends.load().kernel.KERNEL))
    visit.check(kernel, TOLERANCE["bfloat16"])
    if known:
        kind = cudnn.CAUSAL if "causal" in name else cudnn.FULL
        expected = set() if name == "causal-later-chunk" else {kind}
        assert [set(s.kinds) for s in stand_in] == [expected, expected]


@pytest.mark.parametrize("pull", [False, True])
def test_wide_heads_have_no_room_for_a_column(pull, stand_in):
    case = Case(
        "causal",
        **{"queries": 90, "keys": 90, "head_dim": 128, "value_dim": 128},
        dtype="bfloat16",
    )
    visit = CheckedVisit(case, rest=0 if pull else 40, pull=pull)
    kernel = cudnn.CuDnnKernel(backends.load().kernel.KERNEL)
    visit.check(kernel, TOLERANCE["bfloat16"])
    assert stand_in[0].kinds == [cudnn.CAUSAL]
    assert stand_in[1].kinds == [cudnn.CAUSAL]


def test_it_is_for_gpus_and_half_precision(automatic):
    (kernel,) = (
        kernel
        for kernel in backends.load().kernel.KERNELS
        if kernel.name == "cudnn"
    )
    assert not kernel.preferred("cpu", "bfloat16")
    assert not kernel.preferred("gpu", "float32")
    assert kernel.preferred("gpu", "float16") == (cudnn.FORWARD is not None)
    assert selection.choose("bfloat16", "cpu").name != "cudnn"
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="must be that of a kernel"):
            config.set_kernel("cudnn")


def test_the_names_are_there():
    """Of the releases that the tests run with."""
    assert None not in (cudnn.FORWARD, cudnn.BACKWARD, cudnn.FULL)


def test_what_a_part_of_a_visit_is():
    kernel = cudnn.CuDnnKernel(Refusing())
    causal = Scoring(scale=1.0, mask=masks.Causal())
    window = Scoring(scale=1.0, mask=masks.SlidingWindow(3))
    padded = Scoring(scale=1.0, mask=masks.Causal() & Before(20))
    either = Scoring(scale=1.0, mask=masks.Causal() | Before(20))
    for query, key, scoring, number in (
        (8, 8, padded, 2),
        (16, 16, padded, 3),
        (16, 8, padded, 1),
        (24, 24, padded, 0),
        (24, 24, either, 3),
        (8, 0, causal, 1),
        (0, 8, causal, 0),
        (8, 8, causal, 2),
        (8, 4, causal, 3),
        (8, 8, window, 3),
        (0, 80, window, 0),
        (0, 80, Scoring(scale=1.0), 1),
    ):
        visit = Visit((query,), (key,), scoring)
        assert kernel._kinds(visit, 8, 8) == number
        moved = jax.jit(
            lambda q, k, scoring=scoring: kernel._kinds(
                Visit((q,), (k,), scoring), 8, 8
            )
        )(query, key)
        assert int(moved) == number
