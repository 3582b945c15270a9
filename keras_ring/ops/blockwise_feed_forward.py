"""`keras_ring.ops.blockwise_feed_forward`: a feed-forward in chunks."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_ring import arguments, precision, tensor_arguments
from keras_ring.ops.positional_dropout import (
    batch_rows,
    check_seed,
    dropped,
)
from keras_ring.ops.sequence import sequence_positions
from keras_ring.recompute.chunked import map_chunks

Tensor = Any


def blockwise_feed_forward(
    inputs: Tensor,
    up_kernel: Tensor,
    down_kernel: Tensor,
    *,
    gate_kernel: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str | Callable[[Tensor], Tensor] = "gelu",
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Compute a transformer's feed-forward, one chunk of positions at a time.

    `activation(x @ up) @ down`, or with a gate
    `(activation(x @ gate) * (x @ up)) @ down` (SwiGLU with "silu", GeGLU
    with "gelu"). The hidden features exist for one chunk at a time, forward
    and backward: the backward computes them once more from the inputs.

    Args:
        inputs: `(batch, length, features)`, floating point, as a layer sees
            them: global on JAX, this device's shard on TensorFlow and PyTorch.
        up_kernel: `(features, hidden_dim)`.
        down_kernel: `(hidden_dim, output_features)`.
        gate_kernel: `(features, hidden_dim)`, or None for no gate.
        up_bias: `(hidden_dim,)` or None.
        gate_bias: `(hidden_dim,)` or None.
        down_bias: `(output_features,)` or None.
        activation: name of a Keras activation, or a function of a tensor
            that treats positions one by one.
        dropout: rate of dropout on the hidden features; see
            `positional_dropout`.
        dropout_seed: integers `(2,)`, the same on all devices; needed with a
            rate above 0.
        chunk_size: positions of a sequence in a chunk, at most.

    Returns:
        `(batch, length, output_features)`, dtype of the inputs.

    Raises:
        ValueError: for shapes or a chunk size that do not fit.

    Reference:
        Liu and Abbeel, "Blockwise Parallel Transformer for Large Context
        Models", 2023, https://arxiv.org/abs/2305.19370; Shazeer, "GLU
        Variants Improve Transformer", 2020, https://arxiv.org/abs/2002.05202
    """
    inputs = tensor_arguments.tensor("inputs", inputs)
    weights = {
        "up_kernel": up_kernel,
        "up_bias": up_bias,
        "gate_kernel": gate_kernel,
        "gate_bias": gate_bias,
        "down_kernel": down_kernel,
        "down_bias": down_bias,
    }
    given = {
        name: tensor_arguments.tensor(name, weight)
        for name, weight in weights.items()
        if weight is not None or name in ("up_kernel", "down_kernel")
    }
    _check(inputs, given)
    chunk_size = arguments.integer("chunk_size", chunk_size)
    dropout = arguments.rate("dropout", dropout)
    drawn: list[Tensor] = []
    if dropout:
        seed = check_seed("dropout_seed", dropout_seed)
        drawn = [seed, batch_rows(inputs)]
    activate: Any = keras.activations.get(activation)
    dtype = keras.backend.standardize_dtype(inputs.dtype)

    # The function lives until the backward, and must not hold the weights.
    names, gated, by_position = (
        list(given),
        gate_kernel is not None,
        dropout > 0,
    )

    def function(chunk: Tensor, *others: Tensor) -> tuple[Tensor]:
        positions, others = others[:by_position], others[by_position:]
        named = dict(zip(names, others, strict=False))
        hidden = _dense(chunk, named, "up")
        if not gated:
            hidden = activate(hidden)
        else:
            hidden = activate(_dense(chunk, named, "gate")) * hidden
        if positions:
            seed, rows = others[len(names) :]
            rows = rows[:, None, None]
            at = positions[0][..., None]
            hidden = dropped(hidden, seed, rows, at, dropout)
        return (_dense(hidden, named, "down"),)

    places = [sequence_positions(inputs)[None]] if dropout else []
    (outputs,) = map_chunks(
        function,
        [inputs, *places],
        [*given.values(), *drawn],
        results=[((given["down_kernel"].shape[1],), dtype)],
        chunk_size=chunk_size,
    )
    return outputs


def _dense(inputs: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    outputs = precision.matmul(inputs, weights[f"{name}_kernel"])
    bias = weights.get(f"{name}_bias")
    return outputs if bias is None else ops.add(outputs, bias)


def _check(inputs: Tensor, weights: dict[str, Tensor]) -> None:
    received = ", ".join(
        f"{name}.shape={tuple(tensor.shape)}"
        for name, tensor in {"inputs": inputs, **weights}.items()
    )
    if len(inputs.shape) != 3:
        raise ValueError(
            "`inputs` must have the rank 3: (batch, length, features). "
            f"Received: {received}. Add or take away axes with "
            "keras.ops.reshape."
        )
    tensor_arguments.no_empty_axis("inputs", inputs, {1: "length"}, received)
    tensor_arguments.one_floating_dtype({"inputs": inputs, **weights})
    kernels = [n for n in weights if n.endswith("kernel")]
    if any(len(weights[name].shape) != 2 for name in kernels):
        raise ValueError(
            f"Kernels must be matrices. Received: {received}. Reshape them."
        )
    hidden, features = weights["down_kernel"].shape
    wanted = {
        "up_kernel": (inputs.shape[2], hidden),
        "gate_kernel": (inputs.shape[2], hidden),
        "up_bias": (hidden,),
        "gate_bias": (hidden,),
        "down_kernel": (hidden, features),
        "down_bias": (features,),
    }
    if "gate_bias" in weights and "gate_kernel" not in weights:
        raise ValueError(
            f"`gate_bias` needs a `gate_kernel`. Received: {received}. Pass "
            "both or neither."
        )
    for name, tensor in weights.items():
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(
                f"`{name}` must have the shape {wanted[name]}. Received: "
                f"{received}. Transpose or replace it."
            )
        for axis, width in enumerate(("first size", "second size")):
            if axis < len(tensor.shape):
                axes = {axis: width}
                tensor_arguments.no_empty_axis(name, tensor, axes, received)
