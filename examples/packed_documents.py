"""Train on documents of all lengths, packed into long rows without waste.

    KERAS_BACKEND=jax python examples/packed_documents.py
    KERAS_BACKEND=tensorflow python examples/packed_documents.py
    KERAS_BACKEND=torch torchrun --nproc-per-node 2 \
        examples/packed_documents.py

Documents (functions of Python's standard library) differ in length. Padded
to one length, most of a batch is padding; packed one after the other into
long rows, nothing is, but no document may see its neighbours. The segment
ids tell the attention where documents begin. The script shows that the loss
of packed documents is the loss of the same documents apart, trains on packed
rows that are spread over all devices, and draws both.
"""

import argparse
import re
import sys
import sysconfig
from pathlib import Path

from devices import BACKEND, OUT, RANK, say  # isort: skip

import keras
import numpy as np

import keras_ring

LONGEST = 512
TOLERANCE = 1e-5


def documents() -> list[np.ndarray]:
    """Functions as bytes, of 32 to `LONGEST` bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(folder.glob("*.py")):
        text = path.read_bytes()
        for part in re.split(rb"\n(?=def |class |    def )", text):
            if 32 <= len(part) <= LONGEST:
                found.append(np.frombuffer(part, "uint8").astype("int32"))
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order]


def pack(texts: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Rows of documents one after the other, each into the first row that
    has room; what is left of a row is padding with an id of its own."""
    rows: list[list[np.ndarray]] = []
    for text in texts:
        for row in rows:
            if sum(map(len, row)) + len(text) <= length:
                row.append(text)
                break
        else:
            rows.append([text])
    shape = len(rows), length
    tokens, labels = np.zeros(shape, "int32"), np.zeros(shape, "int32")
    ids, weights = np.zeros(shape, "int32"), np.zeros(shape, "float32")
    for r, row in enumerate(rows):
        start = 0
        for number, text in enumerate(row, 1):
            stop = start + len(text)
            tokens[r, start:stop] = text
            ids[r, start:stop] = number
            # The last byte of a document has nothing to predict.
            labels[r, start : stop - 1] = text[1:]
            weights[r, start : stop - 1] = 1.0
            start = stop
    return {"tokens": tokens, "ids": ids, "labels": labels, "weights": weights}


def build_model() -> keras.Model:
    """A decoder that keeps documents apart, compiled."""
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = keras.layers.Embedding(256, 96)(tokens)
    for _ in range(2):
        # Rotary embedding knows distances only: the same in every place.
        block = keras_ring.layers.RingTransformerBlock(
            3, hidden_dim=384, causal=True, rotary=True
        )
        x = block(x, segment_ids=ids)
    x = keras.layers.LayerNormalization()(x)
    model = keras.Model(
        {"tokens": tokens, "ids": ids}, keras.layers.Dense(256)(x)
    )
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def loss_of(model: keras.Model, batch: dict[str, np.ndarray]) -> float:
    """The summed loss of all bytes of a batch, row by row."""
    rows = [
        model.evaluate(
            {name: batch[name][row : row + 1] for name in ("tokens", "ids")},
            batch["labels"][row : row + 1],
            sample_weight=batch["weights"][row : row + 1],
            verbose=0,
        )
        for row in range(len(batch["tokens"]))
    ]
    return float(np.sum(rows)) * batch["tokens"].shape[1]


def draw(packed: dict, padded: dict, losses: list[float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    OUT.mkdir(exist_ok=True)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    for place, title, batch in (
        (0, "padded: a row each", padded),
        (1, "packed", packed),
    ):
        axes[place].imshow(
            np.ma.masked_equal(batch["ids"], 0),
            aspect="auto",
            interpolation="none",
            cmap="tab20",
        )
        share = (batch["ids"] == 0).mean()
        axes[place].set(title=f"{title}, {share:.0%} padding", xlabel="token")
    axes[2].plot(range(1, len(losses) + 1), losses)
    axes[2].set(title="training on packed rows", xlabel="epoch", ylabel="loss")
    figure.tight_layout()
    path = OUT / f"packed-documents-{BACKEND}.png"
    figure.savefig(path, dpi=120)
    say(f"The plot is in {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    keras.utils.set_random_seed(0)
    texts = documents()[: options.documents]
    few = texts[:24]
    strategy = keras_ring.DistributedStrategy()
    with strategy.scope():
        model = build_model()
        together = loss_of(model, pack(few, options.length))
        alone = loss_of(model, pack_apart(few))
        difference = abs(together - alone) / alone
        say(
            f"{len(few)} documents packed: loss {together:.4f}\n"
            f"the same apart:      loss {alone:.4f}\n"
            f"relative difference  {difference:.1e}"
        )
        batch = pack(texts, options.length)
        say(
            f"{len(texts)} documents in {len(batch['tokens'])} rows of "
            f"{options.length}, {(batch['ids'] == 0).mean():.1%} padding"
        )
        history = model.fit(
            {name: batch[name] for name in ("tokens", "ids")},
            batch["labels"],
            sample_weight=batch["weights"],
            batch_size=1,
            epochs=options.epochs,
            verbose=2 if RANK == 0 else 0,
        )
    losses = history.history["loss"]
    if RANK == 0:
        draw(batch, pack_apart(texts), losses)
    agree, learned = difference <= TOLERANCE, losses[-1] < losses[0]
    say("the losses agree" if agree else "THE LOSSES DIFFER")
    if not learned:
        say("TRAINING DID NOT LOWER THE LOSS")
    return int(not (agree and learned))


def pack_apart(texts: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Every document in a row of its own."""
    rows = [pack([text], LONGEST) for text in texts]
    return {
        name: np.concatenate([row[name] for row in rows]) for name in rows[0]
    }


if __name__ == "__main__":
    sys.exit(main())
