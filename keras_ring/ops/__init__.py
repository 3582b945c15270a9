"""The functional interface: operations on tensors."""

from keras_ring.ops.ring_attention import AttentionResult, ring_attention

__all__ = ["AttentionResult", "ring_attention"]
