"""Which arrays of a batch carry the sequence, and whether it can be split.

A batch is `(x, y, sample_weight)`. An array that carries the sequence has it
on axis 1 and is split over the ring; every array is split over the data
axis; the others are whole for every member of a ring. What the model says
decides: an input or output whose length axis is `None` carries the sequence.
Where the model has no symbolic inputs (a subclassed model), shapes decide.

Every process sees the same global batch, so the checks come to the same
result everywhere, before anything is sent.
"""

import math
from typing import Any

import keras
from keras import tree

from keras_ring import placement
from keras_ring.world import World


def split_batch(world: World, model: Any, batch: Any) -> Any:
    """Tell which leaves of a batch carry the sequence on axis 1.

    Args:
        world: the mesh that the batch is spread over.
        model: the Keras model that is fed.
        batch: `x`, `(x,)`, `(x, y)` or `(x, y, sample_weight)`, each a
            nested structure of leaves with a `shape`; sizes may be None.
            None stands for a part that is absent.

    Returns:
        The structure of `batch` with a bool in place of each leaf (None for
        None).

    Raises:
        ValueError: for a batch or a length that the mesh cannot split.
    """
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    x, *rest = parts
    inputs = _matched(x, getattr(model, "inputs", None))
    splits_x = _map(
        lambda leaf, symbol: _carries_sequence(world, leaf, symbol), x, inputs
    )
    lengths = {
        leaf.shape[1]
        for leaf, split in zip(_leaves(x), _leaves(splits_x), strict=True)
        if split
    }

    def like_output(leaf: Any, symbol: Any) -> bool:
        if len(leaf.shape) < 2 or not lengths:
            return False
        if symbol is not None and not _has_length(symbol):
            return False
        return leaf.shape[1] in lengths or leaf.shape[1] is None

    splits = [splits_x]
    for part in rest:
        outputs = _matched(part, getattr(model, "outputs", None))
        splits.append(_map(like_output, part, outputs))
    names = ("x", "y", "sample_weight")
    for name, part, part_splits in zip(names, parts, splits, strict=False):
        for leaf, split in zip(
            _leaves(part), _leaves(part_splits), strict=True
        ):
            check_leaf(world, name, tuple(leaf.shape), split)
    if isinstance(batch, (tuple, list)):
        return type(batch)(splits)
    return splits_x


def split_outputs(model: Any, outputs: Any, local_length: int | None) -> Any:
    """Tell which outputs of a step carry (a shard of) the sequence.

    Args:
        model: the Keras model that gave them.
        outputs: nested structure of leaves with a `shape`.
        local_length: length of a shard, used for a model without symbolic
            outputs.

    Returns:
        The structure of `outputs` with a bool in place of each leaf.
    """
    symbols = _matched(outputs, getattr(model, "outputs", None))

    def split(leaf: Any, symbol: Any) -> bool:
        if len(leaf.shape) < 2:
            return False
        if symbol is not None:
            return _has_length(symbol)
        return local_length is not None and leaf.shape[1] == local_length

    return _map(split, outputs, symbols)


def check_leaf(
    world: World, name: str, shape: tuple[int | None, ...], split: bool
) -> None:
    """Refuse an array that the mesh cannot split into equal parts."""
    if not shape:
        return
    batch = shape[0]
    if isinstance(batch, int) and batch % world.data_size:
        raise ValueError(
            "The batch size must be a multiple of `data_parallel`, for the "
            f"last batch too. Received: `{name}` with a batch of {batch}, "
            f"data_parallel={world.data_size}. Choose another `batch_size`, "
            "drop the remainder, or lower `data_parallel`."
        )
    length = shape[1] if split else None
    if isinstance(length, int):
        placement.check_divisible(length, world.sequence_size, name)


def check_arrays(
    world: World,
    model: Any,
    batch: Any,
    batch_size: int | None = None,
    validation_split: float = 0.0,
) -> None:
    """Refuse in-memory arrays before the first batch is made of them.

    Args:
        world: the mesh.
        model: the model that is fed.
        batch: `(x, y, sample_weight)` over all samples. Anything that is not
            made of arrays is left to the check of each batch.
        batch_size: samples in a batch; 32 if None, as in Keras. None of the
            arrays is cut into batches if it is 0.
        validation_split: fraction that Keras keeps back at the end.

    Raises:
        ValueError: as `split_batch`.
    """
    if not all(hasattr(leaf, "shape") for leaf in _leaves(batch)):
        return
    if not _leaves(batch[0]):
        return
    samples = _leaves(batch[0])[0].shape[0]
    if batch_size == 0:
        sizes = {samples}
    else:
        step = batch_size or 32
        kept = math.floor(samples * (1.0 - validation_split))
        sizes = set()
        for count in (kept, samples - kept):
            sizes |= {min(count, step), count % step} - {0}
    for size in sizes:
        specs = tree.map_structure(
            lambda leaf, size=size: (
                None
                if leaf is None
                else keras.KerasTensor((size, *leaf.shape[1:]), leaf.dtype)
            ),
            tuple(batch),
        )
        split_batch(world, model, specs)


def _carries_sequence(world: World, leaf: Any, symbol: Any) -> bool:
    shape = tuple(leaf.shape)
    if len(shape) < 2 or shape[1] == 1:
        return False
    if symbol is None:
        # Features of a sample are rank 2 and floating point; a sequence is
        # rank 3 or more, or made of integer tokens.
        return len(shape) > 2 or "int" in _dtype(leaf)
    if _has_length(symbol):
        return True
    # A static length: a step that sees the whole sequence may still have it
    # split; where a step sees a shard, the array is a feature vector.
    return (
        not world.layers_see_shards
        and isinstance(shape[1], int)
        and shape[1] % world.sequence_size == 0
    )


def _has_length(symbol: Any) -> bool:
    return len(symbol.shape) >= 2 and symbol.shape[1] is None


def _dtype(leaf: Any) -> str:
    return str(getattr(leaf, "dtype", ""))


def _leaves(structure: Any) -> list[Any]:
    return [leaf for leaf in _flatten(structure) if leaf is not None]


def _flatten(structure: Any) -> list[Any]:
    return [] if structure is None else tree.flatten(structure)


def _map(function: Any, structure: Any, symbols: list[Any]) -> Any:
    """Apply `function(leaf, symbol)`, keeping the structure and None."""
    if structure is None:
        return None
    results = iter(
        [
            None if leaf is None else function(leaf, symbol)
            for leaf, symbol in zip(_flatten(structure), symbols, strict=True)
        ]
    )
    return tree.pack_sequence_as(structure, list(results))


def _matched(structure: Any, symbols: Any) -> list[Any]:
    """The symbolic tensor that belongs to each leaf, None where unknown."""
    leaves = _flatten(structure)
    symbols = [] if symbols is None else tree.flatten(symbols)
    if isinstance(structure, dict):
        by_name = {symbol.name: symbol for symbol in symbols}
        if set(structure) <= set(by_name):
            return [by_name[name] for name in sorted(structure)]
    if len(symbols) == len(leaves):
        return list(symbols)
    return [None] * len(leaves)
