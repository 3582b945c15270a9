"""Keras' trainer on JAX, and what a strategy changes in it.

What it places a batch by, the values that it detaches from variables while it
runs steps, and where sharded weights are whole. Inert without a strategy.
Private names of Keras' trainer on JAX are in this file.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import keras
from keras import tree

from keras_ring.backends.jax import weights
from keras_ring.keras_internals import (
    compiled_variables,
    defining,
    unknown_keras,
)
from keras_ring.wrapping import Function, is_wrapper, mark, wrap_once

_DETACHED = "_keras_ring_detached"
Current = Callable[[], Any]


def prepare(world: Any, model: Any) -> None:
    """Take over what was made outside the scope; see `World.prepare`.

    Raises:
        ValueError: for a model that lies on other devices.
    """
    devices = set(world.mesh.devices.flat)
    optimizer = getattr(model, "optimizer", None)
    slots = {id(v) for v in getattr(optimizer, "variables", ())}
    for variable in compiled_variables(model):
        # Made outside the scope: an optimizer, a metric.
        if set(variable.value.sharding.device_set) != devices:
            _take_over(world, variable, id(variable) in slots)
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


def _take_over(world: Any, variable: Any, slot: bool) -> None:
    """Lay a variable out on the mesh, and whatever it is assigned; in parts if
    it is a slot of an optimizer, where these are shared."""
    layout = world.distribution.get_variable_layout(variable)
    if slot and world.strategy.shard != "none":
        layout = world.distribution.in_parts(layout, variable.shape)
    variable._layout = layout
    variable.assign(variable.value)


def _is_gone(value: Any) -> bool:
    return value is None or (
        isinstance(value, jax.Array) and value.is_deleted()
    )


def install(current: Current) -> None:
    """Teach Keras' trainer three things, once: to place a batch by what the
    model says of each array, to keep the values that it detaches from the
    variables, see `recover`, and to use weights of which each device keeps a
    part.

    Args:
        current: tells the active world.

    Raises:
        NotImplementedError: if Keras has moved one of the names.
    """
    try:
        from keras.src.backend.jax import trainer
        from keras.src.optimizers.loss_scale_optimizer import (
            LossScaleOptimizer,
        )

        optimizer = keras.optimizers.Optimizer
        wrappers: list[tuple[Any, str, Any]] = [
            (trainer, "_distribute_data", _distribute_data),
            (
                defining(keras.Model, "_get_jax_state"),
                "_get_jax_state",
                _get_jax_state,
            ),
            *(
                (defining(optimizer, name), name, wrap)
                for name, wrap in (
                    ("add_variable", _add_variable),
                    ("stateless_apply", _stateless_apply),
                )
            ),
            (LossScaleOptimizer, "stateless_apply", _stateless_apply),
        ]
        wrap_once(
            [
                (owner, name, functools.partial(wrap, current))
                for owner, name, wrap in wrappers
            ]
        )
        _install_value(current)
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


def _install_value(current: Current) -> None:
    """Make a sharded weight whole where a program reads it."""
    owner: Any = defining(keras.Variable, "value")
    original: Any = vars(owner)["value"]
    if is_wrapper(original.fget):
        return

    @functools.wraps(original.fget)
    def value(self: Any) -> Any:
        found = original.fget(self)
        if not isinstance(found, jax.core.Tracer) or weights.reads_parts():
            return found
        active = current()
        if active is None or not active.gathers_weights:
            return found
        layout = getattr(self, "_layout", None)
        sharding = getattr(layout, "backend_layout", layout)
        if not weights.is_shared(sharding):
            return found
        return weights.gathered(found, sharding)

    owner.value = original.getter(mark(value))


def _add_variable(current: Current, add: Function) -> Function:
    """The state that an optimizer keeps of a weight lies in parts."""

    def add_variable(
        self: Any,
        shape: Any,
        *args: Any,
        layout: Any = None,
        **kwargs: Any,
    ) -> Any:
        active = current()
        if active is not None and active.strategy.shard != "none":
            layout = active.distribution.in_parts(layout, shape)
        return add(self, shape, *args, layout=layout, **kwargs)

    return add_variable


def _stateless_apply(current: Current, apply: Function) -> Function:
    """An optimizer works on parts: each device updates its own."""

    def stateless_apply(
        self: Any,
        optimizer_variables: Any,
        grads: Any,
        trainable_variables: Any,
    ) -> Any:
        active = current()
        if active is None or not (
            active.gathers_weights or active.strategy.shard == "optimizer"
        ):
            return apply(self, optimizer_variables, grads, trainable_variables)
        variables = self._trainable_variables
        layouts = [getattr(variable, "_layout", None) for variable in variables]
        parts = [
            active.distribution.in_parts(layout, variable.shape)
            for layout, variable in zip(layouts, variables, strict=True)
        ]
        place = keras.distribution.distribute_tensor
        with weights.in_parts():
            updated, kept = apply(
                self,
                optimizer_variables,
                list(map(place, grads, parts)),
                list(map(place, trainable_variables, parts)),
            )
        return [
            new if layout is None else place(new, layout)
            for new, layout in zip(updated, layouts, strict=True)
        ], kept

    return stateless_apply
