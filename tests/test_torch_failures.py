"""A peer that dies, hangs or fails alone ends the run with an error, never a
wait."""

import os
import signal
import time
import traceback

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


class Raise(keras.callbacks.Callback):
    """An error of the user's own, on rank 1."""

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 1:
            self.begun = time.monotonic()
            if os.environ["RANK"] == "1":
                raise LookupError("of the user's own\n\nin two lines")


def fail_alone():
    """Of a call that fails on rank 1 alone: the seconds, and the error of
    it and of the next call."""
    strategy = keras_ring.DistributedStrategy(timeout=60.0)
    fails = Raise()
    x, y, _ = batch(8, 8)
    with strategy.scope():
        model = language_model("ring")
        with pytest.raises((RuntimeError, LookupError)) as first:
            model.fit(x, y, batch_size=2, verbose=0, callbacks=[fails])
        seconds = time.monotonic() - fails.begun
        begun = time.monotonic()
        with pytest.raises(RuntimeError) as second:
            model.predict(x, verbose=0)
    again = time.monotonic() - begun
    lines = "".join(traceback.format_exception(first.value)).splitlines()
    return (
        (seconds, again),
        (type(first.value).__name__, str(first.value), lines[-1]),
        str(second.value),
    )


def test_the_others_end_at_once_and_name_who_failed():
    pool = Pool(3)
    try:
        pool.send(fail_alone, ())
        answers = [pool.receive(rank) for rank in range(3)]
    finally:
        pool.close()
    for rank, (succeeded, answer) in enumerate(answers):
        assert succeeded, answer
        (seconds, again), (kind, message, last), second = answer
        # The margin is for a busy machine.
        assert seconds < 20
        assert again < 20
        if rank == 1:
            assert kind == "LookupError"
            assert message == "of the user's own\n\nin two lines"
            assert "not on all of the others alike" in second
        else:
            assert kind == "RuntimeError"
            assert message.startswith("Rank 1 failed alone")
            assert last == f"RuntimeError: {message}"
            assert second == message
        for text in (second, message) if rank != 1 else (second,):
            assert "Restart all processes" in text
            assert text.endswith("LookupError: of the user's own in two lines")
