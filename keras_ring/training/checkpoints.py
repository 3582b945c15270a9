"""The backend in a saved model, and what another one makes of it.

Weights and the state of an optimizer are the same on every backend. Two
things in the compile configuration of a file are not: on PyTorch Keras names
its own subclasses of the optimizers, which fail elsewhere, and `jit_compile`
is saved as what "auto" came to there. Files that are written while the
package is in use say neither; those of stock Keras are read all the same.
"""

import functools
from collections.abc import Callable
from typing import Any

from keras_ring.distribution import strategy
from keras_ring.keras_internals import automatic_jit

_OF_A_BACKEND = "keras.src.backend."


def saved(get_compile_config: Callable[..., Any]) -> Callable[..., Any]:
    """`Model.get_compile_config` whose result every backend can read."""

    @functools.wraps(get_compile_config)
    def wrapper(self: Any) -> Any:
        config = portable(get_compile_config(self))
        if config and config.get("jit_compile") == automatic_jit(self):
            config = {**config, "jit_compile": "auto"}
        return config

    return wrapper


def loaded(compile_from_config: Callable[..., Any]) -> Callable[..., Any]:
    """`Model.compile_from_config` that reads what any backend wrote."""

    @functools.wraps(compile_from_config)
    def wrapper(self: Any, config: Any) -> Any:
        config = portable(config)
        world = strategy.current()
        sharded = world is not None and world.layers_see_shards
        if sharded and config.get("jit_compile") is True:
            # Steps over several devices are not compiled here.
            config = {**config, "jit_compile": "auto"}
        return compile_from_config(self, config)

    return wrapper


def portable(config: Any) -> Any:
    """A configuration in which optimizers have their public names."""
    if isinstance(config, (list, tuple)):
        return type(config)(portable(part) for part in config)
    if not isinstance(config, dict):
        return config
    config = {name: portable(part) for name, part in config.items()}
    module = config.get("module")
    if isinstance(module, str) and module.startswith(_OF_A_BACKEND):
        config |= {"module": "keras.optimizers", "registered_name": None}
    return config
