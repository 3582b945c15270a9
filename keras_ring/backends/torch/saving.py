"""Saving from several processes to one path without mixing their files."""

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_ring.backends.torch import weights
from keras_ring.backends.torch.processes import groups
from keras_ring.scratch import scratch


def whole_files(method: Callable[..., Any]) -> Callable[..., Any]:
    """A saving method of a model that several processes may call at once.

    Every process writes a file of its own, in a folder next to the target,
    and then puts it in its place in one operation. The target is whole at any
    time, and after its own call a process finds it, also on a disk of its own.
    What a process leaves that is killed meanwhile goes when the next saves
    there. What is no single local file is written by rank 0 alone. Where
    processes share weights each of them must save.

    Args:
        method: `Model.save` or `Model.save_weights`.
    """

    @functools.wraps(method)
    def save(
        self: Any, filepath: Any, overwrite: bool = True, **kwargs: Any
    ) -> Any:
        if groups.process_count() == 1:
            return method(self, filepath, overwrite=overwrite, **kwargs)
        single = (
            isinstance(filepath, str | os.PathLike)
            and "://" not in str(filepath)
            and kwargs.get("zipped") is not False
            and kwargs.get("max_shard_size") is None
        )
        if not single:
            if groups.rank() == 0:
                return method(self, filepath, overwrite=overwrite, **kwargs)
            if _has_parts(self):
                # Rank 0 asks for this process' parts of the weights.
                with tempfile.TemporaryDirectory() as other:
                    own = Path(other) / Path(str(filepath)).name
                    method(self, str(own), overwrite=True, **kwargs)
            return None
        target = Path(filepath)
        if not target.parent.is_dir() or (target.exists() and not overwrite):
            # Keras asks or refuses.
            return method(self, filepath, overwrite=overwrite, **kwargs)
        with scratch(target.parent) as folder:
            own = folder / target.name
            result = method(self, str(own), overwrite=True, **kwargs)
            os.replace(own, target)
        return result

    return save


def _has_parts(model: Any) -> bool:
    """True if other processes have parts of a model's variables."""
    optimizer = getattr(model, "optimizer", None)
    return any(
        weights.part_of(variable) is not None
        for variable in (
            *model.variables,
            *(() if optimizer is None else optimizer.variables),
        )
    )
