"""The pool of processes that the tests on PyTorch run in."""

import gc
import os
import signal
import time

import numpy as np
import pytest
import torch

import keras_ring
from keras_ring.backends.torch.processes import groups
from tests.processes import Pool

pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(scope="module")
def pool():
    pools = [Pool(2)]

    def call(function, *arguments, limit=60.0):
        if not pools[0].alive:
            pools[0] = Pool(2)
        return pools[0].call(function, arguments, limit)

    yield call
    pools[0].close()


def rank():
    return int(os.environ["RANK"])


def double(array):
    return array * 2 + rank()


def fail_on_rank_1():
    if rank() == 1:
        raise KeyError("missing")
    time.sleep(60)


def die_on_rank_1():
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def sleep():
    time.sleep(60)


def test_the_result_is_that_of_rank_0(pool):
    np.testing.assert_array_equal(pool(double, np.arange(3)), [0, 2, 4])


def test_the_error_of_any_rank_arrives_and_the_pool_recovers(pool):
    with pytest.raises(KeyError, match="in rank 1 of 2"):
        pool(fail_on_rank_1)
    assert pool(double, 1) == 2


def test_a_process_that_dies_is_an_error(pool):
    with pytest.raises(AssertionError, match="rank 1 of 2 died"):
        pool(die_on_rank_1)


def test_a_call_that_hangs_is_an_error(pool):
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2"):
        pool(sleep, limit=2.0)


def threads_of_strategies():
    """Threads of this process after one strategy and after many more."""
    counts = []
    for _ in range(2):
        for _ in range(5):
            strategy = keras_ring.DistributedStrategy(sequence_parallel=2)
            assert strategy.run(lambda: 3.0) == 3.0
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"), reason="threads are not listed here"
)
def test_strategies_of_one_shape_share_their_groups(on_devices):
    """Groups and their threads live as long as the process."""
    before, after = on_devices(2, threads_of_strategies)
    assert before == after


def transports_of_strategies():
    default = keras_ring.DistributedStrategy(sequence_parallel=2)
    default.run(lambda: 3.0)
    failures = groups._failures(torch.distributed.group.WORLD)
    gc.collect()
    before = len(failures.transports)
    for _ in range(5):
        strategy = keras_ring.DistributedStrategy(sequence_parallel=2)
        strategy.run(lambda: 3.0)
    gc.collect()
    return len(failures.transports) - before


def test_transports_live_as_long_as_their_strategy(on_devices):
    # The last strategy is still there: its ring, and everyone.
    assert on_devices(2, transports_of_strategies) <= 2


def test_devices_have_the_names_that_kernels_are_asked_for():
    strategy = keras_ring.DistributedStrategy(devices=("gpu:0",))
    with torch.device("cuda:0"):
        assert groups.device_names(strategy) == ("cuda:0",)
