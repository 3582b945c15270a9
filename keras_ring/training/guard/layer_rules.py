"""Rules for layers that compute something else on a shard of the sequence.

Each rule names classes (and with them their subclasses), says what they do
with the sequence, and when: many mix positions under some settings only.
A layer that no rule meets works position by position.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from keras_ring.keras_internals import sublayers

Shape = tuple[int | None, ...] | None

GATHERED = "wrap it in keras_ring.layers.Gathered(layer)"
RING = "use keras_ring.layers.RingAttention"


def _always(layer: Any, shape: Shape) -> bool:
    del layer, shape
    return True


@dataclasses.dataclass(frozen=True)
class Rule:
    """Rule of what some layers do with the sequence.

    Attributes:
        classes: names of classes; subclasses are meant as well.
        why: what goes wrong on a shard.
        when: `(layer, input_shape) -> bool`, whether it does so as it is
            set up. The shape is None where it is not known.
        instead: the way out.
        gathers: whether a compiler that makes the layer right gathers the
            sequence for it.
        wrong_when_whole: `(layer, input_shape) -> bool`, whether even a
            compiler that sees the whole sequence gets it wrong.
        fatal: whether results differ; if not, only a warning is given.
    """

    classes: tuple[str, ...]
    why: str
    when: Callable[[Any, Shape], bool] = _always
    instead: str = GATHERED
    gathers: bool = False
    wrong_when_whole: Callable[[Any, Shape], bool] | None = None
    fatal: bool = True


def axes_of(value: Any, rank: int | None) -> set[int]:
    """Axes counted from the front; without a rank those that are certain."""
    axes = value if isinstance(value, (tuple, list)) else (value,)
    if rank is None:
        return {axis for axis in axes if axis >= 0}
    return {axis % rank for axis in axes}


def _on_sequence_axis(attribute: str) -> Callable[[Any, Shape], bool]:
    def when(layer: Any, shape: Shape) -> bool:
        # Layers of the same name in other packages may have none: they work
        # along the last axis, or a trial shows it.
        value = getattr(layer, attribute, -1)
        rank = None if shape is None else len(shape)
        return value is None or 1 in axes_of(value, rank)

    return when


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) else value


def _channels_first(layer: Any) -> bool:
    return getattr(layer, "data_format", None) == "channels_first"


def _window_spans(layer: Any, shape: Shape) -> bool:
    del shape
    window = getattr(layer, "kernel_size", getattr(layer, "pool_size", None))
    return (
        _channels_first(layer)
        or _first(window) != 1
        or _first(layer.strides) != 1
    )


def _windows_overlap(layer: Any, shape: Shape) -> bool:
    del shape
    return _first(layer.strides) < _first(layer.pool_size)


def _border(layer: Any, shape: Shape) -> bool:
    del shape
    size = getattr(layer, "padding", getattr(layer, "cropping", 0))
    several = not _names(layer).intersection(("ZeroPadding1D", "Cropping1D"))
    if several or _channels_first(layer):
        size = _first(size)
    return _channels_first(layer) or any(
        size if isinstance(size, (tuple, list)) else (size,)
    )


def _reshapes_positions(layer: Any, shape: Shape) -> bool:
    """Anything but splitting or joining the features of each position."""
    first, *rest = layer.target_shape
    if first not in (-1, None) or -1 in rest or None in rest or shape is None:
        return True
    return _product(rest) != _product(shape[2:])


def _product(sizes: Any) -> int | None:
    product = 1
    for size in sizes:
        if size is None:
            return None
        product *= size
    return product


def _moves_sequence(layer: Any, shape: Shape) -> bool:
    del shape
    return layer.dims[0] != 1


def _attends_over_sequence(layer: Any, shape: Shape) -> bool:
    rank = None if shape is None else len(shape)
    axes = layer.get_config().get("attention_axes")
    return axes is None or 1 in axes_of(axes, rank)


def _contracts_sequence(layer: Any, shape: Shape) -> bool:
    operands, result = layer.equation.replace(" ", "").split("->")
    tensor, kernel = operands.split(",")
    if "..." in tensor:
        # The dots stand for the batch and as many axes as are not named.
        named = len(tensor.replace("...", ""))
        if shape is None or len(shape) - named < 2:
            return True
        return not (tensor.startswith("...") and result.startswith("..."))
    letter = tensor[1]
    return letter in kernel or result[1:2] != letter


def _counts(layer: Any, shape: Shape) -> bool:
    del shape
    return getattr(layer, "output_mode", None) in (
        "count",
        "multi_hot",
        "tf_idf",
    )


def _noise_is_shared(layer: Any, shape: Shape) -> bool:
    del shape
    if "Spatial" in "".join(c.__name__ for c in type(layer).__mro__):
        return layer.rate > 0
    noise = getattr(layer, "noise_shape", None)
    return (
        layer.rate > 0
        and noise is not None
        and len(noise) > 1
        and noise[1] == 1
    )


def _has_batch_statistics(layer: Any, shape: Shape) -> bool:
    del shape
    parts = [layer, *sublayers(layer, recursive=True)]
    return any(
        "BatchNormalization" in _names(part) and part.trainable
        for part in parts
    )


def _names(layer: Any) -> set[str]:
    """The names of a layer's class and of those that it is made from."""
    return {c.__name__ for c in type(layer).__mro__}


_DIMENSIONS = ("1D", "2D", "3D")


def _each(*names: str) -> tuple[str, ...]:
    return tuple(name + d for name in names for d in _DIMENSIONS)


ACTIVITY_REGULARIZER = Rule(
    ("Layer",),
    "its activity_regularizer sums over the shard only",
    lambda layer, shape: (
        getattr(layer, "activity_regularizer", None) is not None
    ),
)

_OWN_WORK = (
    f"{GATHERED}, or attend with keras_ring.layers.RingAttention or "
    "keras_ring.ops.ring_attention; what is right on a shard all the same "
    "says so by an attribute `sequence_parallel_safe = True`"
)

MIXING = Rule(
    (),
    "tried on a short sequence, it gives other results for the halves of it "
    "than for the whole: it mixes positions, or counts them from 0",
    instead=_OWN_WORK,
)

LIKE_ATTENTION = Rule(
    (),
    "it looks like attention, within the shard only",
    instead=_OWN_WORK,
)


def looks_like_attention(layer: Any) -> bool:
    """True if a class that is no table's has the name of attention, or the
    method in which Keras' attention layers compute it."""
    return hasattr(layer, "_compute_attention") or any(
        "attention" in c.__name__.lower() for c in type(layer).__mro__
    )


RULES = (
    Rule(
        _each("Conv", "DepthwiseConv", "SeparableConv")
        + tuple(f"Conv{d}Transpose" for d in _DIMENSIONS),
        "its window reaches into the neighbouring shards",
        _window_spans,
    ),
    Rule(
        _each("MaxPooling"),
        "its window reaches into the neighbouring shards",
        _window_spans,
        wrong_when_whole=_windows_overlap,
    ),
    Rule(
        _each("AveragePooling"),
        "its window reaches into the neighbouring shards",
        _window_spans,
    ),
    Rule(
        _each(
            *("GlobalAveragePooling", "GlobalMaxPooling"),
            *("AdaptiveAveragePooling", "AdaptiveMaxPooling"),
        ),
        "it pools over the shard instead of the sequence",
    ),
    Rule(
        ("RNN", "Bidirectional"),
        "its state would start anew in every shard",
        gathers=True,
    ),
    Rule(
        ("BatchNormalization",),
        "its statistics are those of the shard",
        lambda layer, shape: (
            layer.trainable or _on_sequence_axis("axis")(layer, shape)
        ),
    ),
    Rule(
        ("PReLU",),
        "it has slopes of its own for each position",
        lambda layer, shape: 1 not in (layer.shared_axes or ()),
    ),
    Rule(("GroupNormalization",), "its statistics are those of the shard"),
    Rule(
        ("TimeDistributed",),
        "it holds a BatchNormalization, whose statistics are those of the "
        "shard",
        _has_batch_statistics,
    ),
    Rule(
        ("LayerNormalization", "RMSNormalization", "Normalization"),
        "it normalises over the shard instead of the sequence (axis 1)",
        _on_sequence_axis("axis"),
    ),
    Rule(
        ("Softmax", "UnitNormalization"),
        "it normalises over the shard instead of the sequence (axis 1)",
        _on_sequence_axis("axis"),
    ),
    Rule(
        ("Concatenate",),
        "it joins along the sequence (axis 1), shard by shard",
        _on_sequence_axis("axis"),
    ),
    Rule(
        ("Dot",),
        "it sums over the shard instead of the sequence (axis 1)",
        _on_sequence_axis("axes"),
    ),
    Rule(
        (
            *("MultiHeadAttention", "GroupedQueryAttention"),
            *("GroupQueryAttention",),
        ),
        "it attends within the shard only",
        _attends_over_sequence,
        RING,
        gathers=True,
    ),
    Rule(
        ("Attention", "AdditiveAttention"),
        "it attends within the shard only",
        instead=f"{RING}, or {GATHERED}",
        gathers=True,
    ),
    Rule(("Flatten",), "it flattens the shard only", gathers=True),
    Rule(
        ("Reshape",),
        "it counts the positions of the shard only",
        _reshapes_positions,
        gathers=True,
    ),
    Rule(
        ("Permute",),
        "it moves the sequence away from axis 1",
        _moves_sequence,
    ),
    Rule(("RepeatVector",), "it moves the sequence away from axis 1"),
    Rule(
        _each("ZeroPadding", "Cropping"),
        "it acts at the ends of every shard",
        _border,
    ),
    Rule(
        ("UpSampling2D", "UpSampling3D"),
        "it interpolates between the shard's positions only",
        lambda layer, shape: (
            _channels_first(layer)
            or getattr(layer, "interpolation", "nearest") != "nearest"
        ),
    ),
    Rule(
        ("EinsumDense",),
        "its equation mixes or moves the sequence (axis 1)",
        _contracts_sequence,
    ),
    Rule(
        (
            *("CategoryEncoding", "Discretization", "HashedCrossing"),
            *("Hashing", "IndexLookup", "TextVectorization"),
        ),
        "it counts over the shard instead of the sequence",
        _counts,
    ),
    Rule(
        (
            *("BaseImagePreprocessingLayer", "Resizing", "CenterCrop"),
            *("MelSpectrogram", "STFTSpectrogram"),
        ),
        "it treats the shard as a whole image or signal",
    ),
    Rule(
        (
            *("PositionEmbedding", "TokenAndPositionEmbedding"),
            "SinePositionEncoding",
        ),
        "its positions would start at 0 in every shard",
        instead="use keras_ring.layers.PositionEmbedding, or positions from "
        "keras_ring.ops.sequence_positions",
    ),
    Rule(
        ("RotaryEmbedding",),
        "its positions would start at 0 in every shard",
        instead="use keras_ring.layers.RotaryEmbedding",
    ),
    Rule(
        ("AlibiBias", "RelativeEmbedding", "FNetEncoder", "MaskedLMHead"),
        "it relates positions of the shard only",
    ),
    Rule(
        (*_each("SpatialDropout"), "Dropout"),
        "it draws noise for every shard that one device shares along the "
        "sequence",
        _noise_is_shared,
        "use Dropout without `noise_shape` to be independent of the ring",
        fatal=False,
    ),
    ACTIVITY_REGULARIZER,
)


def rules_for(layer: Any, shape: Shape) -> Iterator[Rule]:
    """The rules that a layer breaks on an input with a sequence axis."""
    names = _names(layer)
    for rule in RULES:
        if names.intersection(rule.classes) and rule.when(layer, shape):
            yield rule
