"""Keras layers that know about the ring."""

from keras_ring.layers.blockwise_feed_forward import BlockwiseFeedForward
from keras_ring.layers.gathered import Gathered
from keras_ring.layers.language_model_head import LanguageModelHead
from keras_ring.layers.position_embedding import PositionEmbedding
from keras_ring.layers.ring_attention import RingAttention
from keras_ring.layers.ring_transformer_block import RingTransformerBlock
from keras_ring.layers.rotary_embedding import RotaryEmbedding

__all__ = [
    "BlockwiseFeedForward",
    "Gathered",
    "LanguageModelHead",
    "PositionEmbedding",
    "RingAttention",
    "RingTransformerBlock",
    "RotaryEmbedding",
]
