"""Visits to a kernel, with what the oracle says of them."""

import dataclasses

import numpy as np
from keras import ops

from keras_ring import masks, precision
from keras_ring.attention.kernel import Inputs, Kernel, Rows
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.masks.by_position import Before
from tests import reference

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
        "window-of-everything": (masks.SlidingWindow(2**31 - 1), every),
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


class CheckedVisit:
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
        accumulate = precision.accumulation_dtype(case.dtype)
        grad_lse = draw.normal(size=arrays[0].shape[:3]) * pull
        mask, allowed = masked(case, draw)
        self.visit = Visit(
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
        self.inputs = Inputs(
            query, key[:, :, : case.keys], value[:, :, : case.keys]
        )
        self.out, self.lse, self.grad_lse = (
            ops.convert_to_tensor(np.swapaxes(a, 1, 2), accumulate)
            for a in (whole.out, whole.lse, grad_lse)
        )

    def rows(self, kernel):
        """What a ring hands a kernel for the backward."""
        delta = kernel.row_delta(self.out, self.grad_out, self.grad_lse)
        return Rows(self.out, self.lse, delta, self.grad_out)

    def check(self, kernel, tolerance=None):
        """Compare forward and backward of a kernel with the oracle."""
        part = kernel.forward(self.inputs, self.visit, None)
        rows = self.rows(kernel)
        grads = kernel.backward(self.inputs, rows, self.visit, None)
        least = tolerance = tolerance or TOLERANCE[self.case.dtype]
        for found, wanted in (
            (part._asdict(), self.forward),
            (grads._asdict(), self.backward),
        ):
            for name, want in wanted.items():
                have = ops.convert_to_numpy(found[name])
                assert have.dtype == precision.accumulation_dtype(
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


class Refusing(Kernel):
    """A kernel that must not be asked."""

    name = "refusing"
    description = "none"

    def available(self):
        return True

    def preferred(self, device, dtype):
        return True

    def forward(self, *arguments):
        raise AssertionError("not fused")

    backward = branch = forward
