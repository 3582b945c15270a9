"""Options of users for the kernels and biases of a layer."""

from typing import Any

import keras

Shape = tuple[int | None, ...]

_KINDS: tuple[tuple[str, Any], ...] = (
    ("initializer", keras.initializers),
    ("regularizer", keras.regularizers),
    ("constraint", keras.constraints),
)


class DenseOptions:
    """The attributes that `keep` makes, for type checkers."""

    kernel_initializer: Any
    bias_initializer: Any
    kernel_regularizer: Any
    bias_regularizer: Any
    kernel_constraint: Any
    bias_constraint: Any


def keep(layer: Any, options: dict[str, Any], prefix: str = "") -> None:
    """Keep the options that are given as attributes, as Keras objects.

    Args:
        layer: gets the attributes.
        options: by `kernel_initializer`, `bias_regularizer` and so on; each
            what the `get` of its module in Keras takes.
        prefix: of the attributes' names.
    """
    for name, value in options.items():
        module = dict(_KINDS)[name.rsplit("_", 1)[1]]
        setattr(layer, prefix + name, module.get(value))


def config(layer: Any, prefix: str = "") -> dict[str, Any]:
    """All six options of a layer, serialized."""
    return {
        f"{what}_{kind}": module.serialize(
            getattr(layer, f"{prefix}{what}_{kind}")
        )
        for kind, module in _KINDS
        for what in ("kernel", "bias")
    }


def copied(initializer: Any) -> Any:
    """A new initializer of the same kind, or a plain function as it is: one
    initializer object gives equal values twice."""
    if isinstance(initializer, keras.initializers.Initializer):
        return initializer.__class__.from_config(initializer.get_config())
    return initializer


def features_of(shape: Shape) -> int:
    """The number of features of a sequence.

    Raises:
        ValueError: unless the shape is `(batch, length, features)`, the last
            one known.
    """
    if len(shape) != 3 or not shape[-1]:
        raise ValueError(
            "Inputs must have the shape (batch, length, features) with a "
            "known number of features of 1 or more. Received: input_shape="
            f"{tuple(shape)}. Add or take away axes with keras.ops.reshape."
        )
    return shape[-1]
