"""The kernels of a backend on one device, against its framework's attention.

    python -m benchmarks.kernels [--backends torch] [--lengths 4096]
        [--dtypes float32,bfloat16] [--head-dims 64,128] [--blockwise-to 16384]
        [--kernels triton,blockwise]

Causal self-attention, forward and backward, in one process, by turns: by every
kernel that "auto" may choose for a device and dtype, or by those of `--kernels`
that this machine can use (see `keras_ring.config.set_kernel`). A kernel that
does not compute a problem leaves it to the one that it falls back on.
TFLOP/s count the products of a causal mask: two forward and five backward of
`length ** 2 / 2` pairs. On a GPU the report's memory is the peak of one call.
Writes `docs/reports/<date>-kernels.md`.
"""

import functools
import sys

from benchmarks import contestants, options, reports, timing

LENGTHS = (1024, 4096, 8192)


def measure_here(dtype, given):
    """In a child: `[length, head_dim, name, seconds, bytes]` of everyone."""
    import keras

    from keras_ring import backends

    backend = keras.backend.backend()
    device = backends.load().kernel.KERNEL.device(keras.ops.zeros(()))
    found = []
    for head_dim in given.head_dims:
        for length in given.lengths:
            steps = {}
            for kernel in backends.load().kernel.KERNELS:
                if not _wanted(kernel, device, dtype, given.kernels):
                    continue
                if kernel.name == "blockwise" and length > given.blockwise_to:
                    continue
                steps[kernel.name] = _with_kernel(
                    kernel.name,
                    lambda length=length, head_dim=head_dim: (
                        contestants.attention(
                            "ring_attention",
                            length,
                            head_dim=head_dim,
                            dtype=dtype,
                        )
                    ),
                )
            for name in contestants.STOCK[backend][:1]:
                steps[name] = contestants.attention(
                    name, length, head_dim=head_dim, dtype=dtype
                )
            for name, (own, peak) in _measured(steps, backend, given).items():
                found.append([length, head_dim, name, own, peak])
                shown = f"{1000 * timing.median(own):.2f} ms"
                print(
                    f"  {dtype} {length} {head_dim} {name}: {shown}",
                    file=sys.stderr,
                    flush=True,
                )
    return found


def _wanted(kernel, device, dtype, names):
    """True for a kernel to be measured: by its name if there are names."""
    if names:
        return kernel.name in names and kernel.available()
    return kernel.preferred(device, dtype)


def _with_kernel(name, make):
    """A step that is compiled, and computed, by the named kernel."""
    from keras_ring import config

    def named(function):
        config.set_kernel(name)
        try:
            return function()
        finally:
            config.set_kernel("auto")

    return functools.partial(named, named(make))


def _measured(steps, backend, given):
    """Seconds and peak bytes by name, of those that did not fail."""
    peaks = {}
    for name in list(steps):
        try:
            peaks[name] = _peak(steps[name], backend)
        except RuntimeError as error:  # Out of memory, say.
            print(f"  {name}: left out. {str(error)[:200]}", file=sys.stderr)
            del steps[name]
    times = timing.interleaved(steps, given.rounds, given.limit)
    return {name: (own, peaks[name]) for name, own in times.items()}


def _peak(step, backend):
    """Bytes that one call holds at most, on a GPU of PyTorch; else None."""
    step()
    if backend != "torch":
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def rows(dtype, found):
    """Lines of the report's table."""
    stock = {
        (length, dim): times
        for length, dim, name, times, _ in found
        if name in sum(contestants.STOCK.values(), ())
    }
    lines = []
    for length, head_dim, name, own, peak in found:
        products = 7 * length**2 / 2 * contestants.HEADS * head_dim * 2
        seconds = timing.median(own)
        base = stock.get((length, head_dim))
        lines.append(
            [
                dtype,
                f"{length:,}",
                str(head_dim),
                name,
                f"{1000 * seconds:.2f}",
                f"{products / seconds / 1e12:.2f}",
                f"{timing.ratio(base, own):.2f}" if base else "-",
                f"{peak / 2**20:,.0f}" if peak else "-",
            ]
        )
    return lines


def main():
    """Measure on each backend and write the report; or be its child."""
    parser = options.parser(__doc__, lengths=LENGTHS)
    parser.add_argument(
        "--dtypes",
        type=lambda text: text.split(","),
        default=["float32", "bfloat16"],
    )
    parser.add_argument("--head-dims", type=options.numbers, default=[64])
    parser.add_argument(
        "--kernels",
        type=lambda text: text.split(","),
        help='names, also of kernels that "auto" does not choose',
    )
    parser.add_argument(
        "--blockwise-to",
        type=int,
        default=16384,
        help="the largest length of the blockwise kernel",
    )
    given = parser.parse_args()
    if given.measure:
        reports.answer(measure_here(given.measure, given))
        return 0
    named = [f"--kernels={','.join(given.kernels)}"] if given.kernels else []
    sections, where = [], []
    for backend in options.backends(given):
        simulated = given.cpu or timing.accelerators(backend) == 0
        where.append(f"{backend}: {timing.on(backend, simulated)}")
        lines = []
        for dtype in given.dtypes:
            print(f"{backend}: {dtype} ...", flush=True)
            found = reports.measured(
                "benchmarks.kernels",
                backend,
                1,
                f"--measure={dtype}",
                f"--lengths={','.join(map(str, given.lengths))}",
                f"--head-dims={','.join(map(str, given.head_dims))}",
                f"--blockwise-to={given.blockwise_to}",
                *named,
                f"--rounds={given.rounds}",
                f"--limit={given.limit}",
                *(["--cpu"] if simulated else []),
                threads=timing.cores(),
                simulated=simulated,
            )
            lines += rows(dtype, found)
        sections += [
            f"## {backend}",
            reports.table(
                [
                    *("dtype", "length", "head_dim", "who", "ms", "TFLOP/s"),
                    *("times faster than the framework", "peak MiB"),
                ],
                lines,
            ),
        ]
    path = reports.write(
        "kernels",
        "\n\n".join(
            [
                "# Kernels",
                reports.surroundings(
                    options.command("kernels"), "; ".join(where)
                ),
                f"Causal, batch 1, {contestants.HEADS} heads, forward and "
                f"backward, medians of {given.rounds} rounds.",
                *sections,
            ]
        ),
    )
    print(path.relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
