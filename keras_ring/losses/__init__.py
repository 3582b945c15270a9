"""Losses that know about chunks and shards."""

from keras_ring.losses.chunked_cross_entropy import ChunkedCrossEntropy

__all__ = ["ChunkedCrossEntropy"]
