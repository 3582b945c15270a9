"""Parts of a stock attention layer, to make one of ours from them."""

from typing import Any

import keras


def config(layer: keras.layers.Layer) -> dict[str, Any]:
    """The configuration of a stock layer, as `RingAttention` takes it.

    Raises:
        ValueError: unless it is a stock attention layer, not a subclass.
        NotImplementedError: for a grouped-query layer that regularizes its
            activity, which it does for its own output once more.
    """
    stock = keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention
    if type(layer) not in stock:
        raise ValueError(
            "`layer` must be a keras.layers.MultiHeadAttention or a "
            "keras.layers.GroupQueryAttention itself: a subclass may compute "
            f"something else. Received: layer of type {type(layer).__name__}. "
            "Build a RingAttention and copy the weights with set_weights()."
        )
    options = layer.get_config()
    regularizer = options.get("activity_regularizer")
    if isinstance(layer, stock[1]) and regularizer is not None:
        raise NotImplementedError(
            "GroupQueryAttention applies its activity regularizer to the "
            "layer's output as well as to every projection, RingAttention to "
            f"the projections. Received: activity_regularizer={regularizer}. "
            "Remove it from the layer and add the loss to the model."
        )
    options["dtype"] = layer.dtype_policy
    options["empty_rows"] = "stock"
    options["strip_masks"] = isinstance(layer, stock[0])
    return options


def copy_weights(
    source: keras.layers.Layer, target: keras.layers.Layer
) -> None:
    """Build `target` like `source` and give it the same weights.

    Raises:
        ValueError: if the weights of `source` do not fit.
    """
    target.build_from_config(source.get_build_config())
    have = [tuple(w.shape) for w in source.weights]
    want = [tuple(w.shape) for w in target.weights]
    if have != want:
        raise ValueError(
            "The layer's weights must be those of its configuration. "
            f"Received: layer={source.name} with weights of shapes {have}, "
            f"not {want}. Merge or remove LoRA weights, and convert before "
            "quantizing."
        )
    target.set_weights(source.get_weights())
    for ours, theirs in zip(target.weights, source.weights, strict=True):
        ours.trainable = theirs.trainable
