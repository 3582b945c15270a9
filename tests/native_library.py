"""Whether the C++ library can be compiled here."""

import pytest

from keras_ring.native import library


def _why():
    try:
        library.build("attention", [library.ATTENTION])
    except library.UnavailableError as error:
        return str(error)
    return ""


WHY = _why()
NEEDED = pytest.mark.skipif(bool(WHY), reason=f"no C++ library: {WHY}")
