"""Run the tests on each backend: `python -m tests [jax tensorflow torch]`.

Keras runs on one backend per process, so each gets a process of its own. A
failure on one does not keep the others from running; a backend that ran no
test, or skipped every one, has failed. What no backend has a part in runs on
the first of them.

`--keras FOLDER` runs the tests on the Keras in that folder, and `--also FOLDER`
the quick ones, after all tests have run on the one that is installed.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from tests.thinning import BACKENDS

WORKERS = 2
# On PyTorch the tests that start processes share one worker.
DISTRIBUTION = {"jax": "worksteal", "tensorflow": "worksteal"}
# TensorFlow keeps every program with a gradient of its own for as long as the
# process lives: its tests are run by several processes, one after the other.
PARTS = {"tensorflow": 3}
# Private names of Keras are looked up when a scope is entered, and used by
# fit, evaluate and predict.
QUICK = ["tests/test_training.py::test_a_small_model_from_fit_to_predict"]


class Outcome(NamedTuple):
    """What one backend's tests came to."""

    backend: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    exit_code: int

    @property
    def complaint(self) -> str:
        """Why this backend has failed, or nothing."""
        if self.failed or self.exit_code not in (0, 5):
            return f"pytest ended with exit code {self.exit_code}"
        if not self.passed:
            return "no test was run, or every one was skipped"
        return ""


def environment(backend: str, folder: Path | None) -> dict[str, str]:
    """The environment of tests on a backend, and on the Keras in a folder."""
    own = os.environ | {"KERAS_BACKEND": backend}
    if folder is not None:
        paths = (str(folder), own.get("PYTHONPATH"))
        own["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return own


def release(folder: Path) -> str:
    """The name and version of the Keras in a folder.

    Raises:
        ValueError: if there is none, or it is not what Python would import.
    """
    found = [
        f"{own.name} {own.version}"
        for own in importlib.metadata.distributions(path=[str(folder)])
        if own.name.startswith("keras")
    ]
    code = "import importlib.util as u; print(u.find_spec('keras').origin)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment("jax", folder),
        capture_output=True,
        text=True,
        check=True,
    )
    if not found or not Path(done.stdout.strip()).is_relative_to(folder):
        raise ValueError(f"no Keras to test with is in {folder}")
    return found[0]


def run(
    backend: str, arguments: list[str], folder: Path | None = None
) -> Outcome:
    """Run pytest on one backend and count."""
    parts = PARTS.get(backend, 1)
    files = [files_of(backend)[part::parts] for part in range(parts)]
    outcomes = [
        # A file that is named is collected in any case, GPU or not.
        run_part(backend, arguments, own if parts > 1 else ["tests"], folder)
        for own in files
    ]
    return Outcome(
        backend,
        *(sum(o[place] for o in outcomes) for place in range(1, 5)),
        max((o.exit_code for o in outcomes), key=lambda code: code % 5),
    )


def files_of(backend: str) -> list[str]:
    """The files with tests that a backend runs."""
    others = tuple(f"test_{b}_" for b in BACKENDS if b != backend)
    return [
        f"tests/{path.name}"
        for path in sorted(Path(__file__).parent.glob("test_*.py"))
        if not path.name.startswith(others)
    ]


def run_quick(backend: str, folder: Path | None) -> Outcome:
    """Run the quick tests of a backend, in one process: to import frameworks
    is most of their time."""
    return run_part(backend, ["--numprocesses=0"], QUICK, folder)


def run_part(
    backend: str,
    arguments: list[str],
    files: list[str],
    folder: Path | None = None,
) -> Outcome:
    """Run pytest on some files."""
    suffix = f", the Keras in {folder.name}" if folder else ""
    print(f"\n==== {backend}{suffix} ====", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", *files, "--durations=5"),
                f"--numprocesses={WORKERS}",
                f"--dist={DISTRIBUTION.get(backend, 'loadgroup')}",
                f"--junit-xml={report}",
                *arguments,
            ],
            env=environment(backend, folder),
            cwd=Path(__file__).parent.parent,
            check=False,
        )
        counts = count(report)
    return Outcome(backend, *counts, time.monotonic() - start, done.returncode)


def count(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of a JUnit report."""
    if not report.exists():
        return 0, 0, 0
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    failed = totals["failures"] + totals["errors"]
    skipped = totals["skipped"]
    return totals["tests"] - failed - skipped, failed, skipped


def main() -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests")
    parser.add_argument("backends", nargs="*", help="; ".join(BACKENDS))
    parser.add_argument(
        "--all", action="store_true", help="every combination of parameters"
    )
    parser.add_argument(
        "--pytest", default="", help="further arguments for pytest"
    )
    parser.add_argument(
        "--quick", action="store_true", help="only some tests of the trainer"
    )
    for name, text in (
        ("--keras", "a folder with the Keras to test with"),
        ("--also", "one with another, for the quick tests afterwards"),
    ):
        parser.add_argument(name, type=Path, metavar="FOLDER", help=text)
    options = parser.parse_args()
    unknown = set(options.backends) - set(BACKENDS)
    if unknown:
        parser.error(f"unknown backends: {', '.join(sorted(unknown))}")
    backends = options.backends or BACKENDS
    arguments = options.pytest.split() + ["--all"] * options.all
    folder, also = (x and x.resolve() for x in (options.keras, options.also))
    names = {x: release(x) for x in (folder, also) if x is not None}
    outcomes = [
        run_quick(backend, folder)
        if options.quick
        else run(backend, arguments + ["--without-once"] * (number > 0), folder)
        for number, backend in enumerate(backends)
    ]
    others = [run_quick(backend, also) for backend in backends if also]
    if others:
        summarise(f"{names[also]}, quick tests", others)
    suffix = f" on {names[folder]}" if folder else ""
    summarise(f"all backends{suffix}", outcomes)
    return int(any(outcome.complaint for outcome in outcomes + others))


def summarise(title: str, outcomes: list[Outcome]) -> None:
    """Print what some backends' tests came to."""
    print(f"\n==== {title} ====")
    for outcome in outcomes:
        print(
            f"{outcome.backend}: {outcome.passed} passed, "
            f"{outcome.failed} failed, {outcome.skipped} skipped"
        )
    for outcome in outcomes:
        verdict = outcome.complaint or "passed"
        print(f"{outcome.backend} took {outcome.seconds:.0f} s: {verdict}.")


if __name__ == "__main__":
    sys.exit(main())
