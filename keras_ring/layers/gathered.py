"""`keras_ring.layers.Gathered`."""

import inspect
from collections.abc import Callable
from typing import Any

import keras
from keras import tree

from keras_ring import arguments
from keras_ring.distribution import strategy
from keras_ring.keras_internals import sublayers
from keras_ring.ops.sequence import gather_sequence, own_chunk, shard_ring

Tensor = Any


@keras.saving.register_keras_serializable(package="keras_ring")
class Gathered(keras.layers.Wrapper):
    """Gives a layer the whole sequence and keeps this device's part.

    Where a layer sees a shard of the sequence (in a step on TensorFlow and
    PyTorch), a layer that mixes positions, such as a convolution, a
    recurrence, pooling over time or batch normalisation, would compute
    something else. Inside `Gathered` it computes what it computes on one
    device: the shards are gathered, every device of the ring applies the
    layer to the whole, and each keeps its part. A result without a sequence
    axis, such as that of global pooling, stays whole on every device.
    Gradients are exact. On JAX, where a layer sees the whole sequence, the
    compiler is told not to split what the layer takes and gives; without a
    strategy `Gathered` just calls the layer.

    The price is that every device holds the whole sequence while the layer
    runs, and that the work of the layer is not shared. The batch is not
    gathered: with `data_parallel` a batch normalisation sees the samples of
    its own group only, as in data-parallel training without a ring.

    A layer that draws random numbers while training, such as dropout within
    a recurrent layer, draws on every device for itself. Each element of the
    result is then distributed as on one device, but parts that lie on two
    devices do not share a noise mask that one device would share along the
    sequence, and a pooled result is averaged over as many draws as the ring
    has members, through the loss. When the model is evaluated there is no
    such difference.

    Args:
        layer: any layer, called as it would be by itself. The sequence is
            on axis 1 of every tensor that it is given.
        **kwargs: name and others of `keras.layers.Layer`. The dtype policy
            is that of `layer` unless given.

    Call arguments:
        *args, **kwargs: what `layer` takes. Tensors given by position, and
            `value`, `key`, `mask` and `*_mask` given by name, carry the
            sequence on axis 1 and are gathered, as are the masks attached
            to them.

    Returns:
        What `layer` returns: this device's part of each result that has
        the sequence on axis 1, with its mask; the others whole.

    Raises:
        ValueError: for what is no layer, for one that is, or contains, a
            layer of keras_ring, and for another tensor given by name. When a
            functional model is trained, for an input without a sequence
            axis.

    Example:

    ```python
    x = keras_ring.layers.Gathered(keras.layers.Conv1D(64, 3, "same"))(x)
    ```
    """

    def __init__(self, layer: keras.layers.Layer, **kwargs: Any):
        if not isinstance(layer, keras.layers.Layer):
            raise ValueError(
                "The argument `layer` must be a layer of Keras. Received: "
                f"layer={arguments.shown(layer)}. Pass the layer itself, and "
                "a function as keras.layers.Lambda(function)."
            )
        kwargs.setdefault("dtype", layer.dtype_policy)
        _refuse_ring_layers(layer)
        super().__init__(layer, **kwargs)
        self.supports_masking = True
        self._gather = _Gather(name="gather", autocast=False)
        self._keep = _Keep(name="keep", autocast=False)
        self._known_splits = _Remembered()

    def build(self, input_shape: Any = None) -> None:
        self._ring_world = strategy.current()
        # A layer of several inputs is built by its own first call.
        if not self.layer.built and not _takes_several(self.layer.build):
            with strategy.suspended():
                self.layer.build(tree.map_shape_structure(_whole, input_shape))

    def call(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        sees_shard = shard_ring() is not None
        if sees_shard:
            _check_options(kwargs)
        arguments, kwargs = tree.map_structure(
            lambda value: self._gather(value) if _is_tensor(value) else value,
            ((inputs, *args), kwargs),
        )
        with strategy.suspended():
            results = self.layer(*arguments, **kwargs)
        if not sees_shard:
            return tree.map_structure(self._gather, results)
        splits = self.splits(arguments, kwargs)
        flat = [
            self._keep(result) if split else result
            for result, split in zip(tree.flatten(results), splits, strict=True)
        ]
        return tree.pack_sequence_as(results, flat)

    def compute_output_spec(
        self, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        return self._spec((inputs, *args), kwargs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.layer.compute_output_shape(input_shape)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """The layer's own masks are on its results already."""
        del inputs, previous_mask

    def _spec(self, arguments: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's symbolic result, for tensors or symbolic tensors."""
        arguments, kwargs = tree.map_structure(_symbol, (arguments, kwargs))
        with strategy.suspended():
            if not self.layer.built:
                return self.layer(*arguments, **kwargs)
            return self.layer.compute_output_spec(*arguments, **kwargs)

    def splits(
        self, arguments: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[bool]:
        """Find the results that have the sequence on axis 1, for tensors or
        symbolic tensors."""
        return list(
            self._known_splits(
                (arguments, kwargs), lambda: self._split(arguments, kwargs)
            )
        )

    def _split(
        self, arguments: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[bool]:
        """Those whose axis 1 is of unknown size when the length of the inputs
        is."""
        lengthless = tree.map_structure(
            lambda value: _symbol(value, any_length=True), (arguments, kwargs)
        )
        return [
            len(result.shape) > 1 and result.shape[1] is None
            for result in tree.flatten(self._spec(*lengthless))
        ]


class _Gather(keras.layers.Layer):
    """`gather_sequence` of a tensor and of the mask that Keras keeps with
    it. A layer, because only layers can read and give such masks."""

    def call(self, tensor: Tensor) -> Tensor:
        return gather_sequence(tensor) if len(tensor.shape) > 1 else tensor

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        del inputs
        return None if previous_mask is None else self.call(previous_mask)


class _Keep(keras.layers.Layer):
    """`own_chunk` of a tensor and of its mask."""

    def call(self, tensor: Tensor) -> Tensor:
        return own_chunk(tensor)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        del inputs
        return None if previous_mask is None else own_chunk(previous_mask)


class _Remembered:
    """The value that belongs to the ranks and dtypes of some tensors; it
    costs a symbolic call and is asked for at every step."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def __call__(self, structure: Any, compute: Callable[[], Any]) -> Any:
        key = str(
            tree.map_structure(
                lambda value: (
                    (len(value.shape), str(value.dtype))
                    if _is_tensor(value)
                    else value
                ),
                structure,
            )
        )
        if key not in self._values:
            self._values[key] = compute()
        return self._values[key]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor) or keras.ops.is_tensor(value)


def _symbol(value: Any, any_length: bool = False) -> Any:
    """A symbolic tensor like a tensor, part of no graph."""
    if not _is_tensor(value):
        return value
    shape = list(value.shape)
    if any_length:
        shape[: min(2, len(shape))] = [None] * min(2, len(shape))
    return keras.KerasTensor(
        tuple(shape), dtype=keras.backend.standardize_dtype(value.dtype)
    )


def _whole(shape: Any) -> Any:
    """The shape of the whole sequence, for the shape that a layer sees."""
    if shard_ring() is None or shape is None or len(shape) < 2:
        return shape
    return (shape[0], None, *shape[2:])


def _takes_several(build: Callable[..., None]) -> bool:
    parameters = inspect.signature(build).parameters.values()
    return sum(p.default is p.empty for p in parameters) > 1


def _refuse_ring_layers(layer: keras.layers.Layer) -> None:
    for part in [layer, *sublayers(layer, recursive=True)]:
        modules = (c.__module__ for c in type(part).__mro__)
        if any(module.split(".")[0] == "keras_ring" for module in modules):
            raise ValueError(
                "A layer inside `Gathered` is given the whole sequence, so "
                "it must not be, or contain, a layer of keras_ring, which "
                f"works on a shard itself. Received: {type(part).__name__} "
                f"(name={part.name!r}). Use it outside `Gathered`."
            )


def _check_options(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        carries = name in ("value", "key") or name.split("_")[-1] == "mask"
        if carries or not any(_is_tensor(leaf) for leaf in tree.flatten(value)):
            continue
        raise ValueError(
            "Of the tensors given by name, only `value`, `key` and masks are "
            "known to carry the sequence; others cannot be split. Received: "
            f"{name}=a tensor. Put `Gathered` around a layer that makes it."
        )
