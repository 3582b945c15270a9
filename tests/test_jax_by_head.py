"""The blockwise kernel one head after the other: exact, and when it is used."""

import jax
import numpy as np

import keras_ring
from keras_ring import masks
from keras_ring.attention import selection
from keras_ring.attention.blockwise import tiles
from keras_ring.attention.blockwise.tiles import Tiling
from keras_ring.backends.jax.kernel import CacheKernel
from keras_ring.backends.jax.kernels.by_head import ByHeadKernel
from tests.conformance import KernelConformance
from tests.kernel_choice import tensors
from tests.visits import CASES, Case, CheckedVisit, Refusing

# Those whose masks carry no tensors; others are left to another kernel.
ALONE = sorted(
    name
    for name, case in CASES.items()
    if case.kind in ("full", "causal", "window", "prefix")
    and case.dtype != "float64"  # It is float32 here.
)


def by_head(fallback):
    return ByHeadKernel(CacheKernel(), fallback)


class TestByHead(KernelConformance):
    """Masks with tensors are left to another kernel."""

    cases = {name: CASES[name] for name in ALONE}  # noqa: RUF012
    # What is cut into heads; tiles and masks are the reference's.
    first = (
        *("full", "one-query", "grouped-query", "wide-values"),
        *("causal-grouped", "causal-more-keys", "causal-beside"),
        *("causal-rows-without-keys", "window", "prefix", "bfloat16"),
    )
    left = {  # noqa: RUF012
        name: CASES[name] for name in ("padding", "segments", "pairs-per-head")
    }

    def make(self, fallback):
        return by_head(fallback)


def test_one_head_at_a_time_in_small_tiles(monkeypatch):
    seen = set()

    class Watching(Tiling):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            seen.add((self.pairs, self.heads, self.queries.tile))

    monkeypatch.setattr(
        "keras_ring.attention.blockwise.kernel.Tiling", Watching
    )
    case = Case("causal", queries=512, keys=512, batch=3, heads=4, key_heads=2)
    CheckedVisit(case).check(by_head(Refusing()))
    assert seen == {(1, 2, 256)}
    assert tiles.TILE > 256


def test_it_is_for_cpus_that_stand_for_several_devices(
    automatic, without_native, monkeypatch
):
    kernel = selection.choose("float32", "cpu")
    assert kernel.name == "by_head"
    assert not kernel.preferred("gpu", "float32")
    one = jax.devices("cpu")[:1]
    monkeypatch.setattr(jax, "devices", lambda *kind: one)
    assert selection.choose("float32", "cpu").name == "blockwise"


def test_it_is_used_around_a_ring(automatic, without_native, monkeypatch):
    """And batches that the compiler splits stay split."""
    calls = []
    forward = CacheKernel.forward

    def counted(self, inputs, *others):
        calls.append(inputs.query.shape[:2])
        return forward(self, inputs, *others)

    monkeypatch.setattr(CacheKernel, "forward", counted)
    query, key, value = (
        np.concatenate([t, t], axis=0) for t in tensors("float32")
    )
    ring = keras_ring.DistributedStrategy(data_parallel=2, sequence_parallel=2)
    results = [
        run(
            lambda *t: keras_ring.ops.ring_attention(*t, mask=masks.Causal()),
            query,
            key,
            value,
        )
        for run in (ring.run, lambda function, *t: function(*t))
    ]
    np.testing.assert_allclose(*results, atol=2e-6)
    # The others are of the proof that the kernel agrees with the reference.
    assert (1, 1) in calls
    assert set(calls) <= {(1, 1), (1, selection.HEADS // selection.KEY_HEADS)}
