"""One folder per framework, with the same four files in each.

- `transport.py`: the ring of this framework, a
  `keras_ring.distribution.transport.Transport`.
- `kernel.py`: `KERNELS`, which compute attention over one K/V block, by
  preference; the last is `KERNEL`, the blockwise reference, with the control
  flow it is written in.
- `runtime.py`: `World`, `current()`, `custom_gradient()`, `vjp()` and
  `exporting()`: how the framework carries a strategy, differentiates a function
  with its own gradient, and whether it exports a program. Private names of
  Keras and of the framework appear in no `transport.py`.
- `trainer.py`: `prepare()` and `install()`: what a strategy changes in Keras'
  own trainer. It does not import the runtime, which imports it.

Nothing is imported before `load()` is called, and only the backend that
Keras runs on is.
"""

import importlib
from types import ModuleType
from typing import NamedTuple

import keras


class Backend(NamedTuple):
    """The four modules of one framework."""

    name: str
    transport: ModuleType
    kernel: ModuleType
    runtime: ModuleType
    trainer: ModuleType


def load() -> Backend:
    """The backend package of the framework that Keras runs on.

    Raises:
        NotImplementedError: if Keras runs on a backend without a ring.
    """
    match keras.backend.backend():
        case "jax" | "tensorflow" | "torch" as name:
            modules = [
                importlib.import_module(f"keras_ring.backends.{name}.{part}")
                for part in ("transport", "kernel", "runtime", "trainer")
            ]
            return Backend(name, *modules)
        case other:
            raise NotImplementedError(
                "keras_ring runs on the Keras backends 'jax', 'tensorflow' "
                f"and 'torch'. Received: backend={other!r}. Set the "
                "environment variable KERAS_BACKEND before Keras is imported."
            )
