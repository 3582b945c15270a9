"""One step of fit, evaluate or predict on this process's part of a batch.

A step runs Keras' own code on this process' shard. What makes the result
that of one device happens at three places: a loss with a local denominator
is weighted by its share of the global one, the gradients are averaged over
all processes before the optimizer sees them, and what the metrics added up
is summed over all processes before their result is read.

The objective that is differentiated is the mean of everyone's loss.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import torch
from keras import tree

from keras_ring.backends.torch import weights
from keras_ring.backends.torch.member import Member
from keras_ring.distribution.padding import PaddedAxis
from keras_ring.keras_internals import sublayers
from keras_ring.training import batches, counting, step, wrappers


class Step(step.Step):
    """A step while Keras runs it."""

    world: Member

    def __init__(
        self,
        world: Member,
        model: Any,
        batch: Any,
        splits: Any,
        axes: tuple[PaddedAxis, PaddedAxis] | None = None,
    ):
        rows, lengths = axes or batches.axes(world, batch, splits)
        self.local = tree.map_structure(
            lambda leaf, split: (
                None
                if leaf is None
                else world.shard(leaf, bool(split), rows, lengths)
            ),
            batch,
            splits,
        )
        super().__init__(
            world,
            model,
            place=world.place(),
            rows=rows,
            lengths=lengths,
            local=self.local,
            splits=splits,
            everyones_sum=world.everyone.sum,
            sums_metrics=model is not None,
        )
        self.results_read = False
        # Identities of the weights that it trains, when they are asked for.
        self.trained: set[int] | None = None
        # By the identity of a metric's variable: what it was before the step,
        # of those that count this step alone; and those that know it all.
        self._before: dict[int, tuple[Any, torch.Tensor]] = {}
        self._started: list[tuple[Any, torch.Tensor]] = []
        self._whole: dict[int, Any] = {}

    @classmethod
    def of_batch(cls, world: Member, model: Any, batch: Any) -> "Step":
        """The step of a model that is given a global batch."""
        return cls(
            world, model, batch, batches.split_batch(world, model, batch)
        )

    # Metrics.

    def start_metrics(self) -> None:
        """Let the metrics count this step alone, from zero."""
        for variable in self._metric_variables():
            value = variable.value.detach()
            self._before[id(variable)] = (variable, value.clone())
            variable.assign(torch.zeros_like(value))
        self._started = list(self._before.values())

    def sum_metrics(self) -> None:
        """Add everyone's counts of this step to what was there before."""
        self._sum(
            [v for v in self._metric_variables() if id(v) not in self._whole]
        )

    @contextlib.contextmanager
    def full_state(self, metrics: Sequence[Any]) -> Iterator[None]:
        self._sum(
            [v for v in _variables(metrics).values() if id(v) in self._before]
        )
        try:
            yield
        finally:
            # Some are made by the first update.
            self._whole.update(_variables(metrics))

    def _sum(self, variables: Sequence[Any]) -> None:
        added = _summed(self.world, [v.value.detach() for v in variables])
        for variable, counts in zip(variables, added, strict=True):
            _, before = self._before.pop(id(variable), (None, None))
            variable.assign(counts if before is None else before + counts)

    def read_metrics(self) -> None:
        """Called before results are read inside a step."""
        if not self.results_read:
            self.sum_metrics()
            self.results_read = True

    def finish(self, logs: Any) -> Any:
        """The global logs of a step.

        What Keras computes is global by now. A `train_step` of the user's
        may have read a metric itself, or added a number of its own: the one
        is read again, the other averaged.
        """
        metrics = {metric.name: metric for metric in self.model.metrics}
        # As this process read them, in case the step has done so.
        results = {name: m.result() for name, m in metrics.items()}
        if not self.results_read:
            self.read_metrics()
        if not isinstance(logs, dict):
            return logs
        known = self.model.get_metrics_result()
        if _computed_by_keras(self.model) and set(logs) <= set(known):
            return {name: known[name] for name in logs}
        values = {
            name: keras.ops.convert_to_tensor(value)
            for name, value in logs.items()
        }
        sources = [
            [_same(value, results[name]) for name in metrics]
            for value in values.values()
        ]
        device = next(iter(values.values())).device if values else None
        flags = torch.tensor(sources, dtype=torch.float32, device=device)
        *means, agreed = (
            total / self.world.size
            for total in _summed(
                self.world,
                [*(v.to(torch.float32) for v in values.values()), flags],
            )
        )
        for name, mean, row in zip(values, means, agreed.tolist(), strict=True):
            # Every process must have read it of the same metric.
            read = [
                m for m, share in zip(metrics, row, strict=True) if share == 1
            ]
            source = name if name in read or not read else read[0]
            values[name] = metrics[source].result() if read else mean
        return values

    def restore_metrics(self) -> None:
        """After an error: the counts before the step."""
        for variable, before in self._started:
            variable.assign(before)
        self._before.clear()

    def _metric_variables(self) -> list[Any]:
        variables = _variables(self.model.metrics)
        for variable in variables.values():
            if variable.aggregation not in ("sum", "none"):
                raise NotImplementedError(
                    "Only metrics whose state adds up over devices are "
                    "supported under a strategy. Received: the metric "
                    f"variable {variable.path!r} with aggregation="
                    f"{variable.aggregation!r}."
                )
        return list(variables.values())


def _computed_by_keras(model: Any) -> bool:
    """True if the steps of a model, and their logs, are Keras' own."""
    return all(
        getattr(type(model), name) is getattr(keras.Model, name)
        for name in ("train_step", "test_step", "compute_metrics")
    )


def _same(value: torch.Tensor, result: Any) -> bool:
    return (
        isinstance(result, torch.Tensor)
        and result.shape == value.shape
        and torch.equal(result.to(value.dtype), value)
    )


def _variables(metrics: Sequence[Any]) -> dict[int, Any]:
    return {id(v): v for metric in metrics for v in metric.variables}


def reduced_gradients(
    world: Member,
    gradients: Sequence[Any],
    variables: Sequence[Any],
    summed: bool,
) -> list[Any]:
    """Everyone's mean gradient of each variable (the sum, if the losses have
    been divided by the number of processes), in one transfer per dtype; None
    where there is none. Of weights that processes share it is this process'
    part of that."""
    wrappers.check_overwritten(world, variables)
    present = [g is not None for g in gradients]
    world.agreement.check_gradients(present, variables)
    count = 1 if summed else world.size
    pairs = list(zip(gradients, map(weights.part_of, variables), strict=True))
    everyones = iter(
        _summed(
            world,
            [g for g, part in pairs if g is not None and _is_whole(part)],
        )
    )

    def mean(gradient: Any, part: Any, variable: Any) -> Any:
        if gradient is None:
            return None
        if _is_whole(part):
            gradient = next(everyones) / count
            return gradient if part is None else part.cut(gradient)
        if keeps_part(world, variable):
            return gradient / count  # The backward has added them up.
        # What a step of the user's saw are means.
        return part.cut(gradient) * (world.size / count)

    return [
        mean(*pair, variable)
        for pair, variable in zip(pairs, variables, strict=True)
    ]


def _is_whole(part: Any) -> bool:
    """True for a weight of which each process has a gradient of its own."""
    return part is None or part.keeps_whole


def own_parts(gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """This process' parts of whole gradients."""
    return [
        g if g is None or part is None else part.cut(g)
        for g, part in zip(
            gradients, map(weights.part_of, variables), strict=True
        )
    ]


def keeps_part(world: Member, variable: Any) -> bool:
    """True for a weight in a step of Keras' own, which does nothing with its
    gradient but apply it: there this process' part of that is enough."""
    running: Any = world.step
    if running is None or not _steps_of_keras(running.model):
        return False
    if running.trained is None:
        running.trained = {id(v) for v in running.model.trainable_variables}
    return id(variable) in running.trained


def _steps_of_keras(model: Any) -> bool:
    return model is not None and (
        getattr(type(model), "train_step", None) is keras.Model.train_step
    )


def _forget_gradients(model: Any) -> None:
    """Before a step of Keras' own: of one that ended with an error parts of
    gradients may be left, after which weights would be read as parts."""
    if _steps_of_keras(model):
        for variable in model.trainable_variables:
            if weights.lies_in_parts(variable):
                variable._value.grad = None


def run_step(
    world: Member, model: Any, function: Callable[..., Any], batch: Any
) -> Any:
    """A step of fit or evaluate on this process's part of a batch; gives
    the global logs."""
    wrappers.ready(world, model, batch)
    world.agreement.check(model, batch)
    own = Step.of_batch(world, model, batch)
    counting.check(world, model, padded=own.padded)
    previous, world.step = world.step, own
    own.start_metrics()
    try:
        _forget_gradients(model)
        with (
            world.stepping(),
            step.run(own),
            world.agreement.own_seeds(model),
        ):
            logs = function([own.local])
        return own.finish(logs)
    except BaseException:
        own.restore_metrics()
        raise
    finally:
        world.step = previous


def predict_step(
    world: Member, model: Any, function: Callable[..., Any], batch: Any
) -> Any:
    """The global predictions for a global batch."""
    wrappers.ready(world, model, batch)
    world.agreement.check(model, batch)
    own = Step.of_batch(world, model, batch)
    with world.stepping(), step.run(own), world.agreement.own_seeds(model):
        outputs = function([own.local])
    carries = batches.split_outputs(world, model, outputs, own.local_lengths)
    return tree.map_structure(
        lambda output, split: world.unshard(
            keras.ops.convert_to_tensor(output), split, own.rows, own.lengths
        ),
        outputs,
        carries,
    )


def joined(outputs: Sequence[Any]) -> Any:
    """The predictions for several batches in one."""
    if len(outputs) == 1:
        return outputs[0]
    return tree.map_structure(lambda *parts: torch.cat(parts), *outputs)


def mixed(model: Any) -> bool:
    """True if some layer computes in another dtype than its variables."""
    layers = [model, *sublayers(model, recursive=True)]
    return any(x.compute_dtype != x.variable_dtype for x in layers)


def own_part(world: Member, model: Any, batch: Any) -> Any:
    """This process' part of a global batch in a step."""
    return Step.of_batch(world, model, batch).local


def _summed(
    world: Member, tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Everyone's sum of each tensor, one transfer per dtype."""
    results: list[Any] = [None] * len(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in places])
        parts = world.everyone.sum(flat).split(
            [tensors[i].numel() for i in places]
        )
        for i, part in zip(places, parts, strict=True):
            results[i] = part.reshape(tensors[i].shape)
    return results
