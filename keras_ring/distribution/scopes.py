"""Scopes: the active strategy, and the one that a layer was made under.

The record of what is active is the package's own: Keras forgets its
distribution when `clear_session` is called, and some of its backends do more
with one than is meant here. It is kept for each thread, as Keras' is.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from keras_ring.distribution.world import World

_THREAD = threading.local()
_HOME = "_keras_ring_home"


def active() -> World | None:
    """The world whose scope this thread is in, or None."""
    world: World | None = getattr(_THREAD, "world", None)
    return world


@contextlib.contextmanager
def entered(world: World) -> Iterator[bool]:
    """Code in here is in the scope of a world.

    Yields:
        Whether it was not before: scopes of one world nest.

    Raises:
        ValueError: in the scope of another one.
    """
    previous = active()
    if previous is not None and previous is not world:
        raise ValueError(
            "Only one distribution can be active at a time. Received: a "
            f"scope inside the scope of {previous.strategy!r}. Leave that "
            "scope first."
        )
    _THREAD.world = world
    try:
        yield previous is None
    finally:
        _THREAD.world = previous


def remember(part: Any, world: World | None) -> None:
    """Remember the world that a layer or model was made or used under."""
    if world is not None:
        # Not by Keras' own way, which tracks what a layer is given.
        part.__dict__[_HOME] = world


def home(parts: Iterable[Any]) -> World | None:
    """The world of the first of some layers that has one: under which it was
    made or used."""
    homes = (part.__dict__.get(_HOME) for part in parts)
    return next((world for world in homes if world is not None), None)
