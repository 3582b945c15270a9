"""Step: what code that sees a shard knows of the whole batch.

Keras computes losses and metrics of what it is given. In a step on a shard
that is a part of the batch, possibly with padding; a `Step` cuts the padding
off before Keras sees it, and tells by which factor a local loss counts, so
that the mean over all devices is the loss of the whole batch. `counting`
puts this into Keras.
"""

import contextlib
import contextvars
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from keras import ops, tree

from keras_ring.distribution import padding
from keras_ring.distribution.padding import PaddedAxis, Size
from keras_ring.distribution.world import World
from keras_ring.keras_internals import with_companions
from keras_ring.training import batches

Tensor = Any


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of the model on this device.

    Attributes:
        split: whether it carries the sequence on axis 1.
        rows: true rows of this device's part, of `all_rows` in the batch.
        all_rows: rows of the batch.
        length: true positions of this device's part, of `all_length`; 1 of 1
            for an output that does not carry the sequence.
        all_length: positions of the sequence.
        padded: whether there may be more than the true ones.
    """

    split: bool
    rows: Size
    all_rows: Size
    length: Size
    all_length: Size
    padded: bool

    @property
    def nothing(self) -> bool:
        """True if it is known that all of this device's part is padding."""
        sizes = (self.rows, self.length)
        return any(isinstance(size, int) and size == 0 for size in sizes)


class Step:
    """One step of training or evaluation on one device.

    Args:
        world: the mesh.
        model: whose step it is; None for a function of the user's own, see
            `DistributedStrategy.run`.
        place: `(data index, sequence index)` of this device.
        rows: the batch axis.
        lengths: the sequence axis.
        local: this device's part of the batch.
        splits: the structure of `local`; whether a leaf has the sequence.
        everyones_sum: the sum over all devices of a float32 scalar.
        sums_metrics: whether what each device counts is added up.
    """

    def __init__(
        self,
        world: World,
        model: Any,
        *,
        place: tuple[int, int],
        rows: PaddedAxis,
        lengths: PaddedAxis,
        local: Any,
        splits: Any,
        everyones_sum: Callable[[Tensor], Tensor],
        sums_metrics: bool = True,
    ):
        self.world = world
        self.model = model
        self.data_index, self.sequence_index = place
        self.rows = rows
        self.lengths = lengths
        self.devices = world.layout.size()
        self.everyones_sum = everyones_sum
        self.sums_metrics = sums_metrics
        # Tensors are known by identity, and kept so that it stays theirs.
        self._splits: dict[int, tuple[Any, bool]] = {}
        leaves = [leaf for leaf in tree.flatten(local) if leaf is not None]
        flags = [flag for flag in tree.flatten(splits) if flag is not None]
        for leaf, flag in zip(leaves, flags, strict=True):
            self._splits[id(leaf)] = leaf, flag
        # Not the static size, which a program for many sizes does not know.
        self.local_rows = next(
            (ops.shape(t)[0] for t in leaves if len(t.shape)), None
        )
        self.local_lengths = [
            leaf.shape[1]
            for leaf, flag in zip(leaves, flags, strict=True)
            if flag
        ]
        self.copies = _copies(splits, world.sequence_size)
        # By the identity of the layer.
        self.added: dict[int, list[Tensor]] = {}

    @property
    def padded(self) -> bool:
        """True if what the step sees has padding somewhere."""
        return self.rows.padded or self.lengths.padded

    def know_outputs(self, model: Any, outputs: Any) -> None:
        """Remember which outputs of a model carry the sequence."""
        flags = batches.split_outputs(
            self.world, model, outputs, self.local_lengths
        )
        for leaf, flag in zip(
            tree.flatten(outputs), tree.flatten(flags), strict=True
        ):
            if leaf is not None:
                self._splits[id(leaf)] = leaf, flag

    def output(self, prediction: Any) -> Output | None:
        """Knowledge of an output; None where it is not the model's."""
        leaf = tree.flatten(prediction)[0]
        if id(leaf) not in self._splits:
            return None
        _, split = self._splits[id(leaf)]
        shape = ops.shape(leaf)
        rows = self.rows.valid(shape[0], self.data_index)
        all_rows = self.rows.whole(shape[0])
        length, all_length = 1, 1
        if split:
            length = self.lengths.valid(shape[1], self.sequence_index)
            all_length = self.lengths.whole(shape[1])
        return Output(split, rows, all_rows, length, all_length, self.padded)

    def split(self, tensor: Any) -> bool:
        """True if a tensor has the sequence on axis 1; of one that is neither
        of the batch nor an output its size decides."""
        if id(tensor) in self._splits:
            return self._splits[id(tensor)][1]
        return len(tensor.shape) > 1 and tensor.shape[1] in self.local_lengths

    def carries(self, tensor: Any, output: Output, prediction: Any) -> bool:
        """True if labels or weights of an output carry the sequence."""
        if id(tensor) in self._splits:
            return self._splits[id(tensor)][1]
        like = tree.flatten(prediction)[0]
        return (
            output.split
            and len(tensor.shape) > 1
            and tensor.shape[1] == like.shape[1]
        )

    def trimmed(
        self, structure: Any, output: Output, prediction: Any, least: int
    ) -> Any:
        """Tensors of an output without their padding.

        Args:
            structure: predictions, labels or weights, nested.
            output: of these.
            prediction: of this output; tells about tensors not known.
            least: rows that are kept where none is true. One position is
                always kept, so that nothing is the mean over no numbers.
        """
        rows = padding.clip(output.rows, least, output.all_rows)
        if least == 0:
            rows = _only_if(output.length, rows)
        length = padding.clip(output.length, 1, output.all_length)

        def cut(tensor: Any) -> Any:
            if tensor is None or len(tensor.shape) == 0:
                return tensor
            carries = self.carries(tensor, output, prediction)

            def own(tensor: Any, name: str) -> Any:
                del name
                tensor = padding.trim(tensor, 0, rows)
                return padding.trim(tensor, 1, length) if carries else tensor

            return with_companions(tensor, own)

        return tree.map_structure(cut, structure)

    # Losses.

    def share(self, output: Output) -> Any:
        """The part of all values of an output that is on this device."""
        own, every = (
            output.rows * output.length,
            (output.all_rows * output.all_length),
        )
        copies = 1 if output.split else self.world.sequence_size
        return _ratio(own, every) / copies

    def plain_weight(self, output: Output | None) -> Any:
        """Factor on a mean over the values of an output."""
        if output is None or not output.padded:
            return 1.0
        return self.share(output) * self.devices

    def sum_weight(self, output: Output | None, mean_over_length: bool) -> Any:
        """Factor on a sum over the values of an output, or of something
        else that a loss was computed of."""
        if output is None:
            if self.copies is None:
                raise NotImplementedError(
                    "A loss with reduction='sum' that is called outside of "
                    "what the model was compiled with is not supported in a "
                    "model with outputs that carry the sequence and others "
                    "that do not. Use reduction='sum_over_batch_size'."
                )
            return self.devices / self.copies
        copies = 1 if output.split else self.world.sequence_size
        weight = self.devices / copies * self.present(output)
        if mean_over_length:
            weight = weight * _ratio(output.length, output.all_length)
        return weight

    def present(self, output: Output | None, rows_only: bool = False) -> Any:
        """1 where this device has something of an output, or else 0."""
        if output is None or not output.padded:
            return 1.0
        own = output.rows if rows_only else output.rows * output.length
        if isinstance(own, int):
            return float(own > 0)
        return ops.cast(own > 0, "float32")

    def counted_weight(
        self,
        output: Output | None,
        count: Tensor,
        *,
        count_split: bool,
        mean_over_length: bool,
    ) -> Any:
        """Factor on a loss that was divided by a count of its data.

        Args:
            output: whose loss it is, None where that is not known.
            count: what the local sum was divided by, float32.
            count_split: whether the members of a ring count their own
                positions, and not each the same rows.
            mean_over_length: whether each value is a mean over this
                device's positions.
        """
        members = self.world.sequence_size
        split = output is None or output.split
        copies = 1 if split else members
        count_copies = 1 if split and count_split else members
        rows_only = count_copies > 1
        counted = count * self.present(output, rows_only)
        total = self.everyones_sum(counted)
        weight = counted * (self.devices * count_copies / copies)
        weight = weight * self.present(output)
        if output is not None and mean_over_length:
            weight = weight * _ratio(output.length, output.all_length)
        return ops.where(
            total == 0,
            ops.zeros_like(weight),
            weight / ops.where(total == 0, ops.ones_like(total), total),
        )

    # Metrics.

    def full_state(
        self, metrics: Sequence[Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Return a context in which code sees the state of metrics as one
        device would, and changes it on every device alike; afterwards it
        counts once."""
        raise NotImplementedError

    def mean_weight(self, output: Output) -> Any:
        """Factor on this device's means over positions of an output, so that
        they add up to the mean over the whole sequence; None where all are of
        equally many."""
        if not output.padded:
            return None
        # Losses see an element where there is none; see `trimmed`.
        weight = self.present(output)
        if output.split and self.lengths.padded:
            members = self.world.sequence_size
            weight = weight * _ratio(output.length, output.all_length) * members
        return weight

    def tracker_weight(self) -> Any:
        """By how many samples the losses of this batch count in an epoch;
        None for what Keras takes. That may be a static number of rows, which
        a program for many sizes does not know."""
        if self.local_rows is None:
            return None
        true = self.rows.true(self.local_rows)
        # Keras counts this device's rows on every device.
        if true is None:
            return self.local_rows
        return _ratio(true, self.world.data_size)


def _copies(splits: Any, members: int) -> int | None:
    """On how many devices each label lies (each input without labels): 1
    where they are split over the ring, all of its members where they are
    not, None where there are both kinds."""
    parts = splits if isinstance(splits, tuple | list) else (splits,)
    deciding = parts[1] if len(parts) > 1 and parts[1] is not None else parts[0]
    kinds = {leaf for leaf in tree.flatten(deciding) if leaf is not None}
    if kinds == {True}:
        return 1
    if kinds <= {False}:
        return members
    return 1 if members == 1 else None


def _ratio(own: Size, every: Size) -> Any:
    if isinstance(own, int) and isinstance(every, int):
        return own / every
    return _number(own) / _number(every)


def _number(size: Size) -> Any:
    return size if isinstance(size, int) else ops.cast(size, "float32")


def _only_if(there: Size, rows: Size) -> Size:
    """The rows, or none where there is nothing of the sequence."""
    if isinstance(there, int):
        return rows if there > 0 else 0
    return ops.where(there > 0, rows, 0)


_RUNNING: ContextVar[Step | None] = ContextVar("keras_ring_step", default=None)
_PAUSED: ContextVar[bool] = ContextVar("keras_ring_step_paused", default=False)


def running() -> Step | None:
    """The step of which code sees a part here; None outside of steps, and
    where a step computes something of the whole batch."""
    return None if _PAUSED.get() else _RUNNING.get()


def innermost() -> Step | None:
    """The step that runs here, whatever the code sees; None outside."""
    return _RUNNING.get()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Return a context in which code is given the whole batch in the middle
    of a step."""
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)


@contextlib.contextmanager
def run(step: Step) -> Iterator[None]:
    """Return a context in which code runs in a step."""
    token = _RUNNING.set(step)
    try:
        # A function of the user's own sees what it is given.
        whole = step.model is not None and not step.local_lengths
        with padding.seen(step.rows, step.lengths, whole):
            yield
    finally:
        _RUNNING.reset(token)


def returning() -> Callable[..., Any]:
    """Calls functions as if where this is called: in the same step, with the
    same sizes.

    What is returned can be kept in a graph of gradients. It keeps the step
    only as long as others do: a step has the model's outputs, and these have
    the graph, a circle through C++ that Python's collector does not see.
    """
    step = _RUNNING.get()
    kept = None if step is None else weakref.ref(step)
    context = contextvars.copy_context()
    context.run(_RUNNING.set, None)

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        again = context.copy()
        again.run(_RUNNING.set, None if kept is None else kept())
        return again.run(function, *arguments)

    return call
