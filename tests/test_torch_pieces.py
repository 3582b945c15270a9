"""Rectangles that a visit is cut into, and how their results add up."""

import itertools

import numpy as np
import pytest
import torch
from keras import ops

from keras_ring import masks, numerics
from keras_ring.backends.torch.flash import CpuFlash
from keras_ring.backends.torch.fused import FusedKernel
from keras_ring.backends.torch.pieces import COARSE, FINE, pieces
from keras_ring.scoring import Scoring
from keras_ring.tiling import Block
from tests.visits import Case, Refusing, Visit

FAR = 10_000


def block(starts, mask):
    return Block(starts, starts, Scoring(scale=0.3, mask=mask))


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
    found = pieces(block(starts, mask), length, length, grain)
    inside = np.arange(length // len(starts))
    places = np.concatenate([start + inside for start in starts])
    allowed = ops.convert_to_numpy(
        mask.allowed(*[torch.from_numpy(places.astype("int32"))] * 2)
    )[0, 0]
    np.testing.assert_array_equal(covered(found, length), allowed)


def test_a_causal_chunk_takes_few_calls():
    """Of equal squares along diagonals, those of 256 first."""
    found = pieces(block((0,), masks.Causal()), 4096, 4096)
    assert [(p.rows, p.count, p.causal) for p in found] == [
        (256, 16, True),
        *((256, 8, False), (512, 4, False)),
        *((1024, 2, False), (2048, 1, False)),
    ]
    assert found[0].covers(4096, 4096)
    # Two parts in the order in which an odd member has them.
    found = pieces(block((FAR, 0), masks.Causal()), 1024, 1024)
    assert [(p.rows, p.count) for p in found] == [
        *((256, 4), (512, 1), (256, 2)),
    ] or [(p.rows, p.count) for p in found] == [(256, 4), (256, 2), (512, 1)]
    (whole,) = pieces(block((0,), masks.Causal()), 4096, 4096, COARSE)
    assert (whole.rows, whole.causal) == (4096, True)


@pytest.mark.parametrize("length", [1024, 1100])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("options", [{"rest": 40}, {"pull": True}])
def test_squares_along_a_diagonal_are_exact(length, heads, options):
    """As samples of one call, in a batch of several."""
    case = Case(
        "causal",
        **{"queries": length, "keys": length, "batch": 2},
        **dict(zip(("heads", "key_heads"), heads, strict=True)),
    )
    kernel = FusedKernel("flash", Refusing(), CpuFlash())
    Visit(case, **options).check(kernel)


@pytest.mark.parametrize("kind", ["full", "causal", "window"])
def test_a_visit_is_added_to_what_is_there(kind):
    """In place, and with what the reference makes of the sum."""
    kernel = FusedKernel("flash", Refusing(), CpuFlash())
    visit = Visit(Case(kind, queries=600, keys=600))
    query, key, value = visit.inputs
    fresh = kernel.block_forward(query, key, value, visit.block)
    before = numerics.Partial(
        torch.randn_like(fresh.out), torch.randn_like(fresh.lse)
    )
    # One row so far saw nothing.
    before.out[:, :, 5], before.lse[:, :, 5] = 0.0, -torch.inf
    expected = numerics.merge(before, fresh)
    found = kernel.fold(before, query, key, value, visit.block)
    for have, want in zip(found, expected, strict=True):
        torch.testing.assert_close(have, want)
    rows = visit.out, visit.lse, None, visit.grad_out
    own = kernel.block_backward(query, key, value, *rows, visit.block)
    total = torch.randn_like(own.query)
    expected = own._replace(query=own.query + total)
    found = kernel.fold_backward(total, query, key, value, *rows, visit.block)
    assert found.query is total
    for have, want in itertools.islice(zip(found, expected, strict=True), 3):
        torch.testing.assert_close(have, want)


def test_rows_that_see_nothing_twice_stay_so():
    kernel = FusedKernel("flash", Refusing(), CpuFlash())
    query = torch.randn(1, 2, 40, 8)
    late = Block(
        (0,), (30,), Scoring(scale=0.3, mask=masks.Causal())
    )  # The first 30 see no key.
    once = kernel.block_forward(query, query, query, late)
    twice = kernel.fold(
        numerics.Partial(once.out.clone(), once.lse.clone()),
        *(query, query, query, late),
    )
    assert torch.equal(twice.out[:, :, :30], torch.zeros(1, 2, 30, 8))
    assert torch.isneginf(twice.lse[:, :, :30]).all()
    torch.testing.assert_close(twice.out, once.out)
    torch.testing.assert_close(
        twice.lse[:, :, 30:], once.lse[:, :, 30:] + np.log(2.0)
    )
