"""Rules for the layout of weights over the model axis (tensor parallelism).

Megatron-LM (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053): queries,
keys and values by head, the hidden units of a feed-forward, and the entries of
a vocabulary are split; what follows them is split along the same numbers, so
that one sum over the devices comes after each pair.
"""

import re
from collections.abc import Sequence
from typing import Any

from keras_ring.distribution.mesh import AXES, MODEL, Mesh

Axes = tuple[Any, ...]

# By the end of a variable's path and its rank: where the model axis goes. The
# names are those of this package's layers, and of Keras' attention.
RULES: tuple[tuple[str, Axes], ...] = (
    (r"(query|key|value)/kernel", (None, MODEL, None)),
    (r"(query|key|value)/bias", (MODEL, None)),
    (r"attention_output/kernel", (MODEL, None, None)),
    (r"(up|gate)/kernel", (None, MODEL)),
    (r"(up|gate)/bias", (MODEL,)),
    (r"down/kernel", (MODEL, None)),
    # Not along the features: full-length activations would be gathered.
    (r"(token_)?embedding(_\d+)?/embeddings", (MODEL, None)),
    (r"language_model_head(_\d+)?/kernel", (None, MODEL)),
    (r"language_model_head(_\d+)?/bias", (MODEL,)),
)


class Rules:
    """Layouts of weights by their paths.

    Args:
        given: the user's own, pairs of a pattern for whole paths and axes.
        mesh: of the devices.
    """

    def __init__(self, given: Sequence[tuple[str, Axes]], mesh: Mesh):
        self.given = given
        self.mesh = mesh
        self.size = mesh.size(MODEL)

    def axes(self, path: str, shape: tuple[int, ...]) -> Axes | None:
        """Axes of the mesh for those of a weight; None where it is whole.

        Args:
            path: of the variable.
            shape: of it; what the devices cannot split evenly stays whole.

        Raises:
            ValueError: where a rule of the user's does not fit the weight.
        """
        if self.size == 1:
            return None
        own = dict(self.given)
        fitting = [path] if path in own else []
        fitting = fitting or [p for p in own if re.fullmatch(p, path)]
        if len(fitting) > 1:
            raise ValueError(
                "A variable must fit one rule of `layout_map` at most. "
                f"Received: the patterns {fitting} for {path!r}. Make them "
                "exclude one another."
            )
        for pattern in fitting:
            self._check(pattern, own[pattern], path, shape)
            return own[pattern]
        for pattern, axes in RULES:
            if len(axes) == len(shape) and re.search(f"(^|/){pattern}$", path):
                place = axes.index(MODEL)
                return axes if shape[place] % self.size == 0 else None
        return None

    def _check(
        self, pattern: str, axes: Axes, path: str, shape: tuple[int, ...]
    ) -> None:
        uneven = any(
            axis is not None and size % self.mesh.size(axis)
            for size, axis in zip(shape, axes, strict=False)
        )
        if len(axes) != len(shape) or uneven:
            raise ValueError(
                "A rule of `layout_map` must name an axis of the mesh, or "
                "None, for each axis of a weight, and the devices must split "
                f"those evenly. Received: {axes} for {pattern!r} and the "
                f"variable {path!r} of shape {shape}, on a mesh of the sizes "
                f"{dict(zip(AXES, self.mesh.shape, strict=True))}. Change the "
                "rule or the size of the layer."
            )
