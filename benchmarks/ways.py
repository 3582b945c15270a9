"""The ways to share the attention of a sequence, against the ring.

    python -m benchmarks.ways [--backends torch] [--lengths 4096]

Causal, forward and backward, on the same devices in one run: the children
take turns. Writes `docs/reports/<date>-ways.md`.
"""

import sys

from benchmarks import comparison, contestants, options, reports, timing

LENGTHS = (4096, 8192)
SIZES = {"torch": (4,), "jax": (4,), "tensorflow": (4,)}
WAYS = ("ring", "all_to_all", "all_gather", "mixed", "auto")


def contestants_of(backend, length, size, simulated):
    """Specifications of children by the name of the way."""
    cores = timing.cores()
    return {
        way: comparison.child(
            "ring_attention",
            backend,
            length,
            size=size,
            threads=max(1, cores // size),
            simulated=simulated,
            way=way,
        )
        for way in WAYS
        if way != "mixed" or size > 3
    }


def main():
    """Measure on each backend and write the report."""
    parser = options.parser(__doc__, lengths=LENGTHS)
    parser.add_argument(
        "--sizes", type=options.numbers, help="devices of the rings"
    )
    given = parser.parse_args()
    sections, where = [], []
    for backend in options.backends(given):
        sizes, simulated = timing.sizes(
            backend, given.sizes, SIZES[backend], given.cpu
        )
        where.append(f"{backend}: {timing.on(backend, simulated)}")
        body = []
        for size in sizes:
            for length in given.lengths:
                print(f"{backend}: {length} on {size} ...", flush=True)
                times = timing.compared(
                    contestants_of(backend, length, size, simulated),
                    given.rounds,
                    given.limit,
                )
                what = [str(size), f"{length:,}"]
                body += comparison.rows(what, times, ["ring", "auto"])
        sections += [
            f"## {backend}",
            comparison.table(["devices", "length"], ["ring", "auto"], body),
        ]
    path = reports.write(
        "ways",
        "\n\n".join(
            [
                "# Ways to share a sequence",
                reports.surroundings(options.command("ways"), "; ".join(where)),
                f"Causal, batch 1, {contestants.HEADS} heads, head_dim "
                f"{contestants.HEAD_DIM}, float32, forward and backward, "
                f"{given.rounds} rounds. " + comparison.READING,
                *sections,
            ]
        ),
    )
    print(path)


if __name__ == "__main__":
    sys.exit(main())
