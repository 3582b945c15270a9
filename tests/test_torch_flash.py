"""The fused kernel of PyTorch: what it computes, and when it is taken."""

import dataclasses
import warnings

import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring import backends, config, kernels, masks, numerics
from keras_ring.attention import Kernel
from keras_ring.masks.by_position import Before
from keras_ring.scoring import Dropout, Scoring
from keras_ring.tiling import Block
from tests import reference
from tests.kernel_choice import tensors

# Largest error, absolute and relative. Sums of some hundred products of
# numbers of order one carry some 1e-6 in float32 and 1e-14 in float64. What
# comes in half precision is summed in float32 and stays there.
TOLERANCE = {"float64": 1e-12} | dict.fromkeys(
    ("float32", "bfloat16", "float16"), 2e-5
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One visit.

    `kind` names the mask. `calls` is how many fused calls the forward takes,
    None where it does not matter.
    """

    kind: str = "full"
    queries: int = 300
    keys: int = 300
    batch: int = 1
    heads: int = 2
    key_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    starts: tuple[int, int] = (0, 0)
    dtype: str = "float32"
    calls: int | None = None


LONG = {"queries": 1100, "keys": 1100, "heads": 1, "key_heads": 1}

CASES = {
    "full": Case(batch=2, calls=1),
    "full-long": Case(**LONG, calls=1),
    "full-cross": Case(queries=130, keys=700, calls=1),
    "one-query": Case(queries=1, keys=77, calls=1),
    "one-key": Case(queries=77, keys=1, calls=1),
    "grouped-query": Case(heads=6, key_heads=2, calls=1),
    "wide-values": Case(value_dim=20, calls=1),
    "narrow-values": Case(value_dim=4, calls=1),
    "causal": Case("causal", calls=1),
    "causal-long": Case("causal", **LONG, calls=1),
    "causal-grouped": Case("causal", heads=4, key_heads=1, calls=1),
    "causal-more-keys": Case("causal", queries=290, keys=600, calls=1),
    "causal-more-queries": Case("causal", queries=600, keys=290, calls=1),
    "causal-same-place": Case("causal", starts=(600, 600), calls=1),
    "causal-earlier-chunk": Case("causal", starts=(600, 300), calls=1),
    "causal-later-chunk": Case("causal", starts=(300, 600), calls=0),
    "causal-beside": Case("causal", **LONG, starts=(100, 0)),
    "causal-rows-without-keys": Case("causal", starts=(0, 100)),
    "window": Case("window", **LONG),
    "window-causal": Case("window-causal", **LONG),
    # Of the last 60 keys nothing is seen, of all before everything is.
    "padding": Case("padding", keys=572, batch=2),
    "padding-causal": Case("padding-causal", queries=600, keys=600),
    "padding-grouped": Case("padding", heads=4, key_heads=2),
    "segments": Case("segments", batch=2),
    "segments-causal": Case("segments-causal", **LONG),
    "prefix": Case("prefix", queries=600, keys=600),
    "padded-queries": Case("padded-queries", queries=600, keys=600),
    # Where the other mask decides nothing, the causal one is left: one call.
    "prefix-is-over": Case("prefix", starts=(300, 300), calls=1),
    "no-query-is-padded": Case("padded-queries", queries=500, keys=500,
                               calls=1),
    "pairs": Case("pairs", queries=290, keys=290, batch=2),
    "pairs-per-head": Case("pairs-per-head", heads=4),
    # All that is drawn of it needs a mask: one call, not four.
    "pairs-at-once": Case("pairs", queries=600, keys=500, calls=1),
    "float64": Case("causal", dtype="float64"),
    "float64-padding": Case("padding-causal", dtype="float64", keys=600),
    "bfloat16": Case("causal", dtype="bfloat16"),
    "bfloat16-window": Case("window-causal", **LONG, dtype="bfloat16"),
    "float16": Case("padding", dtype="float16"),
}  # fmt: skip


def masked(case, draw):
    """The mask, and the oracle's array of allowed pairs."""
    row, column = case.starts
    ends = row + case.queries, column + case.keys

    def visit(allowed):
        return allowed[..., row:, column:]

    every = np.ones((1, 1, case.queries, case.keys), bool)
    causal = visit(reference.causal(*ends))
    window = visit(reference.window(*ends, 150))
    valid = draw.random((case.batch, case.keys)) > 0.3
    valid[:, : case.keys // 2] = True
    valid[:, :5] = valid[:, -60:] = False
    ids = [
        np.cumsum(draw.random((case.batch, n)) > 0.99, axis=1)
        for n in (case.queries, case.keys)
    ]
    heads = case.heads if case.kind == "pairs-per-head" else 1
    pairs = draw.random((case.batch, case.queries, heads, ends[1])) > 0.6
    pairs[:, 3:4] = False
    padding = masks.Padding(ops.convert_to_tensor(valid))
    segments = masks.Segments(*(ops.convert_to_tensor(t) for t in ids))
    explicit = masks.Explicit(ops.convert_to_tensor(pairs))
    padded, apart = reference.padding(valid), reference.segments(*ids)
    written = np.swapaxes(pairs, 1, 2)[..., column:]
    real = np.arange(row, ends[0])[:, None] < 550
    return {
        "full": (None, every),
        "causal": (masks.Causal(), causal),
        "window": (masks.SlidingWindow(150), window),
        "window-causal": (
            masks.Causal() & masks.SlidingWindow(150),
            causal & window,
        ),
        "padding": (padding, padded & every),
        "padding-causal": (masks.Causal() & padding, causal & padded),
        "segments": (segments, apart),
        "segments-causal": (segments & masks.Causal(), causal & apart),
        "prefix": (
            masks.Causal() | Before(270),
            causal | (np.arange(column, ends[1]) < 270),
        ),
        "padded-queries": (
            masks.Causal() & Before(550, queries=True),
            causal & real,
        ),
        "pairs": (explicit, written),
        "pairs-per-head": (explicit, written),
    }[case.kind]


class Visit:
    """A visit to a kernel, and what the oracle says of it.

    Args:
        case: a `Case`.
        rest: keys of other chunks, which all queries see: the log-sum-exp
            that the backward gets is over all.
        pull: whether the log-sum-exp has a gradient of its own.
    """

    def __init__(self, case, rest=0, pull=False):
        draw = np.random.default_rng(case.queries)
        self.case = case
        # Heads behind the length, as layers have them: kernels get views.
        shapes = (
            (case.queries, case.heads, case.head_dim),
            (case.keys + rest, case.key_heads, case.head_dim),
            (case.keys + rest, case.key_heads, case.value_dim),
            (case.queries, case.heads, case.value_dim),
        )
        tensors = [
            ops.convert_to_tensor(
                draw.normal(size=(case.batch, *shape)), case.dtype
            )
            for shape in shapes
        ]
        arrays = [ops.convert_to_numpy(ops.cast(t, "float64")) for t in tensors]
        accumulate = numerics.accumulation_dtype(case.dtype)
        grad_lse = draw.normal(size=arrays[0].shape[:3]) * pull
        mask, allowed = masked(case, draw)
        self.block = Block(
            *((s,) for s in case.starts), Scoring(scale=0.3, mask=mask)
        )
        everything = np.ones((*allowed.shape[:3], rest), bool)
        whole = reference.full_attention(
            *arrays,
            allowed=np.concatenate([allowed, everything], axis=3),
            scale=0.3,
            grad_lse=grad_lse,
        )
        key, value = (a[:, : case.keys] for a in arrays[1:3])
        own = reference.attention(
            arrays[0], key, value, arrays[3], allowed=allowed, scale=0.3
        )
        group = case.heads // case.key_heads
        grad_query = 0.3 * np.einsum(
            "bhqk,bkhd->bhqd",
            whole.grad_scores[..., : case.keys],
            np.repeat(key, group, axis=2),
        )
        heads_first = [np.swapaxes(t, 1, 2) for t in (own.out, own.lse)]
        self.forward = dict(zip(("out", "lse"), heads_first, strict=True))
        self.backward = {"query": grad_query} | {
            name: np.swapaxes(grad[:, : case.keys], 1, 2)
            for name, grad in (
                ("key", whole.grad_key),
                ("value", whole.grad_value),
            )
        }
        query, key, value, self.grad_out = (
            ops.transpose(t, (0, 2, 1, 3)) for t in tensors
        )
        self.inputs = query, key[:, :, : case.keys], value[:, :, : case.keys]
        self.out, self.lse, self.grad_lse = (
            ops.convert_to_tensor(np.swapaxes(a, 1, 2), accumulate)
            for a in (whole.out, whole.lse, grad_lse)
        )

    def check(self, kernel, tolerance=None):
        """Compare forward and backward of a kernel with the oracle."""
        part = kernel.block_forward(*self.inputs, self.block)
        delta = numerics.row_delta(
            self.out, ops.cast(self.grad_out, self.out.dtype), self.grad_lse
        )
        grads = kernel.block_backward(
            *self.inputs, self.out, self.lse, delta, self.grad_out, self.block
        )
        least = tolerance = tolerance or TOLERANCE[self.case.dtype]
        for found, wanted in (
            (part._asdict(), self.forward),
            (grads._asdict(), self.backward),
        ):
            for name, want in wanted.items():
                have = ops.convert_to_numpy(found[name])
                assert have.dtype == numerics.accumulation_dtype(
                    self.case.dtype
                )
                if least > TOLERANCE[self.case.dtype]:
                    # Rounded before it was summed.
                    finite = np.where(np.isfinite(want), want, 0.0)
                    tolerance = least * max(1.0, np.abs(finite).max())
                np.testing.assert_allclose(
                    have, want, least, tolerance, err_msg=name
                )


class Calls:
    """Stands for an operation and counts its calls."""

    def __init__(self, operation):
        self.operation = operation
        self.count = 0

    def __call__(self, *arguments, **options):
        self.count += 1
        return self.operation(*arguments, **options)


class Refusing:
    """A kernel that must not be asked."""

    def block_forward(self, *arguments):
        raise AssertionError("not fused")

    block_backward = block_forward


@pytest.fixture
def operations(monkeypatch):
    """Counts of the fused operations: forward, backward."""
    import torch

    from keras_ring.backends.torch import flash

    counts = []
    for name in (flash.FORWARD, flash.BACKWARD):
        counts.append(Calls(getattr(torch.ops.aten, name)))
        monkeypatch.setattr(torch.ops.aten, name, counts[-1])
    return counts


def flash(otherwise: Kernel):
    from keras_ring.backends.torch.flash import CpuFlash
    from keras_ring.backends.torch.fused import FusedKernel

    return FusedKernel("flash", otherwise, CpuFlash())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "options",
    [{"rest": 40}, {"pull": True}],
    ids=["in-a-ring", "lse-has-a-gradient"],
)
def test_fused_calls_are_exact(name, options, operations):
    case = CASES[name]
    Visit(case, **options).check(flash(Refusing()))
    forward, backward = (spy.count for spy in operations)
    assert forward == backward
    if case.calls is not None:
        assert forward == case.calls


@pytest.mark.parametrize("name", ["causal", "padding-grouped", "bfloat16"])
def test_the_reference_passes_the_same_test(name):
    Visit(CASES[name], rest=40, pull=True).check(backends.load().kernel.KERNEL)


def test_any_strides_are_right(operations):
    """The operation itself takes a last stride of 1 for granted."""
    visit = Visit(Case("causal"), rest=40)
    turned = [t.mT.contiguous().mT for t in (*visit.inputs, visit.grad_out)]
    assert all(t.stride(-1) != 1 for t in turned)
    *visit.inputs, visit.grad_out = turned
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
    visit = Visit(Case("causal", queries=40, keys=40))
    scoring = dataclasses.replace(
        visit.block.scoring, **options_that_do_not_fit()[name]
    )
    block = dataclasses.replace(visit.block, scoring=scoring)
    reference_kernel = backends.load().kernel.KERNEL
    results = []
    for kernel in (flash(reference_kernel), reference_kernel):
        part = kernel.block_forward(*visit.inputs, block)
        results.append(
            [
                *part,
                *kernel.block_backward(
                    *visit.inputs,
                    *part,
                    numerics.row_delta(part.out, visit.grad_out, 0.0),
                    visit.grad_out,
                    block,
                ),
            ]
        )
    for have, want in zip(*results, strict=True):
        if want is not None:
            np.testing.assert_array_equal(have.numpy(), want.numpy())
    assert [spy.count for spy in operations] == [0, 0]


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_the_operation_never_gets_an_empty_tensor(empty, operations):
    """It would end the process."""
    case = dataclasses.replace(Case(queries=8, keys=8), **{empty: 0})
    block = Block((0,), (0,), Scoring(scale=1.0))
    query = ops.ones((case.batch, 2, case.queries, 16))
    key = ops.ones((case.batch, 2, case.keys, 16))
    with pytest.raises(AssertionError, match="not fused"):
        flash(Refusing()).block_forward(query, key, key, block)
    assert operations[0].count == 0


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_attention_takes_the_fused_kernel(dtype, automatic, operations):
    """By default, forward and backward, and with the reference's results."""
    results = {}
    kernels.choose(dtype, "cpu")
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


def test_a_wrong_operation_is_dropped(automatic, monkeypatch):
    import torch

    from keras_ring.backends.torch import flash

    operation = getattr(torch.ops.aten, flash.FORWARD)

    def broken(*arguments, **options):
        out, lse = operation(*arguments, **options)
        return out * 1.001, lse

    monkeypatch.setattr(torch.ops.aten, flash.FORWARD, broken)
    with pytest.warns(RuntimeWarning, match="'flash' is not used for float32"):
        assert kernels.choose("float32", "cpu").name == "blockwise"


def test_an_operation_that_is_not_there_is_not_offered(automatic, monkeypatch):
    from keras_ring.backends.torch import flash

    monkeypatch.setattr(flash, "FORWARD", "_an_operation_of_another_release")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.choose("float32", "cpu").name == "blockwise"
    with pytest.raises(ValueError, match="one of 'auto', 'blockwise'"):
        config.set_kernel("flash")


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_it_is_for_cpus(device, automatic):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # It is not even tried.
        # Of float64 no kernel for GPUs takes anything.
        assert kernels.choose("float64", device).name == "blockwise"
