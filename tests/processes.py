"""A pool of real processes, the devices of the tests on PyTorch.

Each process gets the environment that torchrun would set, lives as long as
the test session, and runs one function after the other. A function is sent
by its module and name, its arguments and the result are pickled. Whatever
goes wrong in one process ends the whole pool of that size: what the others
still wait for will never come.

All are forks of one process that has imported what they need and no more:
importing takes ten seconds of a core, and there are some twenty of them.
"""

import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import unittest.mock
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
# What is imported before any is forked: the package, and what `fit` imports.
IMPORTED = (
    "keras_ring.training.wrappers",
    "keras_ring.backends.torch",
    "tensorflow",
)
# Seconds that a call may take, and that the others get to finish theirs
# after one has failed.
LIMIT = 300.0
GRACE = 1.0


class Pool:
    """`size` processes with the environment of torchrun's."""

    def __init__(self, size):
        self.size = size
        self.connections = []
        self.processes = []
        port = free_port()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        for rank in range(size):
            ours, theirs = multiprocessing.Pipe()
            environment = launch_environment(rank, size, port)
            process = context.Process(
                target=serve, args=(theirs, environment), daemon=True
            )
            # The first is what starts the process that all are forks of.
            with theirs, unittest.mock.patch.dict(os.environ, environment):
                process.start()
            self.processes.append(process)
            self.connections.append(ours)

    def call(self, function, arguments, limit=LIMIT):
        """Run `function(*arguments)` in every process; rank 0's result.

        Raises:
            The error of the rank that failed first, with its traceback;
            AssertionError if a process died or did not finish in time.
        """
        try:
            self.send(function, arguments)
            answers = self._collect(time.monotonic() + limit)
        except BaseException:
            self.close()
            raise
        return answers[0]

    def send(self, function, arguments):
        """Let every process start with `function(*arguments)`."""
        task = (
            function.__module__,
            function.__qualname__,
            pickle.dumps(arguments),
        )
        for connection in self.connections:
            connection.send(task)

    def receive(self, rank, limit=LIMIT):
        """Whether the function succeeded on one rank, and its result or
        error. For tests in which the others never answer."""
        if not self.connections[rank].poll(limit):
            raise AssertionError(f"rank {rank} did not finish in time")
        return pickle.loads(self.connections[rank].recv_bytes())

    def _collect(self, deadline):
        waiting = dict(zip(self.connections, range(self.size), strict=True))
        answers, failure, last = {}, None, "no process has finished"
        while waiting:
            left = deadline - time.monotonic()
            ready = multiprocessing.connection.wait(
                list(waiting), max(left, 0.0)
            )
            if not ready:
                if failure is not None:
                    raise failure
                raise AssertionError(
                    f"ranks {sorted(waiting.values())} of {self.size} did "
                    f"not finish in time ({last})"
                )
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    succeeded, answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    self.processes[rank].join()
                    code = self.processes[rank].exitcode
                    succeeded = False
                    answer = AssertionError(
                        f"rank {rank} of {self.size} died with exit code {code}"
                    )
                if succeeded:
                    answers[rank] = answer
                    last = f"rank {rank} has"
                elif failure is None:
                    failure = answer
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failure is not None:
            raise failure
        return answers

    def close(self):
        """End the processes."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    @property
    def alive(self):
        return all(process.is_alive() for process in self.processes)


def free_port():
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_environment(rank, size, port):
    """The environment of one process, as torchrun sets it."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "KERAS_BACKEND": "torch",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), os.environ.get("PYTHONPATH", "")]
        ),
    }


def serve(connection, environment):
    """Run what the pool sends, until the pool has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    # Forks begin with one state of NumPy's, which no process started alone
    # shares with another; Python seeds its own anew.
    np.random.seed()
    while True:
        try:
            module, name, arguments = connection.recv()
        except (EOFError, ConnectionError):
            # Without waiting for peers that may be gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        try:
            function = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer = pickle.dumps((True, function(*pickle.loads(arguments))))
        # Whatever a test raises, pytest's own outcomes included, belongs to
        # the process that asked.
        except BaseException as error:  # noqa: BLE001
            answer = pickle.dumps((False, described(error)))
        connection.send_bytes(answer)


def described(error):
    """The error with the traceback of this process in its message."""
    text = (
        f"{error}\n\nin rank {os.environ['RANK']} of "
        f"{os.environ['WORLD_SIZE']}:\n{traceback.format_exc()}"
    )
    try:
        copy = type(error)(text)
        pickle.loads(pickle.dumps(copy))
    # An exception class may refuse to be made or pickled in any way.
    except Exception:  # noqa: BLE001
        copy = AssertionError(f"{type(error).__name__}: {text}")
    return copy
