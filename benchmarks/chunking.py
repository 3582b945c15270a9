"""What it costs to cut attention into the chunks of a ring.

    python -m benchmarks.chunking [--backends jax] [--sizes 8]

The members of a ring run one after the other on one device, visit by visit,
with the ring's own kernel and merge, against one monolithic call: forward
and backward, causal. What is left above 1 is what a ring costs beside its
transfers. Writes `docs/reports/<date>-chunking.md`.
"""

import sys

from benchmarks import options, reports, timing

LENGTHS = (4096, 8192, 16384)


def measure_here(length, sizes, kinds, rounds, limit):
    """In a child: a ring's name, chunk and seconds, and how far its results
    are apart."""
    import numpy as np

    from benchmarks.virtual import VirtualRing

    rings = {"one call": VirtualRing(length, 1)}
    for size in sizes:
        for kind in kinds:
            rings[f"{size} members, {kind}"] = VirtualRing(length, size, kind)
    times = timing.interleaved(
        {name: ring.run for name, ring in rings.items()}, rounds, limit
    )
    want = rings["one call"].result()
    apart = {
        name: max(
            float(np.abs(a - b).max())
            for a, b in zip(ring.result(), want, strict=True)
        )
        for name, ring in rings.items()
    }
    return [
        [name, length // rings[name].size, own, apart[name]]
        for name, own in times.items()
    ]


def main():
    """Measure on each backend and write the report; or be its child."""
    parser = options.parser(__doc__, lengths=LENGTHS)
    parser.add_argument("--sizes", type=options.numbers, default=[8])
    parser.add_argument("--placements", default="contiguous,balanced")
    given = parser.parse_args()
    kinds = given.placements.split(",")
    if given.measure:
        reports.answer(
            measure_here(
                int(given.measure),
                given.sizes,
                kinds,
                given.rounds,
                given.limit,
            )
        )
        return 0
    sections, where = [], []
    for backend in options.backends(given):
        simulated = given.cpu or timing.accelerators(backend) == 0
        where.append(f"{backend}: {'CPU' if simulated else 'accelerator'}")
        body = []
        for length in given.lengths:
            print(f"{backend}: {length} ...", flush=True)
            found = reports.measured(
                "benchmarks.chunking",
                backend,
                1,
                f"--measure={length}",
                f"--sizes={','.join(map(str, given.sizes))}",
                f"--placements={given.placements}",
                f"--rounds={given.rounds}",
                f"--limit={given.limit}",
                threads=timing.cores(),
                simulated=simulated,
            )
            _, _, one, _ = found[0]
            for name, chunk, own, apart in found:
                body.append(
                    [
                        f"{length:,}",
                        name,
                        f"{chunk:,}",
                        f"{timing.median(own):.4f}",
                        f"{timing.ratio(own, one):.3f}",
                        f"{apart:.1e}",
                    ]
                )
        sections += [
            f"## {backend}",
            reports.table(
                ["length", "who", "chunk", "seconds", "of one call", "apart"],
                body,
            ),
        ]
    path = reports.write(
        "chunking",
        "\n\n".join(
            [
                "# What chunks cost",
                reports.surroundings(
                    options.command("chunking"), "; ".join(where)
                ),
                "The members' visits one after the other on one device, by "
                "the kernel and merge of the ring, against the same kernel "
                "over the whole sequence. Causal, batch 1, 8 heads, head_dim "
                "64, float32, forward and backward. `chunk` is the positions "
                "that a member holds, which is what the cost depends on. "
                "Seconds are medians, `of one call` is the median of the "
                "rounds' ratios, `apart` the largest difference of a result "
                "or gradient.",
                *sections,
            ]
        ),
    )
    print(path.relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
