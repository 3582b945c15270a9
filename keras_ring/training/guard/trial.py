"""Does a layer that nobody knows treat every position by itself?

It is tried: on a short made-up sequence and on the halves of it. Where the
halves give something else than the whole, the layer mixes positions. Where
they give the same, with weights of order one, it does not. This says more
than any list of names: it holds for whatever the layer's `call` computes, in
whatever library.

The layer's variables keep their values and its seeds their state. What a
trial cannot tell stays unknown: a layer that fails on the made-up tensors,
that draws random numbers, or that asks the package for what only a ring has.
"""

import enum
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_ring.distribution import strategy, trials
from keras_ring.keras_internals import sublayers

# Positions of the whole. What reaches no further than from one half into the
# other at their border is found.
LENGTH = 8
_BATCH = 2

# Above so many numbers weights stay what they are: no second copy of them.
_MOST_WEIGHTS = 2**22

_VERDICTS = "_keras_ring_verdicts"


class Verdict(enum.Enum):
    """Result of a trial."""

    BY_POSITION = "treats every position by itself"
    OUTSIDE_TRAINING = "does so outside of training, where alone it can tell"
    MIXES = "mixes positions"
    UNKNOWN = "not known"


def of(
    layer: Any, arguments: Any, is_sequence: Callable[[Any], bool]
) -> Verdict:
    """Verdict on what a layer does to a sequence. It is tried once for
    arguments of the same ranks.

    Args:
        layer: a built layer.
        arguments: `(args, kwargs)` of a call, with something that has a
            shape and a dtype in place of each tensor.
        is_sequence: tells of one of these whether it has the sequence on
            axis 1.
    """
    if not all(
        part.built for part in [layer, *sublayers(layer, recursive=True)]
    ):
        return Verdict.UNKNOWN  # A trial would build it.
    # Past Keras, which keeps track of attributes. What is frozen may do
    # something else.
    verdicts = layer.__dict__.setdefault(_VERDICTS, {})
    ranks = tuple(
        (len(a.shape), is_sequence(a))
        for a in tree.flatten(arguments)
        if _has_shape(a)
    )
    case = layer.trainable, ranks
    if case not in verdicts:
        verdicts[case] = _tried(layer, arguments, is_sequence)
    verdict: Verdict = verdicts[case]
    return verdict


def _tried(
    layer: Any, arguments: Any, is_sequence: Callable[[Any], bool]
) -> Verdict:
    try:
        with strategy.suspended(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = _Trial(layer, arguments, is_sequence)
            found = trial.verdict(training=False)
            if found is not Verdict.BY_POSITION:
                return found
            found = trial.verdict(training=True)
            if found is Verdict.UNKNOWN:
                return Verdict.OUTSIDE_TRAINING
            return found
    except Exception:  # noqa: BLE001 - any may dislike what is made up
        return Verdict.UNKNOWN


class _Trial:
    """A layer with made-up arguments and weights."""

    def __init__(
        self, layer: Any, arguments: Any, is_sequence: Callable[[Any], bool]
    ):
        self._layer = layer
        draw = np.random.default_rng(0)
        self._split = tree.map_structure(
            lambda a: _has_shape(a) and is_sequence(a), arguments
        )
        self._whole = tree.map_structure(
            lambda a: _made_up(a, draw) if _has_shape(a) else a, arguments
        )
        self._weights = _made_up_weights(layer, draw)

    def verdict(self, training: bool) -> Verdict:
        """Verdict on the layer in training or outside of it."""
        (whole,) = self._calls(1, training)
        (again,) = self._calls(1, training, seeds=1)
        if not all(np.isfinite(result).all() for result in whole):
            return Verdict.UNKNOWN
        tolerance = 1e-4
        if "16" in self._layer.compute_dtype:
            tolerance = 5e-2
        if not _same(again, whole, tolerance):
            return Verdict.UNKNOWN  # It draws random numbers.
        joined, flat = [], []
        parts = self._calls(2, training)
        for result, *halves in zip(whole, *parts, strict=True):
            if result.ndim and result.shape[0] == _BATCH * LENGTH:
                # Positions of all samples, one after the other.
                result, *halves = (_unflattened(r) for r in (result, *halves))
            flat.append(result)
            first = halves[0].shape
            if result.ndim > 1 and 2 * first[1] == result.shape[1]:
                joined.append(np.concatenate(halves, 1))
            elif first == result.shape:
                # Without a sequence: both halves must give it.
                if not _same(halves[1:], halves[:1], tolerance):
                    return Verdict.MIXES
                joined.append(halves[0])
            else:
                return Verdict.MIXES
        if _same(joined, flat, tolerance):
            return Verdict.BY_POSITION
        return Verdict.MIXES

    def _calls(
        self, parts: int, training: bool, seeds: int = 0
    ) -> list[list[np.ndarray]]:
        """The tensors that the layer gives for each part of the sequence."""
        options = {}
        if "training" in inspect.signature(self._layer.call).parameters:
            options["training"] = training
        state = [
            (v, value + seeds if _is_seed(v) else value)
            for v, value in self._weights
        ]
        length = LENGTH // parts
        found = []
        for index in range(parts):
            args, kwargs = tree.map_structure(
                functools.partial(_part, start=index * length, length=length),
                self._whole,
                self._split,
            )
            scope = keras.StatelessScope(state_mapping=state)
            with scope, trials.at(index, parts):
                results = self._layer(*args, **{**kwargs, **options})
            found.append(
                [
                    ops.convert_to_numpy(result).astype("float64")
                    for result in tree.flatten(results)
                    if ops.is_tensor(result)
                ]
            )
        return found


def _part(value: Any, split: bool, start: int, length: int) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return ops.convert_to_tensor(
        value[:, start : start + length] if split else value
    )


def _unflattened(result: np.ndarray) -> np.ndarray:
    return result.reshape(_BATCH, -1, *result.shape[1:])


def _has_shape(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _made_up(symbol: Any, draw: np.random.Generator) -> np.ndarray:
    """An array for a symbolic tensor."""
    sizes = list(symbol.shape)
    shape = [
        (LENGTH if axis else _BATCH) if size is None else size
        for axis, size in enumerate(sizes)
    ]
    dtype = keras.backend.standardize_dtype(symbol.dtype)
    if dtype == "bool":
        return draw.random(shape) < 0.7
    if "int" in dtype:
        return draw.integers(0, 2, shape).astype(dtype)
    return draw.normal(size=shape).astype("float32")


def _made_up_weights(
    layer: Any, draw: np.random.Generator
) -> list[tuple[Any, Any]]:
    """Each variable of a layer with a value to try it with: one that starts
    at zero would hide what it is multiplied with."""
    variables = layer.variables
    many = sum(int(np.prod(v.shape)) for v in variables) > _MOST_WEIGHTS
    weights = []
    for v in variables:
        value = v.value
        if not many and "float" in keras.backend.standardize_dtype(v.dtype):
            # Scales and variances are better off positive.
            value = (
                draw.normal(size=v.shape) / 2
                if len(v.shape) > 1
                else draw.uniform(0.5, 1.5, v.shape)
            )
            value = ops.convert_to_tensor(value.astype("float32"), v.dtype)
        weights.append((v, value))
    return weights


def _is_seed(variable: Any) -> bool:
    return variable.name == "seed_generator_state"


def _same(
    found: list[np.ndarray], wanted: list[np.ndarray], tolerance: float
) -> bool:
    return all(
        one.shape == two.shape
        and np.abs(one - two).max(initial=0.0)
        <= tolerance * np.abs(two).max(initial=1e-6)
        for one, two in zip(found, wanted, strict=True)
    )
