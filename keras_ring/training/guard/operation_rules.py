"""Rules for `keras.ops` in a functional model that mix the sequence.

Most operations say by an `axis` what they work along; a few have their own
form. What neither mixes nor moves axis 1 works position by position.
"""

from collections.abc import Callable
from typing import Any

import keras

from keras_ring.training import indexing

Sees = Callable[[Any], bool]

# These add or remove axes: where the sequence ends up is what counts.
_INSERTING = {"ExpandDims", "OneHot", "Squeeze", "Stack"}

# Without a rule by axis, whatever their arguments.
_MIXING = {
    *("Append", "AveragePool", "AdaptiveAveragePool", "AdaptiveMaxPool"),
    *("Bincount", "Conv", "ConvTranspose", "Correlate", "Corrcoef", "CTCLoss"),
    *("CTCDecode", "CDist", "DepthwiseConv", "Diagonal", "Dot"),
    *("DotProductAttention", "ExtractSequences", "FFT2", "Fliplr"),
    *("Fold", "Histogram", "IFFT2", "ISTFT", "Inner", "Kron", "MaxPool"),
    *("Outer", "Qr", "Ravel", "Rot90", "STFT", "Scatter", "ScatterUpdate"),
    *("SegmentReduction", "SeparableConv", "Slice", "SliceUpdate", "Tensordot"),
    *("Trace", "Tril", "Triu", "Unfold", "Unique", "Vander", "Vdot", "Vstack"),
}

# These work along the last axis.
_LAST_AXIS = {"FFT", "IRFFT", "MultiHot", "RFFT", "Sparsemax", "TopK"}


def problem(operation: Any, node: Any, sees_sequence: Sees) -> str | None:
    """Problem of an operation with a shard, None if there is none.

    Args:
        operation: a `keras.Operation` that is no layer.
        node: its call in the graph.
        sees_sequence: tells whether a symbolic tensor has the sequence on
            axis 1.
    """
    inputs = [t for t in node.input_tensors if sees_sequence(t)]
    if not inputs or indexing.takes_positions(operation, node, sees_sequence):
        return None
    name = type(operation).__name__
    if name in _SPECIAL:
        why = _SPECIAL[name](operation, node, sees_sequence)
        if why:
            return why
    elif name in _MIXING:
        return "it mixes positions of the shard only"
    elif name not in _INSERTING and _works_along(operation, inputs[0]):
        return "it works along the sequence (axis 1) of the shard only"
    if not all(map(sees_sequence, node.output_tensors)):
        return "its result has lost the sequence on axis 1"
    return None


def wrong_when_whole(operation: Any, shape: Any) -> bool:
    """True if a compiler that splits the sequence gets it wrong."""
    del shape
    if type(operation).__name__ != "MaxPool":
        return False
    size, strides = operation.pool_size, operation.strides
    if strides is None:
        return False
    first = [
        v[0] if isinstance(v, (tuple, list)) else v for v in (size, strides)
    ]
    return first[1] < first[0]


def _works_along(operation: Any, tensor: Any) -> bool:
    rank = len(tensor.shape)
    if type(operation).__name__ in _LAST_AXIS:
        return rank == 2
    for attribute in ("axis", "axes", "axis1", "axis2"):
        if not hasattr(operation, attribute):
            continue
        axes = getattr(operation, attribute)
        if axes is None:
            return True
        axes = axes if isinstance(axes, (tuple, list)) else (axes,)
        if 1 in {axis % rank for axis in axes}:
            return True
    return False


def _indexed(operation: Any, node: Any, sees_sequence: Sees) -> str | None:
    del operation, sees_sequence
    key = [*node.arguments.args, *node.arguments.kwargs.values()][1]
    key = tuple(key) if isinstance(key, (tuple, list)) else (key,)
    for place in key[:2]:
        if place is Ellipsis:
            named = len(key) - 1 - key.count(None)
            rank = len(node.input_tensors[0].shape)
            if rank - named - key.index(Ellipsis) < 2 - key.index(Ellipsis):
                return "it takes positions of the shard (axis 1)"
            return None
        if not (isinstance(place, slice) and place == slice(None)):
            return "it takes positions of the shard (axis 1)"
    return None


def _padded(operation: Any, node: Any, sees_sequence: Sees) -> str | None:
    del node, sees_sequence
    widths = operation.pad_width
    if any(widths[min(1, len(widths) - 1)]):
        return "it pads every shard (axis 1)"
    return None


def _tiled(operation: Any, node: Any, sees_sequence: Sees) -> str | None:
    del sees_sequence
    repeats = operation.repeats
    repeats = (repeats,) if isinstance(repeats, int) else tuple(repeats)
    rank = max(len(node.input_tensors[0].shape), len(repeats))
    repeats = (1,) * (rank - len(repeats)) + repeats
    return None if repeats[1] == 1 else "it repeats every shard (axis 1)"


def _transposed(operation: Any, node: Any, sees_sequence: Sees) -> str | None:
    del node, sees_sequence
    axes = operation.axes
    if axes is not None and tuple(axes[:2]) == (0, 1):
        return None
    return "it moves the sequence away from axis 1"


def _multiplied(operation: Any, node: Any, sees_sequence: Sees) -> str | None:
    """A contraction of the last axis with the last but one."""
    del operation
    operands = [*node.arguments.args, *node.arguments.kwargs.values()]
    contracted = (-1, -2)
    for operand, axis in zip(operands, contracted, strict=True):
        if (
            isinstance(operand, keras.KerasTensor)
            and sees_sequence(operand)
            and len(operand.shape) + axis == 1
        ):
            return "it sums over the shard instead of the sequence (axis 1)"
    return None


def _einsum(operation: Any, node: Any, sees_sequence: Sees) -> str | None:
    why = "its subscripts mix or move the sequence (axis 1)"
    subscripts = operation.subscripts.replace(" ", "")
    if "..." in subscripts or "->" not in subscripts:
        return why
    operands, result = subscripts.split("->")
    letters = set()
    tensors = node.input_tensors
    for term, tensor in zip(operands.split(","), tensors, strict=False):
        if sees_sequence(tensor):
            letters.add(term[1])
    if operands.count(",") + 1 != len(tensors):
        return why
    return None if letters == set(result[1:2]) else why


_SPECIAL: dict[str, Callable[[Any, Any, Sees], str | None]] = {
    "Einsum": _einsum,
    "GetItem": _indexed,
    "Matmul": _multiplied,
    "Pad": _padded,
    "Tile": _tiled,
    "Transpose": _transposed,
}
