"""Peak memory of a training step by ring size, and activations by formula.

    python -m benchmarks.memory

Writes `docs/reports/<date>-memory.md` with two tables:

1. What the sequence costs one device in a training step of a small decoder,
   on rings of 1 to 8 devices on JAX and of 1 to 4 on TensorFlow and PyTorch.
   JAX: what the compiler reserves on each device. The others: peak resident
   memory of a process, over that of a process with next to no sequence; on
   TensorFlow one process holds all devices, and its sum is divided.
2. What one layer adds to the memory of a device, beside the formulas of
   Liu, Zaharia and Abbeel 2023 (https://arxiv.org/abs/2310.01889, table 1),
   from compiled programs that differ by one layer.
"""

import argparse
import contextlib
import resource
import sys
from pathlib import Path

from benchmarks import reports

SIZES = {
    "jax": (1, 2, 4, 8),
    "tensorflow": (1, 2, 4),
    "torch": (1, 2, 4),
}
LENGTH = 16384
# Next to no sequence, for what a process needs anyway.
SHORT = 64
FEATURES, HEADS = 128, 4

# The layers of the second table: name, whose attention, ring.
VARIANTS = [
    ("vanilla", "stock", 1),
    ("memory-efficient attention", "tiles", 1),
    ("ring attention, 2 devices", "tiles", 2),
    ("ring attention, 4 devices", "tiles", 4),
    ("ring attention, 8 devices", "tiles", 8),
]
LAYER_LENGTH, LAYER_FEATURES = 4096, 256


def attention(kind, features):
    """A causal attention layer, of the package or of Keras."""
    import keras

    import keras_ring

    if kind == "stock":
        layer = keras.layers.MultiHeadAttention(HEADS, features // HEADS)
        return lambda x: layer(x, x, use_causal_mask=True)
    return keras_ring.layers.RingAttention(
        HEADS, key_dim=features // HEADS, causal=True
    )


def block(x, kind, features):
    """One layer of a decoder."""
    from keras import layers

    y = layers.LayerNormalization()(x)
    x = x + attention(kind, features)(y)
    y = layers.LayerNormalization()(x)
    y = layers.Dense(4 * features, activation="gelu")(y)
    return x + layers.Dense(features)(y)


def decoder():
    """The model of the first table, compiled."""
    import keras
    from keras import layers

    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(256, FEATURES)(tokens)
    for _ in range(2):
        x = block(x, "tiles", FEATURES)
    model = keras.Model(tokens, layers.Dense(256)(x))
    model.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def step_bytes(size, length):
    """Bytes that a process needs for one training step on a ring."""
    import keras
    import numpy as np

    import keras_ring

    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    batch = np.zeros((1, length), "int32")
    with strategy.scope():
        model = decoder()
        if keras.backend.backend() == "jax":
            return compiled_step_bytes(strategy, model, batch)
        model.train_on_batch(batch, batch)
    return peak_memory()


def compiled_step_bytes(strategy, model, batch):
    """Bytes that the compiled step needs on each device."""
    import jax
    import keras

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
    layout = keras.distribution.TensorLayout(
        ("batch", "seq"), strategy.world.distribution.device_mesh
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


def peak_memory():
    """Bytes of memory that this process held at most."""
    try:
        # On Linux what getrusage tells includes the process before it.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def layer_bytes(kind, size, kept):
    """JAX: bytes on a device that one layer adds to forward and backward.

    The gradients are results of the program and the weights are arguments,
    so that what is temporary is activations and workspace. If `kept`, the
    difference of three layers and two: what one layer keeps for the
    backward. Else all that is temporary with one layer: the largest that
    exists at once.
    """
    counts = (3, 2) if kept else (1, 0)
    first, second = (temporary_bytes(kind, size, count) for count in counts)
    return first - second if kept else first


def temporary_bytes(kind, size, count):
    """Temporary bytes of the gradient of `count` layers, on a device."""
    import jax
    import keras
    import numpy as np

    import keras_ring

    if count == 0:
        return 0
    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    scope = strategy.scope() if kind != "stock" else contextlib.nullcontext()
    with scope:
        inputs = keras.Input((None, LAYER_FEATURES))
        x = inputs
        for _ in range(count):
            x = block(x, kind, LAYER_FEATURES)
        model = keras.Model(inputs, x)
        weights = [variable.value for variable in model.trainable_variables]
        tensor = np.zeros((1, LAYER_LENGTH, LAYER_FEATURES), "float32")
        if kind != "stock":
            layout = keras.distribution.TensorLayout(
                ("batch", "seq", None), strategy.world.distribution.device_mesh
            )
            tensor = jax.device_put(tensor, layout.backend_layout)

        def objective(weights, x):
            y, _ = model.stateless_call(weights, [], x, training=True)
            return keras.ops.sum(y * y)

        program = jax.jit(jax.grad(objective, (0, 1)))
        compiled = program.lower(weights, tensor).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def formula(name, size):
    """Bytes of a layer as the paper has them, with two for each number."""
    length, features = LAYER_LENGTH, LAYER_FEATURES
    if name == "vanilla":
        return "2bns²", 2 * HEADS * length**2
    if name == "memory-efficient attention":
        return "8bsh", 8 * length * features
    return "6bch", 6 * (length // size) * features


def measure_here(what):
    """In a child: what the name says."""
    kind, *numbers = what.split(":")
    if kind == "step":
        size, length = (int(number) for number in numbers)
        reports.simulate_devices(size)
        return [step_bytes(size, length)]
    return [
        [layer_bytes(attention, size, kept) for kept in (True, False)]
        for _, attention, size in VARIANTS
    ]


def sequence_bytes(backend, size):
    """Bytes that the sequence takes on one device in a training step."""
    full, short = (
        reports.measured(
            "benchmarks.memory",
            backend,
            size,
            f"--measure=step:{size}:{length}",
        )[0]
        for length in (LENGTH, SHORT)
    )
    return (full - short) / (size if backend == "tensorflow" else 1)


def report(steps, layers):
    """Write the report; returns its file."""
    mebi = 2**20
    body = []
    for backend, by_size in steps.items():
        one = by_size[1]
        for size, amount in by_size.items():
            body.append(
                [
                    backend,
                    str(size),
                    f"{amount / mebi:.1f}",
                    f"{one / size / mebi:.1f}",
                    f"{amount * size / one:.2f}",
                ]
            )
    header = ["backend", "ring", "MiB a device", "1/N", "figure by 1/N"]
    rows = []
    for (name, _, size), (kept, most) in zip(VARIANTS, layers, strict=True):
        text, amount = formula(name, size)
        # The measured programs have four bytes for each number.
        rows.append(
            [
                name,
                text,
                f"{amount / mebi:.2f}",
                f"{kept / 2 / mebi:.2f}",
                f"{most / 2 / mebi:.2f}",
            ]
        )
    layer_header = [
        "layer",
        "formula",
        "formula, MiB",
        "kept for the backward, MiB",
        "most at once, MiB",
    ]
    sections = [
        "# Memory by ring size",
        reports.surroundings("python -m benchmarks.memory"),
        "## A training step",
        "What the sequence takes on one device: a decoder of 2 layers "
        f"(width {FEATURES}, {HEADS} heads, feed-forward {4 * FEATURES}, 256 "
        f"classes), float32, batch 1, length {LENGTH:,}, Adam. From it is "
        f"subtracted what a step with {SHORT} tokens takes. On JAX the "
        "compiler says what a device needs; on PyTorch it is the peak "
        "resident memory of the process of rank 0; on TensorFlow that of "
        "the one process that holds all devices, divided by their number "
        "(host copies of the batch and of the copies that are under way "
        "count there too).",
        reports.table(header, body),
        "## One layer, beside the paper's formulas",
        f"Batch 1, length s = {LAYER_LENGTH:,}, width h = {LAYER_FEATURES}, "
        f"n = {HEADS} heads, feed-forward 4h, chunk c = s / N, on JAX, in "
        "float32; figures are halved, because the formulas have two bytes "
        "for each number. The formulas are those of attention and what it "
        "needs beside it at the largest moment; the figures are of a whole "
        "layer with its normalisations, projections and a plain feed-forward "
        "of four times the width, which alone keeps 2 x 8bch.",
        reports.table(layer_header, rows),
    ]
    return reports.write("memory", "\n\n".join(sections))


def main():
    """Measure on every backend and write the report; or be its child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", help="for the children")
    options = parser.parse_args()
    if options.measure:
        reports.answer(measure_here(options.measure))
        return 0
    steps = {}
    for backend, sizes in SIZES.items():
        steps[backend] = {}
        for size in sizes:
            print(f"{backend}: a step on a ring of {size} ...", flush=True)
            steps[backend][size] = sequence_bytes(backend, size)
    print("jax: one layer ...", flush=True)
    layers = reports.measured("benchmarks.memory", "jax", 8, "--measure=layer")
    path = report(steps, layers)
    print(path.relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
