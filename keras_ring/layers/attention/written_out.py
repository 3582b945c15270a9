"""Attention of a layer with all its scores, on one device."""

from typing import Any

from keras import ops

from keras_ring.attention.dense import Dense, dense_attention
from keras_ring.attention.scoring import Dropout, Scoring
from keras_ring.distribution import strategy
from keras_ring.layers.attention.axes import AttentionAxes
from keras_ring.layers.attention.masks import AttentionMasks
from keras_ring.layers.attention.options import AttentionOptions

Tensor = Any


def written_out(
    options: AttentionOptions,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
) -> Dense:
    """Attention and its scores.

    Args:
        options: of the layer.
        query: `(batch, query_length, heads, key_dim)`.
        key: `(batch, key_length, key_heads, key_dim)`.
        value: `(batch, key_length, key_heads, value_dim)`.
        attention_mask: boolean, as in a call; or None.
        causal: whether to hide later keys as well.
        bias: `(batch, query_length, heads or 1, key_length)` or None.
        sinks: `(heads,)` or None.
        dropout_seed: `(2,)`; None where nothing is dropped.
    """
    pairs = dropout = None
    if attention_mask is not None:
        pairs = AttentionAxes(3, (1,)).fold_pairs(
            attention_mask, ops.shape(query)[:3], (ops.shape(key)[1],)
        )
    masks = AttentionMasks(None, (), pairs, causal, None)
    if dropout_seed is not None:
        seed = ops.cast(dropout_seed, "int32")
        world = strategy.current()
        # Each group of devices sees a part of the batch.
        group = 0 if world is None else world.data_index()
        first_row = group * ops.shape(query)[0]
        dropout = Dropout(options.dropout, seed, first_row)
    scale = options.scale
    scoring = Scoring(
        scale=options.heads.key_dim**-0.5 if scale is None else scale,
        mask=masks.structured(),
        soft_cap=options.soft_cap,
        bias=bias,
        slopes=options.slopes,
        dropout=dropout,
    )
    return dense_attention(query, key, value, scoring, sinks)
