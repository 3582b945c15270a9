"""How the C++ library comes to be, and that it is refused where it cannot."""

import ctypes
import os
import shutil
import stat
import subprocess
import warnings
from pathlib import Path

import pytest
from keras import ops

from keras_ring.attention.native import kernel, library
from keras_ring.masks import Causal, Padding, SlidingWindow
from keras_ring.masks.band import FAR
from keras_ring.masks.by_position import Before
from tests.native_library import BUILDING, NEEDED

pytestmark = pytest.mark.once
SOURCE = 'extern "C" __attribute__((visibility("default")))\nint answer() {'


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A small library of one function, and a folder for it."""
    monkeypatch.setenv("KERAS_RING_CACHE", str(tmp_path / "kept"))
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE + " return 42; }\n")
    return path


@NEEDED
def test_it_is_compiled_once(source, monkeypatch):
    made = library.build("small", [source])
    assert ctypes.CDLL(str(made)).answer() == 42
    assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(
        library, "_compile", lambda *_: pytest.fail("compiled again")
    )
    assert library.build("small", [source]) == made


@NEEDED
def test_other_code_flags_or_processors_make_another(source, monkeypatch):
    made = {library.build("small", [source])}
    made.add(library.build("small", [source], ["-DMORE"]))
    source.write_text(SOURCE + " return 43; }\n")
    made.add(library.build("small", [source]))
    monkeypatch.setattr(library, "_machine", lambda: "another")
    made.add(library.build("small", [source]))
    monkeypatch.setattr(library, "_version", lambda *_: "another")
    made.add(library.build("small", [source]))
    assert len(made) == 5
    # What is made on the way does not stay.
    assert {made.pop().parent} == {path.parent for path in made}
    assert len(list(made.pop().parent.glob("*"))) == 6


@NEEDED
def test_any_file_that_is_included_makes_another(source, monkeypatch):
    """By the compiler's own list, which leaves out no file of the folder."""
    here = source.parent / "native"
    shutil.copytree(library.HERE, here)
    unit = here / library.ATTENTION.name
    monkeypatch.setattr(library, "HERE", here)
    monkeypatch.setattr(
        library, "_compile", lambda command, folder, stem, deadline: stem
    )
    command = [*library._compilers()[0], "-std=c++17", "-MM", str(unit)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    files = [
        Path(word) for word in listed.stdout.split() if word[-1] not in ":\\"
    ]
    assert set(files) == {*here.glob("*.cpp"), *here.glob("*.h")}
    made = {library.build("attention", [unit])}
    for path in files:
        path.write_text(path.read_text() + "// More.\n")
        made.add(library.build("attention", [unit]))
    assert len(made) == 1 + len(files)


@NEEDED
def test_what_is_kept_may_be_read_only(source, monkeypatch):
    """As in an image that somebody else has made."""
    made = library.build("small", [source])
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert library.build("small", [source]) == made
    with pytest.raises(library.UnavailableError, match="cannot be written"):
        library.build("other", [source])


@NEEDED
def test_processes_that_compile_at_once_do_not_disturb_each_other(source):
    processes = [
        subprocess.Popen([*BUILDING, str(source)], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    made = {process.communicate()[0].decode().strip() for process in processes}
    assert ctypes.CDLL(made.pop()).answer() == 42
    assert made == set()
    folder = os.environ["KERAS_RING_CACHE"]
    assert len(list(Path(folder).glob("*.so"))) == 1


@NEEDED
def test_a_compiler_that_fails_says_why(source):
    source.write_text("this is no C++")
    with pytest.raises(
        library.UnavailableError, match=r"failed with 1: .*error"
    ):
        library.build("small", [source])
    assert os.listdir(os.environ["KERAS_RING_CACHE"]) == [".lock"]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("KERAS_RING_CXX", "", "KERAS_RING_CXX is empty"),
        ("PATH", "", "no C.. compiler"),
        ("KERAS_RING_CACHE", "/dev/null/folder", "no folder"),
    ],
)
def test_what_is_missing_is_said(source, monkeypatch, variable, value, message):
    if variable == "KERAS_RING_CACHE":
        monkeypatch.setattr(library, "_compilers", lambda: [["true"]])
    monkeypatch.setenv(variable, value)
    with pytest.raises(library.UnavailableError, match=message):
        library.build("small", [source])


def test_what_failed_is_not_tried_again():
    calls = []

    def load():
        calls.append(1)
        if len(calls) == 1:
            raise AttributeError("a name of another release")
        return "library"

    once = library.Once(load)
    for _ in range(2):
        with pytest.raises(
            library.UnavailableError, match="AttributeError: a name"
        ):
            once()
    assert len(calls) == 1
    once = library.Once(load)
    assert [once(), once()] == ["library", "library"]
    assert len(calls) == 2


def test_only_a_failure_is_told_of(monkeypatch):
    class Failing(kernel.NativeKernel):
        call_forward = call_backward = None

        def __init__(self, why, expected=False):
            self.why = library.UnavailableError(why, expected)

        def load(self):
            raise self.why

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert not Failing("There is no C++ compiler", True).preferred(
            "cpu", "float32"
        )
    with pytest.warns(RuntimeWarning, match="'native' is not used: c.. failed"):
        assert not Failing("c++ failed with 1: ...").preferred("cpu", "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # Once.
        assert not Failing("c++ failed with 1: ...").preferred("cpu", "float32")


def test_masks_that_are_bands():
    def counts(pairs, length):
        return [
            [
                pairs.least <= i - j <= pairs.most
                and j < pairs.stop
                and i < pairs.rows
                for j in range(length)
            ]
            for i in range(length)
        ]

    assert counts(kernel.band(None), 2) == [[True, True], [True, True]]
    assert counts(kernel.band(Causal()), 2) == [[True, False], [True, True]]
    window = kernel.band(SlidingWindow(2) & Causal() & Before(3))
    assert counts(window, 4) == [
        [True, False, False, False],
        [True, True, False, False],
        [False, True, True, False],
        [False, False, True, False],
    ]
    assert kernel.band(SlidingWindow(2**70)).most < 2**62
    assert kernel.band(Causal() | SlidingWindow(2)) is None
    assert kernel.band(Causal() & Padding(None)) is None
    padded = kernel.band(Before(1) & Before(2, queries=True))
    assert counts(padded, 3) == [[True, False, False]] * 2 + [[False] * 3]


def test_limits_that_are_tensors():
    """Where padding begins, in a program of lengths that vary."""
    limit = ops.convert_to_tensor(3, "int32")
    mask = Causal() & Before(limit) & Before(limit, queries=True)
    assert kernel.band(mask) is None
    assert kernel.band(mask, open_limits=True) == (0, FAR, limit, limit)
    twice = kernel.band(Before(limit) & Before(2), open_limits=True)
    assert int(twice.stop) == 2


@NEEDED
@pytest.mark.parametrize(
    ("processor", "sanitizer"),
    [
        ("native", "thread"),
        ("baseline", "address,undefined"),
        pytest.param("native", "address,undefined", marks=pytest.mark.extra),
        pytest.param("baseline", "thread", marks=pytest.mark.extra),
    ],
)
def test_random_visits_under_sanitizers(processor, sanitizer, tmp_path):
    """Nothing is read or written that is not there, and threads do not meet;
    with the vectors of this processor and with the shortest."""
    options = [
        *("-std=c++17", "-O1", "-pthread", f"-I{library.HERE}"),
        *(f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"),
        *(["-march=native"] if processor == "native" else []),
    ]
    program = tmp_path / "cases"

    def compiled(*sources):
        command = [*library._compilers()[0], *options, *sources, "-o", program]
        return subprocess.run(command, capture_output=True, text=True)

    nothing = tmp_path / "nothing.cpp"
    nothing.write_text("int main() {}\n")
    made = compiled(nothing)
    if made.returncode or subprocess.run([program]).returncode:
        pytest.skip(f"no sanitizer {sanitizer} here: {made.stderr[-300:]}")
    cases = Path(__file__).with_name("native_cases.cpp")
    made = compiled(library.ATTENTION, cases)
    assert made.returncode == 0, made.stderr
    found = subprocess.run(
        [str(program), "50"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout == "50 cases\n"
