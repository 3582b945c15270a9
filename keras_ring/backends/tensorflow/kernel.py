"""The kernels of TensorFlow, by preference."""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_ring import precision
from keras_ring.attention.blockwise import kernel as blockwise
from keras_ring.attention.blockwise import tiles
from keras_ring.attention.blockwise.kernel import BlockwiseKernel
from keras_ring.attention.kernel import Gradients, Inputs, Rows
from keras_ring.attention.numerics import Partial
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.backends.tensorflow.kernels.native import TensorFlowNativeKernel
from keras_ring.masks import Carried


@dataclasses.dataclass(frozen=True)
class Store:
    """A list of tiles whose items are replaced in place.

    `tf.TensorArray` would do the same; the bare list passes through
    branches and loops as one tensor.
    """

    handle: tf.Tensor
    count: int | None
    tile_shape: tf.TensorShape
    dtype: tf.DType


class Kernel(BlockwiseKernel):
    """The blockwise kernel in `tf.while_loop`s; a store is a tensor list."""

    short = 512

    def device(self, tensor: tf.Tensor) -> str | None:
        return None  # Not known while a program is traced.

    def forward_alone(self, inputs: Inputs, visit: Visit) -> Partial:
        return Partial(*_called("forward", visit, *inputs))

    def backward_alone(
        self, inputs: Inputs, rows: Rows, visit: Visit
    ) -> Gradients:
        # What `out` says is in delta already.
        query, key, value, *rest = _called(
            "backward", visit, *inputs, *rows[1:]
        )
        has = visit.scoring.bias is not None, visit.scoring.slopes is not None
        bias, slopes = (rest.pop(0) if there else None for there in has)
        return Gradients(query, key, value, bias, slopes)

    def eager(self) -> BlockwiseKernel:
        return _OPERATION_BY_OPERATION

    def loop(self, count: Any, body: Callable, carry: Any) -> Any:
        if isinstance(count, int) and count == 1:
            return body(0, carry)
        tensors = _bare(carry)
        shapes = [tensor.shape for tensor in tensors]

        def step(index: tf.Tensor, tensors: list[tf.Tensor]) -> Any:
            results = _bare(body(index, _dressed(carry, tensors)))
            for result, shape in zip(results, shapes, strict=True):
                result.set_shape(shape)
            return index + 1, results

        _, tensors = tf.while_loop(
            lambda index, tensors: index < count,
            step,
            (tf.constant(0, tf.int32), tensors),
            # One at a time: several would be held in memory at once.
            parallel_iterations=1,
        )
        return _dressed(carry, tensors)

    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        if isinstance(predicate, bool):
            return yes() if predicate else no()
        structure = []

        def bare(function: Callable) -> Callable:
            def branch() -> list[tf.Tensor]:
                result = function()
                structure.append(result)
                return _bare(result)

            return branch

        tensors = tf.cond(predicate, bare(yes), bare(no))
        return _dressed(structure[-1], tensors)

    def store(self, tensor: tf.Tensor, axis: int = 0) -> Store:
        tensor = _moved(tf.convert_to_tensor(tensor), axis, 0)
        handle = tf.raw_ops.TensorListFromTensor(
            tensor=tensor,
            element_shape=tf.constant(
                [-1 if size is None else size for size in tensor.shape[1:]],
                tf.int32,
            ),
        )
        return Store(handle, tensor.shape[0], tensor.shape[1:], tensor.dtype)

    def read(self, store: Store, index: Any, axis: int = 0) -> tf.Tensor:
        tile = tf.raw_ops.TensorListGetItem(
            input_handle=store.handle,
            index=index,
            element_shape=_partial_shape(store.tile_shape),
            element_dtype=store.dtype,
        )
        tile.set_shape(store.tile_shape)
        return tile

    def write(
        self, store: Store, index: Any, tile: tf.Tensor, axis: int = 0
    ) -> Store:
        handle = tf.raw_ops.TensorListSetItem(
            input_handle=store.handle, index=index, item=tile
        )
        return dataclasses.replace(store, handle=handle)

    def stacked(self, store: Store, axis: int = 0) -> tf.Tensor:
        tensor = tf.raw_ops.TensorListStack(
            input_handle=store.handle,
            element_shape=_partial_shape(store.tile_shape),
            element_dtype=store.dtype,
        )
        tensor.set_shape([store.count, *store.tile_shape])
        return _moved(tensor, 0, axis)

    def product(
        self, equation: str, left: tf.Tensor, right: tf.Tensor
    ) -> tf.Tensor:
        dtype = precision.accumulation_dtype(left.dtype)
        left, right = tf.cast(left, dtype), tf.cast(right, dtype)
        inputs, output = equation.split("->")
        first, second = inputs.split(",")
        (shared,) = set(first) & set(second) - {output[0]}
        # One batch axis and one product: a matmul that reads transposed
        # operands where they are, while einsum copies them first.
        return tf.matmul(
            left,
            right,
            transpose_a=first[1] == shared,
            transpose_b=second[2] == shared,
        )


def _moved(tensor: tf.Tensor, source: int, target: int) -> tf.Tensor:
    """One axis moved to another place."""
    if source == target:
        return tensor
    axes = list(range(tensor.shape.rank))
    axes.insert(target, axes.pop(source))
    return tf.transpose(tensor, axes)


def _partial_shape(shape: tf.TensorShape) -> tf.Tensor:
    return tf.constant(
        [-1 if size is None else size for size in shape], tf.int32
    )


def _bare(structure: Any) -> list[tf.Tensor]:
    """The tensors of a nested structure of tensors, stores and None."""
    return [
        leaf.handle if isinstance(leaf, Store) else tf.convert_to_tensor(leaf)
        for leaf in tf.nest.flatten(structure)
        if leaf is not None
    ]


def _dressed(structure: Any, tensors: list[tf.Tensor]) -> Any:
    """The same nested structure with other tensors."""
    others = iter(tensors)

    def dress(leaf: Any) -> Any:
        if leaf is None:
            return None
        if isinstance(leaf, Store):
            return dataclasses.replace(leaf, handle=next(others))
        return next(others)

    return tf.nest.map_structure(dress, structure)


class _OfOneDevice(Kernel):
    """Kernel for visits whose places are known while a program is traced: the
    few tiles of a side that is short need no loop, and what positions alone
    mask is a constant. Which tiles are visited may still depend on tensors."""

    # Tiles of a side at most.
    unrolled = 2

    def loop(self, count: Any, body: Callable, carry: Any) -> Any:
        if not isinstance(count, int) or count > self.unrolled:
            return super().loop(count, body, carry)
        for index in range(count):
            carry = body(index, carry)
        return carry


class _WrittenOut(Kernel):
    """Kernel for few tiles, of which no tensor decides a visit: no loop at all,
    and tiles are slices of their tensors, so that no list of them is laid out
    anew."""

    def takes(self, inputs: Inputs, scoring: Scoring) -> bool:
        """True if a visit has few tiles, and a number for each."""
        most = _OfOneDevice.unrolled * tiles.TILE
        return all(
            length and length <= most
            for length in (inputs.query.shape[2], inputs.key.shape[2])
        ) and (scoring.mask is None or not any(scoring.mask.carried()))

    def loop(self, count: Any, body: Callable, carry: Any) -> Any:
        for index in range(count):
            carry = body(index, carry)
        return carry

    def store(self, tensor: tf.Tensor, axis: int = 0) -> Any:
        return tuple(tf.unstack(tf.convert_to_tensor(tensor), axis=axis))

    def read(self, store: Any, index: Any, axis: int = 0) -> tf.Tensor:
        return store[index]

    def write(
        self, store: Any, index: Any, tile: tf.Tensor, axis: int = 0
    ) -> Any:
        return *store[:index], tile, *store[index + 1 :]

    def stacked(self, store: Any, axis: int = 0) -> tf.Tensor:
        return tf.stack(store, axis)


class _OperationByOperation(Kernel):
    """Kernel for a visit outside of any program: tracing one takes longer."""

    forward_alone = BlockwiseKernel.forward_alone
    backward_alone = BlockwiseKernel.backward_alone


KERNEL = Kernel()
_OPERATION_BY_OPERATION = _OperationByOperation()
_OF_ONE_DEVICE = _OfOneDevice()
_WRITTEN_OUT = _WrittenOut()
# By preference; the last is the reference.
KERNELS = (TensorFlowNativeKernel(KERNEL), KERNEL)


def _called(name: str, visit: Visit, *tensors: tf.Tensor) -> list[tf.Tensor]:
    """One block by the program that all blocks of its kind share.

    A step has one block for every replica, hop, layer and direction. Traced
    each by itself they would take minutes; as calls of one function that
    is traced once, they take seconds.
    """
    carried = visit.scoring.carried()
    # The program must not hold on to the tensors of its first visit.
    scoring = visit.scoring.replace(
        Carried(*(tuple(_PLACE for _ in side) for side in carried))
    )
    places = visit.query_starts, visit.key_starts
    # Programs for all places in a ring would be too many.
    known = all(
        len(side) == 1 and isinstance(side[0], int) and side[0] == 0
        for side in places
    )
    kind = name, scoring.structure(), known
    if kind not in _PROGRAMS:
        _PROGRAMS[kind] = _program(name, scoring, known)
    return _PROGRAMS[kind](
        places if known else tuple(map(_scalars, places)),
        tf.nest.map_structure(tf.convert_to_tensor, carried),
        *tensors,
    )


def _scalars(starts: tuple[Any, ...]) -> tuple[tf.Tensor, ...]:
    return tuple(tf.convert_to_tensor(start, tf.int32) for start in starts)


# Stands where a tensor will be.
_PLACE = types.SimpleNamespace(shape=())
# Programs by what they compute; never a different result for the same name.
_PROGRAMS: dict[Any, Callable[..., list[tf.Tensor]]] = {}


def _program(
    name: str, scoring: Scoring, known: bool
) -> Callable[..., list[tf.Tensor]]:
    # Not with `reduce_retracing`, which would forget the number of heads.
    @tf.function(autograph=False)
    def program(places: Any, carried: Carried, *tensors: Any) -> Any:
        query_starts, key_starts = places
        visit = Visit(query_starts, key_starts, scoring.replace(carried))
        inputs = Inputs(*tensors[:3])
        primitives = KERNEL
        if known:
            written = _WRITTEN_OUT.takes(inputs, visit.scoring)
            primitives = _WRITTEN_OUT if written else _OF_ONE_DEVICE
        if name == "forward":
            results: Any = blockwise.forward_alone(primitives, inputs, visit)
        else:
            rows = Rows(None, *tensors[3:])
            results = blockwise.backward_alone(primitives, inputs, rows, visit)
        return [tensor for tensor in results if tensor is not None]

    # A program for each kind is what is wanted.
    program._omit_frequent_tracing_warning = True
    return program
