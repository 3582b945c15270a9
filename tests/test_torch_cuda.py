"""The fused kernels for GPUs, on a GPU: what they compute, and when they are
taken.

Collected where there is one (see conftest.py); what is around these kernels
is tested everywhere, in test_torch_fused.py.
"""

import dataclasses

import numpy as np
import pytest
import torch

import keras_ring
from keras_ring import backends, config, masks
from keras_ring.attention import selection
from tests.fused_kernels import DTYPES, OPERATIONS, TOLERANCE, kernel_of
from tests.kernel_choice import tensors
from tests.visits import CASES, Calls, CheckedVisit, Refusing

PAIRS = [(name, dtype) for name, own in DTYPES.items() for dtype in own]


@pytest.fixture
def calls(monkeypatch):
    """Counts of calls of all fused operations by name."""
    counts = {}
    for operation in OPERATIONS.values():
        for name in (operation.name, operation.name + "_backward"):
            counts[name] = Calls(getattr(torch.ops.aten, name))
            monkeypatch.setattr(torch.ops.aten, name, counts[name])
    return counts


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "dtype"), PAIRS)
@pytest.mark.parametrize(
    "options",
    [{"rest": 40}, {"pull": True}],
    ids=["in-a-ring", "lse-has-a-gradient"],
)
def test_fused_calls_are_right(case, name, dtype, options, calls):
    visit = CheckedVisit(
        dataclasses.replace(CASES[case], dtype=dtype), **options
    )
    visit.check(kernel_of(name, Refusing()), TOLERANCE[dtype])
    forward = sum(c.count for n, c in calls.items() if "backward" not in n)
    backward = sum(c.count for n, c in calls.items() if "backward" in n)
    assert forward == backward
    assert forward > 0 or CASES[case].calls == 0


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_a_width_of_128_and_many_heads(name, dtype):
    case = dataclasses.replace(
        CASES["causal-grouped"],
        heads=8,
        key_heads=2,
        head_dim=128 - 8 * (name == "cudnn"),
        value_dim=128 - 8 * (name == "cudnn"),
        dtype=dtype,
    )
    # Products of 128 numbers, whose softmax is sharp.
    CheckedVisit(case, rest=40, pull=True).check(
        kernel_of(name, Refusing()), 2 * TOLERANCE[dtype]
    )


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_they_agree_with_the_reference(name, dtype, automatic, recwarn):
    kernel = next(k for k in backends.load().kernel.KERNELS if k.name == name)
    reference = backends.load().kernel.KERNEL
    assert kernel.preferred("cuda", dtype)
    assert selection.agrees(kernel, reference, dtype, "cuda"), [
        str(w.message) for w in recwarn
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_attention_takes_a_fused_kernel(dtype, automatic, calls):
    chosen = selection.choose(dtype, "cuda")
    assert chosen.name in DTYPES
    assert dtype in DTYPES[chosen.name]
    results = {}
    for name in ("auto", "blockwise"):
        config.set_kernel(name)
        before = sum(c.count for c in calls.values())
        inputs = [t.requires_grad_() for t in tensors(dtype)]
        assert inputs[0].device.type == "cuda"
        out = keras_ring.ops.ring_attention(*inputs, mask=masks.Causal())
        out.square().sum().backward()
        taken = sum(c.count for c in calls.values()) - before
        assert taken == (2 if name == "auto" else 0)
        results[name] = [out.detach(), *(t.grad for t in inputs)]
    for have, want in zip(*results.values(), strict=True):
        np.testing.assert_allclose(
            have.double().cpu().numpy(),
            want.double().cpu().numpy(),
            TOLERANCE[dtype],
            TOLERANCE[dtype] * max(1.0, want.abs().max().item()),
        )
