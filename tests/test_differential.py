"""Random programs and cases against the oracle, and what makes them fit.

`make fuzz N=10000` runs as many as one likes; these few hundred are the same
each time.
"""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring import masks
from keras_ring.distribution.settings import WAYS
from tests import differential, reference, rounding, worlds

SEED = 231001889
# Of the first hundreds those few that together have every option on a ring, on
# each backend, whose draws are not the same. Twenty more with `--all`.
CHOSEN = {
    "jax": (9, 78, 112, 280),
    # Of up to three devices, of which it traces each.
    "tensorflow": (9, 78, 42, 231),
    "torch": (9, 40, 78, 178, 284),
}[keras.backend.backend()]
PROGRAMS = [
    *CHOSEN,
    *(
        pytest.param(number, marks=pytest.mark.extra)
        for number in range(20)
        if number not in CHOSEN
    ),
]
CASES = 15
# Programs with tensors of their own for each head.
OTHER_WAYS = {
    "jax": ((110, "all_to_all"), (280, "all_gather"), (13, "mixed")),
    "tensorflow": ((9, "all_to_all"), (30, "all_gather"), (63, "mixed")),
    "torch": ((9, "all_to_all"), (180, "all_gather"), (63, "mixed")),
}[keras.backend.backend()]

SIZES = [size for size in (1, 2, 3, 4, 8) if size <= worlds.DEVICES]


@pytest.mark.parametrize("number", PROGRAMS)
def test_random_cases_equal_the_oracle(on_devices, number):
    program = differential.draw_program(SEED, number)
    on_devices(
        program.devices,
        differential.check_cases,
        *(SEED, number, range(CASES), "ring"),
    )


@pytest.mark.parametrize(("number", "attention"), OTHER_WAYS)
def test_other_ways_equal_the_oracle(on_devices, number, attention):
    program = differential.draw_program(SEED, number)
    on_devices(
        program.devices,
        differential.check_cases,
        *(SEED, number, range(CASES), attention),
    )


def test_the_chosen_programs_have_every_option_on_a_ring():
    programs = [differential.draw_program(SEED, n) for n in CHOSEN]
    assert all(p.mesh[1] > 1 for p in programs)
    assert any(p.mesh[1] > 2 for p in programs)
    kinds = {leaf[0] for p in programs for leaf in differential.leaves(p.mask)}
    assert kinds == {
        *("causal", "window", "padding", "segments", "prefix", "prefixes"),
        *("blocks", "pairs"),
    }
    for name in ("alibi", "sinks", "soft_cap", "bias", "dropout"):
        assert any(getattr(p, name) for p in programs), name
    for name in ("kernel", "balance", "return_lse"):
        assert len({getattr(p, name) for p in programs}) == 2, name
    for program in programs:
        # Neither empty shards alone, nor lengths that all rings can split.
        assert min(program.lengths) >= 2 * program.mesh[1]
    assert any(p.lengths[0] % p.mesh[1] for p in programs)
    assert any(p.lengths[0] != p.lengths[1] for p in programs)
    cut = [p for p in programs if p.portion]
    for place in range(2):
        assert not cut or any(
            p.lengths[place] > p.mesh[1] * p.portion for p in cut
        )


def test_the_draws_reach_every_option():
    programs = [differential.draw_program(7, n) for n in range(300)]
    kinds = {leaf[0] for p in programs for leaf in differential.leaves(p.mask)}
    assert kinds == {
        *("causal", "window", "padding", "segments", "prefix", "prefixes"),
        *("blocks", "pairs"),
    }
    trees = {p.mask[0] for p in programs if p.mask}
    assert {"and", "or"} <= trees
    for name in ("alibi", "sinks", "dropout", "soft_cap", "bias", "return_lse"):
        values = {bool(getattr(p, name)) for p in programs}
        assert values == {False, True}, name
    assert {p.dtype for p in programs} == set(differential.DTYPES)
    assert {p.tile for p in programs} == set(differential.TILES)
    cut = {p.portion for p in programs if p.lengths not in differential.LONG}
    assert cut == set(differential.PORTIONS)
    assert {p.kernel for p in programs} == {"auto", "blockwise"}
    assert {p.balance for p in programs} == {"auto", True}
    assert {p.attention for p in programs} == set(WAYS)
    sizes = {p.mesh for p in programs}
    assert sizes == {
        m for m in differential.MESHES if m[0] * m[1] <= worlds.DEVICES
    }


def plain_problem(draw, dtype):
    """Tensors, the oracle's results and the bounds of one small problem."""
    tensors = [
        rounding.rounded(draw.standard_normal((1, 12, 2, 8)), dtype)
        for _ in range(4)
    ]
    found = reference.full_attention(*tensors)
    return found, rounding.bounds(found, *tensors, None, {}, dtype)


@pytest.mark.once
@pytest.mark.parametrize("dtype", rounding.UNIT)
def test_the_bounds_find_small_errors(dtype):
    """An error of some hundred roundings in one element is found, so the
    bounds are no wider than a wrong formula is wrong."""
    found, bounds = plain_problem(np.random.default_rng(1), dtype)
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        want = getattr(found, name)
        right = rounding.rounded(want, dtype)
        differential.compare_one(name, right, want, bounds[name], dtype)
        wrong = right.copy()
        wrong[0, 5, 1, 3] += 1000 * rounding.UNIT[dtype] * np.abs(want).max()
        with pytest.raises(AssertionError, match=f"{name} is wrong at"):
            differential.compare_one(name, wrong, want, bounds[name], dtype)
        wrong[0, 5, 1, 3] = np.nan
        with pytest.raises(AssertionError, match="not finite"):
            differential.compare_one(name, wrong, want, bounds[name], dtype)


@pytest.mark.once
def test_the_oracle_s_gradients_are_differences():
    """All of them at once, along random directions, in float64."""
    draw = np.random.default_rng(3)
    tensors = {
        "query": draw.standard_normal((2, 7, 4, 5)),
        "key": draw.standard_normal((2, 6, 2, 5)),
        "value": draw.standard_normal((2, 6, 2, 3)),
        "bias": draw.standard_normal((1, 7, 1, 6)),
        "slopes": draw.standard_normal(4),
        "sinks": draw.standard_normal(4),
    }
    grad_out = draw.standard_normal((2, 7, 4, 3))
    grad_lse = draw.standard_normal((2, 7, 4))
    options = {
        "allowed": reference.causal(7, 6),
        "soft_cap": 2.0,
        "kept": draw.random((2, 4, 7, 6)) < 0.7,
        "rate": 0.3,
        "scale": 0.6,
    }

    def attend(tensors):
        return reference.full_attention(
            **tensors, grad_out=grad_out, grad_lse=grad_lse, **options
        )

    def objective(step, direction):
        moved = {n: t + step * direction[n] for n, t in tensors.items()}
        found = attend(moved)
        return (found.out * grad_out).sum() + (found.lse * grad_lse).sum()

    found = attend(tensors)
    for name, tensor in tensors.items():
        direction = {n: np.zeros_like(t) for n, t in tensors.items()}
        direction[name] = draw.standard_normal(tensor.shape)
        step = 1e-5
        slope = objective(step, direction) - objective(-step, direction)
        along = (getattr(found, f"grad_{name}") * direction[name]).sum()
        # Central differences: an error of step^2 and one of 1e-16 / step.
        np.testing.assert_allclose(slope / (2 * step), along, rtol=1e-6)


def attend(size, query, key, value, *arrays, mask=None, **options):
    """`ring_attention` on a ring, as NumPy; `mask` makes one of arrays."""
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)

    def function(query, key, value, *arrays):
        return keras_ring.ops.ring_attention(
            query,
            key,
            value,
            mask=None if mask is None else mask(*arrays),
            **options,
        )

    out = ring.run(function, query, key, value, *arrays)
    return ops.convert_to_numpy(out)


def packed_mask(query_ids, key_ids):
    return masks.Segments(query_ids, key_ids) & masks.Causal()


def check_packed_documents(size):
    """Documents side by side in one row give what each gives alone."""
    draw = np.random.default_rng(5)
    ends = [0, 1, 2, 20, 47, 48]  # Two of one token, one across shards.
    ids = np.zeros((1, 48), "int32")
    for number, start in enumerate(ends[1:-1], 1):
        ids[:, start:] = number
    query, key, value = draw.standard_normal((3, 1, 48, 2, 8)).astype("float32")
    packed = attend(size, query, key, value, ids, ids, mask=packed_mask)
    for first, last in itertools.pairwise(ends):
        own = (t[:, first:last] for t in (query, key, value))
        alone = keras_ring.ops.ring_attention(
            *(ops.convert_to_tensor(t) for t in own), mask=masks.Causal()
        )
        # Sums of at most 27 numbers of order one, in another order.
        np.testing.assert_allclose(
            packed[:, first:last],
            ops.convert_to_numpy(alone),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.mostly(size=3)
@pytest.mark.parametrize("size", SIZES)
def test_packed_documents_equal_separate_documents(on_devices, size):
    on_devices(size, check_packed_documents, size)


def dropped_entries(size, seed, length=48):
    """(1, length, 2, length) booleans: with equal scores and one-hot values
    an output row shows the probabilities of its query."""
    query = np.zeros((1, length, 2, 4), "float32")
    value = np.eye(length, dtype="float32")[None, :, None]
    out = attend(
        size,
        query,
        query,
        np.broadcast_to(value, (1, length, 2, length)),
        dropout=0.4,
        dropout_seed=np.array(seed, "int32"),
    )
    # What is kept is 1 / length, divided by 1 - rate: nothing in between.
    np.testing.assert_allclose(out[out != 0], 1 / length / 0.6, rtol=1e-5)
    return out != 0


@pytest.mark.mostly(size=3)
@pytest.mark.parametrize("size", SIZES)
def test_dropout_is_the_same_for_every_ring_size(on_devices, size):
    seed = (-5, 2**31 - 1)
    entries = on_devices(size, dropped_entries, size, seed)
    expected = differential.kept(seed, (1, 2, 48, 48), 0.4)
    np.testing.assert_array_equal(entries, np.swapaxes(expected, 1, 2))


@pytest.mark.once
def test_dropout_drops_as_often_as_it_says():
    kept = differential.kept((1, 2), (2, 4, 300, 300), 0.4)
    # Five standard deviations of the share of 720,000 coins.
    assert abs(kept.mean() - 0.6) < 5 * (0.24 / kept.size) ** 0.5
    other = differential.kept((1, 3), (2, 4, 300, 300), 0.4)
    agree = (kept == other).mean()
    assert abs(agree - 0.52) < 5 * (0.25 / kept.size) ** 0.5
