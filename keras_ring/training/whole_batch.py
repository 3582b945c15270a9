"""Losses and metrics that are computed of the whole batch.

What may look at several positions or samples at once is given all of them, on
every device, where a step sees a part: predictions, labels and weights are
gathered with exact gradients. All devices come to the same value, so that the
mean over the devices, which a step differentiates and reports, is the value of
one device. `position_wise` says what need not be gathered.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_ring.distribution import strategy
from keras_ring.keras_internals import (
    loss_trackers,
    with_companions,
    wrapped_function,
)
from keras_ring.ops.batch import gather_batch
from keras_ring.training import position_wise
from keras_ring.training import step as steps
from keras_ring.training.step import Output, Step

Function = Callable[..., Any]

_TOLD = "_keras_ring_told"
_OWN = "_keras_ring_whole_batch"


def loss(
    call: Function, loss: Any, step: Step, output: Output, given: Any
) -> Any:
    """The value of a loss of one output, of all its rows and positions.

    Args:
        call: Keras' own call of a loss.
        loss: the `keras.losses.Loss`.
        step: that runs.
        output: of the model.
        given: `(y_true, y_pred, sample_weight)` of this device.
    """
    whole = _gathered(step, output, given)
    _tell_once(step, loss, f"The loss {loss.name!r}", whole)
    with _seeing_everything():
        return call(loss, *whole)


def metrics(
    metrics: Sequence[Any], step: Step, output: Output, given: Any
) -> None:
    """Update metrics of one output by all its rows and positions.

    Args:
        metrics: of the output.
        step: that runs.
        output: of the model.
        given: `(y_true, y_pred, sample_weight)` of this device.
    """
    y_true, y_pred, sample_weight = _gathered(step, output, given)
    for metric in metrics:
        # Those of Keras that need it are of its own making, such as F1Score.
        if type(metric).__module__.split(".")[0] != keras.__name__ or (
            wrapped_function(metric) is not None
        ):
            what = f"The metric {metric.name!r}"
            _tell_once(step, metric, what, (y_true, y_pred, sample_weight))
    with step.full_state(metrics), _seeing_everything():
        for metric in metrics:
            metric.update_state(y_true, y_pred, sample_weight=sample_weight)


@contextlib.contextmanager
def own_methods(model: Any) -> Iterator[None]:
    """Return a context in which a model's own `compute_loss` and
    `compute_metrics` are given the whole batch."""
    before = {}
    for name, reads in (
        ("compute_loss", lambda model: []),
        ("compute_metrics", _counted),
    ):
        if computes_itself(model, name):
            before[name] = model.__dict__.get(name)
            method = _given_whole(model, getattr(model, name), reads)
            setattr(method, _OWN, True)
            # Not by assignment, which Keras would look into.
            model.__dict__[name] = method
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                del model.__dict__[name]
            else:
                model.__dict__[name] = method


def computes_itself(model: Any, name: str) -> bool:
    """True if a method of a model is not Keras' own, and not said to be right
    on a shard."""
    method = getattr(model, name)
    function = getattr(method, "__func__", method)
    return (
        function is not getattr(keras.Model, name)
        and not getattr(function, _OWN, False)
        and not position_wise.marked(function)
        and not position_wise.marked(model)
    )


def is_given_whole(model: Any, name: str) -> bool:
    """True if a method of a model is given the whole batch now."""
    return getattr(model.__dict__.get(name), _OWN, False)


def _given_whole(
    model: Any, method: Function, reads: Callable[[Any], list[Any]]
) -> Function:
    """A method of a model that is given the whole batch in a step.

    Args:
        model: whose method it is.
        method: takes `x`, `y`, `y_pred` and `sample_weight`.
        reads: of a model, the metrics that the method updates and reads.
    """

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        step = steps.running()
        if step is None or step.model is not model:
            return method(*args, **kwargs)
        what = f"The {method.__name__} of the model {model.name!r}"
        args, kwargs = _gathered_arguments(step, what, args, kwargs)
        with step.full_state(reads(model)), _seeing_everything():
            return method(*args, **kwargs)

    return call


def _counted(model: Any) -> list[Any]:
    """The metrics of a model, but for those that its losses feed, which count
    on each device by itself."""
    fed = set(map(id, loss_trackers(model)))
    return [
        metric
        for metric in model.metrics
        if id(metric) not in fed
        and not getattr(metric, "updated_by_loss", False)
    ]


def _gathered_arguments(
    step: Step, what: str, args: Any, kwargs: Any
) -> tuple[Any, Any]:
    """The arguments of a model's method, with whole tensors."""
    names = ("x", "y", "y_pred", "sample_weight")
    outputs = dict(zip(names, args, strict=False)) | kwargs
    if outputs.get("y_pred") is not None:
        step.know_outputs(step.model, outputs["y_pred"])
    whole = tree.map_structure(
        lambda leaf: (
            _gather(leaf, step.split(leaf)) if _is_batch(leaf) else leaf
        ),
        (args, kwargs),
    )
    tensors = [leaf for leaf in tree.flatten(whole) if _is_batch(leaf)]
    _tell_once(step, step.model, what, tensors)
    return whole


def _gathered(step: Step, output: Output, given: Any) -> Any:
    """`(y_true, y_pred, sample_weight)` of all rows and positions."""
    prediction = given[1]

    def whole(leaf: Any) -> Any:
        if not _is_batch(leaf):
            return leaf
        return _gather(leaf, step.carries(leaf, output, prediction))

    return tree.map_structure(whole, given)


def _is_batch(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and len(leaf.shape) > 0


def _gather(tensor: Any, sequence: bool) -> Any:
    return with_companions(
        tensor,
        lambda part, name: gather_batch(part, sequence and len(part.shape) > 1),
    )


@contextlib.contextmanager
def _seeing_everything() -> Iterator[None]:
    """Return a context in which code, which was given the whole batch, is as
    on one device."""
    with strategy.suspended(), steps.paused():
        yield


def _tell_once(step: Step, owner: Any, what: str, whole: Any) -> None:
    """Say what is gathered for a loss or metric, on one device."""
    nothing = step.devices == 1 or getattr(owner, _TOLD, False)
    if nothing or (step.data_index, step.sequence_index) != (0, 0):
        return
    setattr(owner, _TOLD, True)
    leaves = [leaf for leaf in tree.flatten(whole) if _is_batch(leaf)]
    warnings.warn(
        f"{what} may look at several positions or samples at once, so that "
        "every device gathers the whole predictions and labels for it: "
        f"{_bytes(leaves)}. The result is that of one device. If there is "
        "one value for each position, of this position alone, whose mean "
        f"Keras takes, set the attribute `{position_wise.MARK} = True` on "
        "the function or class: then it is computed shard by shard, and "
        "nothing is gathered.",
        stacklevel=2,
    )


def _bytes(tensors: Sequence[Any]) -> str:
    """Bytes of memory that tensors take; of sizes that a program leaves open,
    how much for each of these."""
    fixed, scaled = 0, 0
    for tensor in tensors:
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        size = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
        known = [n for n in tensor.shape if isinstance(n, int)]
        if len(known) == len(tensor.shape):
            fixed += size * math.prod(known)
        else:
            scaled += size * math.prod(known)
    parts = [f"{fixed:,} bytes in a step"] if fixed or not scaled else []
    parts += [f"{scaled:,} bytes for each row and position"] if scaled else []
    return " and ".join(parts)
