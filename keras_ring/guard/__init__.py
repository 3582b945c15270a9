"""Finds layers that would be silently wrong on a shard of the sequence.

Where a layer sees its shard only, one that mixes positions and does not
know about the ring computes something else than on one device. `check` finds
such layers before anything runs and refuses them by name, with the way out.
Only what is given a sequence matters: in a functional model these are the
tensors whose axis 1 has no fixed size.

A layer of one's own that works position by position, or knows the ring,
says so with an attribute `sequence_parallel_safe = True`.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_ring.guard import operation_rules
from keras_ring.guard.layer_rules import (
    ACTIVITY_REGULARIZER,
    GATHERED,
    Rule,
    Shape,
    rules_for,
)
from keras_ring.keras_internals import calls, sublayers
from keras_ring.layers.gathered import Gathered
from keras_ring.world import World

_OWN = "sequence_parallel_safe"
_KNOWN_PACKAGES = ("keras", "keras_hub", "keras_ring")


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
        return f"{what}: {self.rule.why}; {self.rule.instead}"


def check(model: Any, world: World) -> None:
    """Refuse a model with layers that would be wrong on this world.

    Args:
        model: the Keras model that is about to run.
        world: where it runs.

    Raises:
        ValueError: that names every such layer, why, and the way out.
    """
    if world.sequence_size == 1:
        return
    found = list(_Walk(world).model(model))
    if world.layers_see_shards:
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


def _warn(message: str, found: list[Finding]) -> None:
    if found:
        warnings.warn(f"{message}:{_listed(found)}", stacklevel=4)


def _listed(found: Iterable[Finding]) -> str:
    lines = dict.fromkeys(str(finding) for finding in found)
    return "".join(f"\n  - {line}" for line in lines)


class _Walk:
    """Goes through the layers of a model that are given a sequence."""

    def __init__(self, world: World):
        self._sees_shards = world.layers_see_shards
        self._seen: set[int] = set()

    def model(self, model: Any) -> Iterator[Finding]:
        """What a model's layers and operations do to the sequence."""
        for part in getattr(model, "operations", None) or model.layers:
            nodes = calls(part)
            if not isinstance(part, keras.layers.Layer):
                yield from self._operation(part, nodes)
            elif isinstance(part, Gathered):
                yield from self._gathered(part, nodes)
            elif nodes:
                for node in nodes:
                    yield from self._layer(
                        part, [tuple(t.shape) for t in node.input_tensors]
                    )
            else:
                yield from self._layer(part, _inner_shapes(part))

    def _operation(self, part: Any, nodes: Any) -> Iterator[Finding]:
        if _package(part, "keras_ring"):
            return
        for node in nodes:
            why = operation_rules.problem(
                part, node, lambda tensor: self._is_sequence(tensor.shape)
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
        """What is whole already must not be gathered once more."""
        for node in nodes:
            for tensor in node.input_tensors:
                if self._sees_shards and not self._is_sequence(tensor.shape):
                    yield Finding(part, tuple(tensor.shape), _WHOLE_ALREADY)

    def _layer(self, layer: Any, shapes: list[Shape]) -> Iterator[Finding]:
        sequences = [s for s in shapes if s is None or self._is_sequence(s)]
        if not sequences or id(layer) in self._seen:
            return
        self._seen.add(id(layer))
        if getattr(layer, _OWN, False):
            return
        if _package(layer, "keras_ring"):
            # It knows the ring, but Keras applies its regularizers.
            parts = [layer, *sublayers(layer, recursive=True)]
            if any(ACTIVITY_REGULARIZER.when(p, None) for p in parts):
                yield Finding(layer, sequences[0], ACTIVITY_REGULARIZER)
            return
        rules = list(rules_for(layer, sequences[0]))
        if rules:
            yield from (Finding(layer, sequences[0], rule) for rule in rules)
        elif isinstance(layer, keras.Model):
            yield from self.model(layer)
        elif not isinstance(layer, keras.layers.TimeDistributed):
            yield from self._parts(layer)

    def _parts(self, layer: Any) -> Iterator[Finding]:
        """The layers that a layer is made of."""
        parts = sublayers(layer, recursive=False)
        for part in parts:
            yield from self._layer(part, _inner_shapes(part))
        known = type(layer).__module__.split(".")[0] in _KNOWN_PACKAGES
        if isinstance(layer, keras.layers.Lambda) or not (parts or known):
            yield Finding(layer, None, None)

    def _is_sequence(self, shape: Any) -> bool:
        if len(shape) < 2:
            return False
        # A step that sees a shard is given one where the length is open.
        # One that sees the whole may have fixed lengths, and others inside.
        return shape[1] is None or (not self._sees_shards and len(shape) > 2)


def _package(layer: Any, name: str) -> bool:
    """Whether a layer's class or one that it is made from is in a package."""
    return any(c.__module__.split(".")[0] == name for c in type(layer).__mro__)


def _inner_shapes(layer: Any) -> list[Shape]:
    """The shapes of what a layer inside a layer is given. Lengths are those
    of a made-up or a first batch there, so the rank decides."""
    return [
        s if s is None or len(s) < 3 else (s[0], None, *s[2:])
        for s in _built_shapes(layer)
    ]


def _built_shapes(layer: Any) -> list[Shape]:
    """The shapes that a layer was built with; unknown if it was not."""
    config = layer.get_build_config() if layer.built else None
    if not config:
        return [None]
    given = config.get("input_shape") or config.get("shapes_dict")
    shapes: list[Shape] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            value = list(value.values())
        if not isinstance(value, (tuple, list)):
            return
        if value and all(v is None or isinstance(v, int) for v in value):
            shapes.append(tuple(value))
        else:
            for part in value:
                collect(part)

    collect(given)
    return shapes or [None]
