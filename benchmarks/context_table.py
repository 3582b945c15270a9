"""The paper's table: the longest context under a fixed memory a device.

    python -m benchmarks.context_table [--budget 1024] [--sizes 1,2,4,8]

Table 3 of Liu, Zaharia and Abbeel 2023 (https://arxiv.org/abs/2310.01889)
in small, on JAX: for a whole training step of a decoder (forward, backward,
Adam), the longest sequence for which the compiled program needs no more than
so many bytes of a device.

- vanilla: stock Keras layers;
- memory-efficient: attention of this package, the rest stock;
- blockwise: `RingTransformerBlock(remat="block")` on one device;
- ring: the same on rings.

Steps are compiled, never run. Lengths are searched on a grid of 16 steps an
octave. Writes `docs/reports/<date>-context_table.md`.
"""

import sys

from benchmarks import options, reports

KINDS = ("vanilla", "efficient", "blockwise")
NAMES = {
    "vanilla": "vanilla",
    "efficient": "memory-efficient attention",
    "blockwise": "blockwise attention and feed-forward",
}
SHORT_NAMES = {
    "vanilla": "vanilla",
    "efficient": "memory-\nefficient",
    "blockwise": "blockwise",
}
FEATURES, LAYERS, VOCABULARY = 256, 4, 256
# Tokens with which the search begins.
START = 1024
# The paper's rows, 7B, in thousands of tokens, and devices.
PAPER = {
    "8 A100": (8, (2, 16, 32, 256)),
    "32 A100": (32, (4, 64, 128, 4096)),
    "TPUv5e-256": (256, (2, 8, 16, 2048)),
}


def length_at(place):
    """The length at a place of the grid."""
    octave, step = divmod(place, 16)
    return (16 + step) << octave


def place_at(length):
    """The last place of the grid that is not longer."""
    octave = max(0, int(length).bit_length() - 5)
    return 16 * octave + (int(length) >> octave) - 16


def longest(bytes_of, budget):
    """The longest length of the grid that fits, and its bytes.

    Args:
        bytes_of: bytes for a length, growing with it.
        budget: bytes that there are.

    Returns:
        `(length, bytes)`; None if the first does not fit.
    """
    low = place_at(START)
    have = bytes_of(length_at(low))
    if have > budget:
        return None
    known, high, power = have, None, 1.0
    while high is None or high - low > 1:
        wanted = length_at(low) * (budget / known) ** (1 / power)
        # Far from a known length the power is a guess: go in steps.
        wanted = min(wanted, 16 * length_at(low))
        place = max(place_at(wanted), low + 1)
        if high is not None:
            place = min(place, high - 1)
        need = bytes_of(length_at(place))
        if need > known:
            from math import log

            power = log(need / known) / log(length_at(place) / length_at(low))
            power = min(max(power, 0.5), 2.0)
        if need > budget:
            high = place
        else:
            low, known = place, need
    return length_at(low), known


def decoder(kind, layer_count):
    """The decoder, compiled."""
    import keras
    from keras import layers

    from benchmarks import memory

    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(VOCABULARY, FEATURES)(tokens)
    for _ in range(layer_count):
        x = memory.block(x, kind, FEATURES)
    model = keras.Model(tokens, layers.Dense(VOCABULARY)(x))
    model.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def measure_here(kind, size, layer_count, budget):
    """In a child: the longest length that fits, its bytes, and how many
    programs were compiled."""
    import numpy as np

    import keras_ring
    from benchmarks import memory

    # The same for all rows. Of simulated devices' own the compiler does not
    # know what it needs.
    keras_ring.config.set_kernel("blockwise")
    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    compiled = []
    with strategy.scope():
        model = decoder(kind, layer_count)

        def bytes_of(length):
            batch = np.zeros((1, length), "int32")
            need = memory.compiled_step_bytes(strategy, model, batch)
            compiled.append([length, need])
            print(
                f"    {length:,}: {need / 2**20:,.0f} MiB",
                file=sys.stderr,
                flush=True,
            )
            return need

        found = longest(bytes_of, budget)
    return [found, compiled]


def plot(lengths):
    """Bars of the longest contexts; returns the name of the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    bars = axes.bar(list(lengths), list(lengths.values()), width=0.6)
    axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.set(yscale="log", ylabel="tokens")
    axes.set_title("Longest context under the same memory a device", size=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    path = reports.image("context_table")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path.name


def main():
    """Search for every kind of layer and ring and write the report."""
    parser = options.parser(__doc__, backends=("jax",))
    parser.add_argument(
        "--budget", type=float, default=1024, help="MiB of a device"
    )
    parser.add_argument("--sizes", type=options.numbers, default=[1, 2, 4, 8])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--kinds", default=",".join(KINDS))
    given = parser.parse_args()
    budget = int(given.budget * 2**20)
    if given.measure:
        kind, size = given.measure.split(":")
        reports.answer(measure_here(kind, int(size), given.layers, budget))
        return 0
    if "jax" not in given.backends:
        print("Skipped: compiled memory analysis is JAX's.")
        return 0
    sides = [(kind, 1) for kind in given.kinds.split(",")]
    sides += [("blockwise", size) for size in given.sizes if size > 1]
    body, lengths = [], {}
    for kind, size in sides:
        print(f"{kind} on {size} ...", flush=True)
        found, compiled = reports.measured(
            "benchmarks.context_table",
            "jax",
            size,
            f"--measure={kind}:{size}",
            f"--budget={given.budget}",
            f"--layers={given.layers}",
        )
        if found is None:
            body.append([NAMES[kind], str(size), "none fits", "", "", ""])
            continue
        length, need = found
        name = f"ring of {size}" if size > 1 else SHORT_NAMES[kind]
        lengths[name] = length
        body.append(
            [
                NAMES[kind] if size == 1 else "ring",
                str(size),
                f"{length:,}",
                f"{need / 2**20:,.0f}",
                length,
                str(len(compiled)),
            ]
        )
    one = lengths.get(SHORT_NAMES["blockwise"])
    for row in body:
        row[4] = f"{row[4] / one:.2f}" if one and row[4] else ""
    paper = [
        [
            hardware,
            *(f"{n:,}K" for n in lengths),
            f"{lengths[3] / lengths[2]:.0f} on {devices}",
        ]
        for hardware, (devices, lengths) in PAPER.items()
    ]
    path = reports.write(
        "context_table",
        "\n\n".join(
            [
                "# The longest context under a fixed memory",
                reports.surroundings(
                    options.command("context_table"),
                    "programs were compiled for simulated CPU devices, "
                    "nothing was run",
                ),
                f"A training step of a causal decoder of {given.layers} layers "
                f"({FEATURES} features, 4 heads, feed-forward "
                f"{4 * FEATURES}, {VOCABULARY} classes), float32, batch 1, "
                f"Adam, under {given.budget:,.0f} MiB a device: arguments, "
                "results and temporaries, as the compiler counts them. "
                "Weights are whole on every device.",
                f"![Longest context]({plot(lengths)})",
                reports.table(
                    [
                        *("layers", "devices", "context", "MiB a device"),
                        *("of blockwise", "programs compiled"),
                    ],
                    body,
                ),
                "The paper's, for a model of 7B on other hardware and with "
                "sharded weights:",
                reports.table(
                    [
                        *("hardware", "vanilla", "memory-efficient"),
                        *("blockwise", "ring", "ring of blockwise"),
                    ],
                    paper,
                ),
            ]
        ),
    )
    print(path.relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
