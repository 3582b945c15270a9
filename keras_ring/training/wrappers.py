"""Preparation of models that Keras trains under a strategy.

`install()` wraps the public methods of `keras.Model` that run steps. A
model that was built under a strategy is checked and then handed to Keras'
own method, inside the scope wherever that is called; every other model goes
straight through. How the steps themselves are spread over devices is the
business of each backend's `trainer.py`.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras
from keras import tree

from keras_ring import backends, errors
from keras_ring.distribution import scopes, strategy
from keras_ring.distribution.world import World
from keras_ring.keras_internals import sublayers
from keras_ring.training import (
    batches,
    checkpoints,
    counting,
    guard,
    indexing,
    whole_batch,
)
from keras_ring.wrapping import Target, wrap_once


def install() -> None:
    """Make `fit`, `evaluate`, `predict` and the `*_on_batch` methods know
    strategies, and files of models know no backend; let layers remember the
    scope that they were made in, and `compile` use it. Does nothing where it
    has been done; without a strategy the methods are Keras' own."""
    steps = ("fit", "evaluate", "predict")
    on_batch = ("train_on_batch", "test_on_batch", "predict_on_batch")
    wrappers: dict[str, Callable[..., Any]] = {
        **{name: _under_strategy for name in (*steps, *on_batch)},
        "get_compile_config": checkpoints.saved,
        "compile_from_config": checkpoints.loaded,
    }
    # Where Keras defines it: models that override it are told by that.
    trainer = next(c for c in keras.Model.__mro__ if "compile" in vars(c))
    targets: list[Target] = [
        *((keras.Model, name, wrap) for name, wrap in wrappers.items()),
        (trainer, "compile", _at_home),
        (keras.layers.Layer, "__new__", _remembering),
        *indexing.targets(),
    ]
    wrap_once(targets)
    backend = backends.load()
    backend.trainer.install(backend.runtime.current)


def model_world(model: Any) -> World | None:
    """The world that a model belongs to: the active one, or else the one
    under which its ring layers were built, or anything of it was made.

    Raises:
        ValueError: if layers were built under another one.
    """
    active = strategy.current()
    built = {
        id(layer._ring_world): layer
        for layer in sublayers(model, recursive=True)
        if getattr(layer, "built", False) and hasattr(layer, "_ring_world")
    }
    worlds = [layer._ring_world for layer in built.values()]
    if active is None:
        worlds = [world for world in worlds if world is not None]
        if len(worlds) > 1:
            raise ValueError(
                "All layers of a model must be built under one strategy. "
                f"Received: layers of {len(worlds)} strategies in the model "
                f"{model.name!r}. Build it anew inside one strategy.scope()."
            )
        active = worlds[0] if worlds else _home(model)
        if active is None:
            return None
    for layer in built.values():
        if layer._ring_world is not active:
            where = (
                "outside any scope"
                if layer._ring_world is None
                else "in the scope of another strategy"
            )
            raise ValueError(
                "A model must be built inside the scope of the strategy that "
                f"trains it. Received: the layer {layer.name!r} of the model "
                f"{model.name!r}, built {where}. Build the model inside "
                "`with strategy.scope():` (and load its weights there)."
            )
    return active


def _home(model: Any) -> World | None:
    """The world that something of a model was made under, or None."""
    return scopes.home([model, *sublayers(model, recursive=True)])


def _remembering(original: Callable[..., Any]) -> Callable[..., Any]:
    """Layers, and so models, remember the scope that they are made in."""

    @functools.wraps(original)
    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        layer = original(cls, *args, **kwargs)
        scopes.remember(layer, strategy.current())
        return layer

    return new


def _at_home(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make what `compile` makes belong to the scope of the model."""

    @functools.wraps(method)
    def compile_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        active = strategy.current()
        if active is not None:
            scopes.remember(self, active)
            return method(self, *args, **kwargs)
        home = _home(self)
        with contextlib.nullcontext() if home is None else home.scope():
            return method(self, *args, **kwargs)

    return compile_model


def _under_strategy(method: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        world = model_world(self)
        if world is None:
            return method(self, *args, **kwargs)
        scopes.remember(self, world)
        seen = _own_methods(world, self)
        with (
            errors.as_raised(),
            world.call(),
            world.scope(),
            _running(world, self),
            seen,
        ):
            bound = signature.bind(self, *args, **kwargs)
            known = self in world.lengths or built(self)
            if known or not world.layers_see_shards:
                check(world, self, bound.arguments.get("x"))
            if method.__name__ in ("fit", "train_on_batch"):
                check_overwritten(world, self.trainable_variables)
            _check_arguments(world, self, bound)
            world.prepare(self)
            try:
                return method(self, *args, **kwargs)
            finally:
                world.recover(self)

    return wrapper


def check(world: World, model: Any, x: Any = None) -> None:
    """Refuse a model that would be wrong in a step of a world, and find out
    which of its lengths are split; for a model that is built.

    Args:
        world: whose step it is.
        model: that is about to run it.
        x: what the model is given, if that is known.
    """
    fixed = world.fixed_lengths.get(model)
    if fixed is None and world.layers_see_shards and world.sequence_size > 1:
        fixed = guard.fixed_lengths.find(model)
        world.fixed_lengths[model] = fixed
    world.lengths[model] = guard.check(model, world, fixed, x)
    if fixed is not None and not world.lengths[model].whole:
        for part in fixed.models:
            _open_inputs(world, part, fixed.opened)


def check_overwritten(world: World, variables: Iterable[Any]) -> None:
    """Refuse to train variables that are no parameters: the scales of float8
    are given in place of a gradient, and follow the largest number of the
    whole batch, which no mean over devices is.

    Raises:
        ValueError: where a layer sees a part of the batch.
    """
    if not world.layers_see_shards:
        return
    for variable in variables:
        if getattr(variable, "overwrite_with_gradient", False):
            raise ValueError(
                "Layers that are quantized to float8 can be trained on one "
                "device, and under a strategy on JAX. Received: the variable "
                f"{variable.path!r}, whose gradient overwrites it. Train "
                "before model.quantize('float8'), or use the dtype policy "
                "'mixed_bfloat16'."
            )


def ready(world: World, model: Any, batch: Any) -> None:
    """Before a step on shards: build a model that is not built yet, of whole
    sequences, and check it.

    Args:
        world: whose step it is.
        model: that is about to run it.
        batch: the whole batch, `x`, `(x,)`, `(x, y)` or `(x, y,
            sample_weight)`.
    """
    if model in world.lengths:
        return
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not built(model):
        model(tree.map_structure(_symbol, x))
    check(world, model, x)


def built(model: Any) -> bool:
    """True if a model has all of its variables."""
    if getattr(model, "outputs", None):
        return True  # It has a graph.
    layers = [model, *sublayers(model, recursive=True)]
    return all(layer.built for layer in layers)


def _symbol(leaf: Any) -> Any:
    if leaf is None:
        return None
    dtype = keras.backend.standardize_dtype(leaf.dtype)
    return keras.KerasTensor(tuple(leaf.shape), dtype)


def _open_inputs(world: World, model: Any, opened: Any) -> None:
    """Let a model with a graph take shards of its fixed lengths. Its inputs
    are checked by `batches` meanwhile."""
    specs = model.input_spec
    if not isinstance(specs, list):
        return
    # By shape: the specifications of a dictionary have another order.
    shapes = {tuple(s.shape)[1:] for s in model.inputs if id(s) in opened}
    changed = [copy.copy(spec) for spec in specs]
    for spec in changed:
        if spec.shape is not None and tuple(spec.shape)[1:] in shapes:
            spec.shape = (spec.shape[0], None, *spec.shape[2:])
    world.closed_inputs.append((model, specs))
    model.input_spec = changed


@contextmanager
def _running(world: World, model: Any) -> Iterator[None]:
    """Name the model whose steps run; calls can nest (validation)."""
    previous, world.model = world.model, model
    closed = len(world.closed_inputs)
    try:
        yield
    finally:
        world.model = previous
        while len(world.closed_inputs) > closed:
            part, specs = world.closed_inputs.pop()
            part.input_spec = specs


def _own_methods(world: World, model: Any) -> AbstractContextManager[None]:
    """Give the whole batch to what a model computes itself of it."""
    if world.layers_see_shards and world.layout.size() > 1:
        return whole_batch.own_methods(model)
    return nullcontext()


def _check_arguments(
    world: World, model: Any, bound: inspect.BoundArguments
) -> None:
    """Refuse what would count wrongly before anything runs."""
    given = bound.arguments
    batches.check_not_empty(
        {name: given.get(name) for name in ("x", "y", "sample_weight")}
    )
    if not world.layers_see_shards or "y" not in bound.signature.parameters:
        return  # Nothing is padded there; predictions are trimmed.
    parts = [given.get(name) for name in ("x", "y", "sample_weight")]
    # The *_on_batch methods have no batch_size: they are given one batch.
    in_batches = "batch_size" in bound.signature.parameters
    batch_size = given.get("batch_size") if in_batches else 0
    padded = batches.needs_padding(
        world,
        model,
        parts,
        batch_size,
        given.get("validation_split") or 0.0,
    )
    validation = given.get("validation_data")
    if isinstance(validation, (tuple, list)):
        padded = padded or batches.needs_padding(
            world,
            model,
            list(validation),
            given.get("validation_batch_size") or batch_size,
        )
    counting.check(world, model, padded=padded)
