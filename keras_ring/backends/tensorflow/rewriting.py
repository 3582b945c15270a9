"""How much TensorFlow rewrites the program of a step before its first run.

TensorFlow's optimizer of graphs (Grappler) looks at all that a program does
on every replica, which is a third of the time to the first step of a ring of
four. Two of its passes are most of that, and find next to nothing: programs
of Keras have their constants folded by Python already.

The private name of TensorFlow is in this file alone. Without it programs are
rewritten as all are.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

# Fields of TensorFlow's RewriterConfig, which are on where they are not set.
SPARED = ("constant_folding", "dependency_optimization")


@contextlib.contextmanager
def spared() -> Iterator[None]:
    """Programs that run in here for the first time are not rewritten by
    these passes, unless `tf.config.optimizer` says that they shall be."""
    context = _context()
    if context is None:
        yield
        return
    before = context.function_call_options
    context.function_call_options = _less(before)
    try:
        yield
    finally:
        context.function_call_options = before


def _context() -> Any:
    """What holds the options of calls in this thread; None if unknown."""
    try:
        from tensorflow.python.eager import context as eager

        context = eager.context()
        options = context.function_call_options
        known = isinstance(options.config_proto_serialized, bytes)
    except (ImportError, AttributeError):
        return None
    return context if known else None


def _less(options: Any) -> Any:
    config = _config(options.config_proto_serialized)
    return type(options)(options.executor_type, config)


@functools.lru_cache(8)
def _config(given: bytes) -> Any:
    config = tf.compat.v1.ConfigProto.FromString(given)
    rewriting = config.graph_options.rewrite_options
    for name in SPARED:
        if getattr(rewriting, name) == rewriting.DEFAULT:
            setattr(rewriting, name, rewriting.OFF)
    return config
