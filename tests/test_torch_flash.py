"""The fused kernel of PyTorch: what it computes, and when it is taken."""

import dataclasses
import warnings

import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring import backends, config, masks
from keras_ring.attention import numerics, selection
from keras_ring.attention.kernel import Inputs, Kernel, Rows
from keras_ring.attention.scoring import Dropout, Scoring
from keras_ring.attention.visit import Visit
from tests.conformance import KernelConformance
from tests.kernel_choice import tensors
from tests.visits import CASES, TOLERANCE, Calls, Case, CheckedVisit, Refusing


@pytest.fixture
def operations(monkeypatch):
    """Counts of the fused operations: forward, backward."""
    import torch

    from keras_ring.backends.torch.kernels import flash

    counts = []
    for name in (flash.FORWARD, flash.BACKWARD):
        counts.append(Calls(getattr(torch.ops.aten, name)))
        monkeypatch.setattr(torch.ops.aten, name, counts[-1])
    return counts


def flash(fallback: Kernel):
    from keras_ring.backends.torch.kernels.flash import CpuFlash
    from keras_ring.backends.torch.kernels.fused import FusedKernel

    return FusedKernel("flash", fallback, CpuFlash())


@pytest.mark.mostly(options={"rest": 40}, every=3)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "options",
    [{"rest": 40}, {"pull": True}],
    ids=["in-a-ring", "lse-has-a-gradient"],
)
def test_fused_calls_are_exact(name, options, operations):
    case = CASES[name]
    CheckedVisit(case, **options).check(flash(Refusing()))
    forward, backward = (spy.count for spy in operations)
    assert forward == backward
    if case.calls is not None:
        assert forward == case.calls


class TestFlash(KernelConformance):
    """All cases are above, with the calls they take."""

    cases = {"one-key": CASES["one-key"]}  # noqa: RUF012

    def make(self, fallback):
        return flash(fallback)

    def test_what_does_not_fit_is_left_to_the_fallback(self, operations):
        visit = CheckedVisit(CASES["causal"])
        negative = dataclasses.replace(visit.visit.scoring, scale=-0.3)
        visit.visit = dataclasses.replace(visit.visit, scoring=negative)
        with pytest.raises(AssertionError, match="not fused"):
            visit.check(flash(Refusing()))
        assert operations[0].count == 0


@pytest.mark.parametrize("name", ["causal", "padding-grouped", "bfloat16"])
def test_the_reference_passes_the_same_test(name):
    CheckedVisit(CASES[name], rest=40, pull=True).check(
        backends.load().kernel.KERNEL
    )


def test_any_strides_are_right(operations):
    """The operation itself takes a last stride of 1 for granted."""
    visit = CheckedVisit(Case("causal"), rest=40)
    turned = [t.mT.contiguous().mT for t in (*visit.inputs, visit.grad_out)]
    assert all(t.stride(-1) != 1 for t in turned)
    *inputs, visit.grad_out = turned
    visit.inputs = Inputs(*inputs)
    visit.check(flash(Refusing()))
    assert operations[0].count == 1


def options_that_do_not_fit():
    seed = ops.convert_to_tensor([1, 2], "int32")
    return {
        "soft-cap": {"soft_cap": 5.0},
        "bias": {"bias": ops.ones((1, 40, 1, 40))},
        "slopes": {"slopes": ops.ones((2,))},
        "dropout": {"dropout": Dropout(0.5, seed, 0)},
        "negative-scale": {"scale": -0.3},
        "zero-scale": {"scale": 0.0},
    }


@pytest.mark.parametrize("name", options_that_do_not_fit())
def test_what_does_not_fit_is_left_to_the_reference(name, operations):
    visit = CheckedVisit(Case("causal", queries=40, keys=40))
    scoring = dataclasses.replace(
        visit.visit.scoring, **options_that_do_not_fit()[name]
    )
    changed = dataclasses.replace(visit.visit, scoring=scoring)
    reference_kernel = backends.load().kernel.KERNEL
    results = []
    for kernel in (flash(reference_kernel), reference_kernel):
        part = kernel.forward(visit.inputs, changed, None)
        delta = numerics.row_delta(part.out, visit.grad_out, 0.0)
        rows = Rows(*part, delta, visit.grad_out)
        results.append(
            [*part, *kernel.backward(visit.inputs, rows, changed, None)]
        )
    for have, want in zip(*results, strict=True):
        if want is not None:
            np.testing.assert_array_equal(have.numpy(), want.numpy())
    assert [spy.count for spy in operations] == [0, 0]


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_the_operation_never_gets_an_empty_tensor(empty, operations):
    """It would end the process."""
    case = dataclasses.replace(Case(queries=8, keys=8), **{empty: 0})
    visit = Visit((0,), (0,), Scoring(scale=1.0))
    query = ops.ones((case.batch, 2, case.queries, 16))
    key = ops.ones((case.batch, 2, case.keys, 16))
    with pytest.raises(AssertionError, match="not fused"):
        flash(Refusing()).forward(Inputs(query, key, key), visit, None)
    assert operations[0].count == 0


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_attention_takes_the_fused_kernel(
    dtype, automatic, without_native, operations
):
    """By default, forward and backward, and with the reference's results."""
    results = {}
    selection.choose(dtype, "cpu")
    for name in ("auto", "blockwise"):
        config.set_kernel(name)
        before = [spy.count for spy in operations]
        inputs = [t.requires_grad_() for t in tensors(dtype)]
        out = keras_ring.ops.ring_attention(*inputs, mask=masks.Causal())
        out.square().sum().backward()
        taken = [
            spy.count - b for spy, b in zip(operations, before, strict=True)
        ]
        assert taken == ([1, 1] if name == "auto" else [0, 0])
        results[name] = [out.detach(), *(t.grad for t in inputs)]
    # One rounding to the dtype may fall on the other side.
    unit = {"bfloat16": 2.0**-7, "float16": 2.0**-10}.get(dtype)
    tolerance = unit or TOLERANCE[dtype]
    for have, want in zip(*results.values(), strict=True):
        np.testing.assert_allclose(
            have.double().numpy(), want.double().numpy(), tolerance, tolerance
        )


def test_a_wrong_operation_is_dropped(automatic, without_native, monkeypatch):
    import torch

    from keras_ring.backends.torch.kernels import flash

    operation = getattr(torch.ops.aten, flash.FORWARD)

    def broken(*arguments, **options):
        out, lse = operation(*arguments, **options)
        return out * 1.001, lse

    monkeypatch.setattr(torch.ops.aten, flash.FORWARD, broken)
    with pytest.warns(RuntimeWarning, match="'flash' is not used for float32"):
        assert selection.choose("float32", "cpu").name == "blockwise"


def test_an_operation_that_is_not_there_is_not_offered(
    automatic, without_native, monkeypatch
):
    from keras_ring.backends.torch.kernels import flash

    monkeypatch.setattr(flash, "FORWARD", "_an_operation_of_another_release")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selection.choose("float32", "cpu").name == "blockwise"
    with pytest.raises(ValueError, match="one of 'auto', 'blockwise'"):
        config.set_kernel("flash")


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_it_is_for_cpus(device, automatic):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # It is not even tried.
        # Of float64 no kernel for GPUs takes anything.
        assert selection.choose("float64", device).name == "blockwise"
