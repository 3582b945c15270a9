"""The errors of this package, as it raised them."""

import contextlib
from collections.abc import Iterator


def original(error: BaseException) -> BaseException:
    """The error that another was made of. Around every layer Keras makes a
    new one with more text, and raises it in place of what it caught."""
    while error.__suppress_context__ and error.__cause__ is None:
        inner = error.__context__
        if inner is None or not str(inner) or str(inner) not in str(error):
            break
        error = inner
    return error


@contextlib.contextmanager
def as_raised() -> Iterator[None]:
    """Let errors of this package out as they were raised, so that what is
    printed last is the package's own message."""
    try:
        yield
        return
    except Exception as error:
        found = original(error)
        if found is error or not _raised_here(found):
            raise
    # Outside of the handler, or the other would be its context.
    raise found


def _raised_here(error: BaseException) -> bool:
    """True if the last frame of a traceback is of this package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    name = trace.tb_frame.f_globals.get("__name__", "")
    return str(name).partition(".")[0] == __name__.partition(".")[0]
