"""The functional interface: operations on tensors."""

from keras_ring.ops.batch import gather_batch
from keras_ring.ops.blockwise_feed_forward import blockwise_feed_forward
from keras_ring.ops.chunked_cross_entropy import (
    CrossEntropy,
    chunked_cross_entropy,
)
from keras_ring.ops.positional_dropout import positional_dropout
from keras_ring.ops.ring_attention import AttentionResult, ring_attention
from keras_ring.ops.sequence import (
    gather_sequence,
    own_chunk,
    sequence_positions,
)
from keras_ring.ops.take_position import take_position

__all__ = [
    "AttentionResult",
    "CrossEntropy",
    "blockwise_feed_forward",
    "chunked_cross_entropy",
    "gather_batch",
    "gather_sequence",
    "own_chunk",
    "positional_dropout",
    "ring_attention",
    "sequence_positions",
    "take_position",
]
