"""Folders for what is not finished yet, which nobody is left with.

A process that is killed cannot tidy up. So whoever makes such a folder next
to it first removes those whose makers are gone. A maker holds a lock for as
long as it lives, which the kernel lets go of: numbers of processes mean
nothing to another container.
"""

import contextlib
import hashlib
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = ".keras_ring-"
LOCK = "lock"
# Seconds after which a folder is nobody's any more whose lock says nothing:
# of another machine, or on a disk without locks.
OLD = 24 * 3600.0


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder of this process in `parent`, removed with all that is in it
    afterwards, or by the next one that is made there.

    Args:
        parent: a folder that is there.

    Raises:
        OSError: if there cannot be one.
    """
    for left in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            _remove_abandoned(left)
    folder, held = _made(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _made(parent: Path) -> tuple[Path, int]:
    """A new folder and what holds its lock."""
    while True:
        folder = parent / f"{PREFIX}{_machine()}-{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        lock = folder / LOCK
        try:
            held = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
        except FileNotFoundError:
            continue
        except OSError:
            folder.rmdir()
            raise
        # Somebody who tidies up may have been faster.
        if locked(held) is not False and lock.exists():
            return folder, held
        os.close(held)


def _remove_abandoned(folder: Path) -> None:
    """Remove a folder if its maker is gone.

    Raises:
        OSError: if it is not this user's, or somebody else was faster.
    """
    if folder.name.startswith(f"{PREFIX}{_machine()}-"):
        # Held meanwhile: the maker may be just about to take it.
        held = os.open(folder / LOCK, os.O_RDWR)
        try:
            free = locked(held)
            if free:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(held)
        if free is not None:
            return
    touched = (path.lstat().st_mtime for path in (folder, *folder.iterdir()))
    if time.time() - max(touched) > OLD:
        shutil.rmtree(folder, ignore_errors=True)


def locked(descriptor: int) -> bool | None:
    """Take the lock of an open file, until it is closed.

    Returns:
        Whether it was free; None where files have no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows.
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _machine() -> str:
    """A name of the machine, from its start to its end, whose locks this
    process sees."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        text = platform.node()
    return hashlib.sha256(text.encode()).hexdigest()[:12]
