"""Paired timing: those who are compared take turns, and ratios are paired.

A machine that is slower for a minute is slower for everybody in that round,
so what is reported of a comparison is the median of the rounds' ratios, and
beside it the medians of the times.

Contestants that can share a process are functions (`interleaved`). Others
are `Child`ren that stay alive, compiled and with their data in place, and
are idle unless it is their turn (`alternate`).
"""

import contextlib
import functools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks import reports

# What a child says to its parent begins with this; frameworks print too.
MARK = "@@ "


def interleaved(
    functions: Mapping[Any, Callable[[], Any]],
    rounds: int,
    limit: float = float("inf"),
) -> dict[Any, list[float]]:
    """Seconds of each function, by rounds in which each is called once.

    Args:
        functions: by name; each returns when its work is done.
        rounds: after one call of each that is not counted.
        limit: seconds after which no further round begins.
    """
    for function in functions.values():
        function()
    return _in_turn(
        {
            name: functools.partial(seconds, function)
            for name, function in functions.items()
        },
        rounds,
        limit,
    )


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _in_turn(
    measures: Mapping[Any, Callable[[], float]], rounds: int, limit: float
) -> dict[Any, list[float]]:
    start = time.perf_counter()
    times: dict[Any, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        if number and time.perf_counter() - start > limit:
            break
        # The order turns, so that nobody always follows the same one.
        names = list(measures)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name not in times:
                continue
            try:
                times[name].append(measures[name]())
            except RuntimeError as error:
                # A child that ran out of memory, say. The others go on.
                print(f"  {name}: left out. {error}", flush=True)
                del times[name]
    return times


def median(times: Sequence[float]) -> float:
    """The median, under a name that reads well beside `ratio`."""
    return statistics.median(times)


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """How many times faster the second is: median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


class Child:
    """Another process that gets ready once and then measures when asked."""

    def __init__(
        self,
        make: str,
        arguments: dict[str, Any],
        *,
        backend: str,
        devices: int = 1,
        threads: int = 1,
        python: str = sys.executable,
        simulated: bool = True,
    ):
        """Start it, and wait until it is ready.

        Args:
            make: `module:function` that returns what is timed, a function.
            arguments: of `make`.
            backend: what it runs on; PyTorch gets a process a device.
            devices: how many.
            threads: of each process, on PyTorch.
            python: of the environment to run in.
            simulated: False to leave the devices to the framework.

        Raises:
            RuntimeError: if it ends before it is ready.
        """
        specification = json.dumps(
            {
                "make": make,
                "arguments": arguments,
                "backend": backend,
                "devices": devices,
                "threads": threads,
                "simulated": simulated,
            }
        )
        ranks = devices if backend == "torch" else 1
        port = str(_free_port())
        self.processes = []
        for rank in range(ranks):
            child = reports.environment(
                backend, devices, threads=threads, simulated=simulated
            )
            if ranks > 1:
                child |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            self.processes.append(
                subprocess.Popen(
                    [python, "-m", "benchmarks.child", specification],
                    cwd=reports.ROOT,
                    env=child,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        self.make = make, arguments
        self._answer()

    def ask(self, what: str = "time") -> Any:
        """`"time"`: seconds of one call, the slowest process counts.
        `"memory"`: bytes that the first process has held at most.

        Raises:
            RuntimeError: if it has ended.
        """
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(what + "\n")
                process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        answers = [self._line(process) for process in self.processes]
        return json.loads(answers[0])

    def _line(self, process: subprocess.Popen) -> str:
        for line in process.stdout:
            if line.startswith(MARK):
                return line.removeprefix(MARK)
        self.close()
        raise RuntimeError(
            f"{self.make} ended with status {process.wait()}; see above."
        )

    def close(self) -> None:
        """End it."""
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def children(specifications: Mapping[Any, dict[str, Any]]) -> Iterator[dict]:
    """Children by name, ended at the end. One that fails to start is left
    out, with a line that says so."""
    started: dict[Any, Child] = {}
    try:
        for name, specification in specifications.items():
            try:
                started[name] = Child(**specification)
            except RuntimeError as error:
                print(f"  {name}: left out. {error}", flush=True)
        yield started
    finally:
        for child in started.values():
            child.close()


def alternate(
    those: Mapping[Any, Child], rounds: int, limit: float = float("inf")
) -> dict[Any, list[float]]:
    """Seconds of each child, by rounds in which each has its turn."""
    return _in_turn(
        {name: child.ask for name, child in those.items()}, rounds, limit
    )


def compared(
    specifications: Mapping[Any, dict[str, Any]],
    rounds: int,
    limit: float = float("inf"),
) -> dict[Any, list[float]]:
    """Start children, let them take turns, end them."""
    with children(specifications) as those:
        return alternate(those, rounds, limit)


def peak_bytes(specification: dict[str, Any]) -> int:
    """Bytes that a child of its own has held at most, after one call."""
    child = Child(**specification)
    try:
        return child.ask("memory")
    finally:
        child.close()


@functools.cache
def accelerators(backend: str) -> int:
    """Devices other than CPUs that a framework finds on this machine."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.child", "accelerators"],
        cwd=reports.ROOT,
        env=reports.environment(backend, 1, simulated=False),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    lines = [n for n in done.stdout.splitlines() if n.startswith(MARK)]
    return int(lines[-1].removeprefix(MARK)) if lines else 0


def sizes(
    backend: str,
    asked: Sequence[int] | None,
    default: Sequence[int],
    simulated: bool = True,
) -> tuple[tuple[int, ...], bool]:
    """Rings to measure, and whether their devices are simulated.

    Where there are several accelerators, and no sizes were asked for, rings of
    2, 4, 8, ... of them; one is no ring, and then a CPU is split, as without
    any.

    Args:
        backend: the framework.
        asked: sizes that the user asked for, if any.
        default: sizes on a CPU where none were asked for.
        simulated: what the user asked for: True for a CPU in any case.

    Raises:
        ValueError: for a ring of more accelerators than there are.
    """
    there = 0 if simulated else accelerators(backend)
    if there < 2:
        return tuple(asked or default), True
    if asked:
        if max(asked) > there:
            raise ValueError(
                "A ring cannot have more devices than there are. Received: "
                f"sizes={list(asked)} with {there} accelerators. Ask for "
                "fewer, or for a CPU with --cpu."
            )
        return tuple(asked), False
    return tuple(2**n for n in range(1, there.bit_length())), False


def on(backend: str, simulated: bool) -> str:
    """What a report says of the devices."""
    if simulated:
        return "simulated on the CPU"
    return f"{accelerators(backend)} accelerators"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
