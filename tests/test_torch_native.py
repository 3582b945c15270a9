"""The C++ attention on PyTorch: what it computes, and when it is taken."""

import dataclasses
import functools
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import keras_ring
from keras_ring import config, masks
from keras_ring.attention import selection
from keras_ring.attention.kernel import Inputs, Rows
from keras_ring.attention.native import library
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.backends.torch.kernels import native
from keras_ring.backends.torch.kernels.native import TorchNativeKernel
from tests import reference
from tests.conformance import KernelConformance
from tests.kernel_choice import tensors
from tests.native_library import needed
from tests.visits import CASES, TOLERANCE, Case, CheckedVisit, Refusing

pytestmark = needed(native.loaded)
CASES = {
    **{name: case for name, case in CASES.items() if case.dtype == "float32"},
    "halved": Case("causal", queries=1100, keys=1100, batch=2, heads=4),
    "odd": Case("causal", queries=301, keys=523, head_dim=20, value_dim=36),
    "wide": Case("window", queries=130, keys=140, head_dim=70, value_dim=130),
    "narrow": Case("window-causal", head_dim=1, value_dim=3),
    # Heads that threads cannot share equally.
    "uneven": Case("causal", queries=300, keys=600, heads=3, key_heads=3),
    # Of more queries than the backward packs at a time.
    "bands": Case("causal", queries=1300, keys=600, heads=4, key_heads=1),
    "bands-window": Case(
        "window", queries=1300, keys=1300, heads=4, key_heads=1
    ),
    "tiles-pairs": Case("pairs", queries=700, keys=1300),
}


@functools.cache
def visit_of(name, **options):
    """Once for all numbers of threads: the oracle takes longer than they."""
    return CheckedVisit(CASES[name], **options)


THREADS = {
    "one": (1, True),
    "two": (2, True),
    # More than there are samples and heads.
    "five": (5, True),
    "three-of-its-own": (3, False),
}


@pytest.fixture(params=THREADS)
def threads(request):
    """PyTorch's threads, or those of the library."""
    count, openmp = THREADS[request.param]
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    library = native.loaded()
    if not openmp:
        library.keras_ring_use_threads(None)
    yield count
    library.keras_ring_use_threads(native._openmp())
    torch.set_num_threads(before)


@pytest.mark.pairwise
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "options",
    [{"rest": 40}, {"pull": True}],
    ids=["in-a-ring", "lse-has-a-gradient"],
)
def test_visits_are_exact(name, options, threads):
    visit_of(name, **options).check(TorchNativeKernel(Refusing()))


class TestNative(KernelConformance):
    """All cases are above, with several numbers of threads."""

    cases = {"one-key": CASES["one-key"]}  # noqa: RUF012
    left = {  # noqa: RUF012
        dtype: dataclasses.replace(CASES["causal"], dtype=dtype)
        for dtype in ("float64", "bfloat16")
    }

    def make(self, fallback):
        return TorchNativeKernel(fallback)


def test_what_has_no_memory_is_left_to_another_kernel():
    tensor = torch.empty((1, 2, 30, 8), device="meta")
    visit = Visit((0,), (0,), Scoring(scale=1.0))
    inputs = Inputs(tensor, tensor, tensor)
    with pytest.raises(AssertionError, match="not fused"):
        TorchNativeKernel(Refusing()).forward(inputs, visit, None)


def test_what_is_traced_is_left_to_another_kernel(monkeypatch):
    """Such tensors have no addresses, or none that stay."""

    class Traced(torch.Tensor):
        pass

    visit = CheckedVisit(CASES["causal"])
    kernel, inputs = TorchNativeKernel(Refusing()), visit.inputs
    traced = inputs._replace(key=inputs.key.as_subclass(Traced))
    with pytest.raises(AssertionError, match="not fused"):
        kernel.forward(traced, visit.visit, None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(AssertionError, match="not fused"):
        kernel.forward(inputs, visit.visit, None)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="libraries are found in /proc"
)
def test_pytorchs_own_threads_are_found():
    assert native._openmp() is not None


@pytest.mark.parametrize("options", [{"soft_cap": 2.0}, {"scale": -0.3}])
def test_other_scores_are_left_to_another_kernel(options):
    visit = CheckedVisit(CASES["causal"])
    scoring = dataclasses.replace(visit.visit.scoring, **options)
    visit.visit = dataclasses.replace(visit.visit, scoring=scoring)
    with pytest.raises(AssertionError, match="not fused"):
        visit.check(TorchNativeKernel(Refusing()))


@pytest.mark.parametrize(
    "mask", ["causal", "prefix"], ids=["in-one-call", "in-pieces"]
)
def test_balanced_chunks_one_after_the_other(mask):
    """Two parts of queries meet two parts of keys, and then others: what is
    there already is added to."""
    draw = np.random.default_rng(0)
    length, part, (own, others) = 800, 200, ((200, 600), (0, 400))
    place = np.concatenate([np.arange(part) + start for start in own])
    other = np.concatenate([np.arange(part) + start for start in others])
    arrays = [draw.normal(size=(2, length, 4, 16)) for _ in range(4)]
    allowed = reference.causal(length, length)
    found = masks.Causal()
    if mask == "prefix":
        allowed = allowed | (np.arange(length) < 250)
        found = masks.PrefixLM(250)
    want = reference.full_attention(*arrays, allowed=allowed, scale=0.25)
    query, key, value, grad_out = (
        torch.from_numpy(a).float().transpose(1, 2) for a in arrays
    )
    query, grad_out, out, lse = (
        t[:, :, place]
        for t in (
            query,
            grad_out,
            *(
                torch.from_numpy(a).float().transpose(1, 2)
                for a in (want.out, want.lse)
            ),
        )
    )
    kernel = TorchNativeKernel(Refusing())
    delta = kernel.row_delta(out, grad_out, torch.zeros_like(lse))
    partial = grad_query = None
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    for starts, columns in ((own, place), (others, other)):
        visit = Visit(own, starts, Scoring(scale=0.25, mask=found))
        inputs = Inputs(query, key[:, :, columns], value[:, :, columns])
        before = partial
        partial = kernel.forward(inputs, visit, partial)
        rows = Rows(out, lse, delta, grad_out)
        grads = kernel.backward(inputs, rows, visit, grad_query)
        grad_query = grads.query
        grad_key[:, :, columns], grad_value[:, :, columns] = grads[1:3]
    assert partial.out.data_ptr() == before.out.data_ptr()
    for have, wanted in (
        (partial.out, np.swapaxes(want.out, 1, 2)[:, :, place]),
        (partial.lse, np.swapaxes(want.lse, 1, 2)[:, :, place]),
        (grad_query, np.swapaxes(want.grad_query, 1, 2)[:, :, place]),
    ):
        np.testing.assert_allclose(have.numpy(), wanted, 2e-5, 2e-5)
    # Of the queries of these parts alone.
    rows = np.zeros_like(arrays[3])
    rows[:, place] = arrays[3][:, place]
    want = reference.full_attention(
        *arrays[:3], rows, allowed=allowed, scale=0.25
    )
    for have, wanted in (
        (grad_key, want.grad_key),
        (grad_value, want.grad_value),
    ):
        np.testing.assert_allclose(
            have.numpy(), np.swapaxes(wanted, 1, 2), 2e-5, 2e-5
        )


def test_what_is_no_number_stays_none():
    """In the rows that see it."""
    query, key, value = (torch.ones((1, 1, 40, 8)) for _ in range(3))
    value[0, 0, 20] = float("nan")
    visit = Visit((0,), (0,), Scoring(scale=1.0, mask=masks.Causal()))
    inputs = Inputs(query, key, value)
    part = TorchNativeKernel(Refusing()).forward(inputs, visit, None)
    nothing = part.out.isnan().any(-1)[0, 0]
    assert nothing[20:].all()
    query[0, 0, 3] = float("nan")
    inputs = inputs._replace(value=torch.ones_like(value))
    part = TorchNativeKernel(Refusing()).forward(inputs, visit, None)
    assert part.out.isnan().any(-1)[0, 0].nonzero().flatten().tolist() == [3]


def test_every_kind_of_what_is_no_number():
    """Such as that of GPUs."""
    kinds = torch.tensor([0x7FFFFFFF, 0x7FC00001, -1], dtype=torch.int32)
    for kind in kinds.view(torch.float32):
        query, key, value = (torch.ones((1, 1, 5, 8)) for _ in range(3))
        query[0, 0, 1] = kind
        visit = Visit((0,), (0,), Scoring(scale=1.0))
        inputs = Inputs(query, key, value)
        part = TorchNativeKernel(Refusing()).forward(inputs, visit, None)
        assert part.out[0, 0].isnan().any(1).tolist() == [
            i == 1 for i in range(5)
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_defaults_of_pytorch_do_not_matter(dtype):
    visit = CheckedVisit(CASES["causal"])
    torch.set_default_dtype(dtype)
    try:
        kernel = TorchNativeKernel(Refusing())
        part = kernel.forward(visit.inputs, visit.visit, None)
        rows = Rows(visit.out, visit.lse, visit.lse, visit.grad_out)
        grads = kernel.backward(visit.inputs, rows, visit.visit, None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in (*part, *grads[:3])} == {torch.float32}
    np.testing.assert_allclose(part.out, visit.forward["out"], 2e-5, 2e-5)


def test_only_float32_reaches_the_library():
    visit = CheckedVisit(CASES["causal"])
    rows = Rows(visit.out, visit.lse, visit.lse, visit.grad_out.double())
    with pytest.raises(TypeError, match="float32 tensors on a CPU"):
        TorchNativeKernel(Refusing()).backward(
            visit.inputs, rows, visit.visit, None
        )


def test_what_is_exported_is_of_pytorchs_operations(automatic):
    """Its addresses would be those of the example."""

    class Attention(torch.nn.Module):
        def forward(self, tensor):
            return keras_ring.ops.ring_attention(
                tensor, tensor, tensor, mask=masks.Causal()
            )

    config.set_kernel("native")
    example, other = torch.randn((2, 1, 24, 2, 8)).unbind()
    with torch.no_grad():
        want = Attention()(other)
        traced = torch.jit.trace(Attention(), (example,), check_trace=False)
        torch.testing.assert_close(traced(other), want)


def test_scores_of_any_size():
    """No exponential overflows: the largest score of a row is taken off."""
    query, key = 1e3 * torch.eye(16), 1e3 * torch.eye(16)
    value = torch.arange(256.0).reshape(16, 16)
    part = TorchNativeKernel(Refusing()).forward(
        Inputs(*(t[None, None] for t in (query, key, value))),
        Visit((0,), (0,), Scoring(scale=1.0)),
        None,
    )
    torch.testing.assert_close(part.out[0, 0], value)
    torch.testing.assert_close(part.lse[0, 0], torch.full((16,), 1e6))


def test_attention_by_name(automatic, threads):
    """With gradients asked for, which are the package's own."""
    results = {}
    for name in ("native", "blockwise"):
        config.set_kernel(name)
        inputs = [t.requires_grad_() for t in tensors("float32")]
        out = keras_ring.ops.ring_attention(*inputs, mask=masks.Causal())
        out.square().sum().backward()
        results[name] = [out.detach(), *(t.grad for t in inputs)]
    unit = TOLERANCE["float32"]
    for have, want in zip(*results.values(), strict=True):
        torch.testing.assert_close(have, want, rtol=unit, atol=unit)


def test_it_is_chosen_for_float32_on_cpus(automatic):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # It agrees.
        assert selection.choose("float32", "cpu").name == "native"
    assert selection.choose("float64", "cpu").name == "flash"
    assert not TorchNativeKernel(Refusing()).preferred("cuda", "float32")
    lines = []
    keras_ring.DistributedStrategy().summary(print_fn=lines.append)
    assert "  kernel             native" in lines


def test_without_a_compiler_the_next_is_chosen(automatic, monkeypatch):
    monkeypatch.setenv("KERAS_RING_CXX", "")
    monkeypatch.setattr(native, "loaded", library.Once(native._load))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # Nothing to tell of.
        assert selection.choose("float32", "cpu").name == "flash"
    with pytest.raises(ValueError, match="must be that of a kernel"):
        config.set_kernel("native")


def test_a_forked_process_has_threads_of_its_own():
    """Those of its parent are not there any more. PyTorch's cannot do that."""
    code = """
import os, signal, torch
from keras_ring.backends.torch.kernels import native
from keras_ring.backends.torch.kernels.native import TorchNativeKernel
from keras_ring.attention.kernel import Inputs
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
native.loaded().keras_ring_use_threads(None)
torch.set_num_threads(2)
tensor, visit = torch.ones((1, 4, 300, 8)), Visit((0,), (0,), Scoring(scale=1))
def call():
    inputs = Inputs(tensor, tensor, tensor)
    return TorchNativeKernel(None).forward(inputs, visit, None).out
assert call().eq(1).all()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if call().eq(1).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
