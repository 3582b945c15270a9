"""Splash attention on JAX, in Pallas' interpreter."""

import jax
import numpy as np
import pytest

import keras_ring
from keras_ring import backends, config, masks
from keras_ring.attention import selection
from keras_ring.attention.kernel import Inputs
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.backends.jax.kernels import local, splash
from tests.gradients import vjp
from tests.visits import Case, CheckedVisit, Refusing

ON_TPU = jax.default_backend() == "tpu"
HALF = {"dtype": "bfloat16"}
CASES = {
    "full": Case(queries=256, keys=384, batch=2, heads=4, **HALF),
    "causal": Case(
        "causal", queries=384, keys=384, heads=4, key_heads=1, **HALF
    ),
    "wide-values": Case("causal", queries=128, keys=128, value_dim=24, **HALF),
    "causal-earlier-chunk": Case(
        "causal", queries=128, keys=128, starts=(128, 0), **HALF
    ),
    "causal-later-chunk": Case(
        "causal", queries=128, keys=128, starts=(0, 128), **HALF
    ),
}


def kernel(fallback=None):
    return splash.SplashKernel(fallback or Refusing(), interpret=not ON_TPU)


@pytest.mark.mostly(pull=False, every=4)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pull", [False, True], ids=["in-a-ring", "pulled"])
def test_it_is_right(name, pull):
    visit = CheckedVisit(CASES[name], rest=0 if pull else 40, pull=pull)
    visit.check(kernel(), 3e-2)


@pytest.mark.parametrize(
    ("length", "dtype", "width", "mask"),
    [
        (100, "bfloat16", 16, None),
        (128, "float32", 16, None),
        (128, "bfloat16", 264, None),
        (128, "bfloat16", 16, masks.SlidingWindow(9)),
    ],
    ids=["length", "dtype", "width", "mask"],
)
def test_what_does_not_fit_is_left_to_the_reference(length, dtype, width, mask):
    array = jax.numpy.zeros((1, 1, length, width), dtype)
    visit = Visit((0,), (0,), Scoring(1.0, mask=mask))
    with pytest.raises(AssertionError, match="not fused"):
        kernel().forward(Inputs(array, array, array), visit, None)


# "auto" never chooses it, and it is interpreted here.
@pytest.mark.extra
def test_around_a_ring(monkeypatch):
    """Balanced causal chunks: every branch of a visit, and XLA's batches."""
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    module = backends.load().kernel
    found = kernel(module.KERNEL)
    monkeypatch.setattr(module, "KERNELS", (found, module.KERNEL))
    calls = []
    forward = splash.SplashKernel.call_forward

    def spy(self, inputs, scale, causal):
        calls.append(causal)
        return forward(self, inputs, scale, causal)

    monkeypatch.setattr(splash.SplashKernel, "call_forward", spy)
    draw = np.random.default_rng(0)
    arrays = [
        draw.normal(size=(2, 512, heads, 16)).astype("float32")
        for heads in (2, 1, 1, 2)
    ]

    def attend(*tensors):
        *inputs, pull = (t.astype("bfloat16") for t in tensors)

        def function(*inputs):
            return keras_ring.ops.ring_attention(*inputs, mask=masks.Causal())

        out, grads = vjp(function, inputs, pull)
        return [t.astype("float32") for t in (out, *grads)]

    results = {}
    strategy = keras_ring.DistributedStrategy(
        sequence_parallel=2, data_parallel=2, balance=True
    )
    try:
        for name in ("splash", "blockwise"):
            config.set_kernel(name)
            results[name] = strategy.run(attend, *arrays)
    finally:
        config.set_kernel("auto")
    assert set(calls) == {False, True}
    for have, want in zip(*results.values(), strict=True):
        np.testing.assert_allclose(have, want, 3e-2, 3e-2 * np.abs(want).max())


def test_it_is_there_by_name_only(automatic, monkeypatch):
    """Until it has run on a TPU."""
    assert splash.SplashKernel(Refusing()).available() == ON_TPU
    monkeypatch.setattr(local, "platform", lambda: "tpu")
    there = splash.SplashKernel(Refusing())
    assert there.available()
    assert not there.preferred("tpu", "bfloat16")
    assert not there.preferred(None, "bfloat16")
    assert "splash" in [k.name for k in backends.load().kernel.KERNELS]
    assert selection.choose("bfloat16", "cpu").name != "splash"


def test_the_names_are_there():
    assert splash._operations() is not None
