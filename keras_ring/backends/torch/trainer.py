"""Keras' trainer on PyTorch, and what a strategy changes in it.

Every step of Keras passes through a step function, `optimizer.apply` and
`get_metrics_result`; these, the inference of shapes before the first, the
reduction of a loss and the list of callbacks are wrapped once, and so is
saving. Without an active strategy of more than one process each wrapper only
calls what it wraps. Private names of Keras on PyTorch are in this file, of its
callbacks in `callbacks.py`, and of its global seed in `seeds.py`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_ring.backends.torch import callbacks as ring_callbacks
from keras_ring.backends.torch import (
    saving,
    shared_variables,
    training,
    weights,
)
from keras_ring.backends.torch.member import Member
from keras_ring.backends.torch.processes import groups
from keras_ring.distribution import scopes
from keras_ring.keras_internals import defining, scales_losses, unknown_keras
from keras_ring.training import counting
from keras_ring.training.wrappers import built
from keras_ring.wrapping import is_wrapper, mark, wrap_once

Current = Callable[[], Member | None]


def prepare(world: Member, model: Any) -> None:
    """Before the steps of a model: see `World.prepare`.

    Raises:
        ValueError: for a model that shall be compiled.
    """
    if model.jit_compile:
        raise ValueError(
            "Transfers between processes cannot be compiled. Received: "
            f"jit_compile=True for the model {model.name!r}. Compile it "
            "with jit_compile=False (the default on PyTorch)."
        )
    shared_variables.check(world, model)
    world.agreement.start(model)


def install(current: Current) -> None:
    """Wrap what is named above, once.

    Args:
        current: tells the active world.

    Raises:
        NotImplementedError: if Keras has moved one of the names.
    """
    try:
        from keras.src.losses import loss as loss_module
        from keras.src.optimizers.base_optimizer import BaseOptimizer
        from keras.src.optimizers.loss_scale_optimizer import (
            LossScaleOptimizer,
        )
        from keras.src.trainers import compile_utils

        targets: list[tuple[Any, str, Callable[..., Any]]] = [
            *(
                (defining(keras.Model, name), name, wrap)
                for name, wrap in (
                    ("make_train_function", _steps("train")),
                    ("make_test_function", _steps("test")),
                    ("make_predict_function", _steps("predict")),
                    ("_symbolic_build", _symbolic_build),
                    ("get_metrics_result", _metrics_result),
                )
            ),
            (BaseOptimizer, "apply", _apply),
            (LossScaleOptimizer, "apply", _apply),
            (BaseOptimizer, "scale_loss", _scale_loss),
            (LossScaleOptimizer, "scale_loss", _scale_loss),
            (keras.callbacks.CallbackList, "__init__", _callback_list),
            (keras.Model, "save", _save),
            (keras.Model, "save_weights", _save),
        ]
        targets += shared_variables.targets()
        if hasattr(keras.Model, "_initialize_ddp"):  # From Keras 3.16 on.
            owner = defining(keras.Model, "_initialize_ddp")
            targets.append((owner, "_initialize_ddp", _initialize_ddp))
        wrap_once(
            [
                *counting.targets(loss_module, compile_utils),
                *(
                    (owner, name, functools.partial(_with, wrap, current))
                    for owner, name, wrap in targets
                ),
            ]
        )
        shared_variables.install_properties()
    except (ImportError, AttributeError) as error:
        raise unknown_keras(
            "has another trainer on PyTorch than keras_ring knows", error
        ) from error


def _with(
    wrap: Callable[..., Any], current: Current, original: Callable[..., Any]
) -> Callable[..., Any]:
    return wrap(original, current)


def _steps(kind: str) -> Callable[..., Any]:
    """Step functions that run on this process's part of a global batch."""

    def wrap(make: Callable[..., Any], current: Current) -> Callable[..., Any]:
        attribute = f"{kind}_function"

        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = make(self, *args, **kwargs)
            function = getattr(self, attribute)
            if not is_wrapper(function):
                setattr(self, attribute, _step(self, function, kind, current))
            return result

        return wrapper

    return wrap


def _step(
    model: Any, function: Callable[..., Any], kind: str, current: Current
) -> Callable[..., Any]:
    run = training.predict_step if kind == "predict" else training.run_step

    def step(data: Any) -> Any:
        world = current()
        if world is None or world.size == 1:
            return function(data)
        if world.inside():
            raise NotImplementedError(
                "A step cannot run inside another one under a strategy: it "
                "would take a part of a batch for a whole one. Call the "
                "model itself inside `train_step`, not its fit, evaluate, "
                "predict or *_on_batch."
            )
        # Several, where a model has `steps_per_execution`.
        results = [run(world, model, function, batch) for batch in data]
        return training.joined(results) if kind == "predict" else results[-1]

    return mark(step)


def _symbolic_build(
    original: Callable[..., Any], current: Current
) -> Callable[..., Any]:
    """In mixed precision, infer shapes from this process's part of a batch.

    Keras infers shapes without memory where every layer can do that, and
    computes otherwise. In mixed precision it always computes: there it
    forgets that variables are cast. What it computes is then a part of the
    sequence, and not the whole of it on each process. Models that are not
    built yet, or that a part does not fit (such as one with a gathered
    layer that knows the length), see the whole batch as ever.
    """

    def symbolic_build(
        self: Any, iterator: Any = None, data_batch: Any = None
    ) -> Any:
        world = current()
        if (
            world is None
            or world.size == 1
            or not training.mixed(self)
            or not built(self)
        ):
            return original(self, iterator, data_batch)
        batch = data_batch

        def parts() -> Iterator[Any]:
            """Data that Keras takes its first batch from, if needed."""
            nonlocal batch
            if batch is None:
                _, _, data = next(iter(iterator))
                many = isinstance(data, (list, tuple))
                batch = data[0] if many else next(data)
            yield None, None, [training.own_part(world, self, batch)]

        try:
            return original(self, parts())
        except (ValueError, RuntimeError):
            return original(self, iterator, batch)

    return symbolic_build


def _metrics_result(
    original: Callable[..., Any], current: Current
) -> Callable[..., Any]:
    """Inside a step, sum the metrics over all processes first.

    After a step they are those of all processes. From Keras 3.16 on its
    trainer on PyTorch would add them up again, so the method that it overrides
    is called; also where Keras has no part in the processes, see `_alone`.
    """
    of_every_backend = [
        vars(owner)["get_metrics_result"]
        for owner in keras.Model.__mro__
        if "get_metrics_result" in vars(owner)
    ][-1]

    def get_metrics_result(self: Any) -> Any:
        world: Any = current() or scopes.home([self])
        if world is None or world.size == 1:
            return (of_every_backend if _alone() else original)(self)
        if world.step is not None and world.step.model is self:
            world.step.read_metrics()
        return of_every_backend(self)

    return get_metrics_result


def _initialize_ddp(
    original: Callable[..., Any], current: Current
) -> Callable[..., Any]:
    """No wrapper of PyTorch's around a model that a strategy trains.

    From Keras 3.16 on its trainer wraps every model of a program that has a
    process group. That would average gradients once more, and refuse weights
    that a step does not use.
    """

    def initialize_ddp(self: Any) -> Any:
        world = current()
        if world is None and not _alone():
            return original(self)
        # One of a `fit` before the strategy; PyTorch would register it.
        object.__setattr__(self, "ddp_model", None)
        return None

    return initialize_ddp


def _alone() -> bool:
    """True if a model without a strategy is one of this process alone: where
    the process group is that of the strategies, and Keras was not asked to
    distribute anything. Keras 3.16 would train it on all processes."""
    return groups.made_group() and keras.distribution.distribution() is None


def _apply(
    original: Callable[..., Any], current: Current
) -> Callable[..., Any]:
    """First average the gradients over all processes, on a shard."""

    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        world = current()
        if trainable_variables is not None:
            # It may be gone through once only.
            trainable_variables = list(trainable_variables)
        if world is None:
            owner = _owner(trainable_variables or self._trainable_variables)
            if owner is None:
                return original(self, grads, trainable_variables)
            with owner.scope():
                return apply(self, grads, trainable_variables)
        shares = weights.shared(world, "optimizer")
        if not shares and (world.size == 1 or not world.inside()):
            return original(self, grads, trainable_variables)
        # Optimizers nest: what was averaged is not averaged again.
        with world.applying() as outermost:
            if not outermost:
                return original(self, grads, trainable_variables)
            variables = list(trainable_variables or self._trainable_variables)
            if shares:
                shard = world.strategy.shard
                shared_variables.check_optimizer(self, shard, variables)
                if not self.built:
                    self.build(variables)
            grads = list(grads)
            if world.inside():
                grads = training.reduced_gradients(
                    world, grads, variables, scales_losses(self)
                )
            else:
                # Of the whole batch, the same on each process.
                grads = training.own_parts(grads, variables)
            if not shares:
                return original(self, grads, trainable_variables)
            return shared_variables.apply(
                world,
                lambda own: original(self, own, trainable_variables),
                grads,
                variables,
                # It leaves a step out where a gradient is not finite.
                isinstance(self, keras.optimizers.LossScaleOptimizer),
            )

    return apply


def _owner(variables: Any) -> Member | None:
    """The world whose processes share weights, outside of its scope."""
    parts = map(weights.part_of, variables)
    return next((part.world for part in parts if part is not None), None)


def _scale_loss(
    original: Callable[..., Any], current: Current
) -> Callable[..., Any]:
    """Give each process its share of a loss that is scaled: then gradients
    in half precision are as large as on one device, and overflow alike."""

    def scale_loss(self: Any, loss: Any) -> Any:
        scaled = original(self, loss)
        world = current()
        if world is None or not world.inside() or not scales_losses(self):
            return scaled
        return scaled / world.size

    return scale_loss


def _callback_list(
    original: Callable[..., Any], current: Current
) -> Callable[..., Any]:
    """On other ranks than 0 nothing is printed or written."""

    def initialise(
        self: Any,
        callbacks: Any = None,
        add_history: bool = False,
        add_progbar: bool = False,
        model: Any = None,
        **params: Any,
    ) -> None:
        world = current()
        if world is not None and world.size > 1:
            callbacks = ring_callbacks.for_rank(world, callbacks)
            if world.rank != 0:
                add_progbar = False
                params["verbose"] = 0
        original(self, callbacks, add_history, add_progbar, model, **params)

    return initialise


def _save(original: Callable[..., Any], current: Current) -> Callable[..., Any]:
    """One whole file, whichever processes save."""
    del current
    return saving.whole_files(original)
