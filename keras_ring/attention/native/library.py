"""Shared libraries that are compiled on the machine that uses them.

A library is compiled once for a processor and kept in a folder of the user:
`$KERAS_RING_CACHE`, by default `keras_ring` in `$XDG_CACHE_HOME` or
`~/.cache`. The compiler is `$KERAS_RING_CXX`. Where that is not set it is the
first that works of `$CXX`, `c++`, `g++` and `clang++`; where it is set and
empty nothing is compiled.

A file's name ends with a digest of what is in it, so that one that was damaged
is never loaded. Of processes that need one at the same time one compiles and
the others wait.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_ring.attention.native.trust import distrust
from keras_ring.scratch import locked, scratch

HERE = Path(__file__).parent
# One unit, which includes the other files beside it.
ATTENTION = HERE / "attention.cpp"
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"),
)
# Seconds after which compiling is given up.
PATIENCE = 150.0
NOBODY_ELSE = (
    "Compiled libraries must be files in a folder where nobody but the user "
    "and root may write, nor above it."
)

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


class CompilerError(UnavailableError):
    """A compiler makes no library; another one may."""


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
        """Return what was loaded, now or before.

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
    name: str,
    sources: Sequence[Path],
    flags: Sequence[str] = (),
    seconds: float = PATIENCE,
) -> Path:
    """The shared library made of C++ sources, compiled if it is not kept yet.

    Args:
        name: what its file name begins with.
        sources: files; what lies beside `attention.h` is found and is part
            of the identity of what is made.
        flags: for the compiler, after `FLAGS`.
        seconds: that all of it may take, waiting for other processes that
            compile included; at most `PATIENCE`.

    Raises:
        UnavailableError: without a compiler or a folder to keep it in, and
            if every compiler fails.
    """
    deadline = time.monotonic() + min(seconds, PATIENCE)
    compilers, folder, failures = _compilers(), _folder(), []
    while compilers:
        compiler = compilers.pop(0)
        left = max(0.0, deadline - time.monotonic())
        try:
            # One that hangs leaves time for the next.
            within = left / 2 if compilers else left
            made = _built(name, compiler, sources, flags, folder, within)
        except CompilerError as error:
            failures.append(str(error))
            continue
        if failures:
            tell(f"{' '.join(failures)} {compiler[0]} is used instead.")
        return made
    raise UnavailableError(" ".join(failures))


def patience(world: Any) -> float:
    """Seconds that `build` may take where the other processes of a world wait
    for this one: less than they wait for.

    Args:
        world: of the active strategy, or None.
    """
    return PATIENCE if world is None else world.strategy.timeout / 2


def _built(
    name: str,
    compiler: list[str],
    sources: Sequence[Path],
    flags: Sequence[str],
    folder: Path,
    seconds: float,
) -> Path:
    """`build` with one compiler in one folder."""
    deadline = time.monotonic() + seconds
    command = [*compiler, *FLAGS, f"-I{HERE}", *map(str, sources), *flags]
    # Nobody says which of them a source includes.
    beside = [path for path in HERE.iterdir() if path.suffix in (".cpp", ".h")]
    files = map(_digest, (*sorted(beside), *sources))
    parts = *command, _version(compiler, deadline), _machine(), *files
    identity = hashlib.sha256("\0".join(parts).encode())
    stem = f"{name}-{identity.hexdigest()[:24]}"
    kept = _kept(folder, stem)
    if kept is not None:
        return kept
    if not os.access(folder, os.W_OK):
        raise UnavailableError(f"The folder {folder} cannot be written to.")
    with _alone(folder, deadline):
        # Who had the folder before may have made it.
        return _kept(folder, stem) or _compile(command, folder, stem, deadline)


def _kept(folder: Path, stem: str) -> Path | None:
    """The library of this identity, if there is one and it is whole. One that
    is not goes, where it can."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        try:
            problem = distrust(path, os.geteuid())
            if path.is_symlink():
                problem = f"{path}, a link."
            if problem:
                raise UnavailableError(f"{NOBODY_ELSE} Received: {problem}")
            if path.name == f"{stem}-{_digest(path)}.so":
                return path
        except FileNotFoundError:  # Somebody else has removed it.
            continue
        logger.warning("%s is damaged and is made again.", path)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


@contextlib.contextmanager
def _alone(folder: Path, deadline: float) -> Iterator[None]:
    """Nobody else compiles for a folder in the meantime.

    Raises:
        CompilerError: if somebody still does at the deadline.
    """
    held = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        # On a disk without locks whoever is last replaces it by the same.
        while locked(held) is False:
            if time.monotonic() > deadline:
                raise CompilerError(
                    f"Another process still compiles for the folder {folder}."
                )
            time.sleep(0.05)
        yield
    finally:
        os.close(held)


def _compile(
    command: list[str], folder: Path, stem: str, deadline: float
) -> Path:
    """Make a library whose name says what is in it."""
    logger.info("Compiling %s, which is kept in %s.", stem, folder)
    with scratch(folder) as unfinished:
        made = unfinished / "made.so"
        # What a compiler leaves when it is killed goes with the folder.
        environment = os.environ | {"TMPDIR": str(unfinished)}
        done = _run([*command, "-o", str(made)], deadline, environment)
        if done.returncode or not made.is_file():
            raise CompilerError(
                f"{command[0]} failed with {done.returncode}: "
                f"{done.stderr.strip()[-2000:]}"
            )
        made.chmod(made.stat().st_mode & ~0o022)
        library = folder / f"{stem}-{_digest(made)}.so"
        made.replace(library)
    return library


def _run(
    command: list[str], deadline: float, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a compiler; its exit status and what it says.

    Raises:
        CompilerError: if it cannot be started, or does not end.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env=environment,
            # So that those whom it starts end with it.
            start_new_session=True,
        )
    except OSError as error:
        raise CompilerError(f"{command[0]} did not run: {error}") from error
    try:
        said = process.communicate(
            timeout=max(0.0, deadline - time.monotonic())
        )
    except subprocess.TimeoutExpired as error:
        raise CompilerError(f"{command[0]} took too long.") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, *said)


def _compilers() -> list[list[str]]:
    """Commands of compilers that are there, in the order of preference."""
    own = os.environ.get("KERAS_RING_CXX")
    if own is not None and not own.strip():
        why = "KERAS_RING_CXX is empty: nothing is compiled."
        raise UnavailableError(why, expected=True)
    if os.name != "posix":
        why = "Libraries are compiled on Linux and macOS only."
        raise UnavailableError(why, expected=True)
    asked = own or os.environ.get("CXX")
    names = [asked, "c++", "g++", "clang++"]
    tried = [name for name in names if name and name.strip()]
    found: dict[Any, list[str]] = {}
    for name in tried:
        words = _words(name)
        program = shutil.which(words[0])
        if program:
            # `c++` often is `g++` by another name.
            found.setdefault((os.path.realpath(program), *words[1:]), words)
        elif name == own:
            tell(f"KERAS_RING_CXX={own!r} was not found.")
    if not found:
        raise UnavailableError(
            f"There is no C++ compiler: none of {tried} was found.",
            expected=own is None,
        )
    return list(found.values())


def _words(name: str) -> list[str]:
    """A command and its options; a path may have spaces in it."""
    if shutil.which(name):
        return [name]
    try:
        return shlex.split(name) or [name]
    except ValueError:  # A quotation mark is missing.
        return [name]


def _version(compiler: list[str], deadline: float) -> str:
    """A compiler's version: what it makes needs its libraries."""
    return _run([*compiler, "--version"], deadline, os.environ).stdout


def _folder() -> Path:
    """Folder in which libraries are kept: what is in it is loaded, so that
    nobody else may put anything there."""
    own = os.environ.get("KERAS_RING_CACHE")
    try:
        if own:
            folder = Path(own).absolute()
        else:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
            folder = Path(cache).absolute() / "keras_ring"
        _make(folder)
        problem = distrust(folder, os.geteuid())
    except (OSError, RuntimeError) as error:
        why = f"There is no folder for libraries: {error}"
        raise UnavailableError(why) from error
    if problem:
        raise UnavailableError(
            f"{NOBODY_ELSE} Received: {problem} Or set KERAS_RING_CACHE to "
            "another folder."
        )
    return folder


def _make(folder: Path) -> None:
    """Make a folder, and those above it, for the user alone."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)


@functools.cache
def _machine() -> str:
    """Description of all that `-march=native` depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = {line for line in text.splitlines() if line.startswith(wanted)}
    system = platform.machine(), *platform.libc_ver()
    return "\n".join((*system, *sorted(lines)))


_told: set[str] = set()


def tell(what: str) -> None:
    """Warn once."""
    if what not in _told:
        _told.add(what)
        warnings.warn(what, RuntimeWarning, stacklevel=2)
