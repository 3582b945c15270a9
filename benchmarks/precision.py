"""Error of ring attention against float64, for growing rings.

    python -m benchmarks.precision

Runs the same attention problem (causal, grouped-query heads) on rings of 1
to 8 devices on JAX and of 1 to 4 on TensorFlow and PyTorch, in bfloat16,
float16 and float32, and writes the error of the result and of every
gradient to `docs/reports/<date>-precision.md` with a plot. The error must
not grow with the ring: partial results and gradients are kept in float32.

The oracle gets the rounded inputs, so what is measured is the calculation.
"""

import argparse
import sys

import numpy as np

from benchmarks import reports
from tests import reference, rounding

SIZES = {
    "jax": (1, 2, 3, 4, 5, 6, 7, 8),
    "tensorflow": (1, 2, 3, 4),
    "torch": (1, 2, 3, 4),
}
DTYPES = ("bfloat16", "float16", "float32")
RESULTS = ("out", "grad_query", "grad_key", "grad_value")
# Divides by every ring size.
LENGTH, HEADS, KEY_HEADS, DEPTH = 1680, 4, 2, 32


def problem(dtype):
    """Rounded query, key, value and cotangent, and the oracle's results."""
    draw = np.random.default_rng(0)
    shapes = [
        (1, LENGTH, heads, DEPTH)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    ]
    tensors = [
        rounding.rounded(draw.standard_normal(shape), dtype) for shape in shapes
    ]
    allowed = reference.causal(LENGTH, LENGTH)
    return tensors, reference.full_attention(*tensors, allowed=allowed)


def relative(have, want):
    """The size of the error by the size of the result, both as roots of
    mean squares."""
    have = np.asarray(have, np.float64)
    return float(np.sqrt(np.mean((have - want) ** 2) / np.mean(want**2)))


def measure_here(sizes):
    """On the devices of this process: one row for each dtype and size."""
    from keras import ops

    import keras_ring
    from tests.gradients import vjp

    rows = []
    for dtype in DTYPES:
        tensors, found = problem(dtype)

        def attend(*tensors, dtype=dtype):
            *inputs, grad_out = (ops.cast(t, dtype) for t in tensors)
            out, gradients = vjp(
                lambda q, k, v: keras_ring.ops.ring_attention(
                    q, k, v, mask=keras_ring.masks.Causal()
                ),
                inputs,
                grad_out,
            )
            return [ops.cast(t, "float32") for t in (out, *gradients)]

        for size in sizes:
            ring = keras_ring.DistributedStrategy(sequence_parallel=size)
            got = ring.run(attend, *tensors)
            errors = [
                relative(ops.convert_to_numpy(have), getattr(found, name))
                for name, have in zip(RESULTS, got, strict=True)
            ]
            rows.append([dtype, size, *errors])
    return rows


def partials_in_few_bits(dtype):
    """What it would be if members passed on partial results in `dtype`:
    simulated, for comparison. Returns {size: error of the result}."""
    (_, _, value, _), found = problem(dtype)
    values = np.repeat(value, HEADS // KEY_HEADS, axis=2).astype(np.float64)
    errors = {}
    for size in SIZES["jax"]:
        out, lse = None, None
        for chunk in np.split(np.arange(LENGTH), size):
            scores = found.scores[..., chunk]
            top = scores.max(-1, keepdims=True)
            top = np.where(np.isinf(top), 0.0, top)
            weights = np.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            with np.errstate(divide="ignore"):
                here = top + np.log(total)
            part = rounding.times_values(
                weights / np.where(total == 0, 1.0, total), values[:, chunk]
            )
            part = np.swapaxes(part, 1, 2)
            if out is None:
                out, lse = part, here
            else:
                both = np.logaddexp(lse, here)
                out = out * np.exp(lse - both) + part * np.exp(here - both)
                lse = both
            out = rounding.rounded(out, dtype).astype(np.float64)
            lse = rounding.rounded(lse, dtype).astype(np.float64)
        errors[size] = relative(np.swapaxes(out, 1, 2), found.out)
    return errors


def plot(rows, simulated):
    """Error by ring size in bfloat16; returns the name of the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    marks = dict(zip(SIZES, "os^", strict=True))
    colors = dict(zip(RESULTS, ("C0", "C1", "C2", "C3"), strict=True))
    for backend, marker in marks.items():
        for column, result in enumerate(RESULTS, 3):
            points = [
                (row[2], row[column])
                for row in rows
                if row[:2] == [backend, "bfloat16"]
            ]
            axes.plot(
                *zip(*points, strict=True),
                marker=marker,
                ms=4,
                lw=1,
                color=colors[result],
                label=result if backend == "jax" else None,
            )
    axes.plot(
        list(simulated),
        list(simulated.values()),
        "k--",
        lw=1,
        label="out, were partial results bfloat16 (simulated)",
    )
    axes.set(
        xlabel="devices in the ring",
        ylabel="relative error",
        title="bfloat16 (circles JAX, squares TensorFlow, triangles PyTorch)",
    )
    axes.title.set_size(9)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    path = reports.image("precision")
    figure.savefig(path, dpi=90)
    return path.name


def report(rows, simulated):
    """Write the report; returns its file."""
    image = plot(rows, simulated)
    sections = [
        "# Error by ring size",
        "Ring attention against the float64 oracle, which gets the same "
        f"rounded inputs: causal, batch 1, length {LENGTH:,}, {HEADS} query "
        f"heads over {KEY_HEADS} key heads, head_dim {DEPTH}, normal inputs. "
        "An error is the root mean square of the difference over that of "
        "the result.",
        reports.surroundings("python -m benchmarks.precision"),
        f"![Error by ring size]({image})",
    ]
    worst = 0.0
    for dtype in DTYPES:
        sections.append(f"## {dtype}")
        body = []
        for backend in SIZES:
            own = [r for r in rows if r[:2] == [backend, dtype]]
            for row in own:
                numbers = [f"{error:.3e}" for error in row[3:]]
                body.append([backend, str(row[2]), *numbers])
            if dtype != "float32":
                first = own[0][3:]
                for row in own:
                    for error, one in zip(row[3:], first, strict=True):
                        worst = max(worst, error / one)
        header = ["backend", "ring", *RESULTS]
        sections.append(reports.table(header, body))
    few = ", ".join(f"{error:.2e}" for error in simulated.values())
    sections += [
        "## Reading it",
        "In half precision no error on a larger ring exceeds "
        f"{worst:.3f} times that of one device: what is left is the rounding "
        "of the result. For comparison, if members passed partial results "
        "on in bfloat16, the error of `out` on 1 to 8 devices would be "
        f"{few} (simulated in NumPy).",
    ]
    return reports.write("precision", "\n\n".join(sections))


def main():
    """Measure on every backend and write the report; or be its child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", help="ring sizes, for the children")
    options = parser.parse_args()
    if options.measure:
        sizes = [int(size) for size in options.measure.split(",")]
        reports.simulate_devices(max(sizes))
        reports.answer(measure_here(sizes))
        return 0
    rows = []
    for backend, sizes in SIZES.items():
        # A process of PyTorch is one device, so each size is a new start.
        groups = [(n,) for n in sizes] if backend == "torch" else [sizes]
        for group in groups:
            print(f"{backend}: rings of {group} ...", flush=True)
            found = reports.measured(
                "benchmarks.precision",
                backend,
                max(group),
                "--measure=" + ",".join(str(size) for size in group),
            )
            rows += [[backend, *row] for row in found]
    path = report(rows, partials_in_few_bits("bfloat16"))
    print(path.relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
