"""A ring across worker processes, and what happens when one of them dies."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import keras_ring
from tests.language_model import batch, initial_weights, language_model

TIMEOUT = 8.0
LENGTH = 16


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Workers:
    """Processes that run this file, joined by `TF_CONFIG`."""

    def __init__(self, count, task, folder):
        addresses = [f"localhost:{port}" for port in free_ports(count)]
        self.logs = [folder / f"{task}{i}.log" for i in range(count)]
        self.processes = []
        for index, log in enumerate(self.logs):
            environment = dict(os.environ, KERAS_BACKEND="tensorflow")
            environment["TF_CONFIG"] = json.dumps(
                {
                    "cluster": {"worker": addresses},
                    "task": {"type": "worker", "index": index},
                }
            )
            with log.open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", __name__, task, str(folder)],
                        env=environment,
                        cwd=pathlib.Path(__file__).parents[1],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait_for(self, path, seconds):
        limit = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < limit, self.text()
            assert all(p.poll() is None for p in self.processes), self.text()
            time.sleep(0.05)

    def text(self):
        return "\n".join(log.read_text()[-3000:] for log in self.logs)

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def start(tmp_path):
    started = []

    def start(count, task):
        started.append(Workers(count, task, tmp_path))
        return started[-1]

    yield start
    for workers in started:
        workers.close()


def strategy(timeout=TIMEOUT):
    return keras_ring.DistributedStrategy(sequence_parallel=2, timeout=timeout)


def fit(folder):
    """Train, evaluate and predict; the first worker writes the results."""
    from keras.utils import set_random_seed

    set_random_seed(3)
    # On a busy machine one worker traces much longer than the other.
    ring = strategy(timeout=60.0)
    with ring.scope():
        model = language_model("ring")
        model.set_weights(initial_weights(model))
        data = batch(6, LENGTH)
        history = model.fit(
            *data[:2], sample_weight=data[2], batch_size=4, epochs=2, verbose=0
        )
        evaluated = model.evaluate(*data[:2], batch_size=4, verbose=0)
        predicted = model.predict(data[0], batch_size=4, verbose=0)
        worker = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
        with pytest.raises(ValueError, match="the same whole batches"):
            model.predict(data[0] + worker, verbose=0)
    np.savez(
        folder / f"fit{os.getpid()}.npz",
        loss=history.history["loss"],
        evaluated=evaluated,
        predicted=predicted,
        kernel=ring.world.kernel_name("float32"),
    )


def endless(folder):
    """Move tensors until something breaks; write what is raised."""
    ring = strategy()
    array = np.arange(8, dtype="float32").reshape(1, 8)

    def turn(shard):
        world = keras_ring.distribution.strategy.current()
        return world.per_shard(lambda t, s: t.shift([s])[0], [shard])

    result = ring.run(turn, array)
    np.testing.assert_array_equal(result, np.roll(array, 4, axis=1))
    (folder / f"ready{os.getpid()}").touch()
    try:
        while True:
            ring.run(turn, array)
    except RuntimeError as error:
        (folder / "error").write_text(str(error))


def test_fit_across_workers(start, tmp_path):
    workers = start(2, "fit")
    for process in workers.processes:
        assert process.wait(240) == 0, workers.text()
    results = [np.load(path) for path in tmp_path.glob("fit*.npz")]
    assert len(results) == 2
    import keras

    keras.utils.set_random_seed(3)
    model = language_model("stock")
    model.set_weights(initial_weights(model))
    data = batch(6, LENGTH)
    history = model.fit(
        *data[:2], sample_weight=data[2], batch_size=4, epochs=2, verbose=0
    )
    evaluated = model.evaluate(*data[:2], batch_size=4, verbose=0)
    predicted = model.predict(data[0], batch_size=4, verbose=0)
    # As in one process with as many devices.
    want = keras_ring.DistributedStrategy(2).world.kernel_name("float32")
    for result in results:
        assert result["kernel"] == want
        # Sums in another order: float32 rounding over four Adam steps.
        np.testing.assert_allclose(
            result["loss"], history.history["loss"], rtol=1e-5
        )
        np.testing.assert_allclose(result["evaluated"], evaluated, rtol=1e-5)
        np.testing.assert_allclose(result["predicted"], predicted, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.extra)]
)
def test_a_lost_worker_ends_the_run(start, tmp_path, name):
    workers = start(2, "endless")
    pids = [process.pid for process in workers.processes]
    for pid in pids:
        workers.wait_for(tmp_path / f"ready{pid}", 120)
    lost, left = workers.processes[1], workers.processes[0]
    begin = time.monotonic()
    lost.send_signal(getattr(signal, name))
    left.wait(TIMEOUT + 60)
    # Time to notice, and to end a process on a busy machine.
    assert time.monotonic() - begin < TIMEOUT + 20
    message = (tmp_path / "error").read_text()
    assert "timeout=8.0" in message
    assert "worker" in message


if __name__ == "__main__":
    {"fit": fit, "endless": endless}[sys.argv[1]](pathlib.Path(sys.argv[2]))
