"""Run the tests on each backend: `python -m tests [jax tensorflow torch]`.

Keras runs on one backend per process. The files of each backend are dealt out
to several processes, and three of all processes run at a time, whatever their
backends: so no core waits for the last tests of one. What a process prints is
shown when it has ended. A failure on one backend does not keep the others
from running; a backend that ran no test, or skipped every one, has failed.
What no backend has a part in runs on the first of them.

`--keras FOLDER` runs the tests on the Keras in that folder, and `--also FOLDER`
the quick ones, after all tests have run on the one that is installed.
"""

import argparse
import concurrent.futures
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

# Processes at a time, for two cores: one more than these, since many tests
# wait for processes of their own.
AT_ONCE = 3
# Processes of a backend, in the order in which they begin.
# TensorFlow keeps every program with a gradient of its own for as long as the
# process lives, and so needs most.
PARTS = {"torch": 2, "jax": 3, "tensorflow": 6}
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


class Job(NamedTuple):
    """What one process runs.

    Attributes:
        backend: of `BACKENDS`.
        arguments: for pytest.
        folder: with the Keras to test with; None for the installed one.
        part: which of all parts of the files, such as "1/4".
    """

    backend: str
    arguments: list[str]
    folder: Path | None = None
    part: str = "1/1"

    @property
    def title(self) -> str:
        keras = f", the Keras in {self.folder.name}" if self.folder else ""
        return f"{self.backend}, part {self.part}{keras}"


def all_jobs(
    backend: str, arguments: list[str], folder: Path | None = None
) -> list[Job]:
    """All tests of a backend."""
    parts = PARTS[backend]
    return [
        Job(backend, ["tests", *arguments], folder, f"{number}/{parts}")
        for number in range(1, parts + 1)
    ]


def apart(jobs: list[Job]) -> list[Job]:
    """The same jobs, PyTorch's at the start and in the middle: one alone
    keeps two cores busy."""
    torch = [job for job in jobs if job.backend == "torch"]
    others = [job for job in jobs if job.backend != "torch"]
    middle = len(others) // 2
    return torch[:1] + others[:middle] + torch[1:] + others[middle:]


def run_all(jobs: list[Job]) -> list[Outcome]:
    """Run jobs, some at a time, and print what each printed when it ends."""
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(run, job) for job in jobs]
        places = {future: place for place, future in enumerate(running)}
        ended = concurrent.futures.as_completed(running)
        for number, done in enumerate(ended, start=1):
            title = jobs[places[done]].title
            print(f"\n==== {title} ====\n{done.result()[1]}")
            print(
                f"It ended with exit code {done.result()[0].exit_code}; "
                f"{number} of {len(jobs)} processes have ended.",
                flush=True,
            )
    return [future.result()[0] for future in running]


def together(backend: str, outcomes: list[Outcome]) -> Outcome:
    """What several processes of one backend came to."""
    return Outcome(
        backend,
        *(sum(o[place] for o in outcomes) for place in range(1, 5)),
        max((o.exit_code for o in outcomes), key=lambda code: code % 5),
    )


def run(job: Job) -> tuple[Outcome, str]:
    """Run pytest in a process, and count; returns what it printed as well."""
    start = time.monotonic()
    print(f"{job.title} begins.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", f"--part={job.part}"),
                *("--durations=5", f"--junit-xml={report}"),
                *job.arguments,
            ],
            env=environment(job.backend, job.folder),
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        counts = count(report)
    seconds = time.monotonic() - start
    outcome = Outcome(job.backend, *counts, seconds, done.returncode)
    return outcome, done.stdout


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
    jobs = []
    for backend in sorted(backends, key=list(PARTS).index):
        once = ["--without-once"] * (backend != backends[0])
        if options.quick:
            jobs.append(Job(backend, [*QUICK, *arguments], folder))
        else:
            jobs += all_jobs(backend, arguments + once, folder)
    jobs = apart(jobs)
    quick = [Job(backend, QUICK, also) for backend in backends if also]
    start = time.monotonic()
    found = run_all(jobs + quick)
    seconds = time.monotonic() - start
    outcomes = [
        together(name, [o for o in found[: len(jobs)] if o.backend == name])
        for name in backends
    ]
    others = found[len(jobs) :]
    if others:
        summarise(f"{names[also]}, quick tests", others)
    suffix = f" on {names[folder]}" if folder else ""
    summarise(f"all backends{suffix}", outcomes)
    print(f"All processes together took {seconds:.0f} s.")
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
        print(f"{outcome.backend}, {outcome.seconds:.0f} s: {verdict}.")


if __name__ == "__main__":
    sys.exit(main())
