"""A peer that dies or hangs ends the run with an error, never a wait."""

import os
import signal
import time

import keras
import pytest

import keras_ring
from tests.language_model import batch, language_model
from tests.processes import Pool

pytestmark = pytest.mark.xdist_group("processes")
TIMEOUT = 4.0


class Stop(keras.callbacks.Callback):
    """Sends a signal to its own process, on rank 1."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 1:
            self.begun = time.monotonic()
            if os.environ["RANK"] == "1":
                os.kill(os.getpid(), self.number)


def train_until(number):
    """Seconds from the signal to the error, and the error."""
    strategy = keras_ring.DistributedStrategy(timeout=TIMEOUT)
    stop = Stop(number)
    with strategy.scope():
        model = language_model("ring")
        with pytest.raises(RuntimeError) as error:
            model.fit(
                *batch(8, 8)[:2],
                batch_size=2,
                verbose=0,
                callbacks=[stop],
            )
    return time.monotonic() - stop.begun, str(error.value)


@pytest.mark.parametrize(
    ("number", "earliest", "latest"),
    [
        (signal.SIGKILL, 0.0, TIMEOUT),
        # The limit is that of one transfer; the margin is for a busy machine.
        (signal.SIGSTOP, TIMEOUT * 0.9, TIMEOUT * 2),
    ],
    ids=["killed", "hung"],
)
def test_a_lost_peer_is_an_error_in_time(number, earliest, latest):
    pool = Pool(2)
    try:
        pool.send(train_until, (number,))
        succeeded, answer = pool.receive(0, limit=90)
    finally:
        pool.close()
    assert succeeded, answer
    seconds, message = answer
    assert earliest <= seconds <= latest
    assert "another process has ended, or did not answer" in message
    assert f"timeout={TIMEOUT:g} seconds" in message
