"""Exact long-context attention for Keras on JAX, TensorFlow and PyTorch."""

from keras_ring import config, layers, losses, masks, ops
from keras_ring.strategy import DistributedStrategy
from keras_ring.version import __version__

__all__ = [
    "DistributedStrategy",
    "config",
    "layers",
    "losses",
    "masks",
    "ops",
    "__version__",
]
