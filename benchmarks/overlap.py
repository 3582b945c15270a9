"""What a ring's transfers hide behind, read from PyTorch's profiler.

    python -m benchmarks.overlap [--size 2] [--lengths 8192]

Causal ring attention, forward and backward, in `--size` processes with one
thread each, on contiguous and on balanced chunks. Attention is computed by the
kernel "flash", and chunks travel by the process group, not through shared
memory: of both, and not of what is used by default on a CPU, the profiler
knows when they begin and end. The profiler of the first
process records from when to when each transfer was under way, and what the
process computed meanwhile: a transfer is *hidden* for as long as attention
was being computed, and *exposed* for the rest. A transfer that nothing is
computed beside (half chunks on their way to balanced places and back, the
last gradients on their way home) is exposed by its nature; the waiting for a
slower process counts too. Writes `docs/reports/<date>-overlap.md`.
"""

import os
import sys

from benchmarks import options, reports, timing

LENGTH = 8192
# Kinds of work.
FORWARD, BACKWARD = "forward", "backward"


def measure_here(length, size, balance):
    """In each process: computations and transfers of one step, as
    `[name, bytes, start, end]` in microseconds from its beginning."""
    import torch

    import keras_ring
    from benchmarks import contestants
    from keras_ring.backends.torch.processes import shared_memory

    # What the profiler sees, see above.
    keras_ring.config.set_kernel("flash")
    shared_memory.connect = lambda group: None
    torch.set_num_threads(1)
    strategy = keras_ring.DistributedStrategy(
        sequence_parallel=size, balance=balance
    )
    tensors = [
        torch.from_numpy(t).chunk(size, 1)[strategy.world.rank].contiguous()
        for t in contestants.draw(
            (1, length, contestants.HEADS, contestants.HEAD_DIM)
        )
    ]
    query, key, value = (t.requires_grad_() for t in tensors[:3])

    def step():
        with strategy.scope(), strategy.world.stepping():
            out = keras_ring.ops.ring_attention(
                query, key, value, mask=keras_ring.masks.Causal()
            )
            out.backward(tensors[3])

    for _ in range(2):
        step()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], record_shapes=True) as found:
        torch.distributed.barrier()
        step()
    return spans(found.events())


def spans(events):
    """Fused attention and transfers among the profiler's events.

    Raises:
        ValueError: for events without attention or without a transfer, of
            which nothing could be said.
    """
    found = []
    for event in events:
        place = event.time_range.start, event.time_range.end
        if "flash_attention_for_cpu" in event.name:
            backward = event.name.endswith("backward")
            found.append([BACKWARD if backward else FORWARD, 0, *place])
        elif event.name in ("gloo:send", "gloo:recv"):
            size = sum(_count(shape) for shape in event.input_shapes)
            found.append([event.name.partition(":")[2], size, *place])
    kinds = {name for name, *_ in found}
    if kinds.isdisjoint({FORWARD, BACKWARD}) or "recv" not in kinds:
        raise ValueError(
            "The profiler must see attention and transfers. Received: events "
            f"of the kinds {sorted(kinds)}. Measure with a kernel and a "
            "transport that it knows."
        )
    first = min(span[2] for span in found)
    return [
        [name, size, start - first, end - first]
        for name, size, start, end in sorted(found, key=lambda s: s[2])
    ]


def _count(shape):
    """Elements of a shape, which are bytes: messages are packed."""
    count = 1
    for size in shape:
        count *= size
    return count if shape else 0


def covered(start, end, others):
    """How much of a span lies in one of several that do not overlap."""
    return sum(max(0.0, min(end, b) - max(start, a)) for a, b in others)


def transfers(found):
    """`(bytes, start, end, hidden)` of each message that arrived."""
    work = [(a, b) for name, _, a, b in found if name in (FORWARD, BACKWARD)]
    return [
        (size, start, end, covered(start, end, work))
        for name, size, start, end in found
        if name == "recv"
    ]


def plot(by_kind):
    """Computations and transfers over time; returns the file's name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(by_kind),
        1,
        figsize=(8, 1.9 * len(by_kind)),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    rows = {FORWARD: 1, BACKWARD: 1, "recv": 0}
    colors = {FORWARD: "C0", BACKWARD: "C1", "recv": "C2"}
    for (axes,), (kind, found) in zip(panels, by_kind.items(), strict=True):
        for name, _, start, end in found:
            if name in rows:
                axes.barh(
                    rows[name],
                    max(end - start, 1) / 1000,
                    left=start / 1000,
                    height=0.6,
                    color=colors[name],
                    edgecolor="w",
                    lw=0.5,
                )
        axes.set(title=kind, yticks=[0, 1], yticklabels=["transfer", "compute"])
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1][0].set_xlabel("ms")
    path = reports.image("overlap")
    figure.savefig(path, dpi=90)
    return path.name


def main():
    """Measure and write the report; or be a process of it."""
    parser = options.parser(__doc__, lengths=(LENGTH,), backends=("torch",))
    parser.add_argument("--size", type=int, default=2, help="of the ring")
    given = parser.parse_args()
    (length, *_) = given.lengths
    if given.measure:
        found = measure_here(length, given.size, given.measure == "balanced")
        reports.answer(found)
        if "RANK" in os.environ:
            import torch

            torch.distributed.destroy_process_group()
        return 0
    by_kind = {}
    for kind in ("contiguous", "balanced"):
        print(f"torch: {kind} ...", flush=True)
        by_kind[kind] = reports.measured(
            "benchmarks.overlap",
            "torch",
            given.size,
            f"--measure={kind}",
            f"--size={given.size}",
            f"--lengths={length}",
        )
    rows = []
    for kind, found in by_kind.items():
        for number, (size, start, end, hidden) in enumerate(transfers(found)):
            rows.append(
                [
                    kind,
                    str(number + 1),
                    f"{size / 2**20:.2f}",
                    f"{start / 1000:.1f}",
                    f"{(end - start) / 1000:.1f}",
                    f"{100 * hidden / max(end - start, 1e-9):.0f}%",
                    f"{(end - start - hidden) / 1000:.1f}",
                ]
            )
    path = reports.write(
        "overlap",
        "\n\n".join(
            [
                "# Transfers and what they hide behind",
                reports.surroundings(
                    options.command("overlap"),
                    f"{given.size} processes on its {timing.cores()} cores, "
                    "gloo",
                ),
                f"Causal attention over {length:,} positions, batch 1, 8 "
                "heads, head_dim 64, float32, forward and backward, as the "
                "first process's profiler saw one step, by the kernel "
                '"flash" and without shared memory. A message ends when '
                "it was waited for. Hidden: while attention was computed.",
                f"![What happens when]({plot(by_kind)})",
                reports.table(
                    [
                        *("placement", "message", "MiB", "issued at, ms"),
                        *("under way, ms", "hidden", "exposed, ms"),
                    ],
                    rows,
                ),
            ]
        ),
    )
    print(path.relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
