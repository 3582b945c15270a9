"""Operations on a sequence that may be split over devices: the positions of
the part that the code sees, the whole of it, and this device's part again."""

from typing import Any

import keras
from keras import ops

from keras_ring import arguments, backends, tensor_arguments
from keras_ring.distribution import padding, placement, shards, strategy, trials
from keras_ring.distribution.transport import Transport

Tensor = Any


def sequence_positions(tensor: Tensor, axis: int = 1) -> Tensor:
    """Return the global positions of the elements along a sequence axis.

    Args:
        tensor: a tensor with the sequence on `axis`, as a layer sees it:
            the whole sequence on JAX and outside a strategy's steps, this
            device's shard in a step on TensorFlow and PyTorch.
        axis: the sequence axis; negative values count from the end.

    Returns:
        int32 `(length,)`, where `length` is the size of that axis: `0, 1,
        2, ...` for a whole sequence; for a shard the same, counted from the
        shard's place in the sequence.

    Raises:
        ValueError: for an axis that the tensor does not have.

    Example:

    ```python
    x = x + table(keras_ring.ops.sequence_positions(x))
    ```
    """
    axis = _checked_axis(tensor, axis)
    if isinstance(tensor, keras.KerasTensor):
        return SequencePositions(axis).symbolic_call(tensor)
    length = ops.shape(tensor)[axis]
    positions = ops.arange(length, dtype="int32")
    ring = shard_ring()
    if ring is None:
        return positions
    start = placement.start(ring.index(), length)
    return positions + ops.cast(start, "int32")


@keras.saving.register_keras_serializable(package="keras_ring")
class SequencePositions(keras.Operation):
    """`sequence_positions` as a node of a functional model."""

    def __init__(self, axis: int = 1, *, name: str | None = None):
        super().__init__(name=name)
        self.axis = axis

    def call(self, tensor: Tensor) -> Tensor:
        return sequence_positions(tensor, self.axis)

    def compute_output_spec(self, tensor: Tensor) -> keras.KerasTensor:
        return keras.KerasTensor((tensor.shape[self.axis],), dtype="int32")


def gather_sequence(tensor: Tensor, axis: int = 1) -> Tensor:
    """Gather the whole sequence on every device of the ring.

    The tensor that comes out grows with the sequence: this is the way to
    use code that knows no ring, at the price of memory and transfers. The
    gradient of a shard is the sum of the gradients that all members of the
    ring have for it.

    Args:
        tensor: a tensor of any dtype with the sequence on `axis`, as a
            layer sees it.
        axis: the sequence axis; negative values count from the end.

    Returns:
        The tensor with the whole sequence on `axis`, in natural order and
        without padding. Where the code sees the whole sequence already this
        is the tensor itself; under a strategy on JAX the compiler is told
        not to split it.

    Raises:
        ValueError: for an axis that the tensor does not have.
    """
    axis = _checked_axis(tensor, axis)
    ring = shard_ring()
    if ring is None:
        return _unsplit(tensor)
    true = true_length(ops.shape(tensor)[axis])
    return shards.gather(ring, tensor, axis, true)


def own_chunk(tensor: Tensor, axis: int = 1) -> Tensor:
    """Take this device's part of a whole sequence; undo `gather_sequence`.

    Args:
        tensor: a tensor with the whole sequence on `axis`, the same on
            every device of the ring.
        axis: the sequence axis; negative values count from the end.

    Returns:
        The tensor with this device's `1 / sequence_parallel` of `axis`. A
        length that the ring cannot split equally is padded by copies of the
        last element, as that of a batch is. The tensor itself where the
        code sees the whole sequence.

    Raises:
        ValueError: for an axis that the tensor does not have.
    """
    axis = _checked_axis(tensor, axis)
    ring = shard_ring()
    if ring is None:
        return tensor
    axes = padding.lengths()
    length = None if axes is None else axes.add(ops.shape(tensor)[axis])
    return shards.own_part(ring, tensor, axis, length)


def shard_ring() -> Transport | None:
    """The ring over which the sequence that this code sees is split; None
    where it sees the whole sequence."""
    world = strategy.current()
    tried = trials.place()
    if tried is not None:
        ring: Transport = tried
    elif world is None or not world.inside() or padding.whole():
        return None
    else:
        ring = world.ring()
    return ring if ring.size > 1 else None


def true_length(length: Any) -> Any:
    """Length of the whole sequence without padding, for the length that this
    code sees; None where there is no padding, see `World.true_length`."""
    world = strategy.current()
    return None if world is None else world.true_length(length)


def whole_length(length: Any) -> Any:
    """Length of the whole sequence, for the length that this code sees."""
    ring = shard_ring()
    if ring is None:
        return length
    true = true_length(length)
    return length * ring.size if true is None else true


def ring_sum(tensor: Tensor) -> Tensor:
    """The sum of the floating-point tensors of a ring's members, on each of
    them, with its gradient; the tensor itself where the code sees the whole
    sequence."""
    ring = shard_ring()
    if ring is None:
        return tensor

    def forward(own):
        return (ring.sum(own),), ()

    def backward(residuals, grad):
        del residuals
        return (ring.sum(grad),)

    custom_gradient = backends.load().runtime.custom_gradient
    return custom_gradient(forward, backward)(tensor)[0]


def _unsplit(tensor: Tensor) -> Tensor:
    """Keep the compiler from splitting it where code sees the whole sequence;
    the batch stays split."""
    world = strategy.current()
    sizes = tuple(tensor.shape)
    # Sizes that are no integers: Keras is only inferring shapes.
    known = all(isinstance(size, int) for size in sizes)
    if world is None or world.layers_see_shards or not sizes or not known:
        return tensor
    distribution = keras.distribution.distribution()
    axes: list[str | None] = [None] * len(sizes)
    if sizes[0] % world.data_size == 0:
        axes[0] = distribution.batch_dim_name
    layout = keras.distribution.TensorLayout(axes, distribution.device_mesh)
    return keras.distribution.distribute_tensor(tensor, layout)


def _checked_axis(tensor: Tensor, axis: int) -> int:
    tensor_arguments.is_array("tensor", tensor)
    axis = arguments.integer("axis", axis, least=None)
    rank = len(tensor.shape)
    if not -rank <= axis < rank:
        raise ValueError(
            "`axis` must be an axis of the tensor. Received: axis="
            f"{axis}, shape={tuple(tensor.shape)}. Use an axis from {-rank} "
            f"to {rank - 1}."
        )
    return axis % rank
