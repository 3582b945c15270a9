"""Rectangles that a visit is cut into, and how their results add up."""

import itertools

import numpy as np
import pytest
import torch
from keras import ops

from keras_ring import backends, masks
from keras_ring.attention import numerics
from keras_ring.attention.kernel import Inputs, Rows
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.backends.torch.kernels.flash import CpuFlash
from keras_ring.backends.torch.kernels.fused import FusedKernel
from keras_ring.backends.torch.kernels.pieces import COARSE, FINE, pieces
from tests.visits import Case, CheckedVisit, Refusing

FAR = 10_000


def visit_of(starts, mask):
    return Visit(starts, starts, Scoring(scale=0.3, mask=mask))


def covered(found, length):
    """How often each pair of a chunk is computed."""
    pairs = np.zeros((length, length), int)
    for piece in found:
        shape = piece.rows, piece.columns
        if piece.causal:
            own = np.tril(np.ones(shape, int))
        elif piece.mask is None:
            own = np.ones(shape, int)
        else:
            own = ops.convert_to_numpy(piece.allowed("cpu"))[0, 0]
        for number in range(piece.count):
            by = number * piece.step
            rows, columns = (
                slice(side.start + by, side.stop + by)
                for side in (piece.queries, piece.keys)
            )
            pairs[rows, columns] += own
    return pairs


@pytest.mark.parametrize("grain", [FINE, COARSE], ids=["fine", "coarse"])
@pytest.mark.parametrize("length", [500, 512, 1100, 1536, 2048])
@pytest.mark.parametrize("starts", [(0,), (0, FAR), (FAR, 0)])
@pytest.mark.parametrize(
    "mask", [masks.Causal(), masks.Causal() & masks.SlidingWindow(300)]
)
def test_every_pair_is_computed_once(mask, starts, length, grain):
    found = pieces(visit_of(starts, mask), length, length, grain)
    inside = np.arange(length // len(starts))
    places = np.concatenate([start + inside for start in starts])
    allowed = ops.convert_to_numpy(
        mask.allowed(*[torch.from_numpy(places.astype("int32"))] * 2)
    )[0, 0]
    np.testing.assert_array_equal(covered(found, length), allowed)


def test_equal_rectangles_along_a_diagonal_are_one_call():
    (whole,) = pieces(visit_of((0,), masks.Causal()), 1024, 1024)
    assert (whole.rows, whole.count, whole.causal) == (1024, 1, True)
    # Two parts, in the order in which an odd member has them: the squares of
    # both come first, since they cover the chunk.
    both, between = pieces(visit_of((FAR, 0), masks.Causal()), 1024, 1024)
    assert (both.rows, both.count, both.step) == (512, 2, 512)
    assert both.covers(1024, 1024)
    assert (between.queries, between.keys) == (slice(0, 512), slice(512, 1024))
    assert not between.covers(1024, 1024)


@pytest.mark.parametrize("starts", [(0, 5000), (5000, 0)])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_squares_along_a_diagonal_are_exact(starts, heads):
    """As samples of one call, in a batch of several, with what the reference
    makes of the same visit."""
    kernel = FusedKernel("flash", Refusing(), CpuFlash())
    reference = backends.load().kernel.KERNEL
    visit = visit_of(starts, masks.Causal())
    draw = torch.Generator().manual_seed(0)

    def tensor(number):
        shape = 2, 600, number, 8
        return torch.randn(shape, generator=draw).transpose(1, 2)

    query, grad_out = tensor(heads[0]), tensor(heads[0])
    inputs = Inputs(query, tensor(heads[1]), tensor(heads[1]))
    found, wanted = (
        k.forward(inputs, visit, None) for k in (kernel, reference)
    )
    for have, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(have, want, rtol=2e-5, atol=2e-5)
    out, lse = wanted
    rows = Rows(out, lse, numerics.row_delta(out, grad_out, 0.0), grad_out)
    grads = [k.backward(inputs, rows, visit, None) for k in (kernel, reference)]
    for have, want in itertools.islice(zip(*grads, strict=True), 3):
        torch.testing.assert_close(have, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["full", "causal", "window"])
def test_a_visit_is_added_to_what_is_there(kind):
    """In place, and with what the reference makes of the sum."""
    kernel = FusedKernel("flash", Refusing(), CpuFlash())
    visit = CheckedVisit(Case(kind, queries=600, keys=600))
    fresh = kernel.forward(visit.inputs, visit.visit, None)
    before = numerics.Partial(
        torch.randn_like(fresh.out), torch.randn_like(fresh.lse)
    )
    # One row so far saw nothing.
    before.out[:, :, 5], before.lse[:, :, 5] = 0.0, -torch.inf
    expected = numerics.merge(before, fresh)
    found = kernel.forward(visit.inputs, visit.visit, before)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want)
    rows = Rows(visit.out, visit.lse, None, visit.grad_out)
    own = kernel.backward(visit.inputs, rows, visit.visit, None)
    total = torch.randn_like(own.query)
    expected = own._replace(query=own.query + total)
    found = kernel.backward(visit.inputs, rows, visit.visit, total)
    assert found.query is total
    for have, want in itertools.islice(zip(found, expected, strict=True), 3):
        torch.testing.assert_close(have, want)


def test_rows_that_see_nothing_twice_stay_so():
    kernel = FusedKernel("flash", Refusing(), CpuFlash())
    query = torch.randn(1, 2, 40, 8)
    late = Visit(
        (0,), (30,), Scoring(scale=0.3, mask=masks.Causal())
    )  # The first 30 see no key.
    inputs = Inputs(query, query, query)
    once = kernel.forward(inputs, late, None)
    twice = kernel.forward(
        inputs, late, numerics.Partial(once.out.clone(), once.lse.clone())
    )
    assert torch.equal(twice.out[:, :, :30], torch.zeros(1, 2, 30, 8))
    assert torch.isneginf(twice.lse[:, :, :30]).all()
    torch.testing.assert_close(twice.out, once.out)
    torch.testing.assert_close(
        twice.lse[:, :, 30:], once.lse[:, :, 30:] + np.log(2.0)
    )
