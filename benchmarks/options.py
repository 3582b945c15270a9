"""The options that the benchmarks have in common."""

import argparse
import sys
from typing import Any

BACKENDS = ("jax", "tensorflow", "torch")


def numbers(text: str) -> list[int]:
    """`"512,1024"` as numbers."""
    return [int(number) for number in text.split(",")]


def parser(
    text: str | None,
    *,
    lengths: tuple[int, ...] = (),
    rounds: int = 5,
    backends: tuple[str, ...] = BACKENDS,
) -> argparse.ArgumentParser:
    """A parser with the common options, defaults as given."""
    made = argparse.ArgumentParser(
        description=(text or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument(
        "--backends",
        type=lambda text: text.split(","),
        default=list(backends),
        help="of " + ", ".join(backends),
    )
    if lengths:
        made.add_argument(
            "--lengths",
            type=numbers,
            default=list(lengths),
            help="of the sequence",
        )
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument(
        "--limit",
        type=float,
        default=120.0,
        help="seconds after which a comparison begins no further round",
    )
    made.add_argument(
        "--cpu",
        action="store_true",
        help="simulate devices on the CPU even where there are accelerators",
    )
    made.add_argument("--measure", help=argparse.SUPPRESS)
    return made


def backends(options: Any, possible: tuple[str, ...] = BACKENDS) -> list[str]:
    """The backends that were asked for, of the possible ones."""
    return [name for name in options.backends if name in possible]


def command(module: str) -> str:
    """The command that was given."""
    return " ".join([f"python -m benchmarks.{module}", *sys.argv[1:]])
