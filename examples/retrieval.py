"""Find keys hidden anywhere in 16,384 tokens and read one back at the end.

    KERAS_BACKEND=jax python examples/retrieval.py
    KERAS_BACKEND=tensorflow python examples/retrieval.py
    KERAS_BACKEND=torch torchrun --nproc-per-node 2 examples/retrieval.py

In a long sequence of noise stand four key-value pairs, each somewhere; the
last token names one of the keys and the model must give its value. It learns
on short sequences first and then on longer ones, every sequence spread over
all devices, and reads the whole context. The same model given the last
eighth of the context can only guess where the pair lies before it. The
script prints the accuracy of both for each place of the pair and draws it.
Options: `--length`, `--bfloat16`, `--quick` (2,048 tokens).
"""

import argparse
import sys
import time
from typing import Any, NamedTuple

from devices import BACKEND, OUT, RANK, say  # isort: skip

import keras
import numpy as np

import keras_ring

# A token is a kind and a value: noise, one of the keys, or a question for it.
KEYS, VALUES = 4, 10
NOISE, FIRST_KEY, FIRST_QUESTION = 0, 1, 1 + KEYS
KINDS = 1 + 2 * KEYS
GOAL = 0.99


class Stage(NamedTuple):
    """A part of the training, `EPOCHS` times `steps` steps long."""

    length: int
    steps: int
    batch: int


STAGES = (
    Stage(64, 80, 64),
    Stage(512, 60, 32),
    Stage(4096, 24, 4),
    Stage(16384, 12, 2),
)
EPOCHS = 6
# How much of the context the truncated model keeps.
KEPT = 8
PLACES = 8


def sequences(
    count: int, length: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens `(count, length)`, the value asked for and where it stands."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, VALUES, (count, length), dtype="int32")
    values = draw.integers(0, VALUES, (count, KEYS))
    asked = draw.integers(0, KEYS, count)
    places = np.stack(
        [draw.choice(length - 1, KEYS, replace=False) for _ in range(count)]
    )
    for key in range(KEYS):
        tokens[np.arange(count), places[:, key]] = (
            FIRST_KEY + key
        ) * VALUES + values[:, key]
    tokens[:, -1] += (FIRST_QUESTION + asked) * VALUES
    rows = np.arange(count)
    return tokens, values[rows, asked], places[rows, asked]


def build_model() -> keras.Model:
    """An embedding, one block, and a decision at every position."""
    tokens = keras.Input((None,), dtype="int32")
    spread = keras.initializers.RandomNormal(stddev=1.0)
    x = keras.layers.Embedding(KINDS, 64, spread)(tokens // VALUES)
    x += keras.layers.Embedding(VALUES, 64, spread)(tokens % VALUES)
    x = keras_ring.layers.RingTransformerBlock(
        1, hidden_dim=128, key_dim=32, causal=True
    )(x)
    x = keras.layers.LayerNormalization()(x)
    model = keras.Model(tokens, keras.layers.Dense(VALUES, dtype="float32")(x))
    steps = EPOCHS * sum(stage.steps for stage in STAGES)
    schedule = keras.optimizers.schedules.CosineDecay(3e-3, steps, alpha=0.02)
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
    )
    return model


def fed(tokens: np.ndarray, values: np.ndarray) -> tuple:
    """Labels and weights for `fit`: only the last position counts."""
    labels = np.zeros(tokens.shape, "int32")
    labels[:, -1] = values
    weights = np.zeros(tokens.shape, "float32")
    weights[:, -1] = tokens.shape[1]
    return tokens, labels, weights


def train(model: keras.Model, length: int) -> None:
    """Short sequences first: what is learned there is found in long ones."""
    for stage in STAGES:
        longer = min(stage.length, length)
        for epoch in range(EPOCHS):
            start = time.monotonic()
            tokens, values, _ = sequences(
                stage.steps * stage.batch, longer, seed=longer + epoch
            )
            x, y, weights = fed(tokens, values)
            history = model.fit(
                x, y, sample_weight=weights, batch_size=stage.batch, verbose=0
            )
            last = {name: v[-1] for name, v in history.history.items()}
            say(
                f"{longer:7,} tokens  epoch {epoch + 1}  "
                f"loss {last['loss']:.3f}  accuracy {last['accuracy']:.3f}  "
                f"{time.monotonic() - start:.1f} s"
            )
        if longer == length:
            break


def right(model: keras.Model, tokens: np.ndarray, values: np.ndarray) -> Any:
    """Which of the questions are answered, asked one at a time."""
    answers = []
    for start in range(len(tokens)):
        logits = model.predict(tokens[start : start + 1], verbose=0)
        answers.append(np.asarray(logits)[0, -1].argmax())
    return np.array(answers) == values


def draw(rows: list[tuple], length: int, devices: int, name: str) -> None:
    """Accuracy against the place of the pair."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    OUT.mkdir(exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 4))
    edges = [row[0] for row in rows]
    step = length / PLACES
    for column, label in ((1, "whole context"), (2, f"last 1/{KEPT} of it")):
        axes.plot(
            [edge + step / 2 for edge in edges],
            [row[column] for row in rows],
            marker="o",
            label=label,
        )
    axes.axhline(1 / VALUES, color="grey", linestyle=":", label="guessing")
    axes.set(
        xlabel="place of the pair (tokens from the start)",
        ylabel="accuracy",
        ylim=(0, 1.05),
        title=f"A key hidden in {length:,} tokens, {devices} devices, "
        f"{BACKEND}",
    )
    axes.legend(loc="center left")
    figure.tight_layout()
    path = OUT / name
    figure.savefig(path, dpi=120)
    say(f"The plot is in {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--quick", action="store_true", help="2,048 tokens")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument(
        "--samples", type=int, default=128, help="questions at the end"
    )
    options = parser.parse_args()
    length = 2048 if options.quick else options.length
    keras.utils.set_random_seed(0)
    if options.bfloat16:
        keras.config.set_dtype_policy("mixed_bfloat16")
    strategy = keras_ring.DistributedStrategy()
    if RANK == 0:
        strategy.summary(say)
    with strategy.scope():
        model = build_model()
        train(model, length)
        tokens, values, places = sequences(options.samples, length, seed=1)
        whole = right(model, tokens, values)
        cut = right(model, tokens[:, -(length // KEPT) :], values)
    say(f"\n{'pair at':>16}  {'questions':>9}  {'whole':>6}  {'cut':>6}")
    rows = []
    for place in range(PLACES):
        first, last = (n * length // PLACES for n in (place, place + 1))
        here = (first <= places) & (places < last)
        if here.any():
            rows.append((first, whole[here].mean(), cut[here].mean()))
            say(
                f"{first:7,}-{last - 1:>8,}  {here.sum():9}  "
                f"{rows[-1][1]:6.2f}  {rows[-1][2]:6.2f}"
            )
    say(
        f"whole context: {whole.mean():.1%}, last 1/{KEPT}: {cut.mean():.1%}, "
        f"guessing: {1 / VALUES:.0%}"
    )
    if RANK == 0:
        kind = "-bfloat16" if options.bfloat16 else ""
        devices = strategy.world.sequence_size
        draw(rows, length, devices, f"retrieval-{BACKEND}{kind}.png")
    reached = whole.mean() >= GOAL and cut.mean() < 0.5
    say("reached" if reached else f"MISSED the goal of {GOAL:.0%}")
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
