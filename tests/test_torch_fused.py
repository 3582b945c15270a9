"""What is around the fused kernels for GPUs, on any device: padding, groups,
squares, coarse pieces and half precision, and when they are not offered."""

import dataclasses

import numpy as np
import pytest
import torch

from keras_ring import backends, config, masks
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.backends.torch.kernels import cuda, fused
from keras_ring.backends.torch.kernels.flash import CpuFlash
from keras_ring.backends.torch.kernels.pieces import COARSE, pieces
from tests.fused_kernels import OPERATIONS, TOLERANCE, kernel_of
from tests.visits import CASES, CheckedVisit, Refusing


def test_without_a_gpu_nothing_of_it_is_offered():
    if torch.cuda.is_available():
        kernel = kernel_of("cudnn", Refusing())
        assert kernel.preferred("cuda", "bfloat16")
        assert not kernel.preferred("cuda", "float32")
        assert not kernel.preferred("cpu", "bfloat16")
        return
    for name in OPERATIONS:
        assert not kernel_of(name, Refusing()).available()
        with pytest.raises(ValueError, match="must be that of a kernel"):
            config.set_kernel(name)


def test_an_operation_for_masks_is_needed():
    with pytest.raises(ValueError, match="that takes masks"):
        fused.FusedKernel("cudnn", Refusing(), cuda.CuDnn())


def test_what_rounds_says_so():
    assert kernel_of("cudnn", Refusing()).rounds("bfloat16")
    assert not kernel_of("efficient", Refusing()).rounds("float32")
    assert not backends.load().kernel.KERNELS[0].rounds("bfloat16")


@pytest.mark.parametrize(
    ("rows", "columns"), [(5, 5), (5, 9), (9, 5), (1, 7), (7, 2)]
)
def test_causal_rectangles_are_squared(rows, columns):
    """The squares and what is left cover what a causal mask allows."""
    visit = Visit((30,), (30,), Scoring(scale=1.0, mask=masks.Causal()))
    (piece,) = fused.pieces(visit, rows, columns)
    assert piece.causal
    covered = np.zeros((rows, columns), int)
    for part in fused.squared(piece):
        ones = np.ones((part.rows, part.columns), int)
        if part.causal:
            assert part.rows == part.columns
            ones = np.tril(ones)
        covered[part.queries, part.keys] += ones
        assert part.query_start == 30 + part.queries.start
    np.testing.assert_array_equal(
        covered, np.tril(np.ones((rows, columns), int))
    )


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64])
def test_the_log_sum_exp_is_padded_to_32_rows(rows):
    lse = torch.randn(2, 3, rows)
    padded = cuda.padded(lse)
    assert padded.shape[2] % 32 == 0
    assert padded.shape[2] - rows < 32
    assert torch.equal(padded[:, :, :rows], lse)
    assert torch.all(padded[:, :, rows:] == float("inf"))


@pytest.mark.parametrize("columns", [1, 8, 15, 16, 17])
@pytest.mark.parametrize("heads", [1, 2])
def test_rows_of_a_mask_are_aligned(columns, heads):
    query = torch.zeros(2, 2, 5, 8, dtype=torch.bfloat16)
    mask = torch.rand(1, heads, 5, columns) > 0.5
    bias = cuda._aligned(mask, query)
    assert bias.shape == (2, 2, 5, columns)
    assert bias.dtype == query.dtype
    assert bias.stride(3) == 1
    assert bias.stride(2) % 16 == 0
    expected = torch.where(mask, 0.0, -float("inf")).expand(2, 2, 5, columns)
    assert torch.equal(bias.float(), expected)


class LikeCuda(CpuFlash):
    """An operation for CPUs that is called as those for GPUs are."""

    multiple = 8
    square = True
    grouped = False
    grain = COARSE
    fewest = 2

    def dtype(self, dtype):
        return dtype

    def forward(self, query, key, value, call):
        assert not call.causal or query.shape[2] == key.shape[2]
        assert query.shape[1] == key.shape[1]
        assert query.shape[3] % 8 == 0
        return super().forward(query, key, value, call)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is for CPUs")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", {"rest": 40}), ("bfloat16", {"pull": True})],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize(
    "case",
    [
        *("grouped-query", "narrow-values", "wide-values", "one-key"),
        *("causal-more-keys", "causal-more-queries", "causal-beside"),
        *("causal-rows-without-keys", "window-causal", "padding-causal"),
        *("segments-causal", "prefix", "pairs-per-head"),
    ],
)
def test_what_is_around_a_call_is_right(case, dtype, options):
    """Padding, groups, squares, coarse pieces and half precision."""
    operation = LikeCuda()
    visit = CheckedVisit(
        dataclasses.replace(CASES[case], dtype=dtype), **options
    )
    visit.check(
        fused.FusedKernel("like_cuda", Refusing(), operation),
        TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_number_in_terms_has_all_its_digits(dtype):
    numbers = torch.randn(1000) * 10
    terms = fused.split(numbers, 3, dtype)
    assert torch.equal(terms, terms.to(dtype).float())
    error = (terms.double().sum(-1) - numbers.double()).abs()
    # Below the smallest number of float16 nothing is left of it.
    assert error.max() <= (0.0 if dtype == torch.bfloat16 else 2.0**-25)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is for CPUs")
def test_small_rectangles_are_kept_from_an_operation():
    asked = []

    class Plain(LikeCuda):
        fewest = 3

        def forward(self, query, key, value, call):
            asked.append((query.shape[2], key.shape[2]))
            return super().forward(query, key, value, call)

    kernel = fused.FusedKernel("like_cuda", Refusing(), Plain(), CpuFlash())
    for rows, columns in [(5, 5), (2, 5), (5, 2), (3, 3)]:
        CheckedVisit(
            dataclasses.replace(CASES["full"], queries=rows, keys=columns)
        ).check(kernel)
    assert asked == [(5, 5), (3, 3)]


def test_what_a_mask_carries_is_looked_at_on_the_host():
    """Pieces are decided on copies there, and ask for the pairs alone on the
    device."""
    valid = torch.zeros(1, 2500, dtype=torch.bool)
    valid[:, :1100] = True
    pairs = torch.ones(1, 2500, 1, 2500, dtype=torch.bool)
    mask = masks.Causal() & masks.Padding(valid) & masks.Explicit(pairs)
    visit = Visit((0,), (0,), Scoring(scale=1.0, mask=mask))
    covered = np.zeros((2500, 2500), int)
    for piece in pieces(visit, 2500, 2500, COARSE):
        own = covered[piece.queries, piece.keys]
        own += piece.allowed(torch.device("cpu")).cpu().numpy()[0, 0]
        if piece.mask is not None:
            assert all(
                t.device.type == "cpu"
                for side in piece.mask.carried()
                for t in side
            )
    expected = np.tril(np.ones((2500, 2500), int))
    expected[:, 1100:] = 0
    np.testing.assert_array_equal(covered, expected)
