"""Keras' trainer, losses, metrics and optimizers on TensorFlow, and what a
strategy changes in them.

A model is given steps of its own; what is wrapped only calls what it wraps
where no step runs. Private names of these on TensorFlow are in this file, those
of optimizers also in `gradients.py`, and in `scope.py` those of what was made
outside of a scope.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import tree

from keras_ring.backends.tensorflow import (
    gradients,
    scope,
    training,
    updates,
)
from keras_ring.backends.tensorflow.member import Member
from keras_ring.keras_internals import (
    compiled_variables,
    defining,
    sublayers,
    unknown_keras,
)
from keras_ring.training import counting, step
from keras_ring.wrapping import wrap_once

_STEP = "keras_ring_step"


def prepare(world: Member, model: Any) -> None:
    """Give a model the steps of its world."""
    optimizer = getattr(model, "optimizer", None)
    scope.take_over(world.tf_strategy, optimizer, compiled_variables(model))
    _check_model(world, model)
    if len(world.devices) > 1:
        _check_compiled(model)
    for name, make in (
        (
            "train_function",
            functools.partial(training.steps, name="train_step"),
        ),
        ("test_function", functools.partial(training.steps, name="test_step")),
        ("predict_function", training.predictions),
    ):
        # `compile` drops the functions, and so they are made anew after it.
        if getattr(getattr(model, name), _STEP, None) is not world:
            function = make(world, model)
            setattr(function, _STEP, world)
            setattr(model, name, function)


def _check_model(world: Member, model: Any) -> None:
    outside = [
        variable.path
        for variable in model.variables
        if not scope.is_of(world.tf_strategy, variable)
    ]
    if outside:
        raise ValueError(
            "A model must be built and compiled inside the scope of the "
            "strategy that trains it. Received: "
            f"{len(outside)} variables of the model {model.name!r} made "
            f"elsewhere, such as {outside[0]!r}. Build and compile the model "
            "inside `with strategy.scope():`."
        )


def _check_compiled(model: Any) -> None:
    """Refuse what would be silently wrong when each replica does its part."""
    if model.compiled and model.jit_compile:
        raise ValueError(
            "TensorFlow cannot compile a step over several replicas with XLA. "
            f"Received: jit_compile=True on the model {model.name!r}. Compile "
            "the model with jit_compile='auto' or False."
        )
    for loss in _losses(model):
        reduction = getattr(loss, "reduction", "sum_over_batch_size")
        if reduction in ("none", None):
            raise NotImplementedError(
                "A loss under a strategy must be reduced to one number. "
                f"Received: reduction={reduction!r} of {loss.name!r}. Use "
                "reduction='sum_over_batch_size'."
            )


def _losses(model: Any) -> list[Any]:
    """The loss objects that a model was compiled with."""
    given = getattr(model, "loss", None) if model.compiled else None
    if given is None or callable(getattr(given, "__func__", None)):
        return []
    return [
        loss
        for loss in tree.flatten(given)
        if isinstance(loss, keras.losses.Loss)
    ]


def install(current: Callable[[], Any]) -> None:
    """Wrap what `counting` is about, and let scopes last, once.

    Args:
        current: tells the active world; on TensorFlow its steps know theirs.

    Raises:
        NotImplementedError: if Keras has moved one of the names.
    """
    del current
    scope.install()
    try:
        from keras.src.backend.tensorflow.optimizer import TFOptimizer
        from keras.src.losses import loss as loss_module
        from keras.src.optimizers.base_optimizer import BaseOptimizer
        from keras.src.optimizers.loss_scale_optimizer import (
            LossScaleOptimizer,
        )
        from keras.src.trainers import compile_utils

        wrap_once(
            [
                *counting.targets(loss_module, compile_utils),
                (loss_module, "scale_loss_for_distribution", _as_it_is),
                (loss_module, "unscale_loss_for_distribution", _as_it_is),
                *(
                    (optimizer, *wrapped)
                    for optimizer in (BaseOptimizer, LossScaleOptimizer)
                    for wrapped in (
                        ("apply", gradients.apply),
                        ("scale_loss", gradients.scale_loss),
                    )
                ),
                (
                    TFOptimizer,
                    "_all_reduce_sum_gradients",
                    gradients.all_reduce_sum_gradients,
                ),
                (
                    BaseOptimizer,
                    "_backend_apply_gradients",
                    gradients.backend_apply_gradients,
                ),
                (
                    TFOptimizer,
                    "_distributed_tf_update_step",
                    updates.distributed_update_step,
                ),
                (keras.layers.Layer, "add_loss", _add_loss),
                (keras.layers.Layer, "_get_own_losses", _own_losses),
                (keras.layers.Layer, "_clear_losses", _clear_losses),
                (
                    defining(keras.Model, "_maybe_symbolic_build"),
                    "_maybe_symbolic_build",
                    _maybe_symbolic_build,
                ),
            ]
        )
    except (ImportError, AttributeError) as error:
        raise unknown_keras(
            "has other losses, metrics or optimizers than keras_ring knows",
            error,
        ) from error


def _as_it_is(original: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of a replica stays what it is: the objective is the mean over
    the replicas. Keras would make it the replica's share of a sum."""

    def scaled(value: Any) -> Any:
        strategy = tf.distribute.get_strategy()
        return value if hasattr(strategy, "ring_world") else original(value)

    return scaled


def _add_loss(original: Callable[..., Any]) -> Callable[..., Any]:
    """The losses that layers add, for each replica by itself: to Keras the
    replicas' calls of a layer look like one."""

    def add_loss(self: Any, loss: Any) -> None:
        original(self, loss)
        running = step.innermost()
        if running is not None:
            running.added.setdefault(id(self), []).extend(tree.flatten(loss))

    return add_loss


def _own_losses(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_own_losses(self: Any) -> list[Any]:
        running = step.innermost()
        if running is None:
            return list(original(self))
        return list(running.added.get(id(self), ()))

    return get_own_losses


def _clear_losses(original: Callable[..., Any]) -> Callable[..., Any]:
    def clear_losses(self: Any) -> None:
        original(self)
        running = step.innermost()
        if running is not None:
            running.added.pop(id(self), None)

    return clear_losses


def _maybe_symbolic_build(original: Callable[..., Any]) -> Callable[..., Any]:
    """Infer shapes from what the data are said to be.

    Under a strategy, and only there, Keras draws a first batch for it: the
    batch is lost if it comes of a generator, and what shuffles draws another
    order than on one device. It still does so where the shapes of the data
    are not known and the model is not built.
    """

    def maybe_symbolic_build(
        self: Any, iterator: Any = None, data_batch: Any = None
    ) -> Any:
        world = getattr(tf.distribute.get_strategy(), "ring_world", None)
        if world is not None and world.model is not None and data_batch is None:
            batch = _described(iterator, batches_only=not _built(self))
            if batch is not None:
                iterator, data_batch = None, batch
        return original(self, iterator, data_batch)

    return maybe_symbolic_build


def _built(model: Any) -> bool:
    return all(layer.built for layer in sublayers(model, recursive=True))


def _described(iterator: Any, *, batches_only: bool) -> Any:
    """A batch of symbols, from the specification of a dataset.

    Args:
        iterator: Keras' iterator of epochs.
        batches_only: no other axis than that of the batch may be open.

    Returns:
        None if not enough is known of the shapes.
    """
    dataset = getattr(iterator, "_distributed_dataset", None)
    specification = getattr(dataset, "element_spec", None)
    if specification is None:
        return None
    known = True

    def symbol(spec: Any) -> Any:
        nonlocal known
        if spec is None or isinstance(spec, tf.OptionalSpec):
            return None
        if not isinstance(spec, tf.TensorSpec) or spec.shape.rank is None:
            known = False
            return None
        shape = tuple(spec.shape)
        known = known and not (batches_only and None in shape[1:])
        dtype = keras.backend.standardize_dtype(spec.dtype)
        return keras.KerasTensor(shape, dtype)

    symbols = tf.nest.map_structure(symbol, specification)
    return symbols if known else None
