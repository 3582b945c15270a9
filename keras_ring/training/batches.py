"""The arrays of a batch, and which of them carry the sequence.

A batch is `(x, y, sample_weight)`. An array that carries the sequence has it
on axis 1 and is split over the ring; every array is split over the data
axis; the others are whole for every member of a ring. What the model says
decides: an input or output whose length axis is `None` carries the sequence,
and so does one of fixed length that can be split (`lengths`). Where the model
has no symbolic inputs (a subclassed model), shapes decide.

Every process sees the same global batch, so the checks come to the same
result everywhere, before anything is sent.
"""

import math
from collections.abc import Collection
from typing import Any

from keras import tree

from keras_ring.distribution import padding
from keras_ring.distribution.lengths import OPEN, Lengths
from keras_ring.distribution.padding import PaddedAxis
from keras_ring.distribution.world import World


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
        ValueError: for labels or weights of another length than the inputs,
            where a layer sees a shard.
    """
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    _check_rows(parts)
    x, *rest = parts
    inputs = _matched(x, getattr(model, "inputs", None))
    known = world.lengths.get(model, OPEN)
    splits_x = _map(
        lambda leaf, symbol: _carries_sequence(world, known, leaf, symbol),
        x,
        inputs,
    )
    if known.opened and getattr(model, "input_spec", None):
        # A sequential model takes other lengths than its own.
        for leaf, symbol in zip(_flatten(x), inputs, strict=True):
            if leaf is not None and symbol is not None:
                _check_length(leaf, symbol)
    lengths = {
        leaf.shape[1]
        for leaf, split in zip(_leaves(x), _leaves(splits_x), strict=True)
        if split
    }

    def like_output(leaf: Any, symbol: Any) -> bool:
        if len(leaf.shape) < 2 or not lengths:
            return False
        if symbol is not None and not known.split(symbol):
            return False
        if symbol is not None and leaf.shape[1] == symbol.shape[1]:
            return True
        return leaf.shape[1] in lengths or leaf.shape[1] is None

    splits = [splits_x]
    for part in rest:
        outputs = _matched(part, getattr(model, "outputs", None))
        splits.append(_map(like_output, part, outputs))
    if isinstance(batch, (tuple, list)):
        return type(batch)(splits)
    return splits_x


def split_outputs(
    world: World, model: Any, outputs: Any, local_lengths: Collection[int]
) -> Any:
    """Tell which outputs of a step carry (a shard of) the sequence.

    Args:
        world: the mesh.
        model: the Keras model that gave them.
        outputs: nested structure of leaves with a `shape`.
        local_lengths: lengths of the shards of the inputs, used for a model
            without symbolic outputs.

    Returns:
        The structure of `outputs` with a bool in place of each leaf.
    """
    symbols = _matched(outputs, getattr(model, "outputs", None))
    known = world.lengths.get(model, OPEN)

    def split(leaf: Any, symbol: Any) -> bool:
        if len(leaf.shape) < 2:
            return False
        if symbol is not None:
            return known.split(symbol) and len(local_lengths) > 0
        return leaf.shape[1] in local_lengths

    return _map(split, outputs, symbols)


def axes(
    world: World, batch: Any, splits: Any
) -> tuple[PaddedAxis, PaddedAxis]:
    """The batch and the sequence axis of a batch, with their true sizes.

    Args:
        world: the mesh.
        batch: nested structure of whole arrays.
        splits: of the same structure, as `split_batch` gives it.
    """
    leaves, flags = _flatten(batch), _flatten(splits)
    shapes = [
        (tuple(leaf.shape), flag)
        for leaf, flag in zip(leaves, flags, strict=True)
        if leaf is not None
    ]
    return (
        padding.axis_of(
            world.data_size, [shape[0] for shape, _ in shapes if shape]
        ),
        padding.axis_of(
            world.sequence_size, [shape[1] for shape, flag in shapes if flag]
        ),
    )


def needs_padding(
    world: World,
    model: Any,
    batch: Any,
    batch_size: int | None = None,
    validation_split: float = 0.0,
) -> bool:
    """True if in-memory arrays make batches that the mesh cannot split equally.

    Args:
        world: the mesh.
        model: the model that is fed.
        batch: `(x, y, sample_weight)` over all samples. Of anything that is
            not made of arrays nothing is known before its batches come.
        batch_size: samples in a batch; 32 if None, as in Keras. 0 if the
            arrays are a batch as they are.
        validation_split: fraction that Keras keeps back at the end.
    """
    if not all(hasattr(leaf, "shape") for leaf in _leaves(batch)):
        return False
    if not _leaves(batch[0]):
        return False
    samples = _leaves(batch[0])[0].shape[0]
    sizes = {samples}
    if batch_size != 0:
        step = batch_size or 32
        kept = math.floor(samples * (1.0 - validation_split))
        sizes = set()
        for count in (kept, samples - kept):
            sizes |= {min(count, step), count % step} - {0}
    _, lengths = axes(world, batch, split_batch(world, model, tuple(batch)))
    return lengths.padded or any(size % world.data_size for size in sizes)


def check_not_empty(parts: dict[str, Any]) -> None:
    """Refuse in-memory arrays without a row or a position.

    Args:
        parts: by name, structures of arrays, or None. Of anything that is
            not made of arrays nothing is known before its batches come.

    Raises:
        ValueError: naming the shape.
    """
    for name, part in parts.items():
        for leaf in _leaves(part):
            if 0 in tuple(getattr(leaf, "shape", ()))[:2]:
                raise ValueError(
                    "Data that devices share must have a row and a position. "
                    f"Received: {name} of shape {tuple(leaf.shape)}. Leave "
                    "the call out where there is nothing to compute."
                )


def _check_rows(parts: Any) -> None:
    """Refuse arrays of one batch that have different numbers of samples, of
    which devices would take parts that do not belong together."""
    rows = {
        leaf.shape[0]
        for part in parts
        for leaf in _leaves(part)
        if len(leaf.shape) and isinstance(leaf.shape[0], int)
    } - {1}
    if len(rows) > 1:
        raise ValueError(
            "All arrays of the batch must have the same number of samples, or "
            f"1. Received: {', '.join(map(str, sorted(rows)))} samples. Give "
            "each sample its labels and weights."
        )


def _carries_sequence(
    world: World, known: Lengths, leaf: Any, symbol: Any
) -> bool:
    shape = tuple(leaf.shape)
    if len(shape) < 2 or known.whole:
        return False
    if symbol is not None and known.split(symbol):
        return True
    if shape[1] == 1:
        return False
    if symbol is None:
        # Features of a sample are rank 2 and floating point; a sequence is
        # rank 3 or more, or made of integer tokens.
        return len(shape) > 2 or "int" in _dtype(leaf)
    # A static length: a step that sees the whole sequence may still have it
    # split; where a step sees a shard, the array is a feature vector.
    return (
        not world.layers_see_shards
        and isinstance(shape[1], int)
        and shape[1] % world.sequence_size == 0
    )


def _check_length(leaf: Any, symbol: Any) -> None:
    """As Keras does, which sees a shard of it only."""
    have, want = tuple(leaf.shape), tuple(symbol.shape)
    same = have[1:2] == want[1:2] or None in (*have[1:2], *want[1:2])
    if len(have) == len(want) and not same:
        raise ValueError(
            "An input must have the length that it was declared with. "
            f"Received: an array of shape {have} for the input "
            f"{symbol.name!r} of shape {want}. Declare the length as None to "
            "use several."
        )


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
    results = [
        None if leaf is None else function(leaf, symbol)
        for leaf, symbol in zip(_flatten(structure), symbols, strict=True)
    ]
    return tree.pack_sequence_as(structure, results)


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
