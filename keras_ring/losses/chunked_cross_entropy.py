"""`keras_ring.losses.ChunkedCrossEntropy`: a loss without logits."""

import weakref
from typing import Any

import keras
from keras import ops

from keras_ring import arguments, tensor_arguments
from keras_ring.keras_internals import attach_mask, mask_of, sublayers
from keras_ring.layers.language_model_head import LanguageModelHead
from keras_ring.ops.chunked_cross_entropy import (
    chunked_cross_entropy,
    label_smoothing_and_z_loss,
)

Tensor = Any

# Up to here every whole number is one of the dtype.
_LARGEST_LABEL = {"bfloat16": 2**8, "float16": 2**11, "float32": 2**24}


@keras.saving.register_keras_serializable(package="keras_ring")
class ChunkedCrossEntropy(keras.losses.Loss):
    """Cross-entropy that projects to the vocabulary chunk by chunk.

    It is `keras.losses.SparseCategoricalCrossentropy(from_logits=True)` after
    `keras.layers.Dense(vocabulary_size)`, while logits exist for `chunk_size`
    positions at a time, forward and backward. The model returns features; the
    projection belongs to its last layer, a
    `keras_ring.layers.LanguageModelHead`.

    The weights are the head's; the loss only knows where they are, and a
    file does not. After `model = keras.saving.load_model(path)` call
    `model.loss.bind(model)`; until then a step is refused.

    Args:
        head: the `LanguageModelHead` that ends the model.
        label_smoothing: share of the label's probability that is spread
            evenly over all classes, from 0 to less than 1.
        ignore_class: a label whose tokens have no loss and do not count in
            the mean; it need not be a class.
        z_loss: factor on the squared log-sum-exp of the logits.
        chunk_size: positions of a sequence (of a shard of it, under a
            strategy) that have logits at a time, at most.
        reduction: reduction of the loss, as in `keras.losses.Loss`.
        name: name of the loss.
        dtype: dtype of the reduction.

    Call arguments:
        y_true: integers `(batch, length)` or `(batch, length, 1)`.
        y_pred: `(batch, length, features)`, the output of the head.
        sample_weight: `(batch,)` or `(batch, length)`.

    Returns:
        The reduced loss; `(batch, length)` without a reduction.

    Raises:
        ValueError: for options out of range, or a loss without a head.

    Example:

    ```python
    head = keras_ring.layers.LanguageModelHead(50_000)
    model = keras.Model(tokens, head(x))
    model.compile(
        "adam", keras_ring.losses.ChunkedCrossEntropy(head, ignore_class=0)
    )
    ```

    Reference:
        Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016,
        https://arxiv.org/abs/1604.06174
    """

    # One value for each position; see `keras_ring.training.position_wise`.
    sequence_parallel_safe = True

    def __init__(
        self,
        head: LanguageModelHead | None = None,
        label_smoothing: float = 0.0,
        ignore_class: int | None = None,
        z_loss: float = 0.0,
        chunk_size: int = 256,
        reduction: str | None = "sum_over_batch_size",
        name: str = "chunked_cross_entropy",
        dtype: Any = None,
    ):
        label_smoothing, z_loss = label_smoothing_and_z_loss(
            label_smoothing, z_loss
        )
        if ignore_class is not None:
            ignore_class = arguments.integer(
                "ignore_class", ignore_class, None, ", or None"
            )
        chunk_size = arguments.integer("chunk_size", chunk_size)
        if not (head is None or isinstance(head, LanguageModelHead)):
            raise ValueError(
                "`head` must be the LanguageModelHead that ends the model. "
                f"Received: head={arguments.shown(head)}. Pass the layer "
                "itself."
            )
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self._head: Any = None
        self._point_to(head)
        self.label_smoothing = label_smoothing
        self.ignore_class = ignore_class
        self.z_loss = z_loss
        self.chunk_size = chunk_size

    @property
    def head(self) -> LanguageModelHead | None:
        """The layer whose weights the loss uses, or None."""
        return None if self._head is None else self._head()

    def bind(self, model: keras.Model) -> "ChunkedCrossEntropy":
        """Use the weights of a model's head from now on.

        Args:
            model: a model with one `LanguageModelHead` among its layers.

        Returns:
            The loss itself.

        Raises:
            ValueError: for a model with none or several.
        """
        if not isinstance(model, keras.Model):
            raise ValueError(
                "`model` must be the keras.Model that the loss trains. "
                f"Received: model={arguments.shown(model)}. Pass the model "
                "after load_model."
            )
        heads = [
            layer
            for layer in sublayers(model, recursive=True)
            if isinstance(layer, LanguageModelHead)
        ]
        if len(heads) != 1:
            raise ValueError(
                "A loss is bound to a model with one LanguageModelHead. "
                f"Received: the model {model.name!r} with {len(heads)}. Give "
                "the head itself: ChunkedCrossEntropy(head)."
            )
        self._point_to(heads[0])
        return self

    def __call__(
        self, y_true: Tensor, y_pred: Tensor, sample_weight: Tensor = None
    ) -> Tensor:
        # Keras gives `call` everything in the loss' own dtype.
        y_true = tensor_arguments.tensor("y_true", y_true)
        tensor_arguments.integers("y_true", y_true)
        self._check_exact()
        mask = mask_of(y_pred)
        targets = (y_true,) if mask is None else (y_true, mask)
        return super().__call__(targets, y_pred, sample_weight)

    def call(self, y_true: Any, y_pred: Tensor) -> Tensor:
        head = self._checked_head()
        labels, *mask = y_true if isinstance(y_true, tuple) else (y_true,)
        if len(labels.shape) == 3 and labels.shape[-1] == 1:
            labels = ops.squeeze(labels, -1)
        labels = ops.cast(labels, "int32")
        dtype = head.compute_dtype
        bias = head.bias
        # Keras gives a loss everything in its own dtype: back to the dtype
        # that the projection is computed in.
        result = chunked_cross_entropy(
            ops.cast(y_pred, dtype),
            ops.cast(head.kernel, dtype),
            labels,
            bias=None if bias is None else ops.cast(bias, dtype),
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_class,
            z_loss=self.z_loss,
            soft_cap=head.soft_cap,
            chunk_size=self.chunk_size,
        )
        counts = [ops.cast(given, "bool") for given in mask]
        loss = result.loss
        if self.ignore_class is not None:
            counts.append(ops.not_equal(labels, self.ignore_class))
            attach_mask(loss, counts[-1])
        if head.accuracy is not None:
            weight = None
            if counts:
                weight = ops.cast(counts[0], loss.dtype)
                for other in counts[1:]:
                    weight = weight * ops.cast(other, loss.dtype)
            head.accuracy.update_state(
                ops.stop_gradient(result.correct), sample_weight=weight
            )
        return loss

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "label_smoothing": self.label_smoothing,
            "ignore_class": self.ignore_class,
            "z_loss": self.z_loss,
            "chunk_size": self.chunk_size,
        }

    def _point_to(self, head: LanguageModelHead | None) -> None:
        # Weakly: the loss does not own the layer. If it did, Keras would save
        # the weights in its place instead of the layer's.
        self._head = None if head is None else weakref.ref(head)

    def _check_exact(self) -> None:
        """Refuse a dtype in which Keras would round the labels."""
        head, largest = self.head, _LARGEST_LABEL.get(self.dtype)
        if head is None or largest is None:
            return
        ignored = abs(self.ignore_class or 0)
        if max(head.vocabulary_size, ignored) <= largest:
            return
        also = f" and ignore_class={self.ignore_class}" if ignored else ""
        raise ValueError(
            "Keras casts the labels to the dtype of the loss, which must hold "
            f"each of them exactly. Received: dtype={self.dtype}, exact up to "
            f"{largest}, for {head.vocabulary_size} classes{also}. Pass "
            "dtype='float32' to the loss."
        )

    def _checked_head(self) -> LanguageModelHead:
        head = self.head
        if head is None or not head.built:
            state = "no head" if head is None else "a head without weights"
            raise ValueError(
                "The loss needs the LanguageModelHead of the model that it "
                f"trains. Received: {state}. Call loss.bind(model), after "
                "loading a model model.loss.bind(model), or compile with "
                "ChunkedCrossEntropy(head)."
            )
        return head
