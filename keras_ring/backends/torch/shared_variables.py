"""Keras' variables and optimizers on PyTorch, where processes share weights.

A variable of which this process keeps a part still looks whole to all code but
an optimizer's. Inert for variables that processes do not share. Private names
of these parts of Keras are in this file.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch

from keras_ring.backends.torch import training, weights
from keras_ring.backends.torch.member import Member
from keras_ring.backends.torch.weights import Reading
from keras_ring.keras_internals import defining
from keras_ring.wrapping import is_wrapper, mark

Current = Callable[[], Member | None]


def check(world: Member, model: Any) -> None:
    """Before the steps of a model whose weights are shared.

    Raises:
        ValueError: for a model or an optimizer that was made outside the
            scope, and for an optimizer that does not update each number by
            itself.
    """
    if not weights.shared(world, "optimizer"):
        return
    shard = world.strategy.shard
    in_backward()  # Refuses a release without it.
    for variable in model.trainable_variables:
        part = weights.part_of(variable)
        if part is None and shard == "weights":
            raise ValueError(
                'A model with shard="weights" must be built inside the scope '
                f"of its strategy. Received: the variable {variable.path!r} "
                f"of the model {model.name!r}, which is whole. Build and "
                "compile the model inside `with strategy.scope():`."
            )
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        check_optimizer(optimizer, shard, model.trainable_variables)


def check_optimizer(
    optimizer: Any, shard: str, variables: Sequence[Any]
) -> None:
    """Refuse an optimizer that cannot work on parts, see `check`."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    names = ", ".join(weights.BY_ELEMENT)
    if not _by_element(optimizer):
        raise ValueError(
            "On PyTorch processes can share what an optimizer keeps where it "
            "updates each number of a weight by that number's gradient alone. "
            f"Received: {type(optimizer).__name__} with shard={shard!r}. Use "
            f'one of {names}, the backend JAX, or shard="none".'
        )
    for variable in variables:
        if variable.constraint is not None:
            raise ValueError(
                "A constraint needs the whole of a weight, of which a process "
                f"has a part. Received: {variable.path!r} with the constraint "
                f"{type(variable.constraint).__name__} and shard={shard!r}. "
                'Leave the constraint out, use the backend JAX, or shard="'
                'none".'
            )
    if optimizer.built and any(
        len(slot.shape) and weights.part_of(slot) is None
        for slot in optimizer.variables
    ):
        raise ValueError(
            "An optimizer whose state is shared must be built inside the "
            f"scope of the strategy. Received: {optimizer.name!r}, built "
            f"outside of it, with shard={shard!r}. Compile the model with a "
            "new one inside `with strategy.scope():`."
        )


# Methods of an optimizer that see gradients, or weights with them.
_UPDATES = (
    *("apply", "apply_gradients", "update_step", "_clip_gradients"),
    *("_apply_weight_decay", "_backend_apply_gradients"),
    "_backend_update_step",
)


def _by_element(optimizer: Any) -> bool:
    """True for Keras' own optimizers of `weights.BY_ELEMENT`, and for classes
    made of them that have no update of their own."""
    kind = type(optimizer)
    base = next(
        (c for c in kind.__mro__ if c.__name__ in vars(keras.optimizers)),
        None,
    )
    return (
        base is not None
        and base.__name__ in weights.BY_ELEMENT
        and base.__module__.partition(".")[0] == "keras"
        and all(
            getattr(kind, name).__module__.partition(".")[0] == "keras"
            for name in _UPDATES
            if hasattr(kind, name)
        )
    )


def apply(
    world: Member,
    update: Callable[[list[Any]], Any],
    gradients: Sequence[Any],
    variables: Sequence[Any],
    scaled: bool,
) -> Any:
    """Update this process' parts of weights.

    Args:
        world: the processes.
        update: applies gradients.
        gradients: this process' parts of everyone's means.
        variables: whose gradients these are.
        scaled: whether a step is left out where a gradient is not finite.
    """
    gradients = list(gradients)
    if scaled:
        gradients = weights.alike(world, gradients)
    with weights.reading(Reading.PART):
        result = update(gradients)
    for variable in variables:
        if weights.lies_in_parts(variable):
            variable._value.grad = None
    weights.gather_updated(variables)
    return result


@functools.cache
def _graph_task() -> Callable[[], int]:
    """Function that gives the number of the backward that runs, or -1.

    Raises:
        NotImplementedError: for a release of PyTorch that has none.
    """
    found = getattr(torch._C, "_current_graph_task_id", None)
    if found is None:
        raise NotImplementedError(
            "This release of PyTorch does not say whether a backward runs, "
            "which weights in parts need. Received: torch "
            f'{torch.__version__}. Use PyTorch 2.13, or shard="none".'
        )
    task: Callable[[], int] = found
    return task


def in_backward() -> bool:
    """True while gradients are computed, when a block that is computed again
    may read a weight that has some already."""
    return _graph_task()() != -1


def targets() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Methods of Keras that are wrapped, for `trainer.install`."""
    from keras.src.backend.torch.layer import TorchLayer
    from keras.src.optimizers.base_optimizer import BaseOptimizer

    variable = keras.Variable
    return [
        (defining(variable, "_initialize"), "_initialize", _initialize),
        (defining(variable, "_direct_assign"), "_direct_assign", _assign),
        (TorchLayer, "_track_variables", _tracking),
        (TorchLayer, "_post_track_variable", _tracking),
        (BaseOptimizer, "add_variable_from_reference", _add_slot),
        (BaseOptimizer, "_clip_gradients", _clip_gradients),
    ]


def install_properties() -> None:
    """Let shared variables look whole, and like parts to an optimizer."""
    from keras.src.backend.common.stateless_scope import (
        get_stateless_scope,
        in_stateless_scope,
    )

    def value(original: Callable[[Any], Any], self: Any) -> Any:
        found = original(self)
        part = weights.part_of(self)
        if part is None or found.is_meta:
            return found
        if in_stateless_scope() and (
            get_stateless_scope().get_current_value(self) is not None
        ):
            return found
        if weights.reads(Reading.PART):
            return weights.flat(self, part)
        if weights.reads(Reading.KEPT):
            return self._value
        if part.keeps_whole:
            return found
        own = self._value
        if own.grad is not None and not in_backward():
            # After a backward, whose gradients somebody asks for.
            if training.keeps_part(part.world, self):
                return own
            return weights.with_gradient(part, own)
        return weights.gathered(part, own, found.dtype)

    def shape(original: Callable[[Any], Any], self: Any) -> Any:
        part = weights.part_of(self)
        if part is None or not weights.reads(Reading.PART):
            return original(self)
        return (part.stop - part.start,)

    for name, read in (("value", value), ("shape", shape)):
        owner = defining(keras.Variable, name)
        known: Any = vars(owner)[name]
        if not is_wrapper(known.fget):
            wrapper = functools.wraps(known.fget)(
                functools.partial(read, known.fget)
            )
            setattr(owner, name, known.getter(mark(wrapper)))


def _initialize(
    original: Callable[..., Any], current: Current
) -> Callable[..., Any]:
    """Of a new weight keep this process' part."""

    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        world = current()
        if (
            world is None
            or not weights.shared(world, "weights")
            or not self.trainable
            or weights.reads(Reading.PART)
            or self._value.is_meta
        ):
            return
        if args and isinstance(args[0], torch.nn.Parameter):
            # That of a module of PyTorch's, which computes with it.
            weights.keep_whole(self, world)
        else:
            weights.keep_part(self, world)

    return initialize


def _assign(
    original: Callable[..., Any], current: Current
) -> Callable[..., Any]:
    """Of a new value keep this process' part."""
    del current

    def direct_assign(self: Any, value: Any) -> Any:
        part = weights.part_of(self)
        if part is None or (
            part.keeps_whole and not weights.reads(Reading.PART)
        ):
            return original(self, value)
        if not weights.reads(Reading.PART):
            part.remember(value)
            value = part.cut(value)
        with torch.no_grad():
            return weights.flat(self, part).copy_(value)

    return direct_assign


def _tracking(
    original: Callable[..., Any], current: Current
) -> Callable[..., Any]:
    """PyTorch's parameters of a layer are what this process keeps."""
    del current

    def track(self: Any, *args: Any, **kwargs: Any) -> Any:
        with weights.reading(Reading.KEPT):
            return original(self, *args, **kwargs)

    return track


def _add_slot(
    original: Callable[..., Any], current: Current
) -> Callable[..., Any]:
    """The state that an optimizer keeps of a shared weight is as large as the
    part."""

    def add_variable_from_reference(
        self: Any, reference_variable: Any, *args: Any, **kwargs: Any
    ) -> Any:
        world = current()
        if world is not None and weights.shared(world, "optimizer"):
            weights.keep_whole(reference_variable, world)
        with weights.reading(Reading.PART):
            slot = original(self, reference_variable, *args, **kwargs)
        weights.keep_slot(slot, reference_variable)
        return slot

    return add_variable_from_reference


def _clip_gradients(
    original: Callable[..., Any], current: Current
) -> Callable[..., Any]:
    """A norm is that of the whole gradient, of which this process has a
    part."""

    def clip_gradients(self: Any, grads: Any) -> Any:
        world = current()
        limit = self.clipnorm or self.global_clipnorm
        if world is None or not weights.reads(Reading.PART) or not limit:
            return original(self, grads)
        present = [g for g in grads if g is not None]
        found = weights.norms(world, present)
        factor = limit / torch.clamp(found, min=limit)
        if not self.clipnorm:
            norm = torch.linalg.vector_norm(found)
            # No number where the norm is none, as in Keras.
            factor = limit / torch.clamp(norm, min=limit) + (norm - norm)
            factor = factor.expand(len(present))
        factors = iter(factor)
        return [
            None if g is None else g * next(factors).to(g.dtype) for g in grads
        ]

    return clip_gradients
