"""What `RingAttention` refuses, before anything runs, and with which words."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring
from keras_ring.layers import RingAttention
from tests.attention_layers import (
    BATCH,
    GQA,
    MHA,
    QUERIES,
    WIDTH,
    Halved,
    compare,
    normal,
)

X = normal(1, BATCH, QUERIES, WIDTH)
MEMORY = normal(2, BATCH, 7, WIDTH)

# What a constructor refuses: (arguments, what the error says).
BAD_ARGUMENTS = {
    "no-heads": ({"key_dim": 4}, "Exactly one of.*num_heads=None"),
    "both-heads": ({**MHA, "num_query_heads": 2}, "Exactly one of"),
    "both-dims": ({**MHA, "head_dim": 4}, "key_dim=4, head_dim=4"),
    "groups": (
        {**GQA, "num_key_value_heads": 3},
        "divisible.*num_query_heads=4, num_key_value_heads=3",
    ),
    "no-groups": ({**GQA, "num_key_value_heads": 0}, "num_key_value_heads=0"),
    "bool": ({**MHA, "num_heads": True}, "num_heads=True"),
    "dropout": ({**MHA, "dropout": 1.0}, "dropout=1.0"),
    "flash-dropout": (
        {**MHA, "dropout": 0.1, "flash_attention": True},
        "Dropout is not supported when flash",
    ),
    "flash": ({**MHA, "flash_attention": "yes"}, "flash_attention='yes'"),
    "scale": ({**MHA, "scale": float("nan")}, "scale=nan"),
    "window": ({**MHA, "sliding_window": 0}, "sliding_window=0"),
    "soft-cap": ({**MHA, "soft_cap": 0.0}, "soft_cap=0.0"),
    "alibi": ({**MHA, "alibi": [0.5]}, "one finite slope.* 2 heads"),
    "alibi-number": (
        {**MHA, "alibi": np.array(0.5)},
        "one finite slope.* 2 heads",
    ),
    "empty-rows": ({**MHA, "empty_rows": 1}, "empty_rows=1. Pass one"),
    "rotary": ({**MHA, "rotary": 10000}, "rotary=10000"),
    "axes": ({**MHA, "attention_axes": "1"}, "attention_axes='1'"),
    "output": (
        {**MHA, "output_shape": (3, 0)},
        "Invalid `output_shape`.*\\(3, 0\\)",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(name):
    options, message = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        RingAttention(**options)


# What a call refuses: (constructor options, inputs, call options, message).
BAD_CALLS = {
    "rank": (MHA, [X[0]], {}, "same rank, 3 or more"),
    "ranks-differ": (MHA, [X[:, None], X], {}, "same rank"),
    "batch": (MHA, [X, X[:1]], {}, "same batch size.*(1, 12, 10)"),
    "key-length": (MHA, [X, MEMORY, X], {}, "must be equal.*(2, 7, 10)"),
    "axes": ({**MHA, "attention_axes": 2}, [X], {}, "between the batch"),
    "free-axes": (
        {**MHA, "attention_axes": 1},
        [normal(1, 2, 3, 4, 5), normal(1, 2, 3, 5, 5)],
        {},
        "not attended over.*differ in axis 2",
    ),
    "value-mask": (
        MHA,
        [X, MEMORY],
        {"value_mask": np.ones((BATCH, 6), bool)},
        r"value_mask.shape=\(2, 6\)",
    ),
    "query-mask": (
        MHA,
        [X],
        {"query_mask": np.ones((BATCH, QUERIES, 2, 2), bool)},
        "`query_mask` must have the shape",
    ),
    "pairs": (
        MHA,
        [X, MEMORY],
        {"attention_mask": np.ones((BATCH, QUERIES, 6), bool)},
        r"must broadcast.*\(2, 12, 6\).*\(2, 2, 12, 7\)",
    ),
    "pairs-heads": (
        MHA,
        [X],
        {"attention_mask": np.ones((BATCH, 3, QUERIES, QUERIES), bool)},
        "must broadcast",
    ),
    "pairs-rank": (
        MHA,
        [X],
        {"attention_mask": np.ones((1, BATCH, 2, QUERIES, QUERIES), bool)},
        "must broadcast",
    ),
    "bias": (
        MHA,
        [X, MEMORY],
        {"attention_bias": np.ones((BATCH, QUERIES, 6), "float32")},
        r"`attention_bias` must broadcast.*\(2, 12, 6\)",
    ),
    "key-segments": (
        MHA,
        [X],
        {"key_segment_ids": np.ones((BATCH, QUERIES), "int32")},
        "needs `segment_ids`",
    ),
    "segments": (
        MHA,
        [X, MEMORY],
        {"segment_ids": np.ones((BATCH, QUERIES), "int32")},
        "`key_segment_ids` must have the",
    ),
    "flash-scores": (
        {**MHA, "flash_attention": True},
        [X],
        {"return_attention_scores": True},
        "scores is not supported when flash",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name):
    options, inputs, call_options, message = BAD_CALLS[name]
    layer = RingAttention(**options)
    with pytest.raises(ValueError, match=message):
        layer(*inputs, **call_options)


def test_a_refused_call_leaves_the_layer_usable():
    layer = RingAttention(**MHA)
    want = layer(X)
    with pytest.raises(ValueError, match="same batch size"):
        layer(X, X[:1])
    compare(layer(X), want, "output")


def test_positions_need_one_axis():
    layer = RingAttention(**MHA, causal=True)
    with pytest.raises(NotImplementedError, match="one sequence axis"):
        layer(normal(1, 2, 3, 4, 5))


def check_ring_refusals(size):
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)
    x = normal(46, BATCH, QUERIES, WIDTH)
    with ring.scope():
        layer = RingAttention(**MHA)
        open_length = keras.Input((None, WIDTH))
        layer(open_length)
        assert layer._ring_world is ring.world
        with pytest.raises(NotImplementedError, match="sequence_parallel=2"):
            layer(open_length, return_attention_scores=True)
        with pytest.raises(NotImplementedError, match=r"over axis 1.*\(2,"):
            RingAttention(**MHA, attention_axes=2)(
                keras.Input((None, 3, WIDTH))
            )
        with pytest.raises(NotImplementedError, match="overridden: True"):
            Halved(**MHA)(open_length)

    def few_columns(x, pairs):
        return layer(x, attention_mask=pairs[:, :, :4])

    pairs = np.ones((BATCH, QUERIES, QUERIES), bool)
    with pytest.raises(ValueError, match=r"must broadcast.*12"):
        ring.run(few_columns, x, pairs)
    want = ops.convert_to_numpy(ring.run(layer, x))
    have = ring.run(lambda x, p: layer(x, attention_mask=p), x, pairs)
    compare(have, want, "output after refusals")


def test_refusals_under_a_ring(on_devices):
    on_devices(2, check_ring_refusals, 2)
