"""Random decisions that depend on where an element is, and on nothing else.

A generator with a state draws other numbers when the work is split in
another way. Here every element hashes its own coordinates with a seed: the
same element gets the same bits on every framework, for every ring size, tile
size and layout, in the forward and in every recomputation.

The hash of coordinates `c[0], ..., c[n-1]` (int32) and a seed `(s0, s1)` is,
in 32-bit arithmetic that wraps around:

    h = mix(s0 ^ mix(s1 ^ 0x9E3779B9))
    for each coordinate: h = mix(h + c * 0x9E3779B1)

    mix(x): x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B;
            x ^= x >> 16                       (shifts are logical)

`mix` is the finalizer "lowbias32" that C. Wellons found by search (2018,
public domain): each input bit flips each output bit with a probability of
one half to within 0.2 %. An element is kept where `h`, read as a signed
integer, is at least `rate * 2^32 - 2^31`.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

Tensor = Any


def keep(seed: Tensor, coordinates: Sequence[Tensor], rate: float) -> Tensor:
    """Mask of the elements that a dropout keeps.

    Args:
        seed: int32 `(2,)`.
        coordinates: int32 tensors that broadcast against each other. The
            cheapest order is from the fewest elements to the most: what
            does not depend on later coordinates is hashed before they are.
        rate: probability of dropping, `0 <= rate < 1`, exact to `2^-32`.

    Returns:
        Boolean, of the shape to which the coordinates broadcast.
    """
    state = _mix(
        ops.bitwise_xor(
            seed[0], _mix(ops.bitwise_xor(seed[1], _constant(0x9E3779B9)))
        )
    )
    for coordinate in coordinates:
        state = _mix(state + coordinate * _constant(0x9E3779B1))
    threshold = min(round(rate * 2**32), 2**32 - 1) - 2**31
    return state >= _constant(threshold)


# Odd and far from 1: seeds of neighbouring devices never meet.
STRIDE = 0x9E3779B1
SHARED = "same_on_every_device"


def share_seed(generator: keras.random.SeedGenerator) -> None:
    """Mark a generator whose seeds are for `keep`: all devices must draw the
    same, while other generators draw differently on each shard."""
    setattr(generator.state, SHARED, True)


def is_shared(variable: Any) -> bool:
    """True if a variable is the state of a generator so marked."""
    return getattr(variable, SHARED, False)


def _mix(x: Tensor) -> Tensor:
    x = ops.bitwise_xor(x, _shifted(x, 16)) * _constant(0x7FEB352D)
    x = ops.bitwise_xor(x, _shifted(x, 15)) * _constant(0x846CA68B)
    return ops.bitwise_xor(x, _shifted(x, 16))


def _shifted(x: Tensor, by: int) -> Tensor:
    """A logical shift to the right: int32 would bring in its sign."""
    return ops.bitwise_and(
        ops.right_shift(x, _constant(by)), _constant((1 << (32 - by)) - 1)
    )


def _constant(value: int) -> Tensor:
    """The int32 with the low 32 bits of a number."""
    value &= 0xFFFFFFFF
    return ops.convert_to_tensor(value - ((value >> 31) << 32), dtype="int32")
