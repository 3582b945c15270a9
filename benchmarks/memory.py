"""Peak memory of a training step by ring size, and activations by formula.

    python -m benchmarks.memory

Writes `docs/reports/<date>-memory.md` with two tables:

1. What more sequence costs one device in a training step of a small decoder,
   on rings of 1 to 8 devices on JAX and of 1 to 4 on TensorFlow and PyTorch:
   the difference of a long and a short sequence, which leaves out what does
   not grow. JAX: what the compiler reserves on each device. The others: peak
   resident memory of a process; on TensorFlow one process holds all devices,
   and its sum is divided.
2. What one layer adds to the memory of a device, beside the formulas of
   Liu, Zaharia and Abbeel 2023 (https://arxiv.org/abs/2310.01889, table 1),
   from what JAX hands from the forward to the backward and from the compiled
   program of a layer.
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
# What a process needs anyway, and buffers that are large once, are in both.
SHORT, LENGTH = 8192, 32768
FEATURES, HEADS = 128, 4

# The C library keeps what is freed for later, more or less of it. With this it
# returns every tensor, so that a peak is that of what is in use.
FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}

# The layers of the second table: name, kind, ring, formula.
VARIANTS = [
    ("vanilla", "vanilla", 1, "2bns²"),
    ("memory-efficient attention", "efficient", 1, "8bsh"),
    ("blockwise, one device", "blockwise", 1, "2bsh"),
    *(
        (f"blockwise, ring of {size}", "blockwise", size, "6bch")
        for size in (2, 4, 8)
    ),
]
LAYER_LENGTH, LAYER_FEATURES, CHUNK = 2048, 256, 256


def block(x, kind, features):
    """One layer of a decoder: of Keras, with attention of the package, or
    all of the package."""
    from keras import layers

    import keras_ring

    if kind == "blockwise":
        return keras_ring.layers.RingTransformerBlock(
            HEADS, 4 * features, causal=True, remat="block", chunk_size=CHUNK
        )(x)
    y = layers.LayerNormalization()(x)
    width = features // HEADS
    if kind == "vanilla":
        attend = layers.MultiHeadAttention(HEADS, width)
        x = x + attend(y, y, use_causal_mask=True)
    else:
        attend = keras_ring.layers.RingAttention(HEADS, width, causal=True)
        x = x + attend(y)
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
        x = block(x, "blockwise", FEATURES)
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


def layer_bytes(kind, size):
    """JAX: what one layer needs of a device in forward and backward.

    Returns:
        Bytes that the backward is handed by the forward, weights left out,
        as JAX traces it (three layers less two; a CPU's compiler may undo
        what is computed again to save memory). And the most that is
        temporary at once in the compiled program of a single layer, whose
        weights are arguments and whose gradients are results.
    """
    import jax
    import keras
    import numpy as np

    import keras_ring

    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    scope = strategy.scope() if kind != "vanilla" else contextlib.nullcontext()

    def layers(count):
        """Weights, and the function of weights and inputs."""
        inputs = keras.Input((None, LAYER_FEATURES))
        x = inputs
        for _ in range(count):
            x = block(x, kind, LAYER_FEATURES)
        model = keras.Model(inputs, x)
        weights = [variable.value for variable in model.trainable_variables]

        def apply(weights, x):
            return model.stateless_call(weights, [], x, training=True)[0]

        return weights, apply

    def handed(count):
        weights, apply = layers(count)
        kept = jax.eval_shape(
            lambda *both: jax.vjp(apply, *both)[1], weights, tensor
        )
        return sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(kept)
            if LAYER_LENGTH in leaf.shape
        )

    with scope:
        tensor = np.zeros((1, LAYER_LENGTH, LAYER_FEATURES), "float32")
        kept = (handed(3) - handed(2)) // size
        if kind != "vanilla":
            layout = keras.distribution.TensorLayout(
                ("batch", "seq", None), strategy.world.distribution.device_mesh
            )
            tensor = jax.device_put(tensor, layout.backend_layout)
        weights, apply = layers(1)

        def objective(weights, x):
            y = apply(weights, x)
            return keras.ops.sum(y * y)

        program = jax.jit(jax.grad(objective, (0, 1)))
        compiled = program.lower(weights, tensor).compile()
    return kept, compiled.memory_analysis().temp_size_in_bytes


def formula(text, size):
    """Bytes of a layer as the paper has them, with two for each number."""
    whole = LAYER_LENGTH * LAYER_FEATURES
    return {
        "2bns²": 2 * HEADS * LAYER_LENGTH**2,
        "8bsh": 8 * whole,
        "2bsh": 2 * whole,
        "6bch": 6 * whole // size,
    }[text]


def measure_here(what):
    """In a child: what the name says."""
    kind, *numbers = what.split(":")
    if kind == "step":
        size, length = (int(number) for number in numbers)
        reports.simulate_devices(size)
        return [step_bytes(size, length)]
    return [layer_bytes(kind, size) for _, kind, size, _ in VARIANTS]


def sequence_bytes(backend, size):
    """Bytes that the longer sequence takes on one device, in a training step,
    above the shorter."""
    full, short = (
        reports.measured(
            "benchmarks.memory",
            backend,
            size,
            f"--measure=step:{size}:{length}",
            variables=FREED if backend != "jax" else None,
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
    for (name, _, size, text), (kept, most) in zip(
        VARIANTS, layers, strict=True
    ):
        amount = formula(text, size)
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
        "kept, MiB",
        "most at once, MiB",
    ]
    sections = [
        "# Memory by ring size",
        reports.surroundings("python -m benchmarks.memory"),
        "## A training step",
        f"What {LENGTH - SHORT:,} more tokens take on one device: the step "
        f"with {LENGTH:,} less that with {SHORT:,}, so that what does not grow "
        "with the sequence is left out. A decoder of 2 layers of "
        f'RingTransformerBlock(remat="block") (width {FEATURES}, {HEADS} '
        f"heads, feed-forward {4 * FEATURES}, 256 classes), float32, batch 1, "
        "Adam. On JAX the compiler says what a device needs; on PyTorch it is "
        "the peak resident memory of the process of rank 0, on TensorFlow "
        "that of the one process that holds all devices, divided by their "
        "number (host copies of the batch count there too). The C library of "
        "both returns what is freed (MALLOC_MMAP_THRESHOLD_).",
        reports.table(header, body),
        "## One layer, beside the paper's formulas",
        f"Batch b = 1, length s = {LAYER_LENGTH:,}, width h = "
        f"{LAYER_FEATURES}, n = {HEADS} heads, feed-forward 4h in chunks of "
        f"{CHUNK} positions, chunk c = s / N, on JAX. The programs compute in "
        "float32 and the formulas have two bytes for each number, so the "
        "figures are halved. What is kept is what the forward of a layer "
        "hands to its backward, weights left out, and what a deep model "
        'multiplies by its depth: with `remat="block"` the input of the '
        "layer, 2bch. The most at once is all that the compiled forward and "
        "backward of a single layer hold beside weights and results, on a "
        "CPU, whose compiler may undo what is computed again to save memory.",
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
