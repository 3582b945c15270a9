"""The ring against the best attention of one device, on the same machine.

    python -m benchmarks.ring [--backends torch] [--lengths 4096]

Causal, forward and backward, inside compiled programs with the data on the
devices already (JAX, TensorFlow), or in each process (PyTorch). All sides
have the same cores: a ring of 2 processes with a thread each against one
process with 2 threads. Each is a process that stays alive, they take turns.

- PyTorch: 2 processes against `F.scaled_dot_product_attention`.
- JAX: 4 and 8 devices against `jax.nn.dot_product_attention`, and PyTorch's
  `F.scaled_dot_product_attention`, on one device.
- TensorFlow: 2 and 4 replicas against `keras.ops.dot_product_attention`, and
  the peak memory of both.

Where there are several accelerators, the rings are of them. Writes
`docs/reports/<date>-ring.md`.
"""

import sys

from benchmarks import comparison, contestants, options, reports, timing

LENGTHS = (4096, 8192)
SIZES = {"torch": (2,), "jax": (4, 8), "tensorflow": (2, 4)}
STOCK = {
    "torch": (("torch", "F.scaled_dot_product_attention"),),
    "jax": (
        ("jax", "jax.nn.dot_product_attention"),
        ("torch", "F.scaled_dot_product_attention"),
    ),
    "tensorflow": (("tensorflow", "keras.ops.dot_product_attention"),),
}
# Next to no sequence, for what a process needs anyway.
SHORT = 64


def label(size):
    """How a ring is called in tables."""
    return f"ring_attention, {size} devices"


def contestants_of(backend, length, sizes, simulated):
    """Specifications of children by name."""
    cores = timing.cores()
    found = {}
    for size in sizes:
        found[label(size)] = comparison.child(
            "ring_attention",
            backend,
            length,
            size=size,
            threads=max(1, cores // size),
            simulated=simulated,
        )
    for other, name in STOCK[backend]:
        # A framework without accelerators does not compete with them.
        if simulated or other == backend or timing.accelerators(other):
            found[name] = comparison.child(
                name, other, length, threads=cores, simulated=simulated
            )
    return found


def peaks(backend, length, sizes, simulated):
    """Rows of peak memory: of each, above what it needs anyway."""
    full, short = (
        contestants_of(backend, n, sizes, simulated) for n in (length, SHORT)
    )
    amounts = {}
    for name in full:
        print(f"  memory of {name} ...", flush=True)
        amounts[name] = timing.peak_bytes(full[name]) - timing.peak_bytes(
            short[name]
        )
    most = max(amounts.values())
    return [
        [name, f"{amount / 2**20:,.0f}", f"{most / amount:.1f}"]
        for name, amount in amounts.items()
    ]


def main():
    """Measure on each backend and write the report."""
    parser = options.parser(__doc__, lengths=LENGTHS)
    parser.add_argument(
        "--sizes", type=options.numbers, help="devices of the rings"
    )
    parser.add_argument(
        "--memory-length",
        type=int,
        default=4096,
        help="of the comparison of memory on TensorFlow; 0 for none",
    )
    given = parser.parse_args()
    sections, where = [], []
    for backend in options.backends(given):
        sizes, simulated = timing.sizes(
            backend, given.sizes, SIZES[backend], given.cpu
        )
        where.append(f"{backend}: {timing.on(backend, simulated)}")
        ours = [label(size) for size in sizes]
        body = []
        for length in given.lengths:
            print(f"{backend}: {length} on {sizes} ...", flush=True)
            times = timing.compared(
                contestants_of(backend, length, sizes, simulated),
                given.rounds,
                given.limit,
            )
            body += comparison.rows([f"{length:,}"], times, ours)
        sections += [
            f"## {backend}",
            comparison.table(["length"], ours, body),
        ]
        if backend == "tensorflow" and given.memory_length:
            sections += [
                f"Peak memory of one forward and backward at "
                f"{given.memory_length:,}, all devices together, above that "
                f"of a process whose sequence has {SHORT} positions:",
                reports.table(
                    ["who", "MiB", "of the most, 1/"],
                    peaks(backend, given.memory_length, sizes, simulated),
                ),
            ]
    path = reports.write(
        "ring",
        "\n\n".join(
            [
                "# Ring against one device",
                reports.surroundings(options.command("ring"), "; ".join(where)),
                f"Causal, batch 1, {contestants.HEADS} heads, head_dim "
                f"{contestants.HEAD_DIM}, float32, forward and backward, "
                f"{given.rounds} rounds. On a CPU both sides have the same "
                f"{timing.cores()} cores, so 1 is what a ring that costs "
                "nothing has against an equally fast kernel. "
                + comparison.READING,
                *sections,
            ]
        ),
    )
    print(path.relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
