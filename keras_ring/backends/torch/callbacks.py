"""Callbacks by process: which of them run where.

All processes see the same logs, so callbacks that steer (EarlyStopping, the
learning rate) run everywhere and decide alike. Those that write files or to
the terminal run on rank 0.
"""

from collections.abc import Sequence
from typing import Any

import keras
from keras import tree

from keras_ring.backends.torch import weights
from keras_ring.backends.torch.member import Member

WRITING = tuple(
    getattr(keras.callbacks, name)
    for name in (
        "BackupAndRestore",
        "CSVLogger",
        "ModelCheckpoint",
        "OrbaxCheckpoint",
        "ProgbarLogger",
        "RemoteMonitor",
        "TensorBoard",
    )
    if hasattr(keras.callbacks, name)
)


class InStep(keras.callbacks.Callback):
    """Keeps the processes in step; the last callback of every list.

    Args:
        world: the processes.
        restores: whether rank 0 may load a state when training begins.
    """

    def __init__(self, world: Member, restores: bool):
        super().__init__()
        self.world = world
        self.restores = restores

    def on_train_begin(self, logs: Any = None) -> None:
        if self.restores:
            agreement = self.world.agreement
            agreement.broadcast(self.model)
            self.model._initial_epoch = agreement.from_rank_0(
                self.model._initial_epoch
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.world.agreement.start_epoch()


def for_rank(world: Member, callbacks: Any) -> list[Any]:
    """The callbacks of a list that run on this process, and our own."""
    given: Sequence[Any] = tree.flatten(callbacks) if callbacks else []
    restores = any(
        isinstance(c, keras.callbacks.BackupAndRestore) for c in given
    )
    writing: tuple[Any, ...] = WRITING
    if weights.shared(world, "optimizer"):
        _check_saves(world, given)
        # Every process has parts of what it saves.
        saves = keras.callbacks.ModelCheckpoint
        writing = tuple(kind for kind in WRITING if kind is not saves)
    kept = [c for c in given if world.rank == 0 or not isinstance(c, writing)]
    if world.rank != 0:
        for callback in kept:
            if isinstance(getattr(callback, "verbose", None), int):
                callback.verbose = 0
    return [*kept, InStep(world, restores)]


def _check_saves(world: Member, callbacks: Sequence[Any]) -> None:
    """Refuse callbacks that save on rank 0 what processes share."""
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, keras.callbacks.TensorBoard):
            given = [
                option
                for option in ("histogram_freq", "write_images")
                if getattr(callback, option, 0)
            ]
            given += ["embeddings_freq"] * bool(callback.embeddings_freq)
            if given:
                raise ValueError(
                    "On PyTorch TensorBoard runs on rank 0, which cannot read "
                    "weights that processes share alone. Received: "
                    f"TensorBoard with {', '.join(given)}, and shard="
                    f"{world.strategy.shard!r}. Leave these out."
                )
        if isinstance(callback, keras.callbacks.BackupAndRestore) or (
            name == "OrbaxCheckpoint"
        ):
            raise ValueError(
                "On PyTorch a model whose state processes share is saved by "
                "all of them together, and not by rank 0. Received: the "
                f"callback {name} with shard={world.strategy.shard!r}. Use "
                "keras.callbacks.ModelCheckpoint, and load its file inside "
                "the scope to go on."
            )
