"""Where keras_ring takes part in Keras' losses, metrics and optimizers on
TensorFlow.

What is wrapped only calls what it wraps where no step runs. All private
names of these on TensorFlow are in this file.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from keras_ring import counting, step

_SUMMED: ContextVar[bool] = ContextVar("keras_ring_summed", default=False)


def install() -> None:
    """Wrap what `counting` is about, once.

    Raises:
        NotImplementedError: if Keras has moved one of the names.
    """
    try:
        from keras.src.backend.tensorflow.optimizer import TFOptimizer
        from keras.src.losses import loss as loss_module
        from keras.src.optimizers.base_optimizer import BaseOptimizer
        from keras.src.optimizers.loss_scale_optimizer import (
            LossScaleOptimizer,
        )
        from keras.src.trainers import compile_utils
        from keras.src.trainers.trainer import Trainer

        reduced = functools.partial(
            counting.reduced_loss, loss_module.apply_mask
        )
        counting.wrap_once(
            [
                (Trainer, "compute_loss", counting.model_loss),
                (
                    compile_utils.CompileLoss,
                    "call",
                    counting.outputs("_compile_loss"),
                ),
                (keras.losses.Loss, "__call__", counting.loss),
                (loss_module, "reduce_weighted_values", reduced),
                (
                    compile_utils.CompileMetrics,
                    "update_state",
                    counting.outputs("_compile_metrics"),
                ),
                (
                    compile_utils.MetricsList,
                    "update_state",
                    counting.output_metrics,
                ),
                (keras.metrics.Mean, "update_state", counting.mean_metric),
                (BaseOptimizer, "apply", _apply),
                (LossScaleOptimizer, "apply", _apply),
                (TFOptimizer, "_all_reduce_sum_gradients", _add_up),
                (keras.layers.Layer, "add_loss", _add_loss),
                (keras.layers.Layer, "_get_own_losses", _own_losses),
                (keras.layers.Layer, "_clear_losses", _clear_losses),
            ]
        )
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(
            "This version of Keras has other losses, metrics or optimizers "
            f"than keras_ring knows. Received: keras {keras.__version__}, "
            f"{error}. Use Keras 3.15."
        ) from error


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    """Inside a step, add the gradients up over all replicas first: an
    optimizer that clips them, or looks for an overflow, must see their sum.
    Keras adds them up afterwards."""

    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        if step.running() is None or _SUMMED.get():
            return original(self, grads, trainable_variables)
        grads = list(grads)
        sums = iter(
            tf.distribute.get_replica_context().all_reduce(
                tf.distribute.ReduceOp.SUM, [g for g in grads if g is not None]
            )
        )
        grads = [None if g is None else next(sums) for g in grads]
        # Optimizers nest.
        token = _SUMMED.set(True)
        try:
            return original(self, grads, trainable_variables)
        finally:
            _SUMMED.reset(token)

    return apply


def _add_up(original: Callable[..., Any]) -> Callable[..., Any]:
    """Not again what `_apply` has added up. A loss scale applies its inner
    optimizer in other threads than that of the step."""

    def all_reduce_sum_gradients(self: Any, grads_and_vars: Any) -> Any:
        world = getattr(tf.distribute.get_strategy(), "ring_world", None)
        if world is None or world.model is None:
            return original(self, grads_and_vars)
        return list(grads_and_vars)

    return all_reduce_sum_gradients


def _add_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """The losses that layers add, for each replica by itself: to Keras the
    replicas' calls of a layer look like one."""

    def add_loss(self: Any, loss: Any) -> None:
        original(self, loss)
        running = step.running()
        if running is not None:
            running.added.setdefault(id(self), []).extend(tree.flatten(loss))

    return add_loss


def _own_losses(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_own_losses(self: Any) -> list[Any]:
        running = step.running()
        if running is None:
            return list(original(self))
        return list(running.added.get(id(self), ()))

    return get_own_losses


def _clear_losses(original: Callable[..., Any]) -> Callable[..., Any]:
    def clear_losses(self: Any) -> None:
        original(self)
        running = step.running()
        if running is not None:
            running.added.pop(id(self), None)

    return clear_losses
