"""The scope of a TensorFlow strategy, and what was made outside of it.

A scope outlives a new default graph, which `keras.utils.clear_session` makes.
Variables of optimizers and metrics that were made outside are mirrored when
they are needed.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import tensorflow as tf

_MARK = "_keras_ring_wrapped"
_THREAD = threading.local()


def install() -> None:
    """Let scopes outlive a new default graph; once, and inert outside of
    them."""
    original = tf.compat.v1.reset_default_graph
    if not getattr(original, _MARK, False):
        tf.compat.v1.reset_default_graph = _reset_default_graph(original)


@contextlib.contextmanager
def scope_of(strategy: tf.distribute.Strategy) -> Iterator[None]:
    """`strategy.scope()`, also where the default graph is reset in it."""
    _enter(strategy)
    try:
        yield
    finally:
        _leave()


def _entered() -> list[tuple[tf.distribute.Strategy, Any]]:
    """Scopes of `scope_of` that this thread is in, with the scope itself."""
    if not hasattr(_THREAD, "entered"):
        _THREAD.entered = []
    entered: list[tuple[tf.distribute.Strategy, Any]] = _THREAD.entered
    return entered


def _enter(strategy: tf.distribute.Strategy) -> None:
    scope = strategy.scope()
    scope.__enter__()
    _entered().append((strategy, scope))


def _leave() -> None:
    _, scope = _entered().pop()
    scope.__exit__(None, None, None)


def _reset_default_graph(original: Callable[[], Any]) -> Callable[[], Any]:
    """A new graph knows no scope, and TensorFlow cannot leave one in it that
    was entered in the old."""

    @functools.wraps(original)
    def reset_default_graph() -> None:
        strategies = [strategy for strategy, _ in _entered()]
        for _ in strategies:
            _leave()
        try:
            original()
        finally:
            for strategy in strategies:
                _enter(strategy)

    setattr(reset_default_graph, _MARK, True)
    return reset_default_graph


def is_of(strategy: tf.distribute.Strategy, variable: Any) -> bool:
    """True if a variable was made in the scope of a strategy."""
    return getattr(variable.value, "distribute_strategy", None) is strategy


def take_over(
    strategy: tf.distribute.Strategy,
    optimizer: Any,
    variables: Iterable[Any],
) -> None:
    """Make what was made outside the scope of a strategy anew in it.

    Args:
        strategy: of this scope.
        optimizer: of a model, or None.
        variables: of the optimizer and of metrics.

    Raises:
        NotImplementedError: if Keras makes variables in another way.
    """
    outside = [v for v in variables if not is_of(strategy, v)]
    try:
        for variable in outside:
            variable._initialize(variable.numpy())
        while optimizer is not None:
            if optimizer._distribution_strategy is not strategy:
                optimizer._distribution_strategy = strategy
            optimizer = getattr(optimizer, "inner_optimizer", None)
    except AttributeError as error:
        raise NotImplementedError(
            "This version of Keras makes variables in a way that keras_ring "
            f"does not know. Received: keras {keras.__version__}, {error}. "
            "Make optimizers and metrics inside `with strategy.scope():`."
        ) from error
