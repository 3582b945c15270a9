"""The ring against other rings, on the same problem and machine.

    make bench-peers
    python -m benchmarks.peers [--backends jax] [--lengths 4096]

- JAX: `ringattention`, of the authors of the paper, on 4 and 8 devices.
- PyTorch: `ring-attention-pytorch` on 2 processes, contiguous and striped.

They live in an environment of their own, `.venv-peers`, which `make
bench-peers` makes. A peer's own block size is the fastest of a few on the
shortest length, tried first. Causal, forward and backward; each contestant
is a process (or several) that stays alive, and they take turns. Writes
`docs/reports/<date>-peers.md`.
"""

import subprocess
import sys

from benchmarks import comparison, contestants, options, reports, timing

LENGTHS = (4096, 8192)
SIZES = {"jax": (4, 8), "torch": (2,)}
PEERS = {
    "jax": ("ringattention",),
    "torch": ("ring-attention-pytorch", "ring-attention-pytorch (striped)"),
}
CHUNKS = (256, 512, 1024)
PYTHON = reports.ROOT / ".venv-peers" / "bin" / "python"


def versions(python):
    """What is installed there, as Markdown."""
    wanted = ("ringattention", "ring-attention-pytorch", "jax", "torch", "flax")
    done = subprocess.run(
        [
            *(python, "-c"),
            "from importlib.metadata import version; "
            f"print(', '.join(f'{{n}} {{version(n)}}' for n in {wanted}))",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"- Peers' environment: {done.stdout.strip() or 'unknown'}"


def measure(backend, length, size, chunks, simulated, given):
    """Seconds by name."""
    threads = max(1, timing.cores() // size)
    common = {"size": size, "threads": threads, "simulated": simulated}
    those = {
        "ring_attention": comparison.child(
            "ring_attention", backend, length, **common
        )
    }
    for peer in PEERS[backend]:
        those[peer] = comparison.child(
            peer,
            backend,
            length,
            python=given.python,
            chunk=chunks[peer],
            **common,
        )
    return timing.compared(those, given.rounds, given.limit)


def fastest_chunks(backend, length, size, simulated, given):
    """The block size with which each peer is fastest, of a few."""
    best = {}
    for peer in PEERS[backend]:
        those = {
            chunk: comparison.child(
                peer,
                backend,
                length,
                python=given.python,
                size=size,
                threads=max(1, timing.cores() // size),
                simulated=simulated,
                chunk=chunk,
            )
            for chunk in CHUNKS
            if length // size % chunk == 0
        }
        times = timing.compared(those, given.rounds, given.limit)
        if not times:
            times = {length // size: [0.0]}
        best[peer] = min(times, key=lambda chunk: timing.median(times[chunk]))
    return best


def main():
    """Measure on each backend and write the report."""
    parser = options.parser(__doc__, lengths=LENGTHS, backends=tuple(PEERS))
    parser.add_argument("--sizes", type=options.numbers)
    parser.add_argument(
        "--python", default=str(PYTHON), help="of the peers' environment"
    )
    given = parser.parse_args()
    backends = options.backends(given, tuple(PEERS))
    if not backends:
        print("Skipped: nobody else has a ring on " + ", ".join(given.backends))
        return 0
    if subprocess.run([given.python, "-c", ""], check=False).returncode:
        print(f"Skipped: there is no {given.python}. Run make bench-peers.")
        return 0
    sections, where = [], []
    for backend in backends:
        sizes, simulated = timing.sizes(
            backend, given.sizes, SIZES[backend], given.cpu
        )
        where.append(f"{backend}: {timing.on(backend, simulated)}")
        body, used = [], []
        for size in sizes:
            print(f"{backend}: block sizes of peers ...", flush=True)
            chunks = fastest_chunks(
                backend, min(given.lengths), size, simulated, given
            )
            used += [
                f"{peer} on {size}: {chunk}" for peer, chunk in chunks.items()
            ]
            for length in given.lengths:
                print(f"{backend}: {length} on {size} ...", flush=True)
                times = measure(backend, length, size, chunks, simulated, given)
                body += comparison.rows(
                    [f"{length:,}", str(size)], times, ["ring_attention"]
                )
        sections += [
            f"## {backend}",
            comparison.table(["length", "devices"], ["ring_attention"], body),
            "Block sizes of the peers: " + "; ".join(used) + ".",
        ]
    path = reports.write(
        "peers",
        "\n\n".join(
            [
                "# Ring against other rings",
                reports.surroundings(options.command("peers"), "; ".join(where))
                + "\n"
                + versions(given.python),
                f"Causal, batch 1, {contestants.HEADS} heads, head_dim "
                f"{contestants.HEAD_DIM}, float32, forward and backward, "
                f"{given.rounds} rounds. Only times are compared here, not "
                "results. " + comparison.READING,
                *sections,
            ]
        ),
    )
    print(path.relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
