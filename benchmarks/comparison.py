"""What the reports that compare contestants share: a table and a plot."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import reports, timing

MAKE = "benchmarks.contestants:attention"


def child(name: str, backend: str, length: int, **options: Any) -> dict:
    """What `timing.Child` needs to run a contestant.

    Args:
        name: of the contestant.
        backend: what it runs on.
        length: of the sequence.
        options: of the child (`threads`, `python`, `simulated`), and of
            `contestants.attention`, `size` among them.
    """
    own = {
        key: options.pop(key)
        for key in ("threads", "python", "simulated")
        if key in options
    }
    return {
        "make": MAKE,
        "arguments": {"name": name, "length": length, **options},
        "backend": backend,
        "devices": options.get("size", 1),
        **own,
    }


def rows(
    what: Sequence[str],
    times: Mapping[str, Sequence[float]],
    ours: Sequence[str],
) -> list[list[str]]:
    """Rows of a table: everybody, and by how much each of ours is faster.

    Args:
        what: the first cells of each row.
        times: seconds by name.
        ours: names among them; each becomes a column of ratios.
    """
    found = []
    for name, own in times.items():
        spread = f"{min(own):.4f} to {max(own):.4f}"
        ratios = [
            f"{timing.ratio(own, times[our]):.2f}" if our in times else ""
            for our in ours
        ]
        median = f"{timing.median(own):.4f}"
        found.append([*what, name, median, spread, *ratios])
    return found


def table(
    first: Sequence[str], ours: Sequence[str], body: Sequence[Sequence[str]]
) -> str:
    """The table of those rows."""
    header = [*first, "who", "seconds", "from, to"]
    return reports.table([*header, *(f"by {name}" for name in ours)], body)


READING = (
    "Seconds are medians. A column `by X` is the time of the row divided by "
    "X's in the same round, the median of the rounds: above 1, X is faster."
)


def plot(
    name: str,
    title: str,
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
) -> str:
    """Lines over sizes on logarithmic axes; the name of the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    places = sorted({x for line in points.values() for x, _ in line})
    for label, line in points.items():
        ours = label.startswith(("ring_attention", "RingAttention"))
        axes.plot(
            *zip(*line, strict=True),
            marker="o",
            ms=4,
            lw=2 if ours else 1,
            ls="-" if ours else "--",
            label=label,
        )
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_xticks(places)
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.title.set_size(9)
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    path = reports.image(name)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path.name
