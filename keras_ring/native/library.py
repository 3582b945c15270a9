"""Shared libraries that are compiled on the machine that uses them.

A library is compiled once for a processor and kept in a folder of the user:
`$KERAS_RING_CACHE`, by default `keras_ring` in `$XDG_CACHE_HOME` or
`~/.cache`. The compiler is `$KERAS_RING_CXX`, or else `$CXX`, `c++`, `g++` or
`clang++`, the first that is there; nothing is compiled where the former is
empty.
"""

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ATTENTION = HERE / "attention.cpp"
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"),
)
# Seconds after which a compiler is given up.
PATIENCE = 300

logger = logging.getLogger("keras_ring")


class UnavailableError(RuntimeError):
    """There is no library here; the message says why.

    Attributes:
        expected: whether that is as it should be: nobody asked for a compiler,
            or for none.
    """

    def __init__(self, why: str, expected: bool = False):
        super().__init__(why)
        self.expected = expected


class Once:
    """Calls a function once: what it returned is returned again, and what
    failed once is not tried again.

    Args:
        load: nullary; any exception of it means that there is no library.
    """

    def __init__(self, load: Callable[[], Any]):
        self._load = load
        self._lock = threading.Lock()
        self._found: Any = None
        self._why: UnavailableError | None = None

    def __call__(self) -> Any:
        """
        Raises:
            UnavailableError: if it failed, now or before.
        """
        with self._lock:
            if self._found is None and self._why is None:
                try:
                    self._found = self._load()
                except UnavailableError as error:
                    self._why = error
                except Exception as error:  # noqa: BLE001 - any may be missing
                    self._why = UnavailableError(
                        f"Loading it failed: {type(error).__name__}: {error}"
                    )
            if self._why is not None:
                raise UnavailableError(str(self._why), self._why.expected)
            return self._found


def build(
    name: str, sources: Sequence[Path], flags: Sequence[str] = ()
) -> Path:
    """The shared library made of C++ sources, compiled if it is not kept yet.

    Args:
        name: what its file name begins with.
        sources: files; headers beside `attention.h` are found.
        flags: for the compiler, after `FLAGS`.

    Raises:
        UnavailableError: without a compiler or a folder to keep it in, and
            if the compiler fails.
    """
    compiler = _compiler()
    command = [*compiler, *FLAGS, f"-I{HERE}", *map(str, sources), *flags]
    parts = *command, _version(*compiler), _machine()
    identity = hashlib.sha256("\0".join(parts).encode())
    for path in (HERE / "attention.h", *sources):
        identity.update(path.read_bytes())
    folder = _folder()
    library = folder / f"{name}-{identity.hexdigest()[:24]}.so"
    if not library.exists():
        logger.info("Compiling %s, which is kept in %s.", name, folder)
        _compile(command, library)
    return library


def _compile(command: list[str], library: Path) -> None:
    """Whoever is first among several processes: the others replace it by the
    same."""
    if not os.access(library.parent, os.W_OK):
        why = f"The folder {library.parent} cannot be written to."
        raise UnavailableError(why)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        try:
            done = subprocess.run(
                [*command, "-o", str(made)],
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(
                f"The compiler did not run: {error}"
            ) from error
        if done.returncode:
            raise UnavailableError(
                f"{command[0]} failed with {done.returncode}: "
                f"{done.stderr.strip()[-2000:]}"
            )
        made.replace(library)


def _compiler() -> list[str]:
    own = os.environ.get("KERAS_RING_CXX")
    if own is not None and not own.strip():
        why = "KERAS_RING_CXX is empty: nothing is compiled."
        raise UnavailableError(why, expected=True)
    if os.name != "posix":
        why = "Libraries are compiled on Linux and macOS only."
        raise UnavailableError(why, expected=True)
    asked = own or os.environ.get("CXX")
    names = [own] if own else [asked, "c++", "g++", "clang++"]
    tried = [name for name in names if name and name.strip()]
    for name in tried:
        words = name.split()
        if shutil.which(words[0]):
            return words
    raise UnavailableError(
        f"There is no C++ compiler: none of {tried} was found.",
        expected=own is None,
    )


@functools.cache
def _version(*compiler: str) -> str:
    """What a compiler says of itself: what it makes needs its libraries."""
    try:
        done = subprocess.run(
            [*compiler, "--version"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"The compiler did not run: {error}") from error
    return done.stdout


def _folder() -> Path:
    """Where libraries are kept: what is in it is loaded, so that nobody else
    may own it."""
    own = os.environ.get("KERAS_RING_CACHE")
    try:
        if own:
            folder = Path(own).absolute()
        else:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            folder = Path(cache).absolute() / "keras_ring"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except (OSError, RuntimeError) as error:
        why = f"There is no folder for libraries: {error}"
        raise UnavailableError(why) from error
    if owner not in (0, os.geteuid()):
        raise UnavailableError(f"The folder {folder} belongs to another user.")
    return folder


@functools.cache
def _machine() -> str:
    """What `-march=native` depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = {line for line in text.splitlines() if line.startswith(wanted)}
    system = platform.machine(), *platform.libc_ver()
    return "\n".join((*system, *sorted(lines)))
