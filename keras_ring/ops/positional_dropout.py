"""`keras_ring.ops.positional_dropout`: dropout by position."""

from typing import Any

from keras import ops

from keras_ring import arguments, random_bits, tensor_arguments
from keras_ring.distribution import strategy
from keras_ring.ops.sequence import sequence_positions

Tensor = Any


def positional_dropout(inputs: Tensor, seed: Tensor, rate: float) -> Tensor:
    """Drop elements by where they are in the whole sequence.

    The same elements are dropped for every ring size and whenever this is
    computed again, as in a backward that recomputes: the bits are a hash of
    the seed, the row in the whole batch, the position in the whole sequence
    and the feature.

    Args:
        inputs: `(batch, length, features)`, floating point, as a layer sees
            them: global on JAX, this device's shard on TensorFlow and PyTorch.
        seed: integers `(2,)`, the same on all devices.
        rate: probability of dropping, from 0 to less than 1.

    Returns:
        The inputs with some elements zero and the others divided by
        `1 - rate`.

    Raises:
        ValueError: for a rate out of range, a seed of another shape or
            dtype, or inputs of another rank or dtype.
    """
    rate = arguments.rate("rate", rate)
    inputs = tensor_arguments.tensor("inputs", inputs)
    tensor_arguments.floating("inputs", inputs)
    if len(inputs.shape) != 3:
        raise ValueError(
            "`inputs` must have the rank 3: (batch, length, features). "
            f"Received: inputs.shape={tuple(inputs.shape)}. Add or take away "
            "axes with keras.ops.reshape."
        )
    seed = check_seed("seed", seed)
    if rate == 0.0:
        return inputs
    rows = batch_rows(inputs)[:, None, None]
    positions = sequence_positions(inputs)[None, :, None]
    return dropped(inputs, seed, rows, positions, rate)


def batch_rows(tensor: Tensor) -> Tensor:
    """The numbers of the samples in the whole batch, int32 `(batch,)`."""
    rows = ops.arange(ops.shape(tensor)[0], dtype="int32")
    world = strategy.current()
    if world is None or not world.inside():
        return rows
    first = world.data_index() * ops.shape(tensor)[0]
    return rows + ops.cast(first, "int32")


def dropped(
    inputs: Tensor, seed: Tensor, rows: Tensor, positions: Tensor, rate: float
) -> Tensor:
    """The rule itself, for coordinates that broadcast to the inputs."""
    features = ops.arange(inputs.shape[-1], dtype="int32")
    keep = random_bits.keep(seed, [rows, positions, features], rate)
    scaled = inputs * ops.cast(1.0 / (1.0 - rate), inputs.dtype)
    return ops.where(keep, scaled, ops.zeros_like(inputs))


def check_seed(name: str, seed: Any) -> Tensor:
    """The seed of a dropout, as int32 `(2,)`."""
    if seed is not None:
        seed = tensor_arguments.tensor(name, seed)
        tensor_arguments.integers(name, seed)
        if tuple(seed.shape) == (2,):
            return ops.cast(seed, "int32")
    raise ValueError(
        f"`{name}` must be two integers, the same on all devices. Received: "
        f"{name}={arguments.shown(seed)}. Draw them with "
        "keras.random.SeedGenerator().next()."
    )
