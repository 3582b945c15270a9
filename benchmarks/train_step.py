"""Whole training steps: tokens a second of a small decoder.

    python -m benchmarks.train_step [--backends torch] [--lengths 4096]

A decoder of `RingTransformerBlock` on one device and on rings against the
same decoder of stock Keras layers on one device: forward, backward and Adam
through `train_on_batch`, as a user would run it. On a CPU all have the same
cores. Each is a process that stays alive, they take turns. Writes
`docs/reports/<date>-train_step.md`.
"""

import functools
import sys

from benchmarks import options, reports, timing

LENGTHS = (2048, 4096)
SIZES = {"jax": (4, 8), "tensorflow": (2, 4), "torch": (2,)}
FEATURES, HEADS, LAYERS, VOCABULARY = 256, 8, 2, 256


def decoder(kind, remat="feed_forward"):
    """The decoder, compiled: `stock` or `ring` blocks."""
    import keras
    from keras import layers

    import keras_ring

    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(VOCABULARY, FEATURES)(tokens)
    for _ in range(LAYERS):
        if kind == "ring":
            x = keras_ring.layers.RingTransformerBlock(
                HEADS, 4 * FEATURES, causal=True, remat=remat
            )(x)
            continue
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        attend = layers.MultiHeadAttention(HEADS, FEATURES // HEADS)
        x = layers.add([x, attend(y, y, use_causal_mask=True)])
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = layers.Dense(4 * FEATURES, activation="gelu")(y)
        x = layers.add([x, layers.Dense(FEATURES)(y)])
    model = keras.Model(tokens, layers.Dense(VOCABULARY)(x))
    model.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def step(kind, length, size, remat="feed_forward"):
    """For the child: one training step."""
    import numpy as np

    import keras_ring

    generator = np.random.default_rng(0)
    batch = generator.integers(0, VOCABULARY, (2, 1, length), dtype="int32")
    if size == 1:
        return functools.partial(decoder(kind, remat).train_on_batch, *batch)
    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        model = decoder(kind, remat)

    def inside():
        with strategy.scope():
            model.train_on_batch(*batch)

    return inside


def contestants_of(backend, length, sizes, remat, simulated):
    """Specifications of children by name."""
    sides = [
        ("stock Keras layers", "stock", 1),
        ("ring blocks, 1 device", "ring", 1),
        *((f"ring blocks, {size} devices", "ring", size) for size in sizes),
    ]
    return {
        name: {
            "make": "benchmarks.train_step:step",
            "arguments": {
                "kind": kind,
                "length": length,
                "size": size,
                "remat": remat,
            },
            "backend": backend,
            "devices": size,
            "threads": max(1, timing.cores() // size),
            "simulated": simulated,
        }
        for name, kind, size in sides
    }


def main():
    """Measure on each backend and write the report."""
    parser = options.parser(__doc__, lengths=LENGTHS)
    parser.add_argument("--sizes", type=options.numbers)
    parser.add_argument("--remat", default="feed_forward")
    given = parser.parse_args()
    body, where = [], []
    for backend in options.backends(given):
        sizes, simulated = timing.sizes(
            backend, given.sizes, SIZES[backend], given.cpu
        )
        where.append(f"{backend}: {timing.on(backend, simulated)}")
        for length in given.lengths:
            print(f"{backend}: {length} ...", flush=True)
            times = timing.compared(
                contestants_of(backend, length, sizes, given.remat, simulated),
                given.rounds,
                given.limit,
            )
            stock = next(iter(times.values()))
            for name, own in times.items():
                middle = timing.median(own)
                body.append(
                    [
                        backend,
                        f"{length:,}",
                        name,
                        f"{middle:.3f}",
                        f"{length / middle:,.0f}",
                        f"{timing.ratio(stock, own):.2f}",
                    ]
                )
    path = reports.write(
        "train_step",
        "\n\n".join(
            [
                "# Training steps",
                reports.surroundings(
                    options.command("train_step"), "; ".join(where)
                ),
                f"A causal decoder of {LAYERS} blocks, {FEATURES} features, "
                f"{HEADS} heads, feed-forward {4 * FEATURES}, {VOCABULARY} "
                "classes, float32, batch 1, Adam, with `train_on_batch`. The "
                "last column is the median of the rounds' ratios to the "
                "first row of its length.",
                reports.table(
                    [
                        *("backend", "length", "decoder", "seconds a step"),
                        *("tokens a second", "times the first"),
                    ],
                    body,
                ),
            ]
        ),
    )
    print(path.relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
