"""The C++ attention in XLA's programs: exact, and when it is used."""

import warnings

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from keras import ops

import keras_ring
from keras_ring import masks
from keras_ring.attention import selection
from keras_ring.attention.kernel import Inputs, Rows
from keras_ring.attention.native import library
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.backends.jax.kernel import KERNEL, KERNELS
from keras_ring.backends.jax.kernels import native
from keras_ring.backends.jax.kernels.native import (
    BACKWARD,
    FORWARD,
    JaxNativeKernel,
)
from tests import reference
from tests.conformance import KernelConformance
from tests.kernel_choice import tensors
from tests.native_library import needed
from tests.visits import CASES, CheckedVisit, Refusing

built = needed(native.loaded)

# Those whose pairs are a band, in float32.
BANDS = sorted(
    name
    for name, case in CASES.items()
    if case.kind in ("full", "causal", "window", "window-causal")
    and case.dtype == "float32"
)


def draw(*shape):
    return np.random.default_rng(shape[1]).normal(size=shape).astype("float32")


@built
class TestNative(KernelConformance):
    """Of float32, with the pairs of a band."""

    cases = {name: CASES[name] for name in BANDS}  # noqa: RUF012
    left = {  # noqa: RUF012
        name: CASES[name]
        for name in (
            *("padding", "segments", "pairs-per-head", "prefix", "bfloat16"),
        )
    }

    def make(self, fallback):
        return JaxNativeKernel(fallback)


@built
@pytest.mark.parametrize("kind", ["one-after-the-other", "mapped"])
def test_visits_go_on_from_parts_whose_places_are_traced(kind):
    """Two visits of keys, each chunk of two parts, in compiled programs."""
    kernel = JaxNativeKernel(Refusing())
    arrays = [draw(1, 60, 4, 8), draw(1, 80, 2, 8), draw(1, 80, 2, 12)]
    arrays.append(draw(1, 60, 4, 12))
    # The first rows see nothing at all.
    places = np.r_[10:40, 110:140], np.r_[15:35, 90:110], np.r_[35:75]
    keys = np.concatenate(places[1:])
    distance = places[0][:, None] - keys[None]
    allowed = (distance >= 0) & (distance < 100)
    wanted = reference.attention(*arrays, allowed=allowed[None, None])
    query, key, value, grad_out = (ops.swapaxes(t, 1, 2) for t in arrays)
    mask = masks.Causal() & masks.SlidingWindow(100)
    halves = [
        (key[:, :, p], value[:, :, p]) for p in (slice(40), slice(40, 80))
    ]

    def visits(starts):
        scoring = Scoring(scale=8**-0.5, mask=mask)
        own = starts[0], starts[1]
        return (
            Visit(own, (starts[2], starts[3]), scoring),
            Visit(own, (starts[4],), scoring),
        )

    def both(starts, query, grad_out):
        partial = None
        for pair, visit in zip(halves, visits(starts), strict=True):
            partial = kernel.forward(Inputs(query, *pair), visit, partial)
        out, lse = partial
        delta = kernel.row_delta(out, grad_out, ops.zeros_like(lse))
        grad, found = None, []
        rows = Rows(out, lse, delta, grad_out)
        for pair, visit in zip(halves, visits(starts), strict=True):
            grads = kernel.backward(Inputs(query, *pair), rows, visit, grad)
            grad = grads.query
            found.append(grads[1:3])
        joined = (ops.concatenate(t, 2) for t in zip(*found, strict=True))
        return out, lse, grad, *joined

    starts = np.array([10, 110, 15, 90, 35], "int32")
    if kind == "mapped":
        several = (np.stack([t, t]) for t in (starts, query, grad_out))
        results = [t[1] for t in jax.jit(jax.vmap(both))(*several)]
    else:
        results = jax.jit(both)(starts, query, grad_out)
    assert np.isneginf(wanted.lse[:, :5]).all()
    for have, want in zip(results, wanted, strict=True):
        np.testing.assert_allclose(np.swapaxes(have, 1, 2), want, 2e-5, 2e-5)


@built
def test_it_is_for_cpus_that_stand_for_several_devices(automatic, monkeypatch):
    kernel = selection.choose("float32", "cpu")
    assert kernel.name == "native"
    assert kernel.fallback.name == "by_head"
    assert selection.choose("bfloat16", "cpu").name == "by_head"
    assert not kernel.preferred("gpu", "float32")
    one = jax.devices("cpu")[:1]
    monkeypatch.setattr(jax, "devices", lambda *kind: one)
    assert selection.choose("float32", "cpu").name == "blockwise"


@pytest.mark.parametrize("gone", ["include_dir", "register_ffi_target"])
def test_other_releases_of_jax_may_lack_what_it_needs(
    automatic, monkeypatch, gone
):
    monkeypatch.setattr(native, "loaded", library.Once(native._load))
    monkeypatch.delattr(jax.ffi, gone)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not KERNELS[0].preferred("cpu", "float32")
        assert not KERNELS[0].available()
    assert selection.choose("float32", "cpu").name == "by_head"


@built
@pytest.mark.parametrize(("data", "ring"), [(1, 8), (2, 4)])
@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(40)])
def test_rings_call_it(automatic, data, ring, mask):
    """And are exact, with batches that the compiler splits."""
    shape = data, 128, 4, 8
    arrays = [draw(*shape), draw(data, 128, 2, 8), draw(data, 128, 2, 8)]
    arrays.append(draw(*shape) + 1)
    allowed = (
        reference.causal(128, 128)
        if isinstance(mask, masks.Causal)
        else reference.window(128, 128, 40)
    )
    wanted = reference.attention(*arrays, allowed=allowed)
    strategy = keras_ring.DistributedStrategy(
        data_parallel=data, sequence_parallel=ring
    )
    spec = PartitionSpec("batch", "seq")
    placed = [
        jax.device_put(t, NamedSharding(strategy.world.mesh, spec))
        for t in arrays
    ]

    @jax.jit
    def both(query, key, value, grad_out):
        out, pull_back = jax.vjp(
            lambda *t: keras_ring.ops.ring_attention(*t, mask=mask),
            *(query, key, value),
        )
        return out, *pull_back(grad_out)

    with strategy.scope():
        program = both.lower(*placed).compile()
    text = program.as_text()
    for name in (FORWARD, BACKWARD):
        assert f'custom_call_target="{name}"' in text
    # Added to what is there already.
    assert "output_to_operand_aliasing" in text
    # What the compiler gives to one call: not the batches of all devices.
    for line in text.splitlines():
        if f'custom_call_target="{FORWARD}"' in line:
            assert f"= (f32[1,4,{128 // ring},8]" in line
    for have, want in zip(
        program(*placed), wanted[:1] + wanted[2:], strict=True
    ):
        np.testing.assert_allclose(have, want, 2e-5, 2e-5)


@built
def test_maps_of_others_over_shards_that_are_checked_work(automatic):
    mesh = jax.make_mesh(
        (2,), ("some",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    query, key, value = (
        np.concatenate([t, t], axis=0) for t in tensors("float32")
    )

    def attend(*t):
        return keras_ring.ops.ring_attention(*t, mask=masks.Causal())

    def gradients(function):
        return jax.jit(
            jax.grad(lambda *t: (function(*t) ** 2).sum(), argnums=(0, 1, 2))
        )(query, key, value)

    spec = PartitionSpec("some")
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    for have, want in zip(gradients(mapped), gradients(attend), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-5)


def test_the_others_follow_by_preference():
    names = [kernel.name for kernel in KERNELS]
    assert names[:2] == ["native", "by_head"]
    assert KERNELS[-1] is KERNEL


@built
def test_other_devices_are_left_to_another_kernel(monkeypatch):
    """By name it may be asked for there."""
    monkeypatch.setattr(native.local, "platform", lambda: "gpu")
    with pytest.raises(AssertionError, match="not fused"):
        CheckedVisit(CASES["causal"]).check(JaxNativeKernel(Refusing()))
