"""Classify sequences of 8,192 tokens by something far apart in them.

    KERAS_BACKEND=jax python examples/long_classifier.py
    KERAS_BACKEND=tensorflow python examples/long_classifier.py
    KERAS_BACKEND=torch torchrun --nproc-per-node 2 examples/long_classifier.py

Four kinds of events happen once each, anywhere in a long sequence of noise;
the class is the kind that happens first. No part of a sequence tells: the
classifier attends over the whole and pools over the whole, while every
device holds a part. Pooling needs all positions, so it stands in `Gathered`.
The script prints the accuracy as the sequences get longer and draws it.
"""

import argparse
import sys

from devices import BACKEND, OUT, RANK, say  # isort: skip

import keras
import numpy as np

import keras_ring

EVENTS, NOISE = 4, 16
GOAL = 0.95


def sequences(count: int, length: int, seed: int) -> tuple[np.ndarray, ...]:
    """Tokens `(count, length)` and the kind of the first event."""
    generator = np.random.default_rng(seed)
    tokens = EVENTS + generator.integers(
        0, NOISE, (count, length), dtype="int32"
    )
    places = np.stack(
        [generator.choice(length, EVENTS, replace=False) for _ in range(count)]
    )
    tokens[np.arange(count)[:, None], places] = np.arange(EVENTS)
    return tokens, places.argmin(axis=1).astype("int32")


def build_model() -> keras.Model:
    """One block, pooling over the whole sequence, a decision."""
    tokens = keras.Input((None,), dtype="int32")
    spread = keras.initializers.RandomNormal(stddev=1.0)
    x = keras.layers.Embedding(EVENTS + NOISE, 32, spread)(tokens)
    y = keras.layers.LayerNormalization()(x)
    # Causal: an event sees the earlier ones, the first sees none but noise.
    y = keras_ring.layers.RingAttention(2, key_dim=16, causal=True, sinks=True)(
        y
    )
    x = x + y
    y = keras.layers.LayerNormalization()(x)
    x = x + keras_ring.layers.BlockwiseFeedForward(128)(y)
    x = keras_ring.layers.Gathered(keras.layers.GlobalMaxPooling1D())(x)
    model = keras.Model(tokens, keras.layers.Dense(EVENTS)(x))
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def draw(rows: list[tuple[int, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    OUT.mkdir(exist_ok=True)
    figure, axes = plt.subplots(figsize=(6, 3.6))
    axes.plot(*zip(*rows, strict=True), marker="o", label="accuracy")
    axes.axhline(1 / EVENTS, color="grey", linestyle=":", label="guessing")
    axes.set(
        xscale="log", xlabel="tokens", ylim=(0, 1.05), title="Which came first?"
    )
    axes.legend(loc="lower right")
    figure.tight_layout()
    path = OUT / f"long-classifier-{BACKEND}.png"
    figure.savefig(path, dpi=120)
    say(f"The plot is in {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=8192)
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    rows = []
    strategy = keras_ring.DistributedStrategy()
    with strategy.scope():
        model = build_model()
        # (length, steps, batch): short ones teach what long ones need.
        for length, steps, batch in (
            (64, 600, 64),
            (512, 60, 32),
            (2048, 30, 8),
            (options.length, 12, 4),
        ):
            length = min(length, options.length)
            tokens, kinds = sequences(steps * batch, length, seed=length)
            model.fit(tokens, kinds, batch_size=batch, verbose=0)
            tokens, kinds = sequences(16 * batch, length, seed=1)
            _, accuracy = model.evaluate(
                tokens, kinds, batch_size=batch, verbose=0
            )
            rows.append((length, float(accuracy)))
            say(f"{length:6,} tokens: accuracy {accuracy:.3f}")
    if RANK == 0:
        draw(rows)
    reached = rows[-1][1] >= GOAL
    say("reached" if reached else f"MISSED the goal of {GOAL:.0%}")
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
