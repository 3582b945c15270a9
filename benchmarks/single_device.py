"""One device, no strategy: our attention against what frameworks offer.

    python -m benchmarks.single_device [--backends jax] [--lengths 512,1024]

Causal self-attention forward and backward, compiled on JAX (`jax.jit`) and
TensorFlow (`tf.function`): the function `ring_attention` against the
framework's and Keras', and the layer `RingAttention` against
`keras.layers.MultiHeadAttention`. Each is a process of its own, they take
turns. Writes `docs/reports/<date>-single_device.md`.
"""

import sys

from benchmarks import comparison, contestants, options, reports, timing

LENGTHS = (512, 1024, 2048, 4096, 8192)
OURS = ("ring_attention", "RingAttention")


def names(backend):
    """Functions, then layers."""
    return (OURS[0], *contestants.STOCK[backend], *contestants.LAYERS)


def measure(backend, length, given, simulated):
    """Seconds by name, on one device with all cores."""
    return timing.compared(
        {
            name: comparison.child(
                name,
                backend,
                length,
                threads=timing.cores(),
                simulated=simulated,
            )
            for name in names(backend)
        },
        given.rounds,
        given.limit,
    )


def main():
    """Measure on each backend and write the report."""
    given = options.parser(__doc__, lengths=LENGTHS).parse_args()
    sections, where = [], []
    for backend in options.backends(given):
        simulated = given.cpu or timing.accelerators(backend) == 0
        where.append(f"{backend}: {'CPU' if simulated else 'accelerator'}")
        body, points = [], {name: [] for name in names(backend)}
        for length in given.lengths:
            print(f"{backend}: {length} ...", flush=True)
            times = measure(backend, length, given, simulated)
            body += comparison.rows([f"{length:,}"], times, OURS)
            for name, own in times.items():
                points[name].append((length, timing.median(own)))
        image = comparison.plot(
            f"single_device-{backend}",
            f"{backend}: causal attention on one device, forward + backward",
            {name: line for name, line in points.items() if line},
            xlabel="length",
            ylabel="seconds",
        )
        sections += [
            f"## {backend}",
            f"![Time by length]({image})",
            comparison.table(["length"], OURS, body),
        ]
    path = reports.write(
        "single_device",
        "\n\n".join(
            [
                "# One device",
                reports.surroundings(
                    options.command("single_device"), "; ".join(where)
                ),
                f"Batch 1, {contestants.HEADS} heads, head_dim "
                f"{contestants.HEAD_DIM}, float32, {given.rounds} rounds. "
                "Functions take query, key and value; the layers "
                "(RingAttention, MultiHeadAttention) take "
                f"{contestants.HEADS * contestants.HEAD_DIM} features, and "
                "have projections and their gradients. " + comparison.READING,
                *sections,
            ]
        ),
    )
    print(path.relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
