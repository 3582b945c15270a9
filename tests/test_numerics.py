"""Merging partial results, and what masks tell of blocks."""

import functools
import itertools
import math
import operator
import sys

import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring import masks, precision
from keras_ring.attention import numerics
from keras_ring.attention.dense import dense_attention
from keras_ring.attention.numerics import Partial
from keras_ring.attention.scoring import Scoring
from keras_ring.ops.sequence_mean import sequence_mean
from tests import reference
from tests.gradients import in_dtype, vjp


def partial_of(scores, values):
    """Attention over some keys, in NumPy."""
    scores = np.asarray(scores, "float32")
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    safe = np.where(np.isinf(top), 0, top)
    weights = np.exp(scores - safe)
    total = weights.sum(-1, keepdims=True)
    out = weights @ values / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = (safe + np.log(total))[..., 0]
    return Partial(
        ops.convert_to_tensor(out.astype("float32")),
        ops.convert_to_tensor(lse.astype("float32")),
    )


def test_merge_is_attention_over_the_union():
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(1, 2, 5, 12)) * 20
    scores[0, 0, 0, :4] = -np.inf  # One side empty.
    scores[0, 0, 1, 4:] = -np.inf  # The other side empty.
    scores[0, 1, 2] = -np.inf  # Both.
    scores[0, 1, 3, :4] = 1e5  # Sides that are far apart.
    values = draw.normal(size=(1, 2, 12, 3)).astype("float32")
    merged = numerics.merge(
        partial_of(scores[..., :4], values[..., :4, :]),
        partial_of(scores[..., 4:], values[..., 4:, :]),
    )
    whole = partial_of(scores, values)
    for got, want in zip(merged, whole, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(got),
            ops.convert_to_numpy(want),
            rtol=1e-5,
            atol=1e-5,
        )
    assert not np.isnan(ops.convert_to_numpy(merged.out)).any()
    assert (ops.convert_to_numpy(merged.out)[0, 1, 2] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float64", "float64"),
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
    ],
)
def test_accumulation_dtype(dtype, expected):
    assert precision.accumulation_dtype(dtype) == expected


POSITIONAL = {
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(3),
    "own-position": masks.SlidingWindow(1),
    "causal-window": masks.Causal() & masks.SlidingWindow(4),
    "block-causal": masks.BlockCausal(3),
    "prefix": masks.PrefixLM(3),
    "no-prefix": masks.PrefixLM(0),
    "window-of-everything": masks.SlidingWindow(sys.maxsize),
    "block-of-everything": masks.BlockCausal(2**31),
    "prefix-of-everything": masks.PrefixLM(sys.maxsize),
    "prefix-or-window": masks.PrefixLM(2) | masks.SlidingWindow(2),
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_relation_agrees_with_the_pairs(name):
    """For every block of up to 4 x 4 positions: `nonempty` and `full` are what
    the pairs say. A block that is not empty may be called partial only."""
    mask = POSITIONAL[name]
    simple = not isinstance(mask, (masks.And, masks.Or))
    positions = ops.arange(12, dtype="int32")
    whole = ops.convert_to_numpy(mask.allowed(positions, positions))
    whole = np.broadcast_to(whole, (1, 1, 12, 12))[0, 0]
    for first_query, first_key in itertools.product(range(8), repeat=2):
        for queries, keys in itertools.product((1, 2, 4), repeat=2):
            pairs = whole[
                first_query : first_query + queries,
                first_key : first_key + keys,
            ]
            nonempty, full = mask.relation(
                masks.Span(first_query, first_query + queries - 1),
                masks.Span(first_key, first_key + keys - 1),
            )
            # Of masks in one, `full` of an `|` may be missed.
            assert full <= pairs.all()
            assert nonempty >= pairs.any()
            if simple:
                assert nonempty == pairs.any()
            if not isinstance(mask, masks.Or):
                assert full == pairs.all()


@pytest.mark.parametrize("name", POSITIONAL)
def test_band_and_tile_agree_with_the_pairs(name):
    """What kernels ask where they compare positions themselves."""
    mask = POSITIONAL[name]
    queries, keys = np.arange(5, 17)[:, None], np.arange(3, 20)[None]
    pairs = ops.convert_to_numpy(
        mask.allowed(
            ops.convert_to_tensor(queries[:, 0], "int32"),
            ops.convert_to_tensor(keys[0], "int32"),
        )
    )[0, 0]
    assert mask.has_tile()
    tile = mask.tile(queries, keys, operator.floordiv)
    np.testing.assert_array_equal(np.broadcast_to(tile, pairs.shape), pairs)
    band = mask.band()
    if band is not None:
        inside = (band.least <= queries - keys) & (queries - keys <= band.most)
        inside &= (keys < band.stop) & (queries < band.rows)
        np.testing.assert_array_equal(inside, pairs)


class Even(masks.Causal):
    """Keys of even positions, which some of the inherited answers deny."""

    def allowed(self, query_positions, key_positions):
        return (key_positions % 2 == 0)[None, None, None, :]


class EvenToo(Even):
    """Keys of even positions, and a window that it says itself."""

    def reach(self):
        return 3, 3


class Beside:
    """The pairs of `Even` from beside the masks."""

    allowed = Even.allowed


class EvenFromBeside(Beside, masks.Causal):
    """Keys of even positions."""


def test_other_pairs_inherit_no_answers_about_them():
    """Those of the base would hide keys, or show them, without a word."""
    for mask in (Even(), EvenToo(), EvenFromBeside()):
        span = masks.Span(0, 3)
        assert mask.relation(span, masks.Span(4, 7)) == (True, False)
        assert mask.band() is None
        assert not mask.has_tile()
        assert not mask.grows()
    assert Even().reach() == (math.inf, math.inf)
    assert EvenToo().reach() == (3, 3)
    query = np.random.default_rng(0).normal(size=(1, 40, 2, 8))
    out = keras_ring.ops.ring_attention(
        *[ops.convert_to_tensor(query, "float32")] * 3, mask=Even()
    )
    want = reference.attention(
        *[query] * 4, allowed=np.arange(40)[None, None, None] % 2 == 0
    ).out
    np.testing.assert_allclose(ops.convert_to_numpy(out), want, 1e-5, 1e-5)


def carrying(draw):
    """Masks over tensors of 24 positions that leave some tiles empty, some
    full and some partial, and the pairs that they allow."""
    valid = np.repeat(draw.random((2, 6)) < 0.5, 4, axis=1)
    valid[0, 5] = not valid[0, 5]
    ids = np.sort(draw.integers(0, 5, (2, 24)), axis=1).astype("int32")
    lengths = np.array([4, 9], "int32")
    positions = np.arange(24)
    return {
        "padding": (masks.Padding(valid), valid[:, None]),
        "segments": (
            masks.Segments(ids, ids),
            ids[:, :, None] == ids[:, None],
        ),
        "prefixes": (
            masks.PrefixLM(lengths),
            (positions < lengths[:, None])[:, None]
            | (positions[:, None] >= positions),
        ),
    }


@pytest.mark.parametrize("tile", [3, 4, 8])
@pytest.mark.parametrize("name", ["padding", "segments", "prefixes"])
def test_relation_of_tensors_agrees_with_the_pairs(name, tile):
    """All tiles at once, as the kernel asks: an empty one may be taken for
    partial, never the other way round."""
    mask, pairs = carrying(np.random.default_rng(7))[name]
    pairs = np.broadcast_to(pairs, (2, 24, 24))
    count = 24 // tile

    def cut(tensor):
        tensor = ops.convert_to_tensor(tensor)
        return ops.transpose(ops.reshape(tensor, (2, count, tile)), (1, 0, 2))

    query, key, shared = mask.carried()
    tiles = mask.replace(
        masks.Carried(
            tuple(cut(t) for t in query),
            tuple(cut(t) for t in key),
            tuple(ops.convert_to_tensor(t) for t in shared),
        )
    )
    first = np.arange(count) * tile
    relation = tiles.relation(
        masks.Span(first[:, None], first[:, None] + tile - 1),
        masks.Span(first[None], first[None] + tile - 1),
    )
    nonempty, full = (
        np.broadcast_to(ops.convert_to_numpy(r), (count, count))
        for r in relation
    )
    blocks = pairs.reshape(2, count, tile, count, tile)
    assert (nonempty >= blocks.any((0, 2, 4))).all()
    assert (full <= blocks.all((0, 2, 4))).all()
    # It does tell tiles apart, and exactly where ids are in order.
    if name != "prefixes":
        np.testing.assert_array_equal(nonempty, blocks.any((0, 2, 4)))
        np.testing.assert_array_equal(full, blocks.all((0, 2, 4)))


def test_masks_combine_with_masks_only():
    with pytest.raises(TypeError):
        masks.Causal() & True
    with pytest.raises(TypeError):
        masks.Causal() | 1


def test_structure_tells_masks_apart_but_not_their_tensors():
    first = masks.Causal() & masks.Padding(ops.ones((1, 4), "bool"))
    second = masks.Causal() & masks.Padding(ops.zeros((2, 8), "bool"))
    assert first.structure() == second.structure()
    assert hash(first.structure()) == hash(second.structure())
    third = masks.SlidingWindow(2) & masks.Padding(ops.ones((1, 4), "bool"))
    assert first.structure() != third.structure()
    assert masks.SlidingWindow(2).structure() != masks.SlidingWindow(3)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_window_of_no_size_is_refused(size):
    with pytest.raises(ValueError, match="positive integer"):
        masks.SlidingWindow(size)


def test_float64_is_not_rounded_to_float32():
    draw = np.random.default_rng(0)
    array = np.append(draw.normal(size=20), [0.0, 1e-12, 800.0, -800.0])
    with in_dtype("float64"):
        (mean, tanh), (grad,) = vjp(
            lambda t: [precision.mean(t, -1, keepdims=True), precision.tanh(t)],
            [array],
            [np.zeros(1), np.ones_like(array)],
        )
        over_positions = sequence_mean(array[None])
    # Float64 rounding of numbers of order one; of a mean, of the largest terms.
    close = functools.partial(np.testing.assert_allclose, atol=1e-15)
    close(ops.convert_to_numpy(tanh), np.tanh(array))
    close(ops.convert_to_numpy(grad), 1 - np.tanh(array) ** 2)
    close(ops.convert_to_numpy(mean), [array.mean()], atol=2e-13)
    close(ops.convert_to_numpy(over_positions), [array.mean()], atol=2e-13)


def test_written_out_attention_in_float64():
    draw = np.random.default_rng(1)
    query, key, value = (draw.normal(size=(1, 7, 2, 4)) for _ in range(3))
    want = reference.full_attention(
        query, key, value, np.ones_like(value), scale=2.0, soft_cap=1.5
    )
    with in_dtype("float64"):
        tensors = [ops.convert_to_tensor(t) for t in (query, key, value)]
        have = dense_attention(*tensors, Scoring(scale=2.0, soft_cap=1.5))
        out, lse = (ops.convert_to_numpy(t) for t in (have.out, have.lse))
    np.testing.assert_allclose(out, want.out, atol=1e-14)
    np.testing.assert_allclose(lse, want.lse, atol=1e-14)
