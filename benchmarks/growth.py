"""Time for each query-key pair as sequences grow, and by ring size.

    python -m benchmarks.growth [--backends jax] [--lengths 4096,8192]

Causal, forward and backward of `ring_attention`: on one device from 4K to
64K, and at one length on rings. If nothing but pairs costs time, the first
is flat. Devices that share a CPU have no more cores in a larger ring, so
there the second is flat at best; accelerators divide it. Writes
`docs/reports/<date>-growth.md`.
"""

import sys

from benchmarks import comparison, options, reports, timing

LENGTHS = (4096, 8192, 16384, 32768, 65536)
SIZES = {"jax": (1, 2, 4, 8), "tensorflow": (1, 2, 4), "torch": (1, 2)}


def pairs(length):
    """Query-key pairs of a causal mask."""
    return length * (length + 1) // 2


def by_length(backend, given, simulated):
    """Seconds by length, on one device."""
    those = {
        length: comparison.child(
            "ring_attention",
            backend,
            length,
            threads=timing.cores(),
            simulated=simulated,
        )
        for length in given.lengths
    }
    return timing.compared(those, given.rounds, given.limit)


def by_size(backend, given, sizes, simulated):
    """Seconds by ring size, at one length."""
    those = {
        size: comparison.child(
            "ring_attention",
            backend,
            given.ring_length,
            size=size,
            threads=max(1, timing.cores() // size),
            simulated=simulated,
        )
        for size in sizes
    }
    return timing.compared(those, given.rounds, given.limit)


def rows(times, amount, first):
    """Rows of a table: nanoseconds a pair, beside those of the first."""
    found = []
    for name, own in times.items():
        each = timing.median(own) / amount(name) * 1e9
        base = times[first]
        apart = timing.ratio(
            [t / amount(name) for t in own],
            [t / amount(first) for t in base],
        )
        found.append(
            [
                f"{name:,}",
                f"{timing.median(own):.4f}",
                f"{each:.3f}",
                f"{apart:.3f}",
                str(len(own)),
            ]
        )
    return found


def main():
    """Measure on each backend and write the report."""
    parser = options.parser(__doc__, lengths=LENGTHS, rounds=3)
    parser.add_argument("--sizes", type=options.numbers)
    parser.add_argument("--ring-length", type=int, default=8192)
    given = parser.parse_args()
    sections, where, points = [], [], {}
    columns = ("seconds", "ns a pair", "of the first", "rounds")
    for backend in options.backends(given):
        cpu = given.cpu or timing.accelerators(backend) == 0
        print(f"{backend}: {given.lengths} ...", flush=True)
        grown = by_length(backend, given, cpu)
        sizes, simulated = timing.sizes(
            backend, given.sizes, SIZES[backend], given.cpu
        )
        if 1 not in sizes:
            sizes = (1, *sizes)
        print(f"{backend}: rings of {sizes} ...", flush=True)
        rings = by_size(backend, given, sizes, simulated)
        where.append(f"{backend}: {timing.on(backend, simulated)}")
        points[backend] = [
            (length, timing.median(own) / pairs(length) * 1e9)
            for length, own in grown.items()
        ]
        sections += [
            f"## {backend}",
            reports.table(
                ["length", *columns],
                rows(grown, pairs, min(grown)),
            ),
            f"On rings, at {given.ring_length:,}:",
            reports.table(
                ["devices", *columns],
                rows(rings, lambda size: pairs(given.ring_length), min(rings)),
            ),
        ]
    image = comparison.plot(
        "growth",
        "Time a query-key pair, one device, forward + backward",
        points,
        xlabel="length",
        ylabel="nanoseconds",
    )
    path = reports.write(
        "growth",
        "\n\n".join(
            [
                "# Growth with the length and with the ring",
                reports.surroundings(
                    options.command("growth"), "; ".join(where)
                ),
                "Causal, batch 1, 8 heads, head_dim 64, float32. A pair is a "
                "query and a key that the mask allows. `of the first` is the "
                "median of the rounds' ratios.",
                f"![Time a pair by length]({image})",
                *sections,
            ]
        ),
    )
    print(path.relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
