"""Finds layers that would be silently wrong on a shard of the sequence.

Where a layer sees its shard only, one that mixes positions and does not
know about the ring computes something else than on one device. `check` finds
such layers before anything runs and refuses them by name, with the way out.
Only what is given a sequence matters: in a functional model these are the
tensors whose axis 1 has no fixed size, or one that can be split all the same
(`fixed_lengths`). Where a fixed length cannot be split the model is not
refused: every member of a ring then sees whole sequences.

What stands in no table is tried (`trial`): it is refused if it is shown to
mix positions, and is right if it is shown not to. A layer of one's own that
works position by position, or knows the ring, says so with an attribute
`sequence_parallel_safe = True`.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import keras
from keras import tree

from keras_ring.distribution.lengths import OPEN, Lengths
from keras_ring.distribution.world import World
from keras_ring.keras_internals import calls, sublayers
from keras_ring.layers.gathered import Gathered
from keras_ring.training import batches
from keras_ring.training.guard import fixed_lengths, operation_rules, trial
from keras_ring.training.guard.layer_rules import (
    ACTIVITY_REGULARIZER,
    GATHERED,
    LIKE_ATTENTION,
    MIXING,
    Rule,
    Shape,
    looks_like_attention,
    rules_for,
)
from keras_ring.training.guard.trial import Verdict
from keras_ring.training.position_wise import MARK

# The table of rules knows all that is in these.
_KNOWN_PACKAGES = ("keras", "keras_ring")

# The arguments of a call, `(args, kwargs)`; None where they are not known.
Call = tuple[Any, dict[str, Any]] | None

_WHOLE_ALREADY = Rule(
    (),
    "it is given a tensor whose axis 1 has a fixed size and is no sequence",
    instead="call the layer without Gathered, or declare the length as None "
    "in keras.Input",
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A layer or an operation, and what it does to the sequence. An unknown
    layer has no rule."""

    part: Any
    shape: Shape
    rule: Rule | None

    def __str__(self) -> str:
        what = f"{type(self.part).__name__} (name={self.part.name!r})"
        if self.rule is None:
            return what
        return f"{what}: {self.rule.why}; {self.rule.instead}".removesuffix(
            "; "
        )


def check(
    model: Any,
    world: World,
    fixed: fixed_lengths.Found | None = None,
    x: Any = None,
) -> Lengths:
    """Refuse a model with layers that would be wrong on this world.

    Args:
        model: the Keras model that is about to run.
        world: where it runs.
        fixed: what the fixed lengths of the model are, if that is known.
        x: what the model is given, if that is known: arrays, of which only
            shapes and dtypes count.

    Returns:
        Which lengths are split.

    Raises:
        ValueError: that names every such layer, why, and the way out.
    """
    if world.sequence_size == 1:
        return OPEN
    lengths = OPEN
    if world.layers_see_shards:
        fixed = fixed or fixed_lengths.find(model)
        if fixed.concerned:
            lengths = Lengths(fixed.opened)
    walk = _Walk(world, lengths)
    found = list(walk.model(model))
    if world.layers_see_shards and not _has_operations(model):
        found = list(walk.tried(model, _call_with(world, model, x), found))
    if world.layers_see_shards:
        if fixed and (fixed.concerned or _takes_images(model)):
            against = _against(fixed, found)
            _warn(
                "Every device of a ring holds whole sequences of the model "
                f"{model.name!r} outside of attention, because it has fixed "
                "lengths and these cannot be split; the result is right. "
                f"What mixes positions can be split if you {GATHERED}",
                against,
            )
            if against:
                return Lengths(whole=True)
        refused = [f for f in found if f.rule and f.rule.fatal]
        noted = [f for f in found if f.rule and not f.rule.fatal]
        reason = (
            "a layer sees only its own shard of every sequence, and layers "
            "that mix positions must know about that"
        )
        _warn("These layers do not behave as on one device", noted)
        _warn(
            "It is not known whether these layers are right on a shard of "
            "the sequence. Set the attribute `sequence_parallel_safe = True` "
            "on a layer or its class if it treats every position by itself; "
            f"otherwise {GATHERED}",
            [f for f in found if not f.rule],
        )
    else:
        refused = [
            f
            for f in found
            if f.rule
            and f.rule.wrong_when_whole
            and f.rule.wrong_when_whole(f.part, f.shape)
        ]
        reason = (
            "the compiler splits these layers over the devices and gets the "
            "gradient of overlapping windows wrong"
        )
        _warn(
            "For these layers every device holds the whole sequence, because "
            "the compiler gathers it; the result is right",
            [f for f in found if f.rule and f.rule.gathers],
        )
    if refused:
        raise ValueError(
            f"Under this strategy {reason}. Received: the model "
            f"{model.name!r} with{_listed(refused)}"
        )
    return lengths


def _against(fixed: fixed_lengths.Found, found: list[Finding]) -> list[Finding]:
    """Reasons that keep fixed lengths from being split."""
    inferred = [
        Finding(part, None, Rule((), why, instead=""))
        for part, why in fixed.problems
    ]
    known = {id(finding.part) for finding in found}
    return [f for f in found if f.rule is None or f.rule.fatal] + [
        f for f in inferred if id(f.part) not in known
    ]


def _takes_images(model: Any) -> bool:
    """True if a model without a graph is given more axes than a sequence of
    features has. Where its layers mix them, axis 1 is no sequence yet."""
    if getattr(model, "outputs", None):
        return False
    shapes = _built_shapes(model).values()
    return any(shape is not None and len(shape) > 3 for shape in shapes)


def _warn(message: str, found: list[Finding]) -> None:
    if found:
        warnings.warn(f"{message}:{_listed(found)}", stacklevel=4)


def _listed(found: Iterable[Finding]) -> str:
    lines = dict.fromkeys(str(finding) for finding in found)
    return "".join(f"\n  - {line}" for line in lines)


class _Walk:
    """Goes through the layers of a model that are given a sequence."""

    def __init__(self, world: World, lengths: Lengths):
        self._sees_shards = world.layers_see_shards
        self._lengths = lengths
        # What a layer does may depend on the ranks of what it is given.
        self._seen: set[tuple[int, tuple[Any, ...]]] = set()

    def model(self, model: Any) -> Iterator[Finding]:
        """Find what a model's layers and operations do to the sequence."""
        for part in getattr(model, "operations", None) or model.layers:
            nodes = calls(part)
            if not isinstance(part, keras.layers.Layer):
                yield from self._operation(part, nodes)
            elif isinstance(part, Gathered):
                yield from self._gathered(part, nodes)
            elif nodes:
                for node in nodes:
                    call = node.arguments.args, node.arguments.kwargs
                    yield from self._layer(
                        part,
                        [self._lengths.shape(t) for t in node.input_tensors],
                        call,
                    )
            else:
                yield from self._inner(part)

    def _operation(self, part: Any, nodes: Any) -> Iterator[Finding]:
        if _made_in(part, "keras_ring"):
            return
        for node in nodes:
            why = operation_rules.problem(
                part,
                node,
                lambda tensor: self._is_sequence(self._lengths.shape(tensor)),
            )
            if why:
                rule = Rule(
                    (),
                    why,
                    instead="put it in a layer and " + GATHERED,
                    gathers=type(part).__name__ == "DotProductAttention",
                    wrong_when_whole=operation_rules.wrong_when_whole,
                )
                yield Finding(part, None, rule)

    def _gathered(self, part: Any, nodes: Any) -> Iterator[Finding]:
        """Refuse to gather once more what is whole already."""
        for node in nodes:
            for tensor in node.input_tensors:
                shape = self._lengths.shape(tensor)
                if self._sees_shards and not self._is_sequence(shape):
                    yield Finding(part, shape, _WHOLE_ALREADY)

    def tried(
        self, layer: Any, call: Call, parts: list[Finding]
    ) -> Iterator[Finding]:
        """Verdict on a layer or model, from a trial where nothing else says it.

        Args:
            layer: the layer.
            call: how it is called.
            parts: what has been found of the layers that it is made of.
        """
        wrong = any(f.rule and f.rule.fatal for f in parts)
        own = getattr(layer, MARK, False) or _is_known(layer)
        if wrong or own or not self._sees_shards:
            yield from parts
            return
        verdict = Verdict.UNKNOWN
        if call is not None:
            verdict = trial.of(
                layer,
                call,
                lambda tensor: self._is_sequence(self._lengths.shape(tensor)),
            )
        if verdict is Verdict.BY_POSITION:
            yield from (found for found in parts if found.rule)
            return
        yield from parts
        inner = sublayers(layer, recursive=True)
        if verdict is Verdict.MIXES:
            yield Finding(layer, None, MIXING)
        elif any(_made_in(part, "keras_ring") for part in inner):
            return  # It knows the ring, or its parts do.
        elif verdict is Verdict.UNKNOWN and looks_like_attention(layer):
            yield Finding(layer, None, LIKE_ATTENTION)
        elif not inner or (verdict is Verdict.UNKNOWN and call is not None):
            yield Finding(layer, None, None)

    def _layer(
        self, layer: Any, shapes: list[Shape], call: Call
    ) -> Iterator[Finding]:
        sequences = [s for s in shapes if s is None or self._is_sequence(s)]
        ranks = tuple(
            None if s is None else (len(s), self._is_sequence(s))
            for s in shapes
        )
        if not sequences or (id(layer), ranks) in self._seen:
            return
        self._seen.add((id(layer), ranks))
        if getattr(layer, MARK, False):
            return
        if _made_in(layer, "keras_ring"):
            # It knows the ring, but Keras applies its regularizers.
            parts = [layer, *sublayers(layer, recursive=True)]
            if any(ACTIVITY_REGULARIZER.when(p, None) for p in parts):
                yield Finding(layer, sequences[0], ACTIVITY_REGULARIZER)
            return
        # One for each rank.
        by_rank = {None if s is None else len(s): s for s in sequences}
        broken = [
            Finding(layer, shape, rule)
            for shape in by_rank.values()
            for rule in rules_for(layer, shape)
        ]
        if broken:
            yield from broken
        elif _has_operations(layer):
            yield from self.model(layer)
        elif isinstance(layer, keras.Model):
            yield from self.tried(layer, call, list(self.model(layer)))
        elif not isinstance(layer, keras.layers.TimeDistributed):
            parts = sublayers(layer, recursive=False)
            found = [f for part in parts for f in self._inner(part)]
            yield from self.tried(layer, call, found)

    def _inner(self, layer: Any) -> Iterator[Finding]:
        """A layer of which only the shapes are known that it was built with.

        Lengths are those of a made-up or a first batch there, so the rank
        decides."""
        shapes = _built_shapes(layer)
        opened = {name: _opened(shape) for name, shape in shapes.items()}
        yield from self._layer(
            layer, list(opened.values()) or [None], _call_of(opened)
        )

    def _is_sequence(self, shape: Any) -> bool:
        if len(shape) < 2:
            return False
        # A step that sees a shard is given one where the length is open.
        # One that sees the whole may have fixed lengths, and others inside.
        return shape[1] is None or (not self._sees_shards and len(shape) > 2)


def _made_in(layer: Any, name: str) -> bool:
    """True if a layer's class or one that it is made from is in a package."""
    return any(c.__module__.split(".")[0] == name for c in type(layer).__mro__)


def _is_known(layer: Any) -> bool:
    """True if the tables say all there is to say about a layer."""
    if isinstance(layer, keras.layers.Lambda):
        return False
    return type(layer).__module__.split(".")[0] in _KNOWN_PACKAGES


def _has_operations(model: Any) -> bool:
    return bool(getattr(model, "operations", None))


def _opened(shape: Shape) -> Shape:
    if shape is None or len(shape) < 3:
        return shape
    return (shape[0], None, *shape[2:])


def _call_with(world: World, model: Any, x: Any) -> Call:
    """The call of a model with arrays like these."""
    leaves = tree.flatten(x)
    if not all(hasattr(a, "shape") and hasattr(a, "dtype") for a in leaves):
        return None

    def symbol(leaf: Any, split: bool) -> keras.KerasTensor:
        length = (None,) if split else tuple(leaf.shape[1:2])
        return keras.KerasTensor(
            (None, *length, *leaf.shape[2:]),
            keras.backend.standardize_dtype(leaf.dtype),
        )

    (splits,) = batches.split_batch(world, model, (x,))
    try:
        return (tree.map_structure(symbol, x, splits),), {}
    except (TypeError, ValueError):  # Of strings and the like.
        return None


def _call_of(shapes: dict[str, Shape]) -> Call:
    """The call of a layer that was built with these shapes."""
    symbols = {}
    for name, shape in shapes.items():
        if shape is None or len(shape) < 3:
            return None
        symbols[name.removesuffix("_shape")] = keras.KerasTensor(shape)
    if len(symbols) == 1:
        return tuple(symbols.values()), {}
    return ((), symbols) if symbols else None


def _built_shapes(layer: Any) -> dict[str, Shape]:
    """The shapes that a layer was built with, by the names of the arguments
    of `build`; none if it was not."""
    config = layer.get_build_config() if layer.built else None
    if not config:
        return {}
    given = config.get("input_shape") or config.get("shapes_dict")
    shapes: dict[str, Shape] = {}

    def collect(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                collect(str(key), part)
        elif isinstance(value, (tuple, list)):
            if value and all(v is None or isinstance(v, int) for v in value):
                shapes[name] = tuple(value)
                return
            for number, part in enumerate(value):
                collect(f"{name}{number}", part)

    collect("input", given)
    return shapes
