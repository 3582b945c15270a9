"""Keras' steps on the replicas of a ring.

Keras' trainer asks a model for three functions: one step of training, of
evaluation and of prediction. Under a strategy they are the ones below. A
batch arrives whole, is cut on the host into one part for each replica, and
the step of the model runs on every replica; logs come from the metrics of
all replicas, predictions are joined in natural order.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from keras_ring import batches

if TYPE_CHECKING:
    from keras_ring.backends.tensorflow.runtime import World

_MARK = "keras_ring_step"

# What a collective raises when its other side is gone.
_TRANSFER_ERRORS = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)


def prepare(world: "World", model: Any) -> None:
    """Give a model the steps of its world."""
    _check_model(world, model)
    if len(world.devices) > 1:
        _check_compiled(model)
    for name, make in (
        ("train_function", functools.partial(_step, name="train_step")),
        ("test_function", functools.partial(_step, name="test_step")),
        ("predict_function", _prediction),
    ):
        # `compile` drops the functions, and so they are made anew after it.
        if getattr(getattr(model, name), _MARK, None) is not world:
            function = make(world, model)
            setattr(function, _MARK, world)
            setattr(model, name, function)


def _check_model(world: "World", model: Any) -> None:
    outside = [
        variable.path
        for variable in model.variables
        if getattr(variable.value, "distribute_strategy", None)
        is not world.tf_strategy
    ]
    if outside:
        raise ValueError(
            "A model must be built and compiled inside the scope of the "
            "strategy that trains it. Received: "
            f"{len(outside)} variables of the model {model.name!r} made "
            f"elsewhere, such as {outside[0]!r}. Build and compile the model "
            "inside `with strategy.scope():`."
        )


def _check_compiled(model: Any) -> None:
    """Refuse what would be silently wrong when each replica does its part."""
    if model.compiled and model.jit_compile:
        raise ValueError(
            "TensorFlow cannot compile a step over several replicas with XLA. "
            f"Received: jit_compile=True on the model {model.name!r}. Compile "
            "the model with jit_compile='auto' or False."
        )
    for loss in _losses(model):
        # Each replica divides by what it counts in its own part, and the
        # mean over the replicas is taken: exact where all count the same.
        reduction = getattr(loss, "reduction", "sum_over_batch_size")
        ignored = getattr(loss, "ignore_class", None)
        if reduction in ("sum", "mean_with_sample_weight", "none", None):
            raise NotImplementedError(
                "A loss under a strategy must be the mean over all elements, "
                "so that the mean over the devices is the loss of the whole "
                f"batch. Received: reduction={reduction!r} of {loss.name!r}. "
                "Use reduction='sum_over_batch_size'."
            )
        if ignored is not None:
            raise NotImplementedError(
                "A loss that leaves out a class divides by the number of the "
                "rest, which differs from device to device. Received: "
                f"ignore_class={ignored} of {loss.name!r}. Give a "
                "sample_weight of zero to those elements instead."
            )
    for output in tree.flatten(getattr(model, "outputs", None) or []):
        if getattr(output, "_keras_mask", None) is not None and _losses(model):
            raise NotImplementedError(
                "A loss over masked outputs divides by the number of valid "
                "elements, which differs from device to device. Received: "
                f"the output {output.name!r} of the model {model.name!r} with "
                "a mask. Remove the mask before the loss, and give a "
                "sample_weight of zero to the padding instead."
            )


def _losses(model: Any) -> list[Any]:
    """The loss objects that a model was compiled with."""
    given = getattr(model, "loss", None) if model.compiled else None
    if given is None or callable(getattr(given, "__func__", None)):
        return []
    return [
        loss
        for loss in tree.flatten(given)
        if isinstance(loss, keras.losses.Loss)
    ]


def _step(world: "World", model: Any, name: str) -> Callable[[Any], Any]:
    """A step of training or evaluation: batches in, logs out."""

    def program(data: Any) -> Any:
        strategy = world.tf_strategy
        logs = strategy.run(lambda data: getattr(model, name)(data), (data,))
        # Metrics gather over all replicas and so know the exact value, while
        # the mean of what the replicas report is not, for ratios.
        totals = model.get_metrics_result()
        if isinstance(logs, dict) and set(logs) == set(totals):
            return totals
        return tree.map_structure(
            lambda value: strategy.reduce("MEAN", value, axis=None), logs
        )

    program = compiled(world, program, model.run_eagerly)

    def function(iterator: Any) -> Any:
        logs = None
        for _ in range(model.steps_per_execution):
            try:
                batch = next(iterator)
            except StopIteration:
                if logs is None:
                    raise
                break
            data, _ = _cut(world, model, batch)
            logs = program(data)
        return logs

    return function


def _prediction(world: "World", model: Any) -> Callable[[Any], Any]:
    """A step of prediction: a list of batches in, joined outputs out."""

    def on_replica(data: Any) -> Any:
        return tree.map_structure(world.gathered, model.predict_step(data))

    program = compiled(
        world,
        lambda data: world.tf_strategy.run(on_replica, (data,)),
        model.run_eagerly,
    )

    def predict(batch: Any) -> Any:
        data, local_length = _cut(world, model, batch)
        outputs = program(data)
        rows = [world.everyones(value) for value in tree.flatten(outputs)]
        first = tree.pack_sequence_as(outputs, [pieces[0] for pieces in rows])
        split = tree.flatten(batches.split_outputs(model, first, local_length))
        return tree.pack_sequence_as(
            outputs,
            [join(world, p, s) for p, s in zip(rows, split, strict=True)],
        )

    def function(data: Sequence[Any]) -> Any:
        steps = [predict(batch) for batch in data]
        return tree.map_structure(lambda *parts: tf.concat(parts, 0), *steps)

    return function


def compiled(
    world: "World", program: Callable[..., Any], eager: bool = False
) -> Callable[..., Any]:
    """A program over all replicas as a `tf.function`, unless eager."""
    if eager:
        if not world.placed:
            raise NotImplementedError(
                "A ring across processes runs in compiled functions only, "
                "because every transfer waits for its other side. Received: "
                "run_eagerly=True. Compile the model without it."
            )
        return program
    # Placed copies take any size; a broadcast is best off with known ones.
    program = tf.function(
        program, autograph=False, reduce_retracing=world.placed
    )

    def guarded(*arguments: Any) -> Any:
        try:
            return program(*arguments)
        except _TRANSFER_ERRORS as error:
            if world.placed:
                raise
            raise RuntimeError(
                "A transfer between the members of the ring failed or did "
                "not finish in time: another worker has died, hangs or has "
                "raised an error of its own, which its log shows. Received: "
                f"timeout={world.strategy.timeout}, {world.workers} workers, "
                f"{type(error).__name__}: {error.message[:300]} Transfers stay "
                "broken after this. Restart all workers, from a checkpoint, "
                "and raise the strategy's `timeout` if a step takes longer."
            ) from error

    return guarded


def _cut(world: "World", model: Any, batch: Any) -> tuple[Any, int | None]:
    """A whole batch as values for each replica, and a shard's length."""
    if isinstance(batch, list):
        batch = tuple(batch)
    batch = tree.map_structure(_present, batch)
    splits = batches.split_batch(world, model, batch)
    if world.workers > 1:
        _check_same(world, batch)
    leaves, flags = tree.flatten(batch), tree.flatten(splits)
    lengths = {
        leaf.shape[1] for leaf, flag in zip(leaves, flags, strict=True) if flag
    }
    parts = distribute(world, leaves, flags)
    local_length = (
        lengths.pop() // world.sequence_size if len(lengths) == 1 else None
    )
    return tree.pack_sequence_as(batch, parts), local_length


def _check_same(world: "World", batch: Any) -> None:
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
    world: "World", tensors: Sequence[Any], split: Sequence[Any]
) -> list[Any]:
    """The part of each replica of whole tensors on the host.

    Args:
        world: the mesh.
        tensors: `(batch, ...)` or `(batch, length, ...)`; scalars and None
            are for all.
        split: whether the tensor has the sequence on axis 1.
    """

    def part(tensor: Any, has_length: bool, replica: int) -> tf.Tensor:
        group, index = divmod(replica, world.sequence_size)
        if len(tensor.shape):
            rows = tensor.shape[0] // world.data_size
            tensor = tensor[group * rows : (group + 1) * rows]
        if has_length:
            length = tensor.shape[1] // world.sequence_size
            tensor = tensor[:, index * length : (index + 1) * length]
        return tf.convert_to_tensor(tensor)

    values: list[Any] = []
    for tensor, has_length in zip(tensors, split, strict=True):
        if tensor is None:
            values.append(None)
            continue
        with tf.device("CPU:0"):
            value = (
                world.tf_strategy.experimental_distribute_values_from_function(
                    lambda context, tensor=tensor, has_length=has_length: part(
                        tensor, has_length, context.replica_id_in_sync_group
                    )
                )
            )
        values.append(value)
    return values


def join(world: "World", pieces: Sequence[tf.Tensor], split: bool) -> tf.Tensor:
    """The whole tensor on the host, from the pieces of all replicas.

    What does not carry the sequence is equal on all members of a ring.
    """
    size = world.sequence_size
    with tf.device("CPU:0"):
        rings = [
            pieces[i : i + size] for i in range(0, world.data_size * size, size)
        ]
        groups = [tf.concat(r, 1) if split else r[0] for r in rings]
        return tf.concat(groups, 0)
