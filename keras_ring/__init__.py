"""Exact long-context attention for Keras on JAX, TensorFlow and PyTorch."""

try:
    import keras as _keras  # noqa: F401
except ModuleNotFoundError as error:
    _backend = (error.name or "").partition(".")[0]
    if _backend not in ("jax", "tensorflow", "torch"):
        raise
    raise ModuleNotFoundError(
        "Keras needs the backend that it runs on to be installed. Received: "
        f"backend={_backend!r}, which is not. Install it, with the extra of "
        f"this package (`pip install '.[{_backend}]'` in the repository), or "
        "choose another: set the environment variable KERAS_BACKEND to 'jax', "
        "'tensorflow' or 'torch' before Keras is imported.",
        name=error.name,
    ) from error

from keras_ring import config, layers, losses, masks, ops
from keras_ring.distribution.strategy import DistributedStrategy
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
