"""Train a byte-level language model with every sequence spread over devices.

    make demo                        # 8 simulated devices on JAX
    make demo BACKEND=tensorflow     # 4 simulated devices on TensorFlow
    make demo BACKEND=torch          # 2 processes on PyTorch

By hand, in an environment with keras_ring, one backend and its extra
`examples`:

    KERAS_BACKEND=jax python examples/byte_language_model.py
    KERAS_BACKEND=torch torchrun --nproc-per-node 2 \
        examples/byte_language_model.py

The text is the source of Python's own standard library. The script shows
what the devices do, the loss as it falls, that the first steps are those of
one device, and the memory that a device needs with the ring and without it.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from devices import BACKEND, OUT, RANK, say  # isort: skip

import keras
import numpy as np

import keras_ring

FIRST_STEPS = 3
# What fits into about three minutes on two cores.
STEPS = {"jax": 63, "tensorflow": 33, "torch": 63}[BACKEND]
EPOCHS = 5
TOLERANCE = 1e-4
# A sequence that takes no memory to speak of.
SHORT = 64


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on, and bytes of other files to validate on."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    kept_back = b"".join(files[::10])
    del files[::10]
    return tuple(
        np.frombuffer(text, "uint8").astype("int32")
        for text in (b"".join(files), kept_back)
    )


def windows(text: np.ndarray, count: int, length: int, seed: int) -> tuple:
    """Inputs and the bytes that follow them, `(count, length)` each."""
    starts = np.random.default_rng(seed).integers(
        0, len(text) - length - 1, count
    )
    cut = np.stack([text[start : start + length + 1] for start in starts])
    return cut[:, :-1], cut[:, 1:]


def unigram_bits(train: np.ndarray, validation: np.ndarray) -> float:
    """Bits per byte for a model that knows byte frequencies and no more."""
    seen = np.bincount(train, minlength=256) + 1
    return float(-np.log2(seen / seen.sum())[validation].mean())


def build_model(steps: int, stock: bool = False) -> keras.Model:
    """Two blocks of pre-norm attention and feed-forward, compiled."""
    layers = keras.layers
    tokens = keras.Input((None,), dtype="int32")
    # As large as what the blocks add, so that the byte itself is not drowned.
    spread = keras.initializers.RandomNormal(stddev=1.0)
    x = layers.Embedding(256, 128, embeddings_initializer=spread)(tokens)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        turned = keras_ring.layers.RotaryEmbedding()(y)
        if stock:
            attend = layers.MultiHeadAttention(num_heads=2, key_dim=32)
            y = attend(turned, y, turned, use_causal_mask=True)
        else:
            attend = keras_ring.layers.RingAttention(
                num_heads=2, key_dim=32, causal=True
            )
            y = attend(turned, y, turned)
        x = x + y
        y = layers.LayerNormalization()(x)
        x = x + layers.Dense(128)(layers.Dense(512, activation="gelu")(y))
    x = layers.LayerNormalization()(x)
    logits = layers.Dense(256, kernel_initializer="zeros")(x)
    model = keras.Model(tokens, logits)
    schedule = keras.optimizers.schedules.CosineDecay(
        1e-3, steps, alpha=0.05, warmup_target=1e-2, warmup_steps=steps // 10
    )
    model.compile(
        keras.optimizers.Adam(schedule, beta_2=0.95),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def first_losses(model: keras.Model, x: np.ndarray, y: np.ndarray) -> list:
    """The loss of each of the first steps, one sequence at a time."""
    losses = []
    for step in range(FIRST_STEPS):
        model.reset_metrics()
        one = slice(step, step + 1)
        losses.append(float(model.train_on_batch(x[one], y[one])))
    return losses


class StepLosses(keras.callbacks.Callback):
    """Keep the loss of every step; Keras reports the mean of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        mean = logs["loss"]
        before = self._mean if batch else 0.0
        self.losses.append(mean * (batch + 1) - before * batch)
        self._mean = mean


def compare(ring: list[float], single: list[float]) -> bool:
    """Print the first steps side by side; whether they agree."""
    say(f"\n{'step':>4}  {'ring':>12}  {'one device':>12}  rel. difference")
    differences = []
    for step, (first, second) in enumerate(zip(ring, single, strict=True), 1):
        differences.append(abs(first - second) / abs(second))
        say(f"{step:4}  {first:12.7f}  {second:12.7f}  {differences[-1]:.1e}")
    return max(differences) <= TOLERANCE


def compiled_bytes(model: keras.Model, length: int) -> int:
    """JAX: what the compiled training step needs on each device."""
    import jax

    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    state = [
        [variable.value for variable in group]
        for group in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    ]
    batch = np.zeros((1, length), "int32")
    distribution = keras.distribution.distribution()
    if distribution is not None:
        layout = keras.distribution.TensorLayout(
            ("batch", "seq"), distribution.device_mesh
        )
        batch = jax.device_put(batch, layout.backend_layout)
    step = jax.jit(model.train_step, donate_argnums=0)
    memory = step.lower(state, (batch, batch)).compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def measure_here(what: str, length: int) -> None:
    """Print the peak resident memory, in bytes, of a process that does one
    training step; runs in a child process."""
    strategy = keras_ring.DistributedStrategy() if what == "ring" else None
    with strategy.scope() if strategy else contextlib.nullcontext():
        batch = np.zeros((1, length), "int32")
        build_model(10).train_on_batch(batch, batch)
    devices = strategy.world.sequence_size if strategy else 1
    say(json.dumps({"bytes": peak_memory(), "devices": devices}))


def peak_memory() -> int:
    """Bytes of memory that this program held at most."""
    try:
        # On Linux what getrusage tells includes the program before it.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(what: str, length: int) -> int:
    """TensorFlow, PyTorch: the memory that the sequence takes on a device,
    as the difference of two processes, one with next to no sequence."""
    with ThreadPoolExecutor() as together:
        full, short = together.map(child, (what, what), (length, SHORT))
    # On PyTorch a process is a device, on TensorFlow it holds them all.
    shared = full["devices"] if BACKEND == "tensorflow" else 1
    return max(full["bytes"] - short["bytes"], 0) // shared


def child(what: str, length: int) -> dict[str, int]:
    """Run `measure_here` in fresh processes of its own."""
    arguments = [__file__, f"--measure={what}", f"--length={length}"]
    command = [sys.executable, *arguments]
    if BACKEND == "torch":
        # As many as there are of this one.
        count = int(os.environ["WORLD_SIZE"]) if what == "ring" else 1
        launch = ["-m", "torch.distributed.run", "--standalone"]
        command[1:1] = [*launch, f"--nproc-per-node={count}"]
    outer = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_",
        "MASTER_",
        "GROUP_",
        "TORCHELASTIC",
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(outer)}
    done = subprocess.run(
        command, env=clean, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_memory(
    strategy: keras_ring.DistributedStrategy,
    ring_model: keras.Model,
    length: int,
) -> tuple[dict[str, int], str]:
    """Peak bytes on one device by what it runs, and how that was found."""
    ring = f"ring of {strategy.world.sequence_size}"
    if BACKEND == "jax":
        with strategy.scope():
            found = {ring: compiled_bytes(ring_model, length)}
        found["one device"] = compiled_bytes(build_model(10), length)
        stock = build_model(10, stock=True)
        found["one device,\nstock attention"] = compiled_bytes(stock, length)
        return found, (
            "bytes per device of the compiled training step: arguments, "
            "outputs and temporaries, as the compiler counts them"
        )
    found = {name: 0 for name in (ring, "one device")}
    found[ring] = measure("ring", length)
    found["one device"] = measure("one", length)
    shared = (
        f", shared by {strategy.world.sequence_size} devices"
        if BACKEND == "tensorflow"
        else ", in the process of rank 0"
    )
    return found, (
        "peak resident memory of a process that does one training step, over "
        f"that of one with {SHORT} bytes of text; with the ring{shared}"
    )


def plot(
    losses: list[float],
    validation: list[tuple[int, float]],
    baseline: float,
    memory: dict[str, int],
    title: str,
) -> Path:
    """Draw what was learned and what it took; return the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4.4), width_ratios=(3, 2), layout="constrained"
    )
    figure.suptitle(title)
    steps = range(1, len(losses) + 1)
    left.plot(
        steps, losses, color="tab:blue", lw=1.2, label="training, each step"
    )
    left.plot(
        *zip(*validation, strict=True),
        "o-",
        color="tab:orange",
        label="validation",
    )
    left.axhline(
        baseline, color="gray", ls="--", label="byte frequencies alone"
    )
    left.set(xlabel="step", ylabel="bits per byte", title="Loss")
    left.set_ylim(top=8.4)
    left.legend(frameon=False)
    sizes = [size / 2**20 for size in memory.values()]
    colors = ["tab:blue", "tab:gray", "tab:red"]
    bars = right.bar(list(memory), sizes, color=colors[: len(sizes)], width=0.6)
    right.bar_label(bars, [f"{size:,.0f} MiB" for size in sizes], padding=2)
    # From zero, so that a bar is as long as what it stands for.
    right.set(ylabel="MiB", title="Peak memory of one device")
    right.set_ylim(0, max(sizes) * 1.1)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    OUT.mkdir(exist_ok=True)
    path = OUT / f"byte_language_model_{BACKEND}.png"
    figure.savefig(path, dpi=120)
    return path


def train(length: int, steps: int) -> int:
    """The whole show; returns the exit code."""
    start = time.monotonic()
    text, other_text = read_text()
    x, y = windows(text, steps, length, seed=1)
    held_x, held_y = windows(other_text, 2, length, seed=2)
    baseline = unigram_bits(text, held_y.reshape(-1))
    say(f"{len(text):,} bytes of Python; sequences of {length:,} bytes\n")

    strategy = keras_ring.DistributedStrategy()
    strategy.summary(print_fn=say)
    keras.utils.set_random_seed(0)
    kept = StepLosses()
    with strategy.scope():
        model = build_model(steps)
        initial = model.get_weights()
        say(f"\nTraining: {FIRST_STEPS} single steps, then fit")
        first = first_losses(model, x, y)
        history = model.fit(
            x[FIRST_STEPS:],
            y[FIRST_STEPS:],
            batch_size=1,
            shuffle=False,
            epochs=EPOCHS,
            steps_per_epoch=(steps - FIRST_STEPS) // EPOCHS,
            validation_data=(held_x, held_y),
            validation_batch_size=1,
            callbacks=[kept],
        ).history
    if RANK:
        return 0

    bits = [loss / math.log(2) for loss in first + kept.losses]
    each = (steps - FIRST_STEPS) // EPOCHS
    validation = [
        (FIRST_STEPS + each * epoch, loss / math.log(2))
        for epoch, loss in enumerate(history["val_loss"], 1)
    ]
    say("\nBits per byte (8 without any knowledge of the text):")
    say(
        f"  training    {bits[0]:.2f} at the first step, {bits[-1]:.2f} at last"
    )
    say(f"  validation  {validation[-1][1]:.2f} at the end")
    say(f"  {baseline:.2f} is what the frequencies of the bytes alone give")

    say("\nThe same first steps on one device, from the same weights:")
    single_model = build_model(steps)
    single_model.set_weights(initial)
    agree = compare(first, first_losses(single_model, x, y))

    say("\nMeasuring the memory ...")
    memory, how = measure_memory(strategy, model, length)
    for name, size in memory.items():
        name = " ".join(name.split())
        say(f"  {name:28} {size / 2**20:10,.1f} MiB")
    say(f"  ({how})")

    count = strategy.world.sequence_size
    title = f"{length:,} bytes per sequence over {count} devices ({BACKEND})"
    path = plot(bits, validation, baseline, memory, title)
    say(f"\nPlot: {path.relative_to(OUT.parent)}")
    say(f"Took {time.monotonic() - start:.0f} s.")
    if not agree:
        say(f"FAILED: the ring and one device differ by over {TOLERANCE:g}.")
        return 1
    if validation[-1][1] >= baseline:
        say("FAILED: the model learned no more than byte frequencies.")
        return 1
    return 0


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--measure", choices=("ring", "one"))
    options = parser.parse_args()
    if (options.steps - FIRST_STEPS) % EPOCHS or options.steps <= FIRST_STEPS:
        parser.error(f"--steps must be {FIRST_STEPS} + a multiple of {EPOCHS}")
    if options.measure:
        measure_here(options.measure, options.length)
        return 0
    return train(options.length, options.steps)


if __name__ == "__main__":
    sys.exit(main())
