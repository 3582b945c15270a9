"""What processes leave that are killed: nothing, or the next one removes it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest

from keras_ring import scratch

HOLDING = [
    *(sys.executable, "-c"),
    "import os, sys, time, pathlib, importlib.util as util\n"
    "spec = util.spec_from_file_location('scratch', sys.argv[1])\n"
    "module = util.module_from_spec(spec); spec.loader.exec_module(module)\n"
    "held = module.scratch(pathlib.Path(sys.argv[2]))\n"
    "folder = held.__enter__(); (folder / 'half').write_text('x')\n"
    "if sys.argv[3:]: os.kill(os.getpid(), 9)\n"
    "print(folder, flush=True); time.sleep(100)",
]


def holding(parent):
    """A process that makes such a folder and stays, and the folder."""
    process = subprocess.Popen(
        [*HOLDING, scratch.__file__, str(parent)], stdout=subprocess.PIPE
    )
    return process, Path(process.stdout.readline().decode().strip())


def test_a_folder_goes_afterwards_and_after_an_error(tmp_path):
    with pytest.raises(IsADirectoryError), scratch.scratch(tmp_path) as folder:
        folder.write_text("x")
    with scratch.scratch(tmp_path) as first:
        with scratch.scratch(tmp_path) as second:
            assert first.is_dir()
            assert second.is_dir()
        assert list(tmp_path.iterdir()) == [first]
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(FileNotFoundError),
        scratch.scratch(tmp_path / "missing"),
    ):
        pass


def test_that_of_a_killed_process_goes_and_of_a_live_one_stays(tmp_path):
    mine = tmp_path / ".keras_ring-notes"
    mine.mkdir()
    dead, left = holding(tmp_path)
    live, kept = holding(tmp_path)
    try:
        dead.kill()
        dead.wait()
        assert (left / "half").exists()
        with scratch.scratch(tmp_path):
            assert not left.exists()
            assert (kept / "half").exists()
            # What others call alike, too.
            assert mine.exists()
    finally:
        live.kill()
        live.wait()


def test_what_no_lock_tells_of_goes_when_it_is_old(tmp_path, monkeypatch):
    """It is of another machine, or the disk has no locks."""
    process, left = holding(tmp_path)
    process.kill()
    process.wait()
    elsewhere = left.with_name(".keras_ring-0123456789ab-cdef")
    shutil.copytree(left, elsewhere)
    monkeypatch.setattr(scratch, "locked", lambda _: None)
    with scratch.scratch(tmp_path):
        assert left.exists()
        assert elsewhere.exists()
    old = time.time() - 2 * scratch.OLD
    for folder in (left, elsewhere):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (old, old))
    # One file that is still written to is enough.
    (elsewhere / "half").touch()
    os.utime(elsewhere, (old, old))
    with scratch.scratch(tmp_path):
        assert not left.exists()
        assert elsewhere.exists()


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="one process saves elsewhere"
)
@pytest.mark.parametrize("name", ["saved.keras", "saved.weights.h5"])
def test_a_save_that_is_killed_leaves_the_file_whole(
    tmp_path, monkeypatch, name
):
    from keras_ring.backends.torch import saving
    from keras_ring.backends.torch.processes import groups

    monkeypatch.setattr(groups, "process_count", lambda: 2)
    inputs = keras.Input((None, 2))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    kind = keras.Model.save if name.endswith(".keras") else None
    save = saving.whole_files(kind or keras.Model.save_weights)
    target = tmp_path / name
    save(model, target)
    whole = target.read_bytes()

    def killed(self, filepath, overwrite):
        """Keras' method up to the moment at which the process dies."""
        Path(filepath).write_bytes(b"half")
        assert target.read_bytes() == whole
        visible = [p for p in tmp_path.iterdir() if p.is_file()]
        assert visible == [target]
        return subprocess.run(
            [*HOLDING, scratch.__file__, str(tmp_path), "die"], check=False
        ).returncode

    assert saving.whole_files(killed)(model, target) == -signal.SIGKILL
    assert [p for p in tmp_path.iterdir() if p.name.startswith(scratch.PREFIX)]
    target.write_bytes(whole)
    save(model, tmp_path / f"other-{name}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"other-{name}",
        name,
    ]
    model.load_weights(target)
    # Where there is no folder the message is that of Keras.
    with pytest.raises(FileNotFoundError, match=name):
        save(model, tmp_path / "missing" / name)
