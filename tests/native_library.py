"""Tests that need the C++ library."""

import pytest

from keras_ring.native import library


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
