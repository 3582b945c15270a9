"""Keras' global seed, which `keras.random` draws from where no seed is given.

Private names of Keras, which have been in every Keras 3 release.
"""

import contextlib
from collections.abc import Iterator

import torch


def _seed_state() -> torch.Tensor | None:
    """The state of Keras' global seed generator, if there is one."""
    from keras.src.backend.common import global_state
    from keras.src.random import seed_generator

    generator = global_state.get_global_attribute(
        seed_generator.GLOBAL_SEED_GENERATOR
    )
    return None if generator is None else generator.state.value.detach()


def global_seed() -> list[int] | None:
    """The seed that functions of `keras.random` without one start from."""
    state = _seed_state()
    return None if state is None else state.tolist()


def set_global_seed(seed: list[int]) -> torch.Tensor:
    """Set what `global_seed` tells; gives the state itself."""
    from keras.src.backend.common import global_state
    from keras.src.random import seed_generator

    state = _seed_state()
    if state is None:
        # Made with a seed: without one it draws a number of Python's, which
        # shuffles data, and on one device none is drawn here.
        made = seed_generator.SeedGenerator(seed=0)
        name = seed_generator.GLOBAL_SEED_GENERATOR
        global_state.set_global_attribute(name, made)
        state = made.state.value.detach()
    return state.copy_(torch.tensor(seed))


def forget_global_seed() -> None:
    """Leave the global seed to be drawn when it is needed."""
    from keras.src.backend.common import global_state
    from keras.src.random import seed_generator

    global_state.set_global_attribute(
        seed_generator.GLOBAL_SEED_GENERATOR, None
    )


@contextlib.contextmanager
def forked_global_seed(offset: int) -> Iterator[None]:
    """Another global seed on this process for the length of a step, and the
    same one as on every process afterwards."""
    state = _seed_state()
    if state is None:
        state = set_global_seed([_derived_seed(), 0])
    after = [(value + 1) * 5387 % 933199 for value in state.tolist()]
    state[0] += offset
    try:
        yield
    finally:
        set_global_seed(after)


def _derived_seed() -> int:
    """A seed that is the same on every process and draws no number."""
    return int(torch.get_rng_state().to(torch.int64).sum()) % 933199
