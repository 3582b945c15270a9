"""The whole batch, for code that sees a part of it."""

from typing import Any

import keras
from keras import ops

from keras_ring import arguments, backends, tensor_arguments
from keras_ring.distribution import padding, strategy
from keras_ring.distribution.world import World
from keras_ring.precision import accumulation_dtype, is_floating

Tensor = Any


def gather_batch(tensor: Tensor, sequence: bool = True) -> Tensor:
    """Gather the whole batch: every row and position, on every device.

    For what must be computed of all samples and positions at once, such as a
    loss in a `train_step` or a training loop of your own. The gradient of a
    device's part is the sum of the gradients that all devices have for it, so
    that with the mean of the devices' gradients the result is that of one
    device.

    Args:
        tensor: `(batch, ...)`, or `(batch, length, ...)` with the sequence
            on axis 1, of any dtype, as a layer sees it: this device's
            part in a step on TensorFlow and PyTorch.
        sequence: whether the tensor has the sequence on axis 1. If not, all
            members of a ring must have the same tensor, such as the output
            of a pooled classifier.

    Returns:
        The whole tensor in natural order and without padding. Where the code
        sees the whole batch already (on JAX, and outside of a strategy's
        steps) this is the tensor itself.

    Raises:
        ValueError: for a tensor without a batch axis, or without a sequence
            axis where it should have one.

    Example:

    ```python
    def step(x, y):  # given to strategy.run
        predictions = keras_ring.ops.gather_batch(model(x, training=True))
        return contrastive_loss(keras_ring.ops.gather_batch(y), predictions)
    ```
    """
    tensor_arguments.is_array("tensor", tensor)
    sequence = arguments.flag("sequence", sequence)
    rank = len(tensor.shape)
    if rank < 1 + bool(sequence):
        raise ValueError(
            "`tensor` must have a batch axis, and with sequence=True a "
            f"sequence axis. Received: shape={tuple(tensor.shape)}, sequence="
            f"{sequence}. Pass sequence=False for `(batch, ...)`."
        )
    world = strategy.current()
    if world is None or not world.inside():
        return tensor
    split = sequence and world.sequence_size > 1
    if not split and world.data_size == 1:
        return tensor
    if not is_floating(tensor):
        whole = _joined(world, tensor, split)
    else:
        custom_gradient = backends.load().runtime.custom_gradient
        whole = custom_gradient(
            lambda own: ((_joined(world, own, split),), ()),
            lambda _, grad: (_own_part_of(world, grad, split),),
        )(tensor)[0]
    rows, lengths = padding.axes()
    local = ops.shape(tensor)
    true = rows.true(local[0])
    whole = whole if true is None else padding.trim(whole, 0, true)
    true = lengths.true(local[1]) if split else None
    return whole if true is None else padding.trim(whole, 1, true)


def _joined(world: World, own: Tensor, split: bool) -> Tensor:
    """Everyone's parts at their places, padding included."""
    groups, members = world.data_size, world.sequence_size
    rows, *rest = ops.shape(own)
    parts = world.everyone.all_gather(ops.expand_dims(own, 0), 0)
    parts = ops.reshape(parts, [groups, members, rows, *rest])
    if not split:
        # All members of a ring have the same; each takes its own column, so
        # that its gradient goes where the tensor came from.
        return ops.reshape(parts[:, world.place()[1]], [groups * rows, *rest])
    length, *rest = rest
    axes = [0, 2, 1, *range(3, len(parts.shape))]
    return ops.reshape(
        ops.transpose(parts, axes), [groups * rows, members * length, *rest]
    )


def _own_part_of(world: World, grad: Tensor, split: bool) -> Tensor:
    """The exact transpose of `_joined`: what all devices ask of this
    device's part, summed."""
    groups, members = world.data_size, world.sequence_size
    dtype = keras.backend.standardize_dtype(grad.dtype)
    all_rows, *rest = ops.shape(grad)
    rows = all_rows // groups
    if split:
        all_length, *rest = rest
        parts = ops.reshape(
            grad, [groups, rows, members, all_length // members, *rest]
        )
        axes = [0, 2, 1, *range(3, len(parts.shape))]
        parts = ops.transpose(parts, axes)
    else:
        parts = ops.reshape(grad, [groups, 1, rows, *rest])
        column = world.place()[1]
        shape = ops.shape(parts)
        parts = ops.concatenate(
            [
                parts if member == column else ops.zeros(shape, dtype=dtype)
                for member in range(members)
            ],
            axis=1,
        )
    shape = ops.shape(parts)
    parts = ops.reshape(parts, [groups * members, *shape[2:]])
    asked = world.everyone.all_to_all(parts, split_axis=0, concat_axis=0)
    asked = ops.reshape(asked, [groups * members, *shape[2:]])
    total = ops.sum(ops.cast(asked, accumulation_dtype(dtype)), axis=0)
    return ops.cast(total, dtype)
