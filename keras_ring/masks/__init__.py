"""Masks: which query may attend to which key, as functions of global positions.

A mask is a frozen object. It tells of a block of queries and keys whether
none, some or all pairs are allowed before anything is computed, so that
empty blocks cost nothing, and gives the exact pairs where only some are.
Masks combine with `&` (both allow) and `|` (one of them does). Positions are
global, so a mask means the same on every device and for every ring size.
"""

from keras_ring.masks.by_position import (
    BlockCausal,
    Causal,
    PrefixLM,
    SlidingWindow,
)
from keras_ring.masks.by_tensor import Explicit, Padding, Segments
from keras_ring.masks.mask import And, Carried, Mask, Or, Span

__all__ = [
    "Causal",
    "SlidingWindow",
    "Padding",
    "Segments",
    "PrefixLM",
    "BlockCausal",
    "Explicit",
    "Mask",
    "And",
    "Or",
    "Carried",
    "Span",
]
