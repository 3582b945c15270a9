"""Keras' steps on the replicas of a ring.

Keras' trainer asks a model for three functions: one step of training, of
evaluation and of prediction. Under a strategy they are the ones below. A
batch arrives whole, is cut on the host into one part for each replica, and
the step of the model runs on every replica; logs come from the metrics of
all replicas, predictions are joined in natural order.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from keras_ring import random_bits
from keras_ring.backends.tensorflow.member import Member
from keras_ring.backends.tensorflow.open_sizes import OpenSizes, announced
from keras_ring.backends.tensorflow.programs import compiled
from keras_ring.distribution import padding
from keras_ring.distribution.mesh import BATCH, SEQUENCE
from keras_ring.distribution.padding import PaddedAxis
from keras_ring.training import batches, counting, step, wrappers

# For the batch and the sequence axis: pairs of the size of a shard and the
# true size of the whole, int32 `(sizes, 2)`; None where nothing is padded.
Sizes = tuple[tf.Tensor | None, tf.Tensor | None]


def own_function(function: Any) -> Any:
    """The Python function of a `tf.function`, or else what is given: a ring
    cannot be in a program within that of all replicas.

    Raises:
        ValueError: for one that XLA shall compile.
    """
    if getattr(function, "_jit_compile", None):
        raise ValueError(
            "TensorFlow cannot compile a step over several replicas with XLA. "
            f"Received: {function!r} with jit_compile=True in strategy.run. "
            "Decorate it with @tf.function alone."
        )
    return getattr(function, "python_function", function)


def steps(world: Member, model: Any, name: str) -> Callable[[Any], Any]:
    """A step of training or evaluation: batches in, logs out."""

    def on_replica(data: Any, sizes: Sizes, splits: Any) -> Any:
        with (
            step.run(_step_on_replica(world, model, data, sizes, splits)),
            _own_seeds(world, model),
        ):
            return getattr(model, name)(data)

    def program(data: Any, sizes: Sizes, splits: Any) -> Any:
        strategy = world.tf_strategy
        logs = strategy.run(on_replica, (data, sizes, splits))
        # Metrics gather over all replicas and so know the exact value, while
        # the mean of what the replicas report is not, for ratios.
        totals = model.get_metrics_result()
        if isinstance(logs, dict) and set(logs) == set(totals):
            return totals
        return tree.map_structure(
            lambda value: strategy.reduce("MEAN", value, axis=None), logs
        )

    program = compiled(world, program, model.run_eagerly)
    seen = OpenSizes(world, getattr(program, "traced", None))

    def function(iterator: Any) -> Any:
        logs = None
        for _ in range(model.steps_per_execution):
            try:
                batch = next(iterator)
            except StopIteration:
                if logs is None:
                    raise
                break
            data, sizes, splits = _cut(world, model, batch)
            counting.check(world, model, padded=sizes != (None, None))
            seen.trace(data, sizes, splits, announced(iterator))
            logs = program(data, sizes, splits)
        return logs

    return function


@contextlib.contextmanager
def _own_seeds(world: Member, model: Any) -> Iterator[None]:
    """Random numbers of a step: others on every replica, the same in every
    run, and afterwards the generators stand as on one device."""
    data_index, sequence_index = world.place()
    if padding.whole():
        # Members of a ring do the same, and draw the same.
        sequence_index = 0
    replica = world.layout.rank(batch=data_index, seq=sequence_index)
    offset = (replica * random_bits.STRIDE) % 2**31
    states = [
        variable
        for variable in model.variables
        if variable.name == "seed_generator_state"
        and not random_bits.is_shared(variable)
    ]
    for state in states:
        state.assign(keras.ops.add(state, (offset, 0)))
    try:
        yield
    finally:
        for state in states:
            state.assign(keras.ops.subtract(state, (offset, 0)))


def predictions(world: Member, model: Any) -> Callable[..., Any]:
    """A step of prediction: a list of batches in, joined outputs out."""

    def on_replica(data: Any, sizes: Sizes, splits: Any) -> Any:
        with (
            step.run(_step_on_replica(world, model, data, sizes, splits)),
            _own_seeds(world, model),
        ):
            return result_on_replica(world, model.predict_step(data))

    def program(data: Any, sizes: Sizes, splits: Any) -> Any:
        return world.tf_strategy.run(on_replica, (data, sizes, splits))

    program = compiled(world, program, model.run_eagerly)
    # What all workers gather has known sizes.
    seen = OpenSizes(
        world, getattr(program, "traced", None) if world.placed else None
    )

    def predict(batch: Any) -> Any:
        data, sizes, splits = _cut(world, model, batch)
        local_lengths = [
            world.tf_strategy.experimental_local_results(leaf)[0].shape[1]
            for leaf, split in zip(
                tree.flatten(data), tree.flatten(splits), strict=True
            )
            if split
        ]
        seen.trace(data, sizes, splits)
        outputs, true = program(data, sizes, splits)
        rows = [world.everyones(value) for value in tree.flatten(outputs)]
        first = tree.pack_sequence_as(outputs, [pieces[0] for pieces in rows])
        carries = batches.split_outputs(world, model, first, local_lengths)
        joined = [
            join(world, *parts)
            for parts in zip(rows, tree.flatten(carries), true, strict=True)
        ]
        return tree.pack_sequence_as(outputs, joined)

    def function(data: Sequence[Any]) -> Any:
        steps = [predict(batch) for batch in data]
        return tree.map_structure(lambda *parts: tf.concat(parts, 0), *steps)

    return function


def _cut(world: Member, model: Any, batch: Any) -> tuple[Any, Sizes, Any]:
    """A whole batch as values for each replica, its padded sizes, and which
    of its leaves have the sequence."""
    if isinstance(batch, list):
        batch = tuple(batch)
    batch = tree.map_structure(_present, batch)
    wrappers.ready(world, model, batch)
    splits = batches.split_batch(world, model, batch)
    if world.workers > 1:
        _check_same(world, batch)
    parts, sizes = distribute(world, tree.flatten(batch), tree.flatten(splits))
    return tree.pack_sequence_as(batch, parts), sizes, splits


def _step_on_replica(
    world: Member, model: Any, data: Any, sizes: Sizes, splits: Any
) -> step.Step:
    """The step of the replica whose code runs."""
    axes = axes_on_replica(
        world, tree.flatten(data), tree.flatten(splits), sizes
    )
    return Step(world, model, axes, data, splits)


class Step(step.Step):
    """A step as it is known on one replica."""

    world: Member

    def __init__(
        self,
        world: Member,
        model: Any,
        axes: tuple[PaddedAxis, PaddedAxis],
        local: Any,
        splits: Any,
    ):
        super().__init__(
            world,
            model,
            place=world.place(),
            rows=axes[0],
            lengths=axes[1],
            local=local,
            splits=splits,
            everyones_sum=world.everyone.sum,
        )

    @contextlib.contextmanager
    def full_state(self, metrics: Sequence[Any]) -> Iterator[None]:
        # What is read of a metric is the sum over the replicas.
        context = tf.distribute.get_replica_context()
        summed = _summed_variables(metrics)
        if summed:
            totals = context.all_reduce(
                tf.distribute.ReduceOp.SUM,
                [tf.convert_to_tensor(v.value) for v in summed],
            )
            for variable, total in zip(summed, totals, strict=True):
                variable.assign(total)
        yield
        if self.world.place() != (0, 0):
            for variable in _summed_variables(metrics):
                variable.assign(keras.ops.zeros_like(variable))


def _summed_variables(metrics: Sequence[Any]) -> list[Any]:
    variables = {id(v): v for metric in metrics for v in metric.variables}
    return [v for v in variables.values() if v.aggregation == "sum"]


def axes_on_replica(
    world: Member, shards: Sequence[Any], splits: Sequence[Any], sizes: Sizes
) -> tuple[PaddedAxis, PaddedAxis]:
    """The batch and the sequence axis that a replica's code sees.

    Args:
        world: the mesh.
        shards: the replica's part of every array.
        splits: whether it has the sequence on axis 1.
        sizes: of the axes that are padded.
    """
    axes = PaddedAxis(world.data_size), PaddedAxis(world.sequence_size)
    for number, (axis, known) in enumerate(zip(axes, sizes, strict=True)):
        if known is not None:
            for pair in tf.unstack(known):
                axis.know(pair[0], pair[1])
            continue
        for shard, split in zip(shards, splits, strict=True):
            if shard is not None and shard.shape.rank and (split or not number):
                axis.know(keras.ops.shape(shard)[number], None)
    return axes


def result_on_replica(world: Member, outputs: Any) -> Any:
    """Results of a replica for `join`: its outputs, and for each of them the
    true sizes of the first two axes of the whole, -1 where nothing is padded.
    """
    axes = padding.axes()

    def sizes(output: Any) -> list[Any]:
        found = [-1, -1]
        for number, local in enumerate(keras.ops.shape(output)[:2]):
            true = axes[number].true(local)
            found[number] = -1 if true is None else true
        return [tf.convert_to_tensor(size, tf.int32) for size in found]

    return (
        tree.map_structure(world.gathered, outputs),
        [sizes(output) for output in tree.flatten(outputs)],
    )


def _check_same(world: Member, batch: Any) -> None:
    """Refuse batches that differ between the workers."""
    check = 0
    for leaf in tree.flatten(batch):
        if leaf is not None:
            array = np.ascontiguousarray(leaf)
            check = zlib.crc32(repr((array.shape, array.dtype)).encode(), check)
            check = zlib.crc32(array.tobytes(), check)
    everyones = world.numbers_of_all(check & 0x7FFFFFFF)
    if len(set(everyones)) > 1:
        raise ValueError(
            "Every worker must be fed the same whole batches, of which it "
            "takes its own part. Received: batches with the checksums "
            f"{everyones}. Call keras.utils.set_random_seed with the same "
            "seed on every worker, or use shuffle=False."
        )


def _present(leaf: Any) -> Any:
    """A leaf of a batch; data pipelines wrap what is absent."""
    if leaf is None or isinstance(leaf, tf.experimental.Optional):
        return None
    if isinstance(leaf, (tf.RaggedTensor, tf.SparseTensor)):
        raise NotImplementedError(
            "Ragged and sparse tensors cannot be split over a ring. Received: "
            f"{type(leaf).__name__}. Convert it to a dense tensor, and mask "
            "the padding."
        )
    return leaf if hasattr(leaf, "shape") else tf.convert_to_tensor(leaf)


def distribute(
    world: Member, tensors: Sequence[Any], split: Sequence[Any]
) -> tuple[list[Any], Sizes]:
    """The part of each replica of whole tensors on the host.

    Args:
        world: the mesh.
        tensors: `(batch, ...)` or `(batch, length, ...)`; scalars and None
            are for all.
        split: whether the tensor has the sequence on axis 1.

    Returns:
        The parts, and the sizes of the axes that had to be padded.
    """
    rows, lengths = batches.axes(world, list(tensors), list(split))

    def part(tensor: Any, has_length: bool, replica: int) -> tf.Tensor:
        group, index = (
            world.layout.index(replica, axis) for axis in (BATCH, SEQUENCE)
        )
        if has_length:
            local = padding.local_size(lengths, tensor.shape[1])
            tensor = padding.part(tensor, 1, index, local)
        if len(tensor.shape):
            local = padding.local_size(rows, tensor.shape[0])
            tensor = padding.part(tensor, 0, group, local)
        return tf.convert_to_tensor(tensor)

    values: list[Any] = []
    known: list[list[tuple[int, int]]] = [[], []]
    for tensor, has_length in zip(tensors, split, strict=True):
        if tensor is None:
            values.append(None)
            continue
        if len(tensor.shape) and not known[0]:
            known[0] += padding.pairs(rows, sorted(rows.sizes))
        if has_length:
            # One for each tensor: then their number is that of every batch.
            known[1] += padding.pairs(lengths, [tensor.shape[1]])
        with tf.device("CPU:0"):
            value = (
                world.tf_strategy.experimental_distribute_values_from_function(
                    lambda context, tensor=tensor, has_length=has_length: part(
                        tensor, has_length, context.replica_id_in_sync_group
                    )
                )
            )
        values.append(value)
    of_rows, of_lengths = (
        tf.constant(pairs, tf.int32) if axis.padded else None
        for axis, pairs in zip((rows, lengths), known, strict=True)
    )
    return values, (of_rows, of_lengths)


def join(
    world: Member,
    pieces: Sequence[tf.Tensor],
    split: bool,
    true: Sequence[Any],
) -> tf.Tensor:
    """The whole tensor on the host, from the pieces of all replicas.

    What does not carry the sequence is equal on all members of a ring.

    Args:
        world: the mesh.
        pieces: everyone's.
        split: whether they have the sequence on axis 1.
        true: the sizes of the first two axes without padding, the same on
            every replica; -1 where there is none.
    """
    rows, length = (
        int(world.tf_strategy.experimental_local_results(number)[0])
        for number in true
    )
    with tf.device("CPU:0"):
        rings = [
            [pieces[rank] for rank in ranks]
            for ranks in world.layout.groups(SEQUENCE)
        ]
        groups = [tf.concat(r, 1) if split else r[0] for r in rings]
        whole = tf.concat(groups, 0)
        if split and length >= 0:
            whole = whole[:, :length]
        return whole[:rows] if rows >= 0 else whole
