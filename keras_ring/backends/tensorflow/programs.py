"""Programs over all replicas: how they are traced, and how they fail."""

import functools
import gc
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_ring.backends.tensorflow.member import Member

# What a collective raises when its other side is gone.
_TRANSFER_ERRORS = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)


def compiled(
    world: Member, program: Callable[..., Any], eager: bool = False
) -> Callable[..., Any]:
    """A program over all replicas as a `tf.function`, unless eager."""
    if eager:
        if not world.placed:
            raise NotImplementedError(
                "A ring across processes runs in compiled functions only, "
                "because every transfer waits for its other side. Received: "
                "run_eagerly=True. Compile the model without it."
            )
        return program
    # Placed copies take any size; a broadcast is best off with known ones.
    program = tf.function(
        _with_few_collections(program),
        autograph=False,
        reduce_retracing=world.placed,
    )

    def guarded(*arguments: Any) -> Any:
        try:
            return program(*arguments)
        except _TRANSFER_ERRORS as error:
            if world.placed:
                raise
            raise RuntimeError(
                "A transfer between the members of the ring failed or did "
                "not finish in time: another worker has died, hangs or has "
                "raised an error of its own, which its log shows. Received: "
                f"timeout={world.strategy.timeout}, {world.workers} workers, "
                f"{type(error).__name__}: {error.message[:300]} Transfers stay "
                "broken after this. Restart all workers, from a checkpoint, "
                "and raise the strategy's `timeout` if a step takes longer."
            ) from error

    guarded.traced = program  # type: ignore[attr-defined]
    return guarded


def _with_few_collections(program: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is traced with few searches for garbage. The trace of
    all replicas is millions of objects that stay, and is gone through at each
    search."""

    @functools.wraps(program)
    def traced(*arguments: Any, **named: Any) -> Any:
        before = gc.get_threshold()
        if before[0]:  # Zero is no search at all.
            gc.set_threshold(max(before[0], 100_000), *before[1:])
        try:
            return program(*arguments, **named)
        finally:
            gc.set_threshold(*before)

    return traced
