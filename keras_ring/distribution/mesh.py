"""The mesh: devices along named axes, and who shares what with whom.

Every size, index and group of devices comes from here, on all backends. To
add an axis, name it in `AXES` and give `Mesh` its size.
"""

import dataclasses
import itertools
import math
from typing import Any

# The data axis splits the batch, the sequence axis the positions, the model
# axis weights; Keras and KerasHub use the same names. The last one is fastest.
BATCH, SEQUENCE, MODEL = AXES = ("batch", "seq", "model")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices in a grid with one axis for each way to share work.

    The rank of a device is its number in the grid, the last axis fastest:
    with `shape` (2, 4, 1) device 5 has the second half of the batch and the
    second quarter of the sequence.

    Attributes:
        shape: number of devices along each of `AXES`.
    """

    shape: tuple[int, ...]

    def size(self, *axes: str) -> int:
        """Number of devices along some axes; of all devices without any."""
        return math.prod(self.shape[AXES.index(axis)] for axis in axes or AXES)

    def index(self, rank: Any, axis: str) -> Any:
        """Place of a device along an axis.

        Args:
            rank: of the device, an int or an int32 scalar.
            axis: of `AXES`.
        """
        place = AXES.index(axis)
        faster = math.prod(self.shape[place + 1 :])
        return rank // faster % self.shape[place]

    def rank(self, **indices: int) -> int:
        """Rank of the device at some places, 0 along the axes not named."""
        rank = 0
        for axis, size in zip(AXES, self.shape, strict=True):
            rank = rank * size + indices.get(axis, 0)
        return rank

    def groups(self, *axes: str) -> list[list[int]]:
        """Ranks of the devices that share something along some axes.

        Args:
            *axes: along which the members of a group differ; they agree
                along all others.

        Returns:
            The groups, each in order of rank.
        """
        ranges = [range(size) for size in self.shape]
        found: dict[tuple[int, ...], list[int]] = {}
        for rank, places in enumerate(itertools.product(*ranges)):
            own = zip(AXES, places, strict=True)
            key = tuple(place for axis, place in own if axis not in axes)
            found.setdefault(key, []).append(rank)
        return list(found.values())

    def group(self, rank: int, *axes: str) -> list[int]:
        """The one of `groups` that a device belongs to."""
        return next(g for g in self.groups(*axes) if rank in g)
