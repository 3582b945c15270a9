"""Fixed lengths of a model, and which of them can be split.

A model is inferred once more with another length in place of each fixed one.
A tensor whose axis 1 follows is as long as the sequence. What a layer with a
ring needs of that is split where nothing on the way is against it: then the
model behaves as if its lengths had been left open.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
from keras import tree

from keras_ring.keras_internals import nodes_of, sublayers
from keras_ring.layers.gathered import Gathered
from keras_ring.training.position_wise import MARK

# These know where in the sequence they are.
_PLACED = {
    *("RingAttention", "RingTransformerBlock", "PositionEmbedding"),
    *("RotaryEmbedding", "SequencePositions"),
}
# Their masks and ids have no features.
_MASKED = {"RingAttention", "RingTransformerBlock"}


@dataclasses.dataclass(frozen=True)
class Found:
    """Fixed lengths of a model.

    Attributes:
        opened: the symbolic tensors that are as long as a sequence of fixed
            length that a ring needs, by their id.
        models: the models with a graph whose inputs are among them.
        concerned: whether a ring is given a fixed length at all.
        problems: layers and operations that keep a length from being split,
            and why.
    """

    opened: dict[int, Any] = dataclasses.field(default_factory=dict)
    models: tuple[Any, ...] = ()
    concerned: bool = False
    problems: tuple[tuple[Any, str], ...] = ()


def find(model: Any) -> Found:
    """Fixed lengths of a model.

    Args:
        model: a built Keras model. Of one without a graph the models with
            one inside it are looked at.
    """
    roots = [model] if _has_graph(model) else _parts_with_graph(model)
    inputs = [symbol for root in roots for symbol in root.inputs]
    candidates = [symbol for symbol in inputs if _may_be_sequence(symbol)]
    if roots != [model]:
        # What such a part is given is split by its rank, see `batches`.
        candidates = [
            symbol
            for symbol in candidates
            if len(symbol.shape) > 2 or "int" in symbol.dtype
        ]
    trial = _Trial(roots, candidates)
    if roots == [model]:
        needed = trial.needed()
        chosen = [symbol for symbol in candidates if id(symbol) in needed]
        if len(chosen) < len(candidates):
            candidates = chosen
            trial = _Trial(roots, candidates)
    unsplit = list(trial.unsplit())
    return Found(
        trial.sequences,
        tuple(trial.models),
        bool(candidates or unsplit),
        (*trial.problems, *unsplit),
    )


class _Trial:
    """A model, inferred with other lengths of some inputs.

    Args:
        roots: models with a graph.
        inputs: those of their symbolic inputs that get another length.
    """

    def __init__(self, roots: list[Any], inputs: list[Any]):
        # Of what changes: the shape with another length.
        self._shapes: dict[int, tuple[int | None, ...]] = {}
        # Of these axis 1 follows, and what they are made from.
        self.sequences: dict[int, Any] = {}
        self._makers: dict[int, list[Any]] = {}
        self.problems: list[tuple[Any, str]] = []
        self.models: list[Any] = []
        self._with_ring: list[tuple[Any, Any]] = []
        # Of models within models, what they are called with.
        self._inner_shapes: dict[int, list[Any]] = {}
        for symbol in inputs:
            shape = tuple(symbol.shape)
            changed = (shape[0], _another(shape[1]), *shape[2:])
            self._follow(symbol, changed, [])
        for root in roots:
            self._model(root)

    def needed(self) -> set[int]:
        """The ids of all sequences that something with a ring is made from."""
        found: set[int] = set()
        left = [
            tensor for _, node in self._with_ring for tensor in _tensors(node)
        ]
        while left:
            tensor = left.pop()
            if id(tensor) in self.sequences and id(tensor) not in found:
                found.add(id(tensor))
                left += self._makers[id(tensor)]
        return found

    def unsplit(self) -> Iterator[tuple[Any, str]]:
        """Layers with a ring that are given a length that is not split."""
        for part, node in self._with_ring:
            placed = _names(part) & _PLACED
            if not placed:
                continue
            own = _own_names(part) & _PLACED
            # What a layer of the user's own does with other tensors, such as
            # features of a sample, is not known.
            least = 2 if own else 3
            tensors = _tensors(node)
            for tensor in tensors:
                if own & _MASKED and len(tensor.shape) > len(tensors[0].shape):
                    yield part, "it is given pairs with an axis of heads"
                elif len(tensor.shape) >= least and not self._is_sequence(
                    tensor
                ):
                    yield part, "it is given a length that no input has"

    def _model(self, model: Any) -> None:
        opened = any(id(symbol) in self.sequences for symbol in model.inputs)
        if opened and not any(model is other for other in self.models):
            self.models.append(model)
        for part, node in nodes_of(model):
            if _has_graph(part):
                self._inner(part, node)
                continue
            if _has_ring(part):
                self._with_ring.append((part, node))
            if any(id(tensor) in self._shapes for tensor in _tensors(node)):
                self._call(part, node)

    def _inner(self, model: Any, node: Any) -> None:
        """A model within a model."""
        given = _tensors(node)
        if len(given) != len(model.inputs):
            self.problems.append((model, "it has optional inputs"))
            return
        shapes = [self._shapes.get(id(t), tuple(t.shape)) for t in given]
        if self._inner_shapes.setdefault(id(model), shapes) != shapes:
            self.problems.append((model, "it is called with several lengths"))
            return
        for symbol, tensor, shape in zip(
            model.inputs, given, shapes, strict=True
        ):
            if id(tensor) in self._shapes:
                self._follow(symbol, shape, [tensor])
        self._model(model)
        for tensor, symbol in zip(
            node.output_tensors, model.outputs, strict=True
        ):
            if id(symbol) in self._shapes:
                self._follow(tensor, self._shapes[id(symbol)], [symbol])

    def _call(self, part: Any, node: Any) -> None:
        given = [t for t in _tensors(node) if self._is_sequence(t)]
        try:
            results = self._results(part, node)
        # A layer of the user's own may raise anything.
        except Exception:  # noqa: BLE001
            self.problems.append((part, "it is made for one length"))
            return
        for tensor, shape in zip(node.output_tensors, results, strict=True):
            self._follow(tensor, shape, given)
        if not given or _package(part) != "keras":
            return
        if not all(map(self._is_sequence, node.output_tensors)):
            self.problems.append((part, "its result has another length"))

    def _results(self, part: Any, node: Any) -> list[tuple[int | None, ...]]:
        """The shapes that come of the changed ones."""
        if isinstance(part, Gathered):
            # It gives its layer the true length; what is as long as its
            # result is split again.
            arguments = node.arguments.args, node.arguments.kwargs
            return [
                (shape[0], _another(shape[1]), *shape[2:]) if split else shape
                for shape, split in zip(
                    [tuple(t.shape) for t in node.output_tensors],
                    part.splits(*arguments),
                    strict=True,
                )
            ]

        def changed(value: Any) -> Any:
            if not isinstance(value, keras.KerasTensor):
                return value
            shape = self._shapes.get(id(value), value.shape)
            return keras.KerasTensor(shape, value.dtype)

        args, kwargs = tree.map_structure(
            changed, (node.arguments.args, node.arguments.kwargs)
        )
        results = part.compute_output_spec(*args, **kwargs)
        return [tuple(result.shape) for result in tree.flatten(results)]

    def _follow(
        self, tensor: Any, shape: tuple[int | None, ...], makers: list[Any]
    ) -> None:
        """Take note of the shape that a tensor has now."""
        before = tuple(tensor.shape)
        if shape == before:
            return
        self._shapes[id(tensor)] = shape
        follows = (
            len(shape) == len(before) > 1
            and isinstance(before[1], int)
            and shape == (before[0], _another(before[1]), *before[2:])
        )
        if follows:
            self.sequences[id(tensor)] = tensor
            self._makers.setdefault(id(tensor), []).extend(makers)

    def _is_sequence(self, tensor: Any) -> bool:
        shape = tensor.shape
        return id(tensor) in self.sequences or (
            len(shape) > 1 and shape[1] is None
        )


def _another(length: int | None) -> int | None:
    """A length in place of a fixed one; no 1, which would broadcast."""
    if length is None:
        return None
    return length - 1 if length > 2 else length + 1


def _may_be_sequence(symbol: Any) -> bool:
    shape = symbol.shape
    return (
        len(shape) > 1
        and isinstance(shape[1], int)
        and shape[1] > 1
        and not symbol.sparse
    )


def _tensors(node: Any) -> list[Any]:
    return [t for t in node.input_tensors if isinstance(t, keras.KerasTensor)]


def _has_graph(part: Any) -> bool:
    return (
        isinstance(part, keras.Model)
        and bool(getattr(part, "inputs", None))
        and bool(getattr(part, "outputs", None))
        and all(isinstance(t, keras.KerasTensor) for t in part.inputs)
    )


def _parts_with_graph(model: Any) -> list[Any]:
    return [p for p in sublayers(model, recursive=True) if _has_graph(p)]


def _package(part: Any) -> str:
    return type(part).__module__.split(".")[0]


def _family(part: Any) -> list[Any]:
    """A part of a model with all that it is made of."""
    if not isinstance(part, keras.layers.Layer):
        return [part]
    return [part, *sublayers(part, recursive=True)]


def _own_names(part: Any) -> set[str]:
    ours = [c for c in type(part).__mro__ if _of_ours(c)]
    return {c.__name__ for c in ours}


def _names(part: Any) -> set[str]:
    return set().union(*map(_own_names, _family(part)))


def _of_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "keras_ring"


def _has_ring(part: Any) -> bool:
    return bool(_names(part)) or bool(getattr(part, MARK, False))
