"""Run the tests on each backend: `python -m tests [jax tensorflow torch]`.

Keras runs on one backend per process, so each gets a process of its own. A
failure on one does not keep the others from running; a backend that ran no
test, or skipped every one, has failed. What no backend has a part in runs on
the first of them.
"""

import argparse
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


def run(backend: str, arguments: list[str]) -> Outcome:
    """Run pytest on one backend and count."""
    parts = PARTS.get(backend, 1)
    files = [files_of(backend)[part::parts] for part in range(parts)]
    outcomes = [
        # A file that is named is collected in any case, GPU or not.
        run_part(backend, arguments, own if parts > 1 else ["tests"])
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


def run_part(backend: str, arguments: list[str], files: list[str]) -> Outcome:
    """Run pytest on some files."""
    print(f"\n==== {backend} ====", flush=True)
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
            env=os.environ | {"KERAS_BACKEND": backend},
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
    options = parser.parse_args()
    unknown = set(options.backends) - set(BACKENDS)
    if unknown:
        parser.error(f"unknown backends: {', '.join(sorted(unknown))}")
    backends = options.backends or BACKENDS
    arguments = options.pytest.split() + ["--all"] * options.all
    outcomes = [
        run(backend, arguments + ["--without-once"] * (number > 0))
        for number, backend in enumerate(backends)
    ]
    print("\n==== all backends ====")
    for outcome in outcomes:
        print(
            f"{outcome.backend}: {outcome.passed} passed, "
            f"{outcome.failed} failed, {outcome.skipped} skipped"
        )
    for outcome in outcomes:
        verdict = outcome.complaint or "passed"
        print(f"{outcome.backend} took {outcome.seconds:.0f} s: {verdict}.")
    return int(any(outcome.complaint for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
