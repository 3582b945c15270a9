"""Tests that need the C++ library."""

import sys
from pathlib import Path

import pytest

from keras_ring.attention.native import library


def needed(load):
    """A mark that skips where there is no compiler. One that fails is no
    reason to skip: the code may be wrong.

    Args:
        load: nullary, compiles and loads what is needed.
    """
    why = ""
    try:
        load()
    except library.UnavailableError as error:
        if not error.expected:
            raise
        why = str(error)
    return pytest.mark.skipif(bool(why), reason=f"no C++ library: {why}")


NEEDED = needed(lambda: library.build("attention", [library.ATTENTION]))


# A command that prints the library made of the source that follows. It loads
# no framework, which takes longer than to compile.
BUILDING = [
    *(sys.executable, "-c"),
    "import pathlib, sys, types\n"
    "package = types.ModuleType('keras_ring')\n"
    f"package.__path__ = [{str(Path(library.__file__).parent.parent)!r}]\n"
    "sys.modules['keras_ring'] = package\n"
    "from keras_ring.attention.native import library\n"
    "print(library.build('small', [pathlib.Path(sys.argv[1])]))\n",
]
