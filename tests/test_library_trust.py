"""What is loaded as compiled code: whole files in folders that nobody else can
write to; and how it is made where compilers break, hang or are killed."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from keras_ring.attention.native import library
from keras_ring.attention.native.trust import distrust
from keras_ring.scratch import PREFIX
from tests.native_library import BUILDING, NEEDED

posix = pytest.mark.skipif(os.name != "posix", reason="owners are of POSIX")
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0,
    reason="only root can give a folder away",
)
OWN, OTHER = 12345, 54321
SOURCE = (
    'extern "C" __attribute__((visibility("default"))) int answer() '
    "{ return 42; }\n"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = tmp_path / "with a space" / "kept"
    monkeypatch.setenv("KERAS_RING_CACHE", str(made))
    monkeypatch.delenv("KERAS_RING_CXX", raising=False)
    monkeypatch.setattr(library, "_told", set())
    return made


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "its source.cpp"
    path.write_text(SOURCE)
    return path


def user():
    return os.geteuid()


@posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
@pytest.mark.parametrize("above", [False, True])
def test_nobody_else_may_write_there(tmp_path, mode, above):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    assert distrust(folder, user()) == ""
    wrong = folder.parent if above else folder
    wrong.chmod(mode)
    # Above, the sticky bit keeps the hands of others off.
    if above and mode == 0o1777:
        assert distrust(folder, user()) == ""
    else:
        assert str(wrong) in distrust(folder, user())
        assert f"{mode:04o}" in distrust(folder, user())
    # What is written with dots is what they lead to.
    (folder / "c").mkdir()
    assert bool(distrust(folder / "c" / "..", user())) == bool(
        distrust(folder, user())
    )


@as_root
def test_every_step_belongs_to_the_user_or_to_root(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    file = folder / "library.so"
    file.write_text("")
    for path in (folder.parent, folder, file):
        # One's own and root's, also where the two mix.
        os.chown(path, OWN, -1)
        assert distrust(file, OWN) == ""
        os.chown(path, OTHER, -1)
        assert f"{path}, which belongs to the user {OTHER}" in distrust(
            file, OWN
        )
        assert str(OTHER) in distrust(file, 0)
        os.chown(path, 0, -1)
        assert distrust(file, OWN) == distrust(file, 0) == ""


@as_root
@pytest.mark.parametrize("relative", [False, True])
def test_links_are_followed_with_the_same_eyes(tmp_path, relative):
    """A link of another user, and one of the user's own to another's folder
    or through one."""
    target = tmp_path / "real" / "kept"
    target.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to("real" if relative else target.parent)
    assert distrust(link / "kept", OWN) == ""
    os.chown(link, OTHER, -1, follow_symlinks=False)
    assert f"{link}, which" in distrust(link / "kept", OWN)
    os.chown(link, OWN, -1, follow_symlinks=False)
    os.chown(target.parent, OTHER, -1)
    assert f"{target.parent}, which" in distrust(link / "kept", OWN)
    os.chown(target.parent, OWN, -1)
    target.parent.chmod(0o777)
    assert f"{target.parent} with" in distrust(link / "kept", OWN)
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(OSError, match="too many links"):
        distrust(circle, OWN)


@posix
def test_what_is_wrong_is_said_and_no_compiler_starts(
    folder, source, monkeypatch
):
    monkeypatch.setattr(library, "_compilers", lambda: [["true"]])
    monkeypatch.setattr(library, "_run", lambda *_: pytest.fail("started"))
    folder.mkdir(parents=True)
    folder.chmod(0o770)
    monkeypatch.setenv("KERAS_RING_CACHE", str(folder))
    with pytest.raises(
        library.UnavailableError,
        match=r"nobody but the user .* Received: .*kept with the mode 0770.*"
        r"chmod go-w .*KERAS_RING_CACHE",
    ):
        library.build("small", [source])
    # The temporary folder of all is no place, by any name.
    shared = folder.parent / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    planted = folder.parent / "planted"
    planted.symlink_to(shared)
    for place in (shared, planted):
        monkeypatch.setenv("KERAS_RING_CACHE", str(place))
        with pytest.raises(library.UnavailableError, match="mode 1777"):
            library.build("small", [source])


@NEEDED
def test_a_library_that_is_damaged_or_planted_is_not_loaded(folder, source):
    umask = os.umask(0o002)
    try:
        made = library.build("small", [source])
    finally:
        os.umask(umask)
    whole = made.read_bytes()

    def answer(path):
        """In a process of its own: a file that is damaged while it is loaded
        ends the process that has it."""
        code = f"import ctypes; print(ctypes.CDLL({str(path)!r}).answer())"
        return subprocess.check_output([sys.executable, "-c", code])

    assert answer(made) == b"42\n"
    # Whatever the umask, what is made on the way is the user's alone.
    assert not made.stat().st_mode & 0o022
    assert not folder.parent.stat().st_mode & 0o022
    for wrong in (b"", whole[: len(whole) // 2], b"\0" + whole[1:]):
        made.write_bytes(wrong)
        again = library.build("small", [source])
        assert answer(again) == b"42\n"
        # What was wrong is gone.
        assert list(folder.glob("*.so")) == [again]
    again.chmod(0o666)
    with pytest.raises(library.UnavailableError, match="mode 0666"):
        library.build("small", [source])
    again.rename(folder.parent / "elsewhere.so")
    again.symlink_to(folder.parent / "elsewhere.so")
    (folder.parent / "elsewhere.so").chmod(0o755)
    with pytest.raises(library.UnavailableError, match=r"so, a link"):
        library.build("small", [source])


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@NEEDED
@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("CXX", "echo no good >&2; exit 3"),
        ("CXX", None),
        ("KERAS_RING_CXX", "exit 0"),
        ("KERAS_RING_CXX", "sleep 100"),
        ("KERAS_RING_CXX", None),
    ],
)
def test_a_broken_compiler_is_followed_by_the_next(
    folder, source, monkeypatch, tmp_path, variable, text
):
    """One that fails, that makes nothing, that hangs, that is not there."""
    broken = tmp_path / "a compiler"
    if text is not None:
        script(broken, text)
    monkeypatch.setenv(variable, str(broken))
    if text == "sleep 100":
        monkeypatch.setattr(library, "PATIENCE", 15.0)
    if text is None and variable == "CXX":
        made = library.build("small", [source])
    else:
        with pytest.warns(RuntimeWarning, match="a compiler"):
            made = library.build("small", [source])
    assert ctypes.CDLL(str(made)).answer() == 42
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        made.name,
    ]


@NEEDED
def test_a_compiler_in_a_folder_with_spaces(
    folder, source, monkeypatch, tmp_path
):
    real = shlex.join(library._compilers()[0])
    own = script(tmp_path / "my compiler", f'exec {real} "$@"')
    for written in (str(own), f"'{own}' -DMORE"):
        monkeypatch.setenv("KERAS_RING_CXX", written)
        made = library.build("small", [source])
        assert ctypes.CDLL(str(made)).answer() == 42
    assert len(list(folder.glob("*.so"))) == 2


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@NEEDED
def test_what_a_killed_compilation_leaves_goes_with_the_next(
    folder, source, monkeypatch, tmp_path
):
    """And others wait for it until then, and no longer than they may."""
    started = tmp_path / "started"
    slow = script(
        tmp_path / "slow",
        f'[ "$1" = --version ] || {{ echo "$TMPDIR" > "{started}"; '
        'echo > "$TMPDIR/cc1.s"; sleep 100; }',
    )
    process = subprocess.Popen(
        [*BUILDING, str(source)],
        env=os.environ | {"KERAS_RING_CXX": str(slow)},
        stderr=subprocess.DEVNULL,
    )
    until(lambda: started.exists() and started.read_text().endswith("\n"))
    # The compiler's own files are in it as well.
    (left,) = folder.glob(f"{PREFIX}*")
    assert started.read_text() == f"{left}\n"
    begun = time.monotonic()
    with pytest.raises(library.UnavailableError, match="still compiles"):
        library.build("small", [source], seconds=0.5)
    assert time.monotonic() - begun < 5
    waiting = subprocess.Popen([*BUILDING, str(source)], stdout=subprocess.PIPE)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    made = Path(waiting.communicate(timeout=60)[0].decode().strip())
    assert ctypes.CDLL(str(made)).answer() == 42
    assert sorted(p.name for p in folder.iterdir()) == [".lock", made.name]


@NEEDED
def test_compiling_ends_with_all_that_it_started(
    folder, source, monkeypatch, tmp_path
):
    ended = tmp_path / "ended"
    slow = script(tmp_path / "slow", f'(sleep 3; touch "{ended}") & wait')
    monkeypatch.setattr(library, "_compilers", lambda: [[str(slow)]])
    begun = time.monotonic()
    with pytest.raises(library.UnavailableError, match="took too long"):
        library.build("small", [source], seconds=0.5)
    assert time.monotonic() - begun < 2.5
    time.sleep(3.2 - (time.monotonic() - begun))
    assert not ended.exists()


def test_compiling_takes_less_than_others_wait_for():
    class World:
        class strategy:  # noqa: N801
            timeout = 60.0

    assert library.patience(World) == 30.0
    assert library.patience(None) == library.PATIENCE < 300.0
