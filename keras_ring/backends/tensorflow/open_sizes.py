"""Programs for sizes that vary.

A program of known sizes is the best one, and most batches are of one size. But
to trace is slow, so that what varies is left open as soon as that is known:
from the start where a data pipeline says so, otherwise at the second size.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from keras import tree

from keras_ring.backends.tensorflow.member import Member


def announced(iterator: Any) -> bool:
    """True if a data pipeline says that lengths vary."""
    shapes = [
        getattr(leaf, "shape", None)
        for leaf in tf.nest.flatten(getattr(iterator, "element_spec", None))
    ]
    return any(
        shape is not None
        and shape.rank is not None
        and shape.rank > 1
        and shape[1] is None
        for shape in shapes
    )


class OpenSizes:
    """The sizes that the batches of one program have shown.

    Args:
        world: the mesh.
        function: the `tf.function` of a step; None where steps are not traced.
    """

    def __init__(self, world: Member, function: Any):
        self._world = world
        self._function = function
        # Of the batch and of the sequence axis.
        self._first: list[Any] = [None, None]
        self._open = [False, False]
        self._traced: set[Any] = set()

    def trace(
        self,
        data: Any,
        sizes: Sequence[Any],
        splits: Any,
        lengths_vary: bool = False,
    ) -> None:
        """Trace the program for a batch, and for others like it, where sizes
        vary; what comes after finds it.

        Args:
            data: nested structure of values for each replica.
            sizes: of the axes that are padded.
            splits: which leaves have the sequence on axis 1.
            lengths_vary: whether they are known to.
        """
        if self._function is None:
            return
        leaves, flags = tree.flatten(data), tree.flatten(splits)
        parts = [self._part(leaf) for leaf in leaves]
        shapes = [() if t is None else tuple(t.shape) for t in parts]
        found = (
            {shape[0] for shape in shapes if shape},
            {s[1] for s, flag in zip(shapes, flags, strict=True) if flag},
        )
        for axis, local in enumerate(found):
            # Shards of one size are of another sequence if they are padded.
            seen = local, sizes[axis] is None
            self._first[axis] = self._first[axis] or seen
            self._open[axis] |= seen != self._first[axis]
        self._open[1] |= lengths_vary
        # Of a program of open lengths a known batch makes no better one.
        self._open[0] |= self._open[1]
        if not any(self._open):
            return
        opened = [
            _opened(shape, (self._open[0], self._open[1] and bool(flag)))
            for shape, flag in zip(shapes, flags, strict=True)
        ]
        kind = (
            repr(tree.map_structure(lambda _: 0, data)),
            *(None if t is None else t.dtype for t in parts),
            *opened,
            *flags,
            *(size is None for size in sizes),
        )
        if kind not in self._traced:
            self._traced.add(kind)
            types = tree.pack_sequence_as(
                data, list(map(self._type, leaves, opened))
            )
            self._function.get_concrete_function(types, sizes, splits)

    def _part(self, leaf: Any) -> Any:
        """That of a replica of this process."""
        if leaf is None:
            return None
        return self._world.tf_strategy.experimental_local_results(leaf)[0]

    def _type(self, leaf: Any, shape: Sequence[int | None]) -> Any:
        """The type of what is like a leaf, with all sizes on the open axes."""
        if leaf is None or None not in shape:
            return leaf
        # What two values have in common, of which the other holds nothing.
        other = [0 if size is None else size for size in shape]
        dtype = self._part(leaf).dtype
        with tf.device("CPU:0"):
            like = (
                self._world.tf_strategy
            ).experimental_distribute_values_from_function(
                lambda context: tf.zeros(other, dtype)
            )
        own = tf.type_spec_from_value(leaf)
        return own.most_specific_common_supertype(
            [tf.type_spec_from_value(like)]
        )


def _opened(
    shape: Sequence[int], is_open: Sequence[bool]
) -> tuple[int | None, ...]:
    """A shape without the sizes on its first axes that are open."""
    first = [
        None if here else size
        for size, here in zip(shape, is_open, strict=False)
    ]
    return (*first, *shape[len(first) :])
