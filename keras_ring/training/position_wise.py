"""Losses and metrics that are right on a part of the batch.

A loss is computed shard by shard where that gives the same numbers as on the
whole batch: where it has one value for each position (or each sample), which
depends on nothing but what is there, and Keras takes their mean. Keras' own
losses and metrics are known; a function or class of one's own says so with an
attribute `sequence_parallel_safe = True`. Anything else may look at several
positions or samples at once, and is given the whole batch.
"""

import functools
from typing import Any

import keras

from keras_ring.keras_internals import wrapped_function, wrapped_options

MARK = "sequence_parallel_safe"

# One value for each element, or the mean of these over the last axis. That
# axis may be the sequence: means over equal shards are averaged.
_BY_ELEMENT = frozenset(
    (
        *("accuracy", "binary_accuracy"),
        *("binary_crossentropy", "binary_focal_crossentropy", "huber"),
        *("log_cosh", "mean_absolute_error", "mean_absolute_percentage_error"),
        *("mean_squared_error", "mean_squared_logarithmic_error", "poisson"),
    )
)
# One value for all of the last axis, which must not be the sequence.
_BY_VECTOR = frozenset(
    (
        *("categorical_accuracy", "categorical_crossentropy"),
        *("categorical_focal_crossentropy", "categorical_hinge"),
        *("categorical_generalized_cross_entropy", "concordance_correlation"),
        *("cosine_similarity", "kl_divergence", "pearson_correlation"),
        *("sparse_categorical_accuracy", "sparse_categorical_crossentropy"),
        *("sparse_top_k_categorical_accuracy", "top_k_categorical_accuracy"),
    )
)
# Not there: hinge and squared_hinge (whether labels are 0 and 1 is read off
# all of them), circle, ctc, dice and tversky (over all samples or positions).

# Metrics that add up counts of single elements.
_COUNTING = (
    *("AUC", "FalseNegatives", "FalsePositives", "TrueNegatives"),
    *("TruePositives", "Precision", "PrecisionAtRecall", "Recall"),
    *("RecallAtPrecision", "SensitivityAtSpecificity"),
    *("SpecificityAtSensitivity", "RootMeanSquaredError"),
    *("BinaryIoU", "IoU", "MeanIoU", "OneHotIoU", "OneHotMeanIoU"),
)


def loss(loss: Any, prediction: Any, split: bool) -> bool:
    """True if a loss can be computed shard by shard.

    Args:
        loss: a `keras.losses.Loss`.
        prediction: what it is computed of; only its rank is looked at.
        split: whether the prediction has the sequence on axis 1.
    """
    if marked(loss):
        return True
    # A subclass of one's own may compute anything.
    if not _of_keras(type(loss)):
        return False
    function = wrapped_function(loss)
    if function is None:
        return False
    options = wrapped_options(loss)
    return _function(function, options, len(prediction.shape), split)


def metric(metric: Any, prediction: Any, split: bool) -> bool:
    """True if a metric can count shard by shard; as `loss`."""
    if marked(metric):
        return True
    if not _of_keras(type(metric)):
        return False
    rank = len(prediction.shape)
    function = wrapped_function(metric)
    if function is not None:
        return _function(function, wrapped_options(metric), rank, split)
    if type(metric).__name__ not in _COUNTING:
        return False
    axis = getattr(metric, "axis", -1)
    if axis not in (-1, rank - 1):
        return False
    # These look at classes, which are the last axis.
    by_vector = (
        getattr(metric, "multi_label", False)
        or getattr(metric, "top_k", None) is not None
        or getattr(metric, "class_id", None) is not None
        or "OneHot" in type(metric).__name__
    )
    return not by_vector or rank > 2 or not split


def marked(part: Any) -> bool:
    """True if a loss, metric, function or model says of itself that it is right
    on a shard."""
    if getattr(part, MARK, False):
        return True
    if isinstance(part, functools.partial):
        return marked(part.func)
    inner = wrapped_function(part)
    return inner is not None and inner is not part and marked(inner)


def _function(
    function: Any, options: dict[str, Any] | None, rank: int, split: bool
) -> bool:
    if marked(function):
        return True
    if options is None or not _of_keras(function):
        return False
    name = getattr(function, "__name__", "")
    axis = options.get("axis", -1)
    if axis not in (-1, rank - 1):
        return False
    if name in _BY_ELEMENT:
        return True
    # Of a prediction `(batch,)` the last axis is the batch.
    return name in _BY_VECTOR and (rank > 2 or (rank == 2 and not split))


def _of_keras(part: Any) -> bool:
    module = getattr(part, "__module__", None) or ""
    return module.split(".")[0] == keras.__name__
