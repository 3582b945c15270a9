"""One step of fit, evaluate or predict on the own part of a batch.

A step runs Keras' own code on this process' shard. What makes the result
that of one device happens at three places: a loss with a local denominator
is weighted by its share of the global one, the gradients are averaged over
all processes before the optimizer sees them, and what the metrics added up
is summed over all processes before their result is read.

The objective that is differentiated is the mean of everyone's loss.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import keras
import torch
from keras import tree

from keras_ring import batches, counting, step
from keras_ring.keras_internals import sublayers

if TYPE_CHECKING:
    from keras_ring.backends.torch.runtime import World


class Step(step.Step):
    """What one step knows while Keras runs it."""

    world: "World"

    def __init__(self, world: "World", model: Any, batch: Any):
        splits = batches.split_batch(world, model, batch)
        rows, lengths = batches.axes(world, batch, splits)
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
            place=(world.data_place, world.sequence_index),
            rows=rows,
            lengths=lengths,
            local=self.local,
            splits=splits,
            everyones_sum=world.everyone.sum,
        )
        self.results_read = False
        self._applying = 0
        self._before: dict[int, tuple[Any, torch.Tensor]] = {}

    # Gradients.

    @contextlib.contextmanager
    def applying(self) -> Iterator[bool]:
        """Tells whether this is the outermost call: optimizers nest, and
        the gradients are averaged once."""
        self._applying += 1
        try:
            yield self._applying == 1
        finally:
            self._applying -= 1

    def mean_gradients(
        self, gradients: Sequence[Any], variables: Sequence[Any]
    ) -> list[Any]:
        """Everyone's mean gradient of each variable, in one transfer per
        dtype; None where there is none."""
        for variable in variables:
            if getattr(variable, "overwrite_with_gradient", False):
                raise NotImplementedError(
                    "Variables that their gradient overwrites (float8 "
                    "training) are not supported under a strategy. Received: "
                    f"the variable {variable.path!r}."
                )
        present = [g is not None for g in gradients]
        self.world.agreement.check_gradients(present, variables)
        means = iter(
            _summed(self.world, [g for g in gradients if g is not None])
        )
        return [next(means) / self.world.size if p else None for p in present]

    # Metrics.

    def start_metrics(self) -> None:
        """Let the metrics count this step alone, from zero."""
        for variable in self._metric_variables():
            value = variable.value.detach()
            self._before[id(variable)] = (variable, value.clone())
            variable.assign(torch.zeros_like(value))

    def sum_metrics(self) -> None:
        """Add everyone's counts of this step to what was there before."""
        variables = self._metric_variables()
        added = _summed(
            self.world, [variable.value.detach() for variable in variables]
        )
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
        known: dict[str, Any] = {}
        if self.results_read:
            known = self.model.get_metrics_result()
        else:
            self.read_metrics()
            known = {m.name: m.result() for m in self.model.metrics}
        if not isinstance(logs, dict):
            return logs
        other = [name for name in logs if name not in known]
        if other:
            own = torch.stack(
                [
                    keras.ops.convert_to_tensor(logs[name], "float32").reshape(
                        ()
                    )
                    for name in other
                ]
            )
            known = known | dict(
                zip(other, self.world.mean(own).unbind(), strict=True)
            )
        return {name: known[name] for name in logs}

    def restore_metrics(self) -> None:
        """After an error: the counts before the step."""
        for variable, before in self._before.values():
            variable.assign(before)
        self._before.clear()

    def _metric_variables(self) -> list[Any]:
        variables = {id(v): v for m in self.model.metrics for v in m.variables}
        for variable in variables.values():
            if variable.aggregation not in ("sum", "none"):
                raise NotImplementedError(
                    "Only metrics whose state adds up over devices are "
                    "supported under a strategy. Received: the metric "
                    f"variable {variable.path!r} with aggregation="
                    f"{variable.aggregation!r}."
                )
        return list(variables.values())


def run_step(
    world: "World", model: Any, function: Callable[..., Any], batch: Any
) -> Any:
    """A step of fit or evaluate on the own part of a global batch; gives
    the global logs."""
    world.agreement.check(model, batch)
    own = Step(world, model, batch)
    counting.check(world, model, padded=own.padded)
    previous, world.step = world.step, own
    own.start_metrics()
    try:
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
    world: "World", model: Any, function: Callable[..., Any], batch: Any
) -> Any:
    """The global predictions for a global batch."""
    if not built(model):
        _build(model, batch, batches.split_batch(world, model, batch))
    world.agreement.check(model, batch)
    own = Step(world, model, batch)
    with world.stepping(), step.run(own), world.agreement.own_seeds(model):
        outputs = function([own.local])
    carries = batches.split_outputs(model, outputs, own.local_lengths)
    return tree.map_structure(
        lambda output, split: world.unshard(
            keras.ops.convert_to_tensor(output), split, own.rows, own.lengths
        ),
        outputs,
        carries,
    )


def built(model: Any) -> bool:
    """Whether a model has all of its variables."""
    return all(layer.built for layer in _layers(model))


def mixed(model: Any) -> bool:
    """Whether some layer computes in another dtype than its variables."""
    return any(x.compute_dtype != x.variable_dtype for x in _layers(model))


def _layers(model: Any) -> list[Any]:
    return [model, *sublayers(model, recursive=True)]


def own_part(world: "World", model: Any, batch: Any) -> Any:
    """What of a global batch this process has in a step."""
    return Step(world, model, batch).local


def _build(model: Any, batch: Any, splits: Any) -> None:
    """Build a model from the shapes of a global batch, of any length."""
    x, split = (
        part[0] if isinstance(part, tuple | list) else part
        for part in (batch, splits)
    )

    def symbol(leaf: Any, has_length: bool) -> keras.KerasTensor:
        shape = list(leaf.shape)
        if has_length:
            shape[1] = None
        return keras.KerasTensor(
            tuple(shape), keras.backend.standardize_dtype(leaf.dtype)
        )

    model(tree.map_structure(symbol, x, split))


def _summed(
    world: "World", tensors: Sequence[torch.Tensor]
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
