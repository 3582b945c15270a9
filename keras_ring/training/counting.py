"""Losses and metrics of a shard that add up to those of the whole batch.

Each function here wraps one function of Keras, for backends where a layer
sees a shard. In a step it lets Keras see the true data only, and gives what
Keras computes its weight; outside a step it only calls what it wraps. Which
names of Keras these are is said in each backend's `trainer.py`.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import keras
from keras import ops, tree

from keras_ring.distribution.world import World
from keras_ring.keras_internals import (
    added_losses,
    assigned_metrics,
    compiled_losses,
    compiled_metrics,
    defining,
    loss_trackers,
    without_values,
)
from keras_ring.training import position_wise, whole_batch
from keras_ring.training import step as steps
from keras_ring.training.step import Output, Step
from keras_ring.wrapping import Function, Target

_TOLD = "_keras_ring_told_of_steps"

# What Keras reduces now: the output, its prediction, and whether its weights
# are split.
_REDUCED: ContextVar[tuple[Output, Any, bool] | None] = ContextVar(
    "keras_ring_reduced", default=None
)
# The output of which Keras computes losses or metrics now.
_MEASURED: ContextVar[Output | None] = ContextVar(
    "keras_ring_measured", default=None
)


def targets(losses: Any, compiled: Any) -> list[Target]:
    """Functions of Keras to be wrapped, for `wrapping.wrap_once`.

    Args:
        losses: Keras' module of the reduction of losses.
        compiled: Keras' module of what `compile` makes of losses and metrics.

    Raises:
        AttributeError: if Keras has moved one of the names.
    """
    owner = defining(keras.Model, "compute_loss")
    reduced = functools.partial(reduced_loss, losses.apply_mask)
    return [
        (owner, "compute_loss", model_loss),
        (compiled.CompileLoss, "call", outputs(compiled_losses)),
        (keras.losses.Loss, "__call__", loss),
        (losses, "reduce_weighted_values", reduced),
        (compiled.CompileMetrics, "update_state", outputs(compiled_metrics)),
        (compiled.MetricsList, "update_state", output_metrics),
        (keras.metrics.Mean, "update_state", mean_metric),
        (keras.Model, "__call__", model_call),
    ]


def outputs(holder: Callable[[Any], Any]) -> Callable[[Function], Function]:
    """Wrap the call of a model's losses, or of its metrics, and note which
    predictions are outputs of the model.

    Args:
        holder: tells of a model what holds its losses, or its metrics.
    """

    def wrap(original: Function) -> Function:
        def call(
            self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None
        ) -> Any:
            step = steps.running()
            if (
                step is not None
                and step.model is not None
                and self is holder(step.model)
            ):
                step.know_outputs(step.model, y_pred)
            return original(self, y_true, y_pred, sample_weight)

        return call

    return wrap


def model_loss(original: Function) -> Function:
    """Wrap `Model.compute_loss`: refuse losses that layers computed of
    padding."""

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        step = steps.innermost()
        if step is not None and step.padded and self is step.model:
            _check_added_losses(self)
        return original(self, *args, **kwargs)

    return compute_loss


def loss(original: Function) -> Function:
    """Wrap `Loss.__call__`: leave padding out and weight the value by this
    device's part."""

    def call(
        self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> Any:
        step, output = _seen(y_pred)
        if step is None or output is None:
            return original(self, y_true, y_pred, sample_weight)
        if not position_wise.loss(self, y_pred, output.split):
            given = y_true, y_pred, sample_weight
            return whole_batch.loss(original, self, step, output, given)
        _check_lengths(step, output, y_true, y_pred)
        split = sample_weight is not None and step.carries(
            sample_weight, output, y_pred
        )
        if output.padded:
            y_true, y_pred, sample_weight = step.trimmed(
                (y_true, y_pred, sample_weight), output, y_pred, least=1
            )
        if sample_weight is not None:
            # On PyTorch Keras multiplies the weights by its mask in place,
            # and metrics would see weights scaled by a local count.
            sample_weight = ops.copy(sample_weight)
        reduced = output, tree.flatten(y_pred)[0], split
        with _now(_REDUCED, reduced), _now(_MEASURED, output):
            return original(self, y_true, y_pred, sample_weight)

    return call


def reduced_loss(apply_mask: Function, original: Function) -> Function:
    """Wrap the reduction of a loss: weight the value by its share of the
    global count.

    Args:
        apply_mask: Keras' product of a mask and weights.
        original: the function that is wrapped.
    """

    def reduce_weighted_values(
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: str | None = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        value = original(
            values,
            sample_weight=sample_weight,
            mask=mask,
            reduction=reduction,
            dtype=dtype,
        )
        step = steps.running()
        if step is None or reduction in (None, "none") or without_values(value):
            return value
        known = _REDUCED.get()
        output, prediction, weights_split = known or (None, None, True)
        values = ops.convert_to_tensor(values)
        lengthless = output is not None and (
            output.split and not _like(values, prediction)
        )
        if len(values.shape) == 0:
            _check_scalar(output)
            return value
        if reduction == "sum":
            weight = step.sum_weight(output, lengthless)
            return value * _cast(weight, value)
        if reduction == "mean_with_sample_weight" and (
            sample_weight is not None or mask is not None
        ):
            if sample_weight is not None:
                # A copy: Keras may mask it in place, and the gradient needs it.
                sample_weight = ops.copy(
                    ops.convert_to_tensor(sample_weight, dtype=value.dtype)
                )
            count = ops.sum(
                apply_mask(sample_weight, mask, value.dtype, reduction)
            )
            split = weights_split or mask is not None
        elif mask is not None:
            count, split = ops.sum(ops.cast(mask, "float32")), True
        else:
            weight = step.plain_weight(output)
            return value * _cast(weight, value)
        weight = step.counted_weight(
            output,
            ops.stop_gradient(ops.cast(count, "float32")),
            count_split=split,
            mean_over_length=lengthless,
        )
        return value * _cast(weight, value)

    return reduce_weighted_values


def output_metrics(original: Function) -> Function:
    """Wrap the update of the metrics of one output: every true element
    counts once."""

    def update_state(
        self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> Any:
        given = y_true, y_pred, sample_weight
        step, output = _seen(y_pred)
        if step is None or output is None:
            return original(self, *given)
        own: list[Any] = []
        others: list[Any] = []
        for metric in self.metrics:
            fits = step.sums_metrics and position_wise.metric(
                metric, y_pred, output.split
            )
            (own if fits else others).append(metric)
        if others:
            whole_batch.metrics(others, step, output, given)
        if not own or (not output.split and step.sequence_index > 0):
            return None  # Every member of the ring has it; the first counts.
        _check_lengths(step, output, y_true, y_pred)
        if output.padded:
            given = step.trimmed(given, output, y_pred, least=0)
        if output.nothing:
            return None
        with _now(_MEASURED, output):
            for metric in own:
                metric.update_state(given[0], given[1], sample_weight=given[2])
        return None

    return update_state


def model_call(original: Function) -> Function:
    """Wrap `Model.__call__`: remember the outputs, so that a loss computed
    of them by hand belongs to the step."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        step = steps.running()
        if step is not None and step.model in (None, self):
            step.know_outputs(self, result)
        return result

    return call


def mean_metric(original: Function) -> Function:
    """Wrap `Mean.update_state`: weight a device's mean by the number of its
    true positions."""

    def update_state(self: Any, values: Any, sample_weight: Any = None) -> Any:
        step, output = steps.running(), _MEASURED.get()
        if step is None:
            return original(self, values, sample_weight)
        if step.model is None and not step.sums_metrics:
            _tell_of_own_metric(step, self)
        if is_tracker(step.model, self):
            weight = step.tracker_weight()
            if weight is not None:
                sample_weight = weight
            return original(self, values, sample_weight)
        weight = None if output is None else step.mean_weight(output)
        if weight is None:
            return original(self, values, sample_weight)
        values = ops.convert_to_tensor(values)
        if len(values.shape) == 0:
            _check_scalar(output)
        weight = ops.cast(weight, self.dtype)
        if sample_weight is None:
            # One weight for each sample, and no mask: without weights Keras
            # does not look at it.
            values = ops.cast(values, self.dtype) * 1
            sample_weight = ops.broadcast_to(weight, ops.shape(values)[:1])
        else:
            sample_weight = ops.cast(sample_weight, self.dtype) * weight
        return original(self, values, sample_weight)

    return update_state


def is_tracker(model: Any, metric: Any) -> bool:
    """True if a metric is the mean of a loss of a model."""
    return any(metric is tracker for tracker in loss_trackers(model))


def check(world: World, model: Any, *, padded: bool) -> None:
    """Refuse a model whose losses and metrics would not be those of one
    device, where a layer sees a shard.

    Args:
        world: the mesh.
        model: that is about to run a step.
        padded: whether its batches or sequences are padded.

    Raises:
        NotImplementedError: for a model or layers that count something
            themselves.
    """
    steps_of_its_own = [
        name
        for name in ("train_step", "test_step")
        if whole_batch.computes_itself(model, name)
    ]
    own = _own_metrics(model)
    if not steps_of_its_own:
        # `compute_metrics` of the model's own is given the whole batch.
        given_all = (
            assigned_metrics(model)
            if whole_batch.is_given_whole(model, "compute_metrics")
            else ()
        )
        own = [m for m in own if not any(m is other for other in given_all)]
    others = [m.name for m in own if not isinstance(m, _RATIOS)]
    if others and world.sequence_size > 1:
        raise NotImplementedError(
            "A metric that layers or a model update themselves counts on "
            "every device, of which some may see the same elements. It must "
            "be a ratio, such as keras.metrics.Mean, which does not mind. "
            f"Received: the metrics {others} of the model {model.name!r}. "
            "Give them to `compile`, where every element counts once."
        )
    if not padded:
        _tell_of_own_steps(model, steps_of_its_own)
        return
    if steps_of_its_own:
        raise NotImplementedError(
            "Padding cannot be kept out of what a model computes itself. "
            f"Received: the model {model.name!r} with its own "
            f"{', '.join(steps_of_its_own)}, and a batch or length that the "
            f"devices cannot split equally. {_FIX}"
        )
    others = [m.name for m in own if not getattr(m, "updated_by_loss", False)]
    if others:
        raise NotImplementedError(
            "Padding cannot be kept out of metrics that layers or a model "
            f"update themselves. Received: the metrics {others} of the model "
            f"{model.name!r}, and a batch or length that the devices cannot "
            f"split equally. {_FIX}"
        )


def _tell_of_own_steps(model: Any, names: Sequence[str]) -> None:
    """Say once what a step of a model's own sees."""
    if not names or getattr(model, _TOLD, False):
        return
    setattr(model, _TOLD, True)
    warnings.warn(
        f"The {' and '.join(names)} of the model {model.name!r} sees this "
        "device's part of a batch, and its gradients are averaged over the "
        "devices. Losses of `compile`, and those that are means over samples "
        "and positions, are those of one device. Give others what "
        "keras_ring.ops.gather_batch makes whole. The attribute "
        f"`{position_wise.MARK} = True` on the model says that it is right.",
        stacklevel=2,
    )


def _tell_of_own_metric(step: Step, metric: Any) -> None:
    """Say once that a metric counts a part in a function of the user's own."""
    if step.devices == 1 or metric.__dict__.get(_TOLD):
        return
    metric.__dict__[_TOLD] = True
    warnings.warn(
        f"The metric {metric.name!r} is updated in a function that "
        "strategy.run runs. It counts this device's part of a batch, padding "
        "included, unless keras_ring.ops.gather_batch has made whole what it "
        "is updated with. Or return that, and update the metric outside.",
        stacklevel=3,
    )


# Quotients of counts, all of which may be too large by the same factor.
_RATIOS = (
    *(keras.metrics.Mean, keras.metrics.AUC, keras.metrics.IoU),
    *(keras.metrics.Precision, keras.metrics.Recall, keras.metrics.FBetaScore),
)


def _own_metrics(model: Any) -> list[Any]:
    """The metrics of a model that it was not compiled with."""
    compiled = compiled_metrics(model)
    return [
        inner
        for metric in model.metrics
        if metric is not compiled and not is_tracker(model, metric)
        for inner in _leaves(metric)
    ]


def _leaves(metric: Any) -> list[Any]:
    """A metric, or those that it only holds."""
    inner = getattr(metric, "metrics", None)
    if inner is None:
        return [metric]
    return [leaf for each in inner for leaf in _leaves(each)]


_FIX = (
    "Make the length a multiple of `sequence_parallel` (pad, and mask the "
    "padding) and the batch one of `data_parallel`."
)


def _seen(prediction: Any) -> tuple[Step | None, Output | None]:
    """The running step, and what it knows of a prediction."""
    step = steps.running()
    return step, None if step is None else step.output(prediction)


@contextlib.contextmanager
def _now(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _check_added_losses(model: Any) -> None:
    names = added_losses(model)
    if names:
        raise NotImplementedError(
            "Padding cannot be kept out of a loss that a layer adds itself. "
            f"Received: add_loss in {names}, and a batch or length that the "
            f"devices cannot split equally. {_FIX}"
        )


def _check_lengths(
    step: Step, output: Output, y_true: Any, y_pred: Any
) -> None:
    """Refuse labels of another length than an output with the sequence: a
    part of the output could have that length too."""
    if not output.split or step.world.sequence_size == 1:
        return
    for labels in tree.flatten(y_true):
        shape = tuple(getattr(labels, "shape", ()))
        if len(shape) < 2 or shape[1] == 1:
            continue
        if not step.carries(labels, output, y_pred):
            raise ValueError(
                "Labels of an output with a sequence must have the length of "
                "the inputs, or 1, unless their loss is given the whole batch. "
                f"Received: labels of shape {shape}. Give every position one."
            )


def _check_scalar(output: Output | None) -> None:
    if output is not None and output.padded:
        raise NotImplementedError(
            "A loss or metric function must return one value for each sample "
            "or position where devices hold different numbers of them: of "
            "one number for all nobody knows how it adds up. Received: a "
            "function that returns a scalar, and a batch or length that the "
            f"devices cannot split equally. {_FIX}"
        )


def _like(values: Any, prediction: Any) -> bool:
    """True if the values of a loss have the sequence axis."""
    return len(values.shape) > 1 and len(prediction.shape) > 1


def _cast(weight: Any, value: Any) -> Any:
    return (
        weight if isinstance(weight, float) else ops.cast(weight, value.dtype)
    )
