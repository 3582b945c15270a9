"""Training steps compiled ahead of time for TPUs, with no TPU at hand.

    python -m benchmarks.tpu_aot
    python -m benchmarks.tpu_aot --topologies v5e:2x2 --models 7B

Compiles the forward and backward of one `RingTransformerBlock` of the shape
of a 3B and a 7B model for TPU topologies and writes
`docs/reports/<date>-tpu_aot.md`:

1. what a device needs, by chips and context length, and the context that the
   same memory would hold of the whole model, beside the paper's;
2. the schedule: what the compiler put between the start and the end of each
   transfer, i.e. which of them hide behind a visit, forward and backward.

It needs the compiler, `pip install --no-deps 'libtpu==0.0.42.*'`; `make
bench-peers` puts it into `.venv-peers`, where it is found. Without it this
says so and ends. Nothing is run: bytes and order are the compiler's, times
are not known.
"""

import argparse
import collections
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import reports, schedule

# Width, heads and layers; the feed-forward is four times as wide.
MODELS = {"3B": (3200, 32, 26), "7B": (4096, 32, 32)}
# Bytes of memory of one device that JAX sees (a chip, or a core of it).
MEMORY = {"v3": 16, "v4": 16, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}
TOPOLOGIES = ("v5e:2x2", "v5e:16x16", "v5p:4x4x4")
CHUNKS = (8192, 24576)
# The paper's table 3, in thousands of tokens, by chips and model.
PAPER = {
    ("v5e", 256, "3B"): 4096,
    ("v5e", 256, "7B"): 2048,
    ("v4", 1024, "3B"): 16384,
    ("v4", 1024, "7B"): 8192,
    ("v3", 512, "7B"): 2048,
}
GIBI, MEBI = 2**30, 2**20


def compiler(given: str | None) -> Path | None:
    """The TPU compiler's library, if there is one."""
    if given:
        return Path(given)
    found = importlib.util.find_spec("libtpu")
    if found and found.origin:
        return Path(found.origin).parent / "libtpu.so"
    pattern = ".venv-peers/lib/python*/site-packages/libtpu/libtpu.so"
    return next(iter(sorted(reports.ROOT.glob(pattern))), None)


def neighbours(devices):
    """Chips of a plane as a closed loop: each hop goes to a neighbour.

    Forth and back over the rows without the first column, and home along it.

    Raises:
        ValueError: for chips that are no plane with an even number of rows,
            or that are several devices.
    """
    at = {tuple(device.coords): device for device in devices}
    width, height, depth = (max(c[i] for c in at) + 1 for i in range(3))
    even = depth == 1 and height % 2 == 0 and width > 1
    if not even or len(at) != len(devices) or len(at) != width * height:
        raise ValueError(
            "A loop is known for a plane of chips with an even number of "
            "rows, each one device. Received: "
            f"{len(devices)} devices on {width} x {height} x {depth} chips. "
            "Use --orders listed."
        )
    path = [(0, 0, 0)]
    for y in range(height):
        row = range(1, width)
        path += [(x, y, 0) for x in (reversed(row) if y % 2 else row)]
    path += [(0, y, 0) for y in range(height - 1, 0, -1)]
    return [at[place] for place in path]


ORDERS = {"listed": list, "loop": neighbours}


def ring_over(devices):
    """A strategy whose ring goes over devices that are not here.

    A world over one device of this process, told of another mesh: what it
    traces is the program of that mesh. The mesh has the names that
    `keras_ring` gives its axes.

    Args:
        devices: in the order of the ring.
    """
    import jax
    import numpy as np

    import keras_ring
    from keras_ring.distribution.mesh import AXES, Mesh

    strategy = keras_ring.DistributedStrategy(sequence_parallel=1)
    world = strategy.world
    world.layout = Mesh((1, len(devices), 1))
    world.mesh = jax.sharding.Mesh(
        np.array(devices).reshape(world.layout.shape), AXES
    )
    return strategy


def compiled_block(strategy, model, length):
    """Forward and backward of one block over the mesh of a strategy.

    Weights are arguments and their gradients results, whole on every device;
    so the temporary bytes are those of activations (and of the gradients
    that are summed before they are results).
    """
    import jax
    import keras
    from jax.sharding import NamedSharding, PartitionSpec

    import keras_ring

    width, heads, _ = MODELS[model]
    mesh = strategy.world.mesh
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(None, "seq"))
    keras.config.set_dtype_policy("mixed_bfloat16")
    with strategy.scope():
        inputs = keras.Input((None, width))
        block = keras_ring.layers.RingTransformerBlock(
            heads,
            4 * width,
            causal=True,
            use_bias=False,
            remat="block",
            kernel_initializer="zeros",
        )
        network = keras.Model(inputs, block(inputs))

        def objective(weights, x):
            y = network.stateless_call(weights, [], x, training=True)[0]
            return keras.ops.sum(keras.ops.cast(y * y, "float32"))

        weights = [
            jax.ShapeDtypeStruct(v.shape, "bfloat16", sharding=whole)
            for v in network.trainable_variables
        ]
        x = jax.ShapeDtypeStruct((1, length, width), "bfloat16", sharding=split)
        program = jax.jit(
            jax.grad(objective, (0, 1)),
            out_shardings=([whole] * len(weights), split),
        )
        return program.lower(weights, x).compile()


def measure_here(topology, model, chunk, order):
    """In a child: compile one step; bytes of a device and the schedule."""
    from jax.experimental import topologies

    start = time.perf_counter()
    described = topologies.get_topology_desc(
        topology, platform="tpu", chips_per_host_bounds=(2, 2, 1)
    )
    devices = ORDERS[order](described.devices)
    length = chunk * len(devices)
    compiled = compiled_block(ring_over(devices), model, length)
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    full = re.findall(rf"\w+\[(?:\d+,)*{length}(?:,\d+)*\]", text)
    width = MODELS[model][0]
    if length in (width, 4 * width):
        full = ["not told: a weight has that size"]
    return [
        {
            "devices": len(devices),
            "kind": devices[0].device_kind,
            "length": length,
            "temporary": memory.temp_size_in_bytes,
            "arguments": memory.argument_size_in_bytes,
            "transfers": [row.__dict__ for row in schedule.transfers(text)],
            "full_length": sorted(set(full)),
            "seconds": time.perf_counter() - start,
        }
    ]


def whole_model(topology, model, rows):
    """The longest context of a whole model on a topology, derived.

    From the bytes of one block's step at two chunk lengths: what one more
    position costs. A model keeps the input of every layer (bfloat16), has
    the working memory of one block at a time, and, as the paper's, spreads
    weights, gradients and Adam's state (16 bytes for each weight) evenly.

    Returns:
        Tokens, and bytes a position of a block's step.
    """
    width, _, layers = MODELS[model]
    (near, far) = rows[0], rows[-1]
    devices = far["devices"]
    positions = (far["length"] - near["length"]) / devices
    slope = (far["temporary"] - near["temporary"]) / positions
    constant = far["temporary"] - slope * far["length"] / devices
    weights = 16 * 12 * width**2 * layers / devices
    room = MEMORY[topology.split(":")[0]] * GIBI - weights - constant
    return devices * room / (slope + 2 * width * layers), slope


def report(found, command):
    """Write the report; returns its file."""
    bytes_rows, model_rows, hop_rows, verdicts = [], [], [], []
    for (topology, model), rows in found.items():
        for row in rows:
            bytes_rows.append(
                [
                    f"{topology} ({row['kind']})",
                    str(row["devices"]),
                    model,
                    f"{row['length']:,}",
                    f"{row['length'] // row['devices']:,}",
                    f"{row['temporary'] / MEBI:,.0f}",
                    f"{row['arguments'] / MEBI:,.0f}",
                    ", ".join(row["full_length"]) or "none",
                ]
            )
        if len(rows) > 1:
            tokens, slope = whole_model(topology, model, rows)
            kind, count = topology.split(":")[0], rows[0]["devices"]
            paper = PAPER.get((kind, count, model))
            fits = f"{tokens / 1024:,.0f}K" if tokens > 0 else "none"
            model_rows.append(
                [
                    topology,
                    str(count),
                    model,
                    f"{slope / (2 * MODELS[model][0]):.1f}",
                    fits,
                    f"{paper:,}K" if paper else "",
                ]
            )
        last = rows[-1]
        # Keys and values, and their gradients, travel in pairs alike.
        lines = collections.Counter(
            (
                row["where"],
                f"{row['bytes'] / MEBI:.1f} ({row['dtype']})",
                str(row["products"]),
                row["hides_behind"],
            )
            for row in last["transfers"]
        )
        hop_rows += [
            [topology, model, line[0], str(count), *line[1:]]
            for line, count in lines.items()
        ]
        hidden = sum(row["products"] > 0 for row in last["transfers"])
        verdicts.append(
            f"- {topology}, {model}: {hidden} of {len(last['transfers'])} "
            "transfers have products between start and end."
        )
    sections = [
        "# Compiled for TPUs",
        reports.surroundings(
            command, "compiled for the named TPUs, nothing was run"
        ),
        "One `RingTransformerBlock` (causal, feed-forward 4x, "
        '`remat="block"`, bfloat16) of the width of the named model, batch 1, '
        "forward and backward, one ring over all devices. Weights are whole "
        "on every device here; they are the arguments. A TPU v3 or v4 chip "
        "is two devices. `listed` is the ring in the order in which JAX lists "
        "the devices, what a strategy takes by default; `loop` is a closed "
        "loop of neighbouring chips (`DistributedStrategy(devices=...)`).",
        "## Bytes a device",
        reports.table(
            [
                *("topology", "devices", "model", "context", "chunk"),
                *("temporary, MiB", "arguments, MiB", "full length"),
            ],
            bytes_rows,
        ),
        "The last column names arrays of the program that have an axis of "
        "the full length.",
    ]
    if model_rows:
        sections += [
            "What this leaves room for, derived and not compiled: a model "
            "that keeps the input of each layer, works on one block at a "
            "time, and spreads weights, gradients and Adam's state over all "
            "devices as the paper did (16 bytes a weight). The package does "
            "not spread weights yet. A position's bytes are in units of the "
            "block's input (2h); embedding and logits are left out.",
            reports.table(
                [
                    *("topology", "devices", "model"),
                    *("block, inputs", "context, derived", "paper"),
                ],
                model_rows,
            ),
        ]
    sections += [
        "## Schedule",
        "Every transfer between neighbours in the scheduled program (at the "
        "longest chunk), and how many matrix products (as instructions: "
        "within loops and branches each counts once) stand between its start "
        "and its end. `forward` is run again in the backward with "
        '`remat="block"`. The last transfer of gradients brings them home '
        "and has no visit to hide behind.",
        reports.table(
            [
                *("topology", "model", "where", "transfers", "MiB each"),
                *("products in between", "hides behind"),
            ],
            hop_rows,
        ),
    ]
    sections += [
        "\n".join(verdicts),
        "Whether a transfer takes longer than what stands in between, a "
        "compilation does not tell; and where a causal mask empties a visit, "
        "the branch that is taken has no products: that member waits for its "
        "neighbours' visits. A synchronous transfer hides behind nothing.",
    ]
    return reports.write("tpu_aot", "\n\n".join(sections))


def main():
    """Compile for every topology and write the report; or be a child."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument(
        "--chunks",
        default=",".join(map(str, CHUNKS)),
        help="positions of one device",
    )
    parser.add_argument(
        "--orders",
        default=",".join(ORDERS),
        help="of the ring: as JAX lists the devices, which is what a strategy "
        "takes by default, or a closed loop of neighbours (planes only)",
    )
    parser.add_argument("--libtpu", help="libtpu.so, if it is not found")
    parser.add_argument("--measure", help="for the children")
    options = parser.parse_args()
    if options.measure:
        topology, model, chunk, order = options.measure.split("/")
        reports.answer(measure_here(topology, model, int(chunk), order))
        return 0
    library = compiler(options.libtpu)
    if library is None or not library.exists():
        print(
            "Skipped: there is no TPU compiler here. `make bench-peers` "
            "installs it (package libtpu)."
        )
        return 0
    variables = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_LIBRARY_PATH": str(library),
        # Lines of the compiler that tell of no TPU.
        "TPU_MIN_LOG_LEVEL": "3",
    }
    os.environ.pop("TPU_WORKER_HOSTNAMES", None)
    found = {}
    for topology, model, order, chunk in itertools.product(
        options.topologies.split(","),
        options.models.split(","),
        options.orders.split(","),
        options.chunks.split(","),
    ):
        print(
            f"{topology}, {order}: {model}, chunks of {chunk} ...", flush=True
        )
        try:
            (row,) = reports.measured(
                "benchmarks.tpu_aot",
                "jax",
                1,
                f"--measure={topology}/{model}/{chunk}/{order}",
                variables=variables,
            )
        except subprocess.CalledProcessError as error:
            # Out of memory, or no loop is known: it says so above.
            print(f"  left out. {error}", flush=True)
            continue
        print(
            f"  {row['temporary'] / MEBI:,.0f} MiB temporary, "
            f"{row['seconds']:.0f} s",
            flush=True,
        )
        found.setdefault((f"{topology}, {order}", model), []).append(row)
    if not found:
        print("Nothing was compiled.")
        return 1
    command = " ".join(["python -m benchmarks.tpu_aot", *sys.argv[1:]])
    print(report(found, command).relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
