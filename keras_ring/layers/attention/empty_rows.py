"""Results of attention for queries that may attend to nothing.

There is no softmax over no scores. The kernels give zeros. Keras' layers put
a large negative number in the place of every masked score: where all of them
are masked the softmax is uniform over all keys, and the result the mean of
all values, those of masked keys included. Other layers may then read it: in
`h + attention(h, h)` the sum has no mask any more, so that the next layer
attends to such rows.
"""

from typing import Any

from keras import ops

from keras_ring.layers.attention.axes import AttentionAxes
from keras_ring.layers.attention.masks import AttentionMasks
from keras_ring.layers.attention.options import AttentionOptions
from keras_ring.ops.sequence import sequence_positions, true_length
from keras_ring.ops.sequence_mean import sequence_mean

Tensor = Any


def is_mean(
    options: AttentionOptions, axes: AttentionAxes, masks: AttentionMasks
) -> bool:
    """True if some query of a call may attend to nothing and then gives the
    mean of all values: where a stock layer would not write out the scores."""
    return (
        options.empty_rows == "stock"
        and axes.plain
        and not options.dropout
        and may_be(masks)
    )


def may_be(masks: AttentionMasks) -> bool:
    """True if some query of a call may attend to nothing: not under a causal
    mask alone, under which each sees the first key."""
    hiding = masks.queries, masks.pairs, masks.segments, masks.sliding_window
    return bool(masks.keys) or any(mask is not None for mask in hiding)


def mean_of_values(
    out: Tensor, lse: Tensor, value: Tensor, masks: AttentionMasks
) -> Tensor:
    """Attention with the mean of all values in its empty rows.

    Args:
        out: `(batch, query_length, heads, value_dim)`, attention.
        lse: `(batch, query_length, heads)`, log-sum-exp of its scores.
        value: `(batch, key_length, key_heads, value_dim)`.
        masks: of the call; all keys of a query that they mask are masked.
    """
    empty = ops.isneginf(lse)
    if masks.queries is not None:
        empty = ops.logical_or(
            empty, ops.logical_not(masks.queries)[:, :, None]
        )
    true = true_length(ops.shape(out)[1])
    if true is not None:
        # No gradient comes of rows that are a ring's own padding.
        real = ops.less(sequence_positions(out), true)
        empty = ops.logical_and(empty, real[None, :, None])
    mean = ops.cast(sequence_mean(value), out.dtype)
    group = out.shape[2] // value.shape[2]
    if group > 1:
        mean = ops.repeat(mean, group, axis=1)
    return ops.where(empty[..., None], mean[:, None], out)
