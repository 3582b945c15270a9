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
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ATTENTION = HERE / "attention.cpp"
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"),
)
# Seconds after which a compiler is given up.
PATIENCE = 300

logger = logging.getLogger("keras_ring")


class Unavailable(RuntimeError):
    """There is no library here; the message says why."""


def build(
    name: str, sources: Sequence[Path], flags: Sequence[str] = ()
) -> Path:
    """The shared library made of C++ sources, compiled if it is not kept yet.

    Args:
        name: what its file name begins with.
        sources: files; headers beside `attention.h` are found.
        flags: for the compiler, after `FLAGS`.

    Raises:
        Unavailable: without a compiler, a folder to keep it in, or success.
    """
    command = [*_compiler(), *FLAGS, f"-I{HERE}", *map(str, sources), *flags]
    identity = hashlib.sha256("\0".join((*command, _machine())).encode())
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
            raise Unavailable(f"The compiler did not run: {error}") from error
        if done.returncode:
            raise Unavailable(
                f"{command[0]} failed with {done.returncode}: "
                f"{done.stderr.strip()[-2000:]}"
            )
        made.replace(library)


def _compiler() -> list[str]:
    own = os.environ.get("KERAS_RING_CXX")
    if own is not None and not own.strip():
        raise Unavailable("KERAS_RING_CXX is empty: nothing is compiled.")
    if os.name != "posix":
        raise Unavailable("Libraries are compiled on Linux and macOS only.")
    names = [own or os.environ.get("CXX"), "c++", "g++", "clang++"]
    for name in names[:1] if own else names:
        words = (name or "").split()
        if words and shutil.which(words[0]):
            return words
    raise Unavailable(f"There is no C++ compiler: none of {names} was found.")


def _folder() -> Path:
    own = os.environ.get("KERAS_RING_CACHE")
    try:
        if own:
            folder = Path(own)
        else:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            folder = Path(cache) / "keras_ring"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        why = f"There is no folder for libraries: {error}"
        raise Unavailable(why) from error
    if not os.access(folder, os.W_OK):
        raise Unavailable(f"The folder {folder} cannot be written to.")
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
    return "\n".join((platform.machine(), *sorted(lines)))
