"""Functions of Keras and of frameworks that are replaced by wrappers, once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

_MARK = "_keras_ring_wrapped"
Function = Callable[..., Any]
# Object, attribute, and what makes the wrapper of the original.
Target = tuple[Any, str, Callable[[Function], Function]]


def wrap_once(targets: Sequence[Target]) -> None:
    """Replace each target by its wrapper, unless that has been done.

    Raises:
        AttributeError: if there is no such target; then none is replaced.
    """
    originals = [getattr(owner, name) for owner, name, _ in targets]
    for (owner, name, wrap), original in zip(targets, originals, strict=True):
        if not is_wrapper(original):
            setattr(
                owner, name, mark(functools.wraps(original)(wrap(original)))
            )


def is_wrapper(function: Function) -> bool:
    """True if a function is a wrapper already."""
    return bool(getattr(function, _MARK, False))


def mark(function: Function) -> Function:
    """Say of a function that it is a wrapper."""
    setattr(function, _MARK, True)
    return function
