"""Keras' trainer on JAX, and what a strategy changes in it.

What it places a batch by, and the values that it detaches from variables while
it runs steps. Inert without a strategy. Private names of Keras' trainer on JAX
are in this file.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import keras
from keras import tree

from keras_ring.keras_internals import (
    compiled_variables,
    defining,
    unknown_keras,
)
from keras_ring.wrapping import Function, wrap_once

_DETACHED = "_keras_ring_detached"
Current = Callable[[], Any]


def prepare(world: Any, model: Any) -> None:
    """Take over what was made outside the scope; see `World.prepare`.

    Raises:
        ValueError: for a model that lies on other devices.
    """
    devices = set(world.mesh.devices.flat)
    for variable in compiled_variables(model):
        # Made outside the scope: an optimizer, a metric.
        if set(variable.value.sharding.device_set) != devices:
            _take_over(world, variable)
    for variable in model.variables:
        if set(variable.value.sharding.device_set) != devices:
            raise ValueError(
                "A model must be built inside the scope of the strategy "
                "that trains it. Received: the variable "
                f"{variable.path!r} of the model {model.name!r}, which "
                "lies on other devices. Build and compile the model "
                "inside `with strategy.scope():`."
            )


def recover(model: Any) -> None:
    """Give a model its newest values; see `World.recover`."""
    # After an error between steps the trainer has the newest values; of
    # those that a step was given some may be gone.
    state = getattr(model, "_jax_state", None)
    synced = getattr(model, "_jax_state_synced", True)
    if state and not synced and not any(map(_is_gone, tree.flatten(state))):
        model.jax_state_sync()
    # Keras detaches the variables' values while it runs steps.
    for variable, value in model.__dict__.pop(_DETACHED, ()):
        if variable._value is None and not value.is_deleted():
            variable._value = value


def _take_over(world: Any, variable: Any) -> None:
    """Lay a variable out on the mesh, and whatever it is assigned."""
    variable._layout = world.distribution.get_variable_layout(variable)
    variable.assign(variable.value)


def _is_gone(value: Any) -> bool:
    return value is None or (
        isinstance(value, jax.Array) and value.is_deleted()
    )


def install(current: Current) -> None:
    """Teach Keras' trainer two things, once: to place a batch by what the
    model says of each array, and to keep the values that it detaches from the
    variables, see `recover`.

    Args:
        current: tells the active world.

    Raises:
        NotImplementedError: if Keras has moved one of the names.
    """
    try:
        from keras.src.backend.jax import trainer

        wrap_once(
            [
                (
                    trainer,
                    "_distribute_data",
                    functools.partial(_distribute_data, current),
                ),
                (
                    defining(keras.Model, "_get_jax_state"),
                    "_get_jax_state",
                    functools.partial(_get_jax_state, current),
                ),
            ]
        )
    except (ImportError, AttributeError) as error:
        raise unknown_keras(
            "feeds its JAX trainer in a way that keras_ring does not know",
            error,
        ) from error


def _distribute_data(current: Current, distribute: Function) -> Function:
    """Place a batch by what the model says of each array."""

    def distribute_data(
        data: Any, layouts: Any = None, is_super_batch: bool = False
    ) -> Any:
        active = current()
        if active is None or active.model is None:
            # Releases before 3.16 know nothing of several batches in one.
            more = {"is_super_batch": True} if is_super_batch else {}
            return distribute(data, layouts, **more)
        return active.place_batch(data, stacked=is_super_batch)

    return distribute_data


def _get_jax_state(current: Current, detach: Function) -> Function:
    """Keep the values that the trainer detaches from the variables."""

    def get_jax_state(self: Any, *args: Any, **kwargs: Any) -> Any:
        if current() is not None:
            variables = self.variables
            optimizer = getattr(self, "optimizer", None)  # Not compiled.
            if optimizer is not None:
                variables = variables + optimizer.variables
            self.__dict__[_DETACHED] = [
                (variable, variable._value)
                for variable in (*variables, *self.metrics_variables)
                if variable._value is not None
            ]
        return detach(self, *args, **kwargs)

    return get_jax_state
