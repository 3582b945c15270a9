"""Processes end by themselves, whatever their threads still hold."""

import os
import subprocess
import sys

import pytest

from tests import processes

pytestmark = pytest.mark.xdist_group("processes")
SECONDS = 120


def train_and_leave():
    """The threads of the process groups get no time to let go of what they
    have sent before the process ends."""
    import keras_ring
    from tests.language_model import batch, language_model

    with keras_ring.DistributedStrategy(timeout=60.0).scope():
        model = language_model("ring", optimizer="sgd")
        model.train_on_batch(*batch(4, 8)[:2])
        one = {min(os.sched_getaffinity(0))}
        for thread in map(int, os.listdir("/proc/self/task")):
            os.sched_setaffinity(thread, one)
            if thread != os.getpid():
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        model.train_on_batch(*batch(4, 8)[:2])


@pytest.mark.skipif(
    not hasattr(os, "SCHED_IDLE") or not os.path.isdir("/proc/self/task"),
    reason="the threads of a process are set idle as Linux does it",
)
def test_processes_exit_with_idle_threads():
    port = processes.free_port()
    command = (
        "from tests import test_torch_exit; test_torch_exit.train_and_leave()"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", command],
            cwd=processes.ROOT,
            env=processes.launch_environment(rank, 2, port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [p.communicate(timeout=SECONDS)[1] for p in running]
    finally:
        for process in running:
            process.kill()
    # An abort of the C++ runtime would be -6.
    assert [process.returncode for process in running] == [0, 0], errors
