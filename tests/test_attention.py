"""Ring attention against the float64 oracle, forward and every gradient."""

import dataclasses
import zlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring import backends, masks
from keras_ring.attention.blockwise.tiles import Tiling
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from tests import reference, worlds
from tests.gradients import in_dtype, vjp

SIZES = [size for size in (1, 2, 3, 4, 5, 8) if size <= worlds.DEVICES]

# Largest error, absolute and relative. Sums of about a hundred products of
# numbers of order one carry some 1e-6 in float32 and 1e-14 in float64.
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem; lengths divide by every ring size."""

    queries: int = 120
    keys: int = 120
    batch: int = 2
    heads: int = 2
    key_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    causal: bool = False
    padded: bool = False
    window: int | None = None
    explicit: int = 0
    scale: float | None = None
    dtype: str = "float32"

    def allowed(self, valid, pairs):
        """What the oracle is told, as one boolean array."""
        allowed = np.ones((1, 1, self.queries, self.keys), bool)
        if self.causal:
            allowed = allowed & reference.causal(self.queries, self.keys)
        if self.padded:
            allowed = allowed & reference.padding(valid)
        if self.window:
            distance = np.arange(self.queries)[:, None] - np.arange(self.keys)
            allowed = allowed & (np.abs(distance) < self.window)
        if self.explicit:
            allowed = allowed & np.swapaxes(pairs, 1, 2)
        return allowed

    def mask(self, valid, pairs):
        """The same as the package is told it."""
        parts = []
        if self.causal:
            parts.append(masks.Causal())
        if self.padded:
            parts.append(masks.Padding(valid))
        if self.window:
            parts.append(masks.SlidingWindow(self.window))
        if self.explicit:
            parts.append(masks.Explicit(pairs))
        if not parts:
            return None
        mask = parts[0]
        for part in parts[1:]:
            mask = mask & part
        return mask


CASES = {
    "full": Case(),
    "causal": Case(causal=True),
    "padding": Case(padded=True),
    "causal-padding": Case(causal=True, padded=True),
    "grouped-query-causal": Case(heads=6, key_heads=2, causal=True),
    "grouped-query-padding": Case(heads=4, key_heads=2, padded=True),
    "multi-query": Case(heads=4, key_heads=1, causal=True, padded=True),
    "head-dim-64": Case(head_dim=64, value_dim=64, causal=True),
    "head-dim-128": Case(head_dim=128, value_dim=128, batch=1, heads=1,
                         key_heads=1),
    "value-dim-differs": Case(value_dim=40, causal=True),
    "cross-longer": Case(queries=120, keys=360, padded=True),
    "cross-shorter": Case(queries=240, keys=120),
    "cross-causal": Case(queries=120, keys=240, causal=True),
    "scale": Case(scale=0.7, batch=3),
    "window": Case(window=17),
    "window-causal": Case(window=30, causal=True, heads=4),
    "pairs": Case(explicit=1, padded=True),
    "pairs-per-head": Case(explicit=4, heads=4, causal=True),
    "several-ragged-tiles": Case(queries=1200, keys=1200, batch=1, heads=2,
                                 key_heads=1, causal=True, padded=True),
    "ragged-tile-seen-whole": Case(queries=1200, keys=360, batch=1, heads=1,
                                   key_heads=1, causal=True),
    "float64-causal": Case(dtype="float64", causal=True, heads=4),
    "float64-padding-cross": Case(dtype="float64", padded=True, keys=240),
    "float64-tiles": Case(dtype="float64", queries=600, keys=600, batch=1,
                          causal=True),
}  # fmt: skip


def problem(case, seed):
    """Random tensors of a case, as NumPy arrays of its dtype."""
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return draw.normal(size=shape).astype(case.dtype)

    valid = draw.random((case.batch, case.keys)) < 0.7
    pairs = draw.random(
        (case.batch, case.queries, max(case.explicit, 1), case.keys)
    )
    return {
        "query": normal(case.batch, case.queries, case.heads, case.head_dim),
        "key": normal(case.batch, case.keys, case.key_heads, case.head_dim),
        "value": normal(case.batch, case.keys, case.key_heads, case.value_dim),
        "grad_out": normal(
            case.batch, case.queries, case.heads, case.value_dim
        ),
        "grad_lse": normal(case.batch, case.queries, case.heads),
        "valid": valid,
        "pairs": pairs < 0.6,
    }


def check_against_oracle(size, case, data=None, seed=None):
    """Forward, log-sum-exp and gradients of one case on one ring size."""
    data = data or problem(case, seed)
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)

    def attend(query, key, value, grad_out, grad_lse, valid, pairs):
        mask = case.mask(valid, pairs)

        def function(query, key, value):
            return list(
                keras_ring.ops.ring_attention(
                    query,
                    key,
                    value,
                    mask=mask,
                    scale=case.scale,
                    return_lse=True,
                )
            )

        outputs, gradients = vjp(
            function, [query, key, value], [grad_out, grad_lse]
        )
        return (*outputs, *gradients)

    # The oracle's log-sum-exp has a gradient only where it is finite.
    allowed = case.allowed(data["valid"], data["pairs"])
    shape = (case.batch, case.heads, case.queries, case.keys)
    seen = np.swapaxes(np.broadcast_to(allowed, shape).any(-1), 1, 2)
    data["grad_lse"] = np.where(seen, data["grad_lse"], 0).astype(case.dtype)
    expected = reference.attention(
        data["query"],
        data["key"],
        data["value"],
        data["grad_out"],
        allowed=allowed,
        scale=case.scale,
        grad_lse=data["grad_lse"],
    )
    with in_dtype(case.dtype):
        got = ring.run(attend, *data.values())
        got = [ops.convert_to_numpy(tensor) for tensor in got]
    tolerance = TOLERANCE[case.dtype]
    for name, have, want in zip(expected._fields, got, expected, strict=True):
        assert have.dtype == case.dtype, (name, have.dtype)
        np.testing.assert_allclose(
            have, want, rtol=tolerance, atol=tolerance, err_msg=name
        )


@pytest.mark.dealt(by="name")
@pytest.mark.mostly(size=3, every=8)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(on_devices, name, size):
    seed = zlib.crc32(name.encode())
    on_devices(size, check_against_oracle, size, CASES[name], None, seed)


def hard(case, seed, **changes):
    data = problem(case, seed)
    data.update(changes)
    return data


def check_hard_cases(size):
    """Inputs on which naive code gives NaN or forgets a gradient."""
    case = Case(padded=True, causal=True)
    valid = np.ones((2, 120), bool)
    valid[0] = False  # A sample that is all padding.
    valid[1, :100] = False  # Shards that are all padding, rows that see none.
    data = problem(case, 1)
    check_against_oracle(size, case, {**data, "valid": valid})

    # Logits of 1e5: everything finite, the largest logit takes all.
    case = Case(dtype="float32", causal=True)
    data = problem(case, 2)
    draw = np.random.default_rng(3)
    data["query"] = (data["query"] * 300).astype("float32")
    data["key"] = (draw.integers(-3, 4, data["key"].shape) * 300).astype(
        "float32"
    )
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)

    def attend(query, key, value, grad_out):
        outputs, gradients = vjp(
            lambda q, k, v: keras_ring.ops.ring_attention(
                q, k, v, mask=masks.Causal()
            ),
            [query, key, value],
            grad_out,
        )
        return (outputs, *gradients)

    names = ("query", "key", "value", "grad_out")
    got = ring.run(attend, *(data[n] for n in names))
    for tensor in got:
        assert np.isfinite(ops.convert_to_numpy(tensor)).all()


@pytest.mark.mostly(size=3)
@pytest.mark.parametrize("size", SIZES)
def test_hard_inputs(on_devices, size):
    on_devices(size, check_hard_cases, size)


def check_half_precision(size, dtype):
    """Half-precision inputs: partial results stay in float32, so the only
    errors are the rounding of the inputs' products and of the result."""
    case = Case(causal=True, batch=1, queries=240, keys=240)
    data = problem(case, 4)
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)
    names = ("query", "key", "value", "grad_out")
    rounded = {
        n: ops.convert_to_numpy(ops.cast(ops.cast(data[n], dtype), "float32"))
        for n in names
    }

    def attend(query, key, value, grad_out):
        tensors = [ops.cast(t, dtype) for t in (query, key, value, grad_out)]
        out, lse = keras_ring.ops.ring_attention(
            *tensors[:3], mask=masks.Causal(), return_lse=True
        )
        assert keras.backend.standardize_dtype(out.dtype) == dtype
        assert keras.backend.standardize_dtype(lse.dtype) == "float32"
        output, gradients = vjp(
            lambda q, k, v: keras_ring.ops.ring_attention(
                q, k, v, mask=masks.Causal()
            ),
            tensors[:3],
            tensors[3],
        )
        return tuple(ops.cast(t, "float32") for t in (output, *gradients))

    got = ring.run(attend, *rounded.values())
    expected = reference.attention(
        *rounded.values(), allowed=reference.causal(240, 240)
    )
    want = (expected.out, *expected[2:])
    # One rounding of results of order one: 2^-9 in bfloat16, 2^-12 in
    # float16; delta uses the rounded output, which doubles it.
    tolerance = {"bfloat16": 2e-2, "float16": 3e-3}[dtype]
    for have, target in zip(got, want, strict=True):
        error = np.abs(ops.convert_to_numpy(have) - target).max()
        assert error < tolerance * max(1.0, np.abs(target).max())


@pytest.mark.mostly(size=3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", SIZES)
def test_half_precision(on_devices, size, dtype):
    on_devices(size, check_half_precision, size, dtype)


def test_without_a_strategy_it_is_blockwise_attention():
    case = Case(causal=True, padded=True, queries=300, keys=300)
    data = problem(case, 5)
    out = keras_ring.ops.ring_attention(
        ops.convert_to_tensor(data["query"]),
        ops.convert_to_tensor(data["key"]),
        ops.convert_to_tensor(data["value"]),
        mask=case.mask(ops.convert_to_tensor(data["valid"]), None),
    )
    expected = reference.attention(
        data["query"],
        data["key"],
        data["value"],
        data["grad_out"],
        allowed=case.allowed(data["valid"], None),
    )
    np.testing.assert_allclose(
        ops.convert_to_numpy(out), expected.out, rtol=2e-5, atol=2e-5
    )


def tensors(query=(2, 8, 4, 16), key=(2, 8, 2, 16), value=None):
    value = value or key
    return [ops.ones(shape) for shape in (query, key, value)]


REFUSED = {
    "rank": ([ops.ones((2, 8, 16))] * 3, {}, "rank 4"),
    "head_dim": (tensors(key=(2, 8, 2, 8)), {}, "same head_dim"),
    "length": (tensors(value=(2, 9, 2, 16)), {}, "same length"),
    "heads": (tensors(key=(2, 8, 3, 16)), {}, "multiple of the number"),
    "batch": (tensors(key=(3, 8, 2, 16)), {}, "same batch size"),
    "mask-type": (tensors(), {"mask": "causal"}, "Padding\\(valid\\)"),
    "mask-shape": (
        tensors(),
        {"mask": masks.Padding(ops.ones((2, 7), "bool"))},
        "mask tensor of shape \\(2, 7\\)",
    ),
    "pairs-rank": (
        tensors(),
        {"mask": masks.Explicit(ops.ones((2, 8, 8), "bool"))},
        "pairs",
    ),
    "pairs-columns": (
        tensors(),
        {"mask": masks.Explicit(ops.ones((2, 8, 1, 7), "bool"))},
        "pairs",
    ),
    "dtype": ([ops.ones((2, 8, 2, 4), "int32")] * 3, {}, "floating-point"),
    "scale": (tensors(), {"scale": float("nan")}, "scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_refused(name):
    arguments, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        keras_ring.ops.ring_attention(*arguments, **options)


def check_padded_keys(size, queries, keys):
    """What is said of each score, where the package pads the lengths."""
    draw = np.random.default_rng(keys)
    shapes = {
        "query": (2, queries, 4, 8),
        "key": (2, keys, 2, 8),
        "value": (2, keys, 2, 8),
        "bias": (2, queries, 4, keys),
        "grad_out": (2, queries, 4, 8),
    }
    data = {
        name: draw.normal(size=shape).astype("float32")
        for name, shape in shapes.items()
    }
    pairs = draw.random((2, queries, 1, keys)) < 0.7
    pairs[:, 0] = False  # A query that sees nothing at all.

    def differentiate(query, key, value, bias, grad_out, pairs):
        out, grads = vjp(
            lambda query, key, value, bias: keras_ring.ops.ring_attention(
                query, key, value, mask=masks.Explicit(pairs), bias=bias
            ),
            [query, key, value, bias],
            grad_out,
        )
        return out, *grads

    ring = keras_ring.DistributedStrategy(sequence_parallel=size)
    got = ring.run(differentiate, *data.values(), pairs)
    expected = reference.full_attention(
        **data, allowed=np.swapaxes(pairs, 1, 2)
    )
    names = ("out", "grad_query", "grad_key", "grad_value", "grad_bias")
    for name, tensor in zip(names, got, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(tensor),
            getattr(expected, name),
            err_msg=name,
            rtol=TOLERANCE["float32"],
            atol=TOLERANCE["float32"],
        )


# In this order, since four replicas take TensorFlow long to trace.
@pytest.mark.dealt
@pytest.mark.parametrize(
    ("size", "queries", "keys"), [(4, 7, 8), (2, 7, 5), (4, 3, 2)]
)
def test_pairs_of_any_lengths(on_devices, size, queries, keys):
    on_devices(size, check_padded_keys, size, queries, keys)


def check_documents_without_keys(size):
    """Queries of a document that no key has, and keys that no query has."""
    data = problem(Case(queries=24, keys=24), 6)
    query_ids, key_ids = np.arange(24) // 4, np.arange(24) // 4 + 1
    query_ids, key_ids = (
        np.tile(ids.astype("int32"), (2, 1)) for ids in (query_ids, key_ids)
    )

    def differentiate(query, key, value, grad_out, query_ids, key_ids):
        mask = masks.Segments(query_ids, key_ids)
        out, grads = vjp(
            lambda query, key, value: keras_ring.ops.ring_attention(
                query, key, value, mask=mask
            ),
            [query, key, value],
            grad_out,
        )
        return out, *grads

    tensors = [data[n] for n in ("query", "key", "value", "grad_out")]
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)
    got = ring.run(differentiate, *tensors, query_ids, key_ids)
    out, grad_query, grad_key, grad_value = map(ops.convert_to_numpy, got)
    expected = reference.attention(
        *tensors, allowed=query_ids[:, None, :, None] == key_ids[:, None, None]
    )
    want = expected.out, *expected[2:]
    tolerance = TOLERANCE["float32"]
    for have, target in zip(
        (out, grad_query, grad_key, grad_value), want, strict=True
    ):
        np.testing.assert_allclose(have, target, rtol=tolerance, atol=tolerance)
    # Not nearly but exactly nothing.
    for tensor in (out[:, :4], grad_query[:, :4]):
        assert not tensor.any()
    for tensor in (grad_key[:, 20:], grad_value[:, 20:]):
        assert not tensor.any()


@pytest.mark.parametrize("size", [1, 3])
def test_documents_without_keys(on_devices, size):
    on_devices(size, check_documents_without_keys, size)


def test_short_causal_chunks_are_cut_in_halves_of_a_tile(monkeypatch):
    """Where a backend is faster with that: a quarter of the pairs is left
    out."""
    kernel = backends.load().kernel.KERNEL
    monkeypatch.setattr(type(kernel), "short", 512)

    def tile(length, mask):
        tensor = ops.ones((1, 1, length, 2))
        visit = Visit((0,), (0,), Scoring(scale=1.0, mask=mask))
        return Tiling(kernel, tensor, tensor, visit).queries.tile

    assert tile(512, masks.Causal()) == 256
    assert tile(512, masks.SlidingWindow(9)) == tile(512, None) == 512
    assert tile(1024, masks.Causal()) == 512
