"""Kill one of two PyTorch processes at random moments, and go on.

    python -m tests.kills [--runs 20] [--seed 0]

Every run trains from the start with checkpoints, and one process, drawn like
the moment, is killed: in turn while attention is compiled for the first time,
in the first step, in a later one, in evaluation, and while checkpoints are
written. The other must end by itself; the checkpoint that is left must be
whole; and a second start must end at the loss of an undisturbed run. Prints,
for each run, the moment, the seconds to the other's end and the loss.
"""

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.processes import ROOT, free_port, launch_environment

EPOCHS, TIMEOUT, LIMIT = 4, 60.0, 600.0
# After "build".
FIRST_STEP = 1
KINDS = ("compile", "first step", "step", "evaluate", "saving")


def train(folder):
    """What a process does; prints its moments and the loss."""
    import keras

    import keras_ring
    from tests.language_model import batch, initial_weights, language_model

    class Tell(keras.callbacks.Callback):
        """Says where the process is."""

        def say(self, *words):
            print("at", *words, flush=True)

        def on_train_batch_begin(self, batch, logs=None):
            self.say("step")

        def on_test_batch_begin(self, batch, logs=None):
            self.say("evaluate")

        def on_epoch_end(self, epoch, logs=None):
            self.say("saving")

    strategy = keras_ring.DistributedStrategy(timeout=TIMEOUT)
    x, y, _ = batch(8, 64)
    print("at build", flush=True)
    with strategy.scope():
        model = language_model("ring")
        model.set_weights(initial_weights(model))
        history = model.fit(
            *(x, y),
            batch_size=2,
            epochs=EPOCHS,
            shuffle=False,
            verbose=0,
            validation_data=(x[:4], y[:4]),
            callbacks=[
                Tell(),
                keras.callbacks.BackupAndRestore(f"{folder}/backup"),
                keras.callbacks.ModelCheckpoint(f"{folder}/last.keras"),
            ],
        )
    print("loss", history.history["loss"][-1], flush=True)


def start(folder, compiles=False):
    """Both processes, writing to files of their own.

    Args:
        folder: of all that they write.
        compiles: whether what is compiled is kept there as well.
    """
    port = free_port()
    own = {"KERAS_RING_CACHE": f"{folder}/cache"} if compiles else {}
    processes = []
    for rank in range(2):
        with open(f"{folder}/out{rank}", "w") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.kills", "--train", folder],
                    **{"stdout": out, "stderr": out, "cwd": ROOT},
                    env=launch_environment(rank, 2, port) | own,
                )
            )
    return processes


def finished(processes):
    """Wait for the end of processes; kill those that do not end."""
    try:
        return [process.wait(LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()


def lines(folder, rank=0):
    return Path(f"{folder}/out{rank}").read_text().splitlines()


def loss(folder):
    """The loss at the end, as rank 0 said."""
    (last,) = (x for x in lines(folder) if x.startswith("loss"))
    return float(last.split()[1])


def moments(folder):
    return [line for line in lines(folder) if line.startswith("at ")]


def chosen(kind, said, draw):
    """Which of the moments that an undisturbed run told of, by number.

    Args:
        kind: of `KINDS`.
        said: what it told, without its last epoch.
        draw: random numbers.
    """
    if kind in ("compile", "first step"):
        return FIRST_STEP
    places = [i for i, line in enumerate(said) if line == f"at {kind}"]
    return draw.choice([i for i in places if i != FIRST_STEP])


def until(folder, count):
    """Wait until so many moments have been told of; give the time then."""
    deadline = time.monotonic() + LIMIT
    while len(moments(folder)) < count and time.monotonic() < deadline:
        time.sleep(0.005)
    return time.monotonic()


def killed(folder, kind, said, longest, draw):
    """One run that is disturbed.

    Args:
        folder: of all that it writes.
        kind: when it is disturbed.
        said: the moments of an undisturbed run.
        longest: seconds after that moment at which it is at the latest.
        draw: random numbers.

    Returns:
        The moment, the rank that was killed, the seconds to the other's end
        and how it ended.
    """
    processes = start(folder, kind == "compile")
    number, pause = chosen(kind, said, draw), draw.random() * longest
    victim = draw.randrange(2)
    until(folder, number + 1)
    time.sleep(pause)
    at = f"{len(moments(folder))} ({kind}, {pause:.2f} s later)"
    processes[victim].kill()
    begun = time.monotonic()
    code = finished([processes[1 - victim]])[0]
    seconds = time.monotonic() - begun
    finished(processes)
    return at, victim, seconds, code


def whole(folder):
    """Whether every checkpoint that has its name can be read."""
    import zipfile

    # What is not finished lies in a hidden folder.
    found = [
        path
        for path in Path(folder).rglob("*")
        if path.suffix in (".keras", ".h5")
        and not any(
            part.startswith(".") for part in path.relative_to(folder).parts
        )
    ]
    for path in found:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as file:
                assert file.testzip() is None, path
        else:
            import h5py

            with h5py.File(path) as file:
                file.visit(lambda name: None)
    return len(found)


def main():
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--runs", type=int, default=20)
    given.add_argument("--seed", type=int, default=0)
    given.add_argument("--train", help=argparse.SUPPRESS)
    given = given.parse_args()
    if given.train:
        train(given.train)
        return
    with tempfile.TemporaryDirectory() as folder:
        processes = start(folder, compiles=True)
        begun = until(folder, FIRST_STEP + 1)
        compiling = until(folder, FIRST_STEP + 2) - begun
        finished(processes)
        undisturbed, said = loss(folder), moments(folder)
    # Not in the last epoch: the other may have ended before.
    said = said[: len(said) * (EPOCHS - 1) // EPOCHS]
    print(
        f"undisturbed: loss {undisturbed:.7f}, {compiling:.1f} s for the first "
        "step, which compiles",
        flush=True,
    )
    took = []
    for run in range(given.runs):
        draw = random.Random(given.seed * 1000 + run)
        kind = KINDS[run % len(KINDS)]
        longest = compiling if kind == "compile" else 0.3
        with tempfile.TemporaryDirectory() as folder:
            at, victim, seconds, code = killed(
                folder, kind, said, longest, draw
            )
            files = whole(folder)
            finished(start(folder, kind == "compile"))
            resumed = loss(folder)
            assert code != 0, "the other has not noticed"
            hidden = Path(folder, "cache").glob(".*")
            left = {path.name for path in hidden} - {".lock"}
            assert not left, left
        took.append(seconds)
        print(
            f"seed {given.seed * 1000 + run}: rank {victim} killed at moment "
            f"{at}; the "
            f"other ended with {code} after {seconds:.2f} s; {files} whole "
            f"checkpoints; loss {resumed:.7f}",
            flush=True,
        )
        # A step in float32 that is done again gives the same bits.
        assert abs(resumed - undisturbed) <= 1e-6 * undisturbed
    print(
        f"seconds to the other's end: min {min(took):.2f}, median "
        f"{statistics.median(took):.2f}, max {max(took):.2f}"
    )


if __name__ == "__main__":
    main()
