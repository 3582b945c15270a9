"""How evenly a causal mask's work is shared, contiguous against balanced.

    python -m benchmarks.balance [--backends torch] [--size 8]

Counted: tiles that each member computes, hop by hop, as the mask's relation
says. Measured: the time of each member's visits, one member after the other
on one device. The critical path is what the ring waits for: the busiest
member altogether, and, were every hop to wait for all, the sum over hops of
the busiest at each. Writes `docs/reports/<date>-balance.md`.
"""

import sys

from benchmarks import options, reports, timing

LENGTH = 8192


def counted(kind, size, length):
    """Tiles of each member at each hop."""
    from benchmarks import virtual
    from keras_ring import masks

    mask = masks.Causal()
    return [
        [
            virtual.tiles(kind, index, source, size, length, mask)
            for source in virtual.visits(kind, index, size, length, mask)
        ]
        for index in range(size)
    ]


def measure_here(kind, size, length, rounds, limit):
    """In a child: tiles by member and hop, seconds by member."""
    from benchmarks.virtual import VirtualRing

    ring = VirtualRing(length, size, kind)
    ring.run()

    def member(index):
        def visits():
            ring.member_forward(index)
            ring.wait()
            ring.member_backward(index)
            ring.wait()

        return visits

    times = timing.interleaved(
        {index: member(index) for index in range(size)}, rounds, limit
    )
    return [counted(kind, size, length), list(times.values())]


def plot(found, size):
    """Share of the work by member; returns the name of the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1,
        len(found),
        figsize=(3.2 * len(found), 3.2),
        layout="constrained",
        squeeze=False,
        sharey=True,
    )
    for axes, (backend, kinds) in zip(panels[0], found.items(), strict=True):
        for kind, (_, times) in kinds.items():
            own = [timing.median(member) for member in times]
            axes.plot(
                range(size),
                [n * size / sum(own) for n in own],
                marker="o",
                label=kind,
            )
        axes.axhline(1.0, color="k", lw=0.5)
        axes.set(title=backend, xlabel="member", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("time, of the mean member's")
    panels[0][0].legend(frameon=False, fontsize=8)
    path = reports.image("balance")
    figure.savefig(path, dpi=90)
    return path.name


def main():
    """Measure on each backend and write the report; or be its child."""
    parser = options.parser(__doc__, lengths=(LENGTH,))
    parser.add_argument("--size", type=int, default=8, help="of the ring")
    given = parser.parse_args()
    (length, *_) = given.lengths
    size = given.size
    if given.measure:
        reports.answer(
            measure_here(given.measure, size, length, given.rounds, given.limit)
        )
        return 0
    found, where = {}, []
    for backend in options.backends(given):
        simulated = given.cpu or timing.accelerators(backend) == 0
        where.append(f"{backend}: {'CPU' if simulated else 'accelerator'}")
        for kind in ("contiguous", "balanced"):
            print(f"{backend}: {kind} ...", flush=True)
            found.setdefault(backend, {})[kind] = reports.measured(
                "benchmarks.balance",
                backend,
                1,
                f"--measure={kind}",
                f"--size={size}",
                f"--lengths={length}",
                f"--rounds={given.rounds}",
                f"--limit={given.limit}",
                threads=timing.cores(),
                simulated=simulated,
            )
    first = next(iter(found.values()))
    tile_rows, time_rows = [], []
    for kind, (members, _) in first.items():
        total = sum(map(sum, members))
        sums = [sum(member) for member in members]
        by_hop = sum(max(hop) for hop in zip(*members, strict=True))
        tile_rows.append(
            [
                kind,
                str(total),
                " ".join(map(str, sums)),
                f"{max(sums) * size / total:.3f}",
                f"{by_hop * size / total:.3f}",
            ]
        )
    for backend, kinds in found.items():
        least = min(
            sum(timing.median(t) for t in times) for _, times in kinds.values()
        )
        for kind, (_, times) in kinds.items():
            own = [timing.median(member) for member in times]
            time_rows.append(
                [
                    backend,
                    kind,
                    f"{sum(own):.4f}",
                    " ".join(f"{1000 * t:.0f}" for t in own),
                    f"{max(own) * size / sum(own):.3f}",
                    f"{max(own) * size / least:.3f}",
                ]
            )
    path = reports.write(
        "balance",
        "\n\n".join(
            [
                "# Causal balance",
                reports.surroundings(
                    options.command("balance"), "; ".join(where)
                ),
                f"Causal attention over {length:,} positions on a ring of "
                f"{size}, batch 1, 8 heads, head_dim 64, forward and "
                "backward. `contiguous`: a member holds one chunk. "
                "`balanced`: it holds half a chunk of each end. A critical "
                "path of 1 is 1/N of all work.",
                "## Tiles that are computed",
                reports.table(
                    [
                        *("placement", "tiles", "by member"),
                        *("busiest member", "busiest of each hop"),
                    ],
                    tile_rows,
                ),
                "## Time of the members' visits, one after the other",
                f"![Time by member]({plot(found, size)})",
                reports.table(
                    [
                        *("backend", "placement", "seconds, all"),
                        *("ms by member", "busiest member"),
                        "busiest, of the faster placement's mean",
                    ],
                    time_rows,
                ),
            ]
        ),
    )
    print(path.relative_to(reports.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
