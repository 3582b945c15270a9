"""Settings of a strategy: what a user asks for, checked."""

import dataclasses
import numbers
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_ring import arguments
from keras_ring.distribution.mesh import AXES, BATCH, SEQUENCE, Mesh
from keras_ring.distribution.placement import Choice

# Ways to share the attention of a sequence.
WAYS = ("ring", "all_to_all", "all_gather", "mixed", "auto")
# What devices keep a part of each, rather than the whole.
SHARDS = ("none", "optimizer", "weights")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `DistributedStrategy`, where they are described."""

    sequence_parallel: int = -1
    data_parallel: int = 1
    model_parallel: int = 1
    devices: tuple[str, ...] | None = None
    balance: Choice = "auto"
    timeout: float = 300.0
    attention: str = "ring"
    heads_parallel: int | None = None
    shard: str = "none"
    layout_map: Any = None

    def __post_init__(self) -> None:
        for name in ("sequence_parallel", "data_parallel", "model_parallel"):
            value = getattr(self, name)
            other = ""
            if name == "sequence_parallel":
                other = ", or -1 for all the devices that are left"
                if isinstance(value, numbers.Integral) and value == -1:
                    self._keep(name, -1)
                    continue
            self._keep(name, arguments.integer(name, value, other=other))
        self._check_model_parallel()
        if self.devices is not None:
            self._keep("devices", self._device_names())
        if not isinstance(self.balance, (bool, np.bool_)) and not (
            isinstance(self.balance, str) and self.balance == "auto"
        ):
            raise ValueError(
                '`balance` must be True, False or "auto". Received: '
                f"balance={arguments.shown(self.balance)}. Pass one of these."
            )
        self._keep("timeout", arguments.positive("timeout", self.timeout))
        self._check_attention()
        arguments.choice("shard", self.shard, SHARDS)
        if self.shard != "none" and keras.backend.backend() == "tensorflow":
            raise NotImplementedError(
                "On TensorFlow every replica has a whole copy of each "
                "variable: its MirroredStrategy knows nothing else. Received: "
                f"shard={self.shard!r}. Use the backend JAX or PyTorch, or "
                'shard="none".'
            )

    def _check_model_parallel(self) -> None:
        """Axes of weights that devices share, and the rules for them."""
        backend = keras.backend.backend()
        if self.model_parallel != 1 and backend != "jax":
            raise NotImplementedError(
                "Devices share heads and the hidden units of weights on JAX, "
                "where the compiler splits what is computed. Received: "
                f"model_parallel={self.model_parallel} on the backend "
                f"{backend!r}. {_INSTEAD[backend]}"
            )
        if self.layout_map is None:
            return
        if backend != "jax":
            raise NotImplementedError(
                "`layout_map` is for the model axis, which is JAX's. Received: "
                f"a layout_map on the backend {backend!r}. {_INSTEAD[backend]}"
            )
        if self.model_parallel == 1:
            raise ValueError(
                "`layout_map` says how devices of the model axis share "
                "weights. Received: a layout_map with model_parallel=1. Set "
                "model_parallel, or leave layout_map out."
            )
        if callable(self.layout_map):
            return
        # Not the mapping itself, which may change.
        self._keep("layout_map", checked_rules(self.layout_map))

    def _check_attention(self) -> None:
        arguments.choice("attention", self.attention, WAYS)
        if self.heads_parallel is None:
            return
        other = ", or None"
        number = arguments.integer(
            "heads_parallel", self.heads_parallel, 2, other
        )
        self._keep("heads_parallel", number)
        if self.attention not in ("mixed", "auto"):
            raise ValueError(
                "`heads_parallel` is the size of the groups that share heads "
                'in attention="mixed", which "auto" may choose. Received: '
                f"heads_parallel={number}, attention={self.attention!r}. "
                'Leave it out, or set attention="mixed".'
            )

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _device_names(self) -> tuple[str, ...]:
        """The names that were given, checked."""
        given: Any = self.devices
        if (
            not isinstance(given, (list, tuple))
            or not given
            or not all(isinstance(name, str) and name for name in given)
        ):
            raise ValueError(
                "`devices` must be a list or tuple of device names, in mesh "
                f"order. Received: devices={arguments.shown(given)}. Pass "
                "names such as ('gpu:0', 'gpu:1'), or None for all devices."
            )
        names = tuple(map(str, given))
        if len(set(names)) != len(names) and not self._shared_names():
            raise ValueError(
                "`devices` must not name a device twice. Received: "
                f"devices={names}. Leave out the second one."
            )
        return names

    @staticmethod
    def _shared_names() -> bool:
        """On PyTorch every process may call its own device 'cpu'."""
        return keras.backend.backend() == "torch"

    def mesh_shape(self, available: int) -> tuple[int, int]:
        """Return the sizes of the data and the sequence axis.

        Args:
            available: number of devices there are.

        Returns:
            `(data_size, sequence_size)`; -1 has become a number.

        Raises:
            ValueError: if the mesh does not fit.
        """
        mesh = self.mesh(available)
        return mesh.size(BATCH), mesh.size(SEQUENCE)

    def mesh(self, available: int) -> Mesh:
        """Lay the strategy out over devices.

        Args:
            available: number of devices there are.

        Returns:
            The mesh; -1 has become a number.

        Raises:
            ValueError: if the mesh does not fit.
        """
        available = arguments.integer("available", available)
        data, sequence = self.data_parallel, self.sequence_parallel
        model = self.model_parallel
        if sequence == -1:
            if available % (data * model):
                also = "" if model == 1 else " x `model_parallel`"
                given = "" if model == 1 else f", model_parallel={model}"
                raise ValueError(
                    f"The devices must divide evenly into `data_parallel`{also}"
                    f" groups. Received: data_parallel={data}{given} with "
                    f"{available} devices. Choose a divisor of {available}, "
                    "or set `sequence_parallel` to use fewer devices."
                )
            sequence = available // (data * model)
        needed = data * sequence * model
        if needed > available:
            backend = keras.backend.backend()
            raise ValueError(
                "A strategy cannot use more devices than there are: "
                f"data_parallel={data} x sequence_parallel={sequence} x "
                f"model_parallel={self.model_parallel} = {needed} devices. "
                f"Received: {available} device{'s' * (available != 1)} on the "
                f"backend {backend!r}. Lower the sizes"
                f"{_HOW_TO_GET_DEVICES.get(backend, '')}."
            )
        inner = self.heads_parallel
        if inner is not None and (sequence % inner or sequence == inner):
            raise ValueError(
                "`heads_parallel` must divide the devices that share a "
                "sequence, and be fewer. Received: heads_parallel="
                f"{inner}, sequence_parallel={sequence}. Choose a divisor of "
                f'{sequence}, or attention="all_to_all" for all of them.'
            )
        return Mesh((data, sequence, self.model_parallel))


def checked_rules(rules: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Rules for weights as pairs of a pattern and axes.

    Args:
        rules: axes of the mesh, or a `keras.distribution.TensorLayout`, by
            regular expressions of variable paths.

    Raises:
        ValueError: for a pattern that is none, and for other axes than those
            of a mesh.
    """
    if not isinstance(rules, Mapping):
        raise ValueError(
            "`layout_map` must be a dictionary of axes by regular expressions "
            "of variable paths, a keras.distribution.LayoutMap, or a function "
            "of a keras.distribution.DeviceMesh that returns one, such as a "
            "KerasHub backbone's get_layout_map. Received: layout_map="
            f"{arguments.shown(rules)}. Pass one of these, or None for the "
            "rules of keras_ring's layers."
        )
    found = []
    for pattern, layout in rules.items():
        axes = getattr(layout, "axes", layout)
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(
                "`layout_map` must have regular expressions as keys. Received: "
                f"{arguments.shown(pattern)} ({error}). Write one that matches "
                "whole paths of variables."
            ) from error
        if not isinstance(axes, (tuple, list)) or not all(
            axis is None or (axis in AXES and axes.count(axis) == 1)
            for axis in axes
        ):
            raise ValueError(
                "`layout_map` must have a tuple as value, of None or an axis "
                f"of {AXES}, each once, for each axis of a weight. Received: "
                f"{arguments.shown(axes)} for {pattern!r}. Write "
                "(None, 'model') to share the columns of a matrix."
            )
        found.append((pattern, tuple(axes)))
    return tuple(found)


_INSTEAD = {
    "torch": (
        'Use shard="weights", which keeps a part of each weight on each '
        "process, or the backend JAX."
    ),
    "tensorflow": "Use the backend JAX.",
}
_HOW_TO_GET_DEVICES = {
    "jax": (
        ", or simulate N devices on a CPU with XLA_FLAGS="
        "--xla_force_host_platform_device_count=N, set before JAX starts"
    ),
    "tensorflow": (
        ", or simulate devices on a CPU: call "
        "tf.config.set_logical_device_configuration before TensorFlow starts"
    ),
    "torch": (
        ", or start one process for each device with "
        "`torchrun --nproc-per-node N`"
    ),
}
