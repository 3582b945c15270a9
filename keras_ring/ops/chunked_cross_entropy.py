"""`keras_ring.ops.chunked_cross_entropy`: a loss without logits."""

from typing import Any, NamedTuple

from keras import ops

from keras_ring import arguments, precision, tensor_arguments
from keras_ring.recompute.chunked import map_chunks

Tensor = Any


class CrossEntropy(NamedTuple):
    """Results of the logits of every token, in the accumulation dtype.

    Attributes:
        loss: `(batch, length)`; 0 for an ignored token, NaN for a label that
            is none of the classes.
        lse: `(batch, length)`, the log-sum-exp of the logits.
        correct: `(batch, length)`, 1 where the label has the largest logit,
            else 0; 0 for an ignored token. It has no gradient.
    """

    loss: Tensor
    lse: Tensor
    correct: Tensor


def chunked_cross_entropy(
    features: Tensor,
    kernel: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk_size: int = 256,
) -> CrossEntropy:
    """Compute the cross-entropy of `softmax(features @ kernel + bias)`.

    The logits exist for one chunk of tokens at a time, forward and backward:
    the backward computes them once more from the features. With `p` the
    softmax of the logits, `s` the smoothing and `V` the number of classes the
    loss of a token is

    `-(1 - s) * log p[label] - s / V * sum(log p) + z_loss * lse ** 2`.

    Args:
        features: `(batch, length, features)`, floating point, as a layer sees
            them: global on JAX, this device's shard on TensorFlow and PyTorch.
        kernel: `(features, classes)`.
        labels: integers `(batch, length)`, `0 <= label < classes`.
        bias: `(classes,)` or None.
        label_smoothing: share of the label's probability that is spread
            evenly over all classes, from 0 to less than 1.
        ignore_index: a label whose tokens have no loss; it need not be a
            class.
        z_loss: factor on the squared log-sum-exp, which keeps the logits
            from drifting away.
        soft_cap: bound on the size of the logits, which become `soft_cap *
            tanh(logit / soft_cap)`; none if None.
        chunk_size: positions of a sequence in a chunk, at most.

    Returns:
        A `CrossEntropy(loss, lse, correct)`, float32 (float64 for float64
        features). `loss` and `lse` are differentiable.

    Raises:
        ValueError: for shapes, dtypes or options that do not fit.

    Example:

    ```python
    loss = chunked_cross_entropy(x, kernel, labels, ignore_index=-1).loss
    ```

    Reference:
        Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016,
        https://arxiv.org/abs/1604.06174; Chowdhery et al., "PaLM", 2022,
        https://arxiv.org/abs/2204.02311, section 5 (z-loss)
    """
    given = {"features": features, "kernel": kernel, "labels": labels}
    features, kernel, labels = (
        tensor_arguments.tensor(*pair) for pair in given.items()
    )
    shared = [kernel]
    if bias is not None:
        shared.append(tensor_arguments.tensor("bias", bias))
    _check(features, shared, labels)
    label_smoothing, z_loss = label_smoothing_and_z_loss(
        label_smoothing, z_loss
    )
    if soft_cap is not None:
        soft_cap = arguments.positive("soft_cap", soft_cap, ", or None")
    if ignore_index is not None:
        ignore_index = arguments.integer(
            *("ignore_index", ignore_index, None, ", or None")
        )
    chunk_size = arguments.integer("chunk_size", chunk_size)
    classes = kernel.shape[1]
    dtype = precision.accumulation_dtype(features.dtype)

    def function(
        features: Tensor, labels: Tensor, kernel: Tensor, *bias: Tensor
    ) -> tuple[Tensor, ...]:
        logits = precision.matmul(features, kernel)
        if bias:
            logits = ops.add(logits, bias[0])
        logits = ops.cast(logits, dtype)
        if soft_cap is not None:
            logits = soft_cap * precision.tanh(logits / soft_cap)
        top = ops.stop_gradient(ops.max(logits, axis=-1, keepdims=True))
        lse = ops.log(ops.sum(ops.exp(logits - top), axis=-1)) + top[..., 0]
        # By comparison and not by index: what a device does not hold, or a
        # label that is no class, gives no other class' logit.
        is_label = ops.equal(
            ops.arange(classes, dtype="int32"), labels[..., None]
        )
        picked = ops.sum(
            ops.where(is_label, logits, ops.zeros_like(logits)), axis=-1
        )
        loss = lse - (1.0 - label_smoothing) * picked
        if label_smoothing:
            loss = loss - label_smoothing * precision.mean(logits, -1)
        if z_loss:
            loss = loss + z_loss * lse * lse
        known = ops.logical_and(labels >= 0, labels < classes)
        loss = ops.where(known, loss, ops.zeros_like(loss) + float("nan"))
        best = ops.cast(ops.argmax(logits, axis=-1), "int32")
        correct = ops.cast(ops.equal(best, labels), dtype)
        if ignore_index is not None:
            counts = ops.not_equal(labels, ignore_index)
            nothing = ops.zeros_like(loss)
            loss = ops.where(counts, loss, nothing)
            correct = ops.where(counts, correct, nothing)
        return loss, lse, correct

    results = map_chunks(
        function,
        [features, ops.cast(labels, "int32")],
        shared,
        results=[((), dtype)] * 3,
        chunk_size=chunk_size,
    )
    return CrossEntropy(*results)


def label_smoothing_and_z_loss(
    label_smoothing: Any, z_loss: Any
) -> tuple[float, float]:
    """The two, as numbers that are in range."""
    return (
        arguments.rate("label_smoothing", label_smoothing),
        arguments.not_negative("z_loss", z_loss),
    )


def _check(features: Tensor, weights: list[Tensor], labels: Tensor) -> None:
    kernel, *bias = weights
    received = (
        f"features.shape={tuple(features.shape)}, kernel.shape="
        f"{tuple(kernel.shape)}, labels.shape={tuple(labels.shape)}"
        + "".join(f", bias.shape={tuple(b.shape)}" for b in bias)
    )
    if len(features.shape) != 3 or len(labels.shape) != 2:
        raise ValueError(
            "`features` must be (batch, length, features) and `labels` "
            f"(batch, length). Received: {received}. Add or take away axes "
            "with keras.ops.reshape."
        )
    if len(kernel.shape) != 2 or kernel.shape[0] != features.shape[2]:
        raise ValueError(
            "`kernel` must be (features, classes), with the features of "
            f"`features`. Received: {received}. Transpose or replace it."
        )
    if bias and tuple(bias[0].shape) != (kernel.shape[1],):
        raise ValueError(
            f"`bias` must be (classes,). Received: {received}. Give it one "
            "number for each class."
        )
    tensor_arguments.no_empty_axis(
        *("kernel", kernel, {0: "number of features", 1: "number of classes"}),
        received,
    )
    tensor_arguments.no_empty_axis(
        "features", features, {1: "length"}, received
    )
    for have, want in zip(labels.shape, features.shape[:2], strict=True):
        if isinstance(have, int) and isinstance(want, int) and have != want:
            raise ValueError(
                "`labels` must have the batch and the length of `features`. "
                f"Received: {received}. Give every token one label."
            )
    tensor_arguments.integers("labels", labels)
    named = {"features": features, "kernel": kernel}
    tensor_arguments.one_floating_dtype(
        {**named, "bias": bias[0]} if bias else named
    )
