"""The kernel of oneDNN's products: what it computes, and when it is taken."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

import keras_ring
from keras_ring import config, kernels, masks
from keras_ring.backends.torch import onednn
from keras_ring.backends.torch.fused import FusedKernel
from tests.kernel_choice import tensors
from tests.visits import CASES, TOLERANCE, Case, Refusing, Visit

pytestmark = pytest.mark.skipif(
    onednn._linear() is None, reason="PyTorch has no oneDNN here"
)
# The trial itself, without what is known of it already.
TRIAL = onednn.pays.__wrapped__
CASES = {
    **{name: case for name, case in CASES.items() if case.dtype != "float64"},
    "halved": Case("causal", queries=1100, keys=1100, batch=2, heads=4),
    "tiles": Case(queries=700, keys=1300, head_dim=24, value_dim=16),
    "tiles-pairs": Case("pairs", queries=700, keys=1300),
}


def kernel(otherwise):
    return FusedKernel("onednn", otherwise, onednn.OneDnn())


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    # The threads that compute heads have their own number.
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "options",
    [{"rest": 40}, {"pull": True}],
    ids=["in-a-ring", "lse-has-a-gradient"],
)
def test_visits_are_exact(name, options, threads):
    Visit(CASES[name], **options).check(kernel(Refusing()))


def test_float64_is_left_to_another_kernel():
    visit = Visit(dataclasses.replace(CASES["causal"], dtype="float64"))
    with pytest.raises(AssertionError, match="not fused"):
        visit.check(kernel(Refusing()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_by_name(dtype, automatic, threads):
    """With gradients asked for, which are the package's own."""
    results = {}
    for name in ("onednn", "blockwise"):
        config.set_kernel(name)
        inputs = [t.requires_grad_() for t in tensors(dtype)]
        out = keras_ring.ops.ring_attention(*inputs, mask=masks.Causal())
        out.square().sum().backward()
        results[name] = [out.detach(), *(t.grad for t in inputs)]
    unit = {"bfloat16": 2.0**-7}.get(dtype, TOLERANCE[dtype])
    for have, want in zip(*results.values(), strict=True):
        np.testing.assert_allclose(
            have.double().numpy(), want.double().numpy(), unit, unit
        )


@pytest.mark.parametrize("ahead", [True, False])
def test_it_is_chosen_where_its_products_are_far_ahead(
    ahead, automatic, monkeypatch
):
    monkeypatch.setattr(onednn, "pays", lambda: ahead)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # It agrees.
        chosen = kernels.choose("float32", "cpu").name
    assert chosen == ("onednn" if ahead else "flash")
    assert kernels.choose("float64", "cpu").name == "flash"
    lines = []
    keras_ring.DistributedStrategy().summary(print_fn=lines.append)
    assert f"  kernel             {chosen}" in lines


@pytest.mark.parametrize("faster", ["onednn", "mkl", "neither"])
def test_the_trial_compares_the_products(faster, monkeypatch):
    """By a clock that one of them stops."""
    now, linear, product = [0.0], onednn._linear(), torch.mm

    def slowly(function, name):
        def call(*arguments):
            now[0] += 1.0 if faster == name else 1.2
            now[0] += faster not in (name, "neither")
            return function(*arguments)

        return call

    monkeypatch.setattr(onednn, "_linear", lambda: slowly(linear, "onednn"))
    monkeypatch.setattr(torch, "mm", slowly(product, "mkl"))
    monkeypatch.setattr(onednn.time, "perf_counter", lambda: now[0])
    assert TRIAL() is (faster == "onednn")


def test_a_release_without_it_is_not_offered_it(automatic, monkeypatch):
    monkeypatch.setattr(onednn, "_linear", lambda: None)
    assert not TRIAL()
    with pytest.raises(ValueError, match="must be that of a kernel"):
        config.set_kernel("onednn")
