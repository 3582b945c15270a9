"""Wrong arguments of every public name: each is refused with the rule that it
breaks, the value that came and a way out, before anything is computed; and
what is right but no plain Python number works."""

import functools
import math
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import keras_ring as kr
from keras_ring import layers, losses, masks
from keras_ring.ops import (
    blockwise_feed_forward,
    chunked_cross_entropy,
    gather_batch,
    gather_sequence,
    own_chunk,
    positional_dropout,
    ring_attention,
    sequence_positions,
    take_position,
)

BATCH, LENGTH, WIDTH = 2, 6, 4
CLASSES = 5


@pytest.fixture(autouse=True, scope="module")
def plain_kernel():
    """No kernel has to prove itself for calls that nothing comes of."""
    kr.config.set_kernel("blockwise")
    yield
    kr.config.set_kernel("auto")


def floats(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


X = floats(BATCH, LENGTH, WIDTH)
TOKENS = np.ones((BATCH, LENGTH), "int32")
VALID = np.ones((BATCH, LENGTH), bool)
# 0 where a key is real, a large negative number where it is not.
ADDED = np.where(VALID, 0.0, -1e9).astype("float32")
SCORES = np.zeros((BATCH, LENGTH, LENGTH), "float32")


def attend(length=LENGTH, *, query=None, key=None, value=None, **options):
    tensor = floats(BATCH, length, 2, 4)
    query = tensor if query is None else query
    key = tensor if key is None else key
    return ring_attention(
        query, key, key if value is None else value, **options
    )


def layer(**options):
    return layers.RingAttention(**{"num_heads": 2, "key_dim": 2, **options})


def block(**options):
    given = {"num_heads": 2, "hidden_dim": 8, **options}
    return layers.RingTransformerBlock(**given)


def feed(inputs=X, **options):
    kernels = {"up_kernel": floats(WIDTH, 8), "down_kernel": floats(8, WIDTH)}
    return blockwise_feed_forward(inputs, **{**kernels, **options})


def entropy(labels=TOKENS, **options):
    given = {"features": X, "kernel": floats(WIDTH, CLASSES), **options}
    return chunked_cross_entropy(labels=labels, **given)


def head():
    made = layers.LanguageModelHead(CLASSES)
    made.build((None, None, WIDTH))
    return made


def loss(labels=TOKENS, vocabulary=CLASSES, **options):
    made = layers.LanguageModelHead(vocabulary)
    made.build((None, None, WIDTH))
    return losses.ChunkedCrossEntropy(made, **options)(labels, X)


def strategy(**options):
    return kr.DistributedStrategy(**options)


def one_device(function, *tensors):
    # One process is all there is here on PyTorch.
    return strategy(sequence_parallel=1).run(function, *tensors)


def symbol(*shape, dtype="float32"):
    return keras.Input(shape, dtype=dtype)


NAN, INF = math.nan, math.inf

# The rule that one kind of argument has, and what its error advises.
COUNT = "positive integer", "Pass 1"
WHOLE = "integer", "Pass a whole"
FLAG = "True or False", "Pass one"
FINITE = "finite number", "Pass one"
POSITIVE = "positive number", "Pass a finite"
AT_LEAST_0 = "of at least 0", "Pass 0"
RATE = "from 0 to less than 1", "Pass 0.0"
SLOPES = "one finite slope", "Pass a list"
ROTARY = "True, False or a", "Pass RotaryEmbedding"
OPTION = "one of '", "Pass one"
NAMES = "list or tuple of device names, in mesh order", "Pass names"
BALANCE = 'True, False or "auto"', "Pass one"


def each(make, kind, **wrong):
    """One row for each value of `wrong`, lists of values by name."""
    rule, fix = kind
    return {
        f"{make.__name__}-{name}-{value!r}": (
            functools.partial(make, **{name: value}),
            rule,
            f"{name}={value!r}",
            fix,
        )
        for name, values in wrong.items()
        for value in values
    }


def feed_layer(**options):
    return layers.BlockwiseFeedForward(8, **options)


def head_layer(**options):
    return layers.LanguageModelHead(CLASSES, **options)


chunked = losses.ChunkedCrossEntropy

# name: (the call, the rule, what was received, the way out)
ARGUMENTS = {
    **each(
        layer,
        COUNT,
        num_heads=[0, 2.0],
        key_dim=[0, -1],
        value_dim=[True],
        num_key_value_heads=[0],
        sliding_window=[True, 0],
    ),
    **each(
        layer,
        FLAG,
        causal=["no", None],
        use_bias=["False"],
        use_gate=[2],
        sinks=[[1.0]],
        flash_attention=["on"],
    ),
    **each(layer, FINITE, scale=[True, "1", INF, NAN]),
    **each(layer, POSITIVE, soft_cap=[NAN, True, 0]),
    **each(layer, RATE, dropout=["0.1", None, NAN, True, -0.5]),
    **each(layer, SLOPES, alibi=["yes", 0.5, [1.0]]),
    **each(layer, ROTARY, rotary=["yes", 10000]),
    **each(layer, WHOLE, attention_axes=[True, "1", 1.0]),
    **each(layer, AT_LEAST_0, seed=[1.5, -1]),
    **each(
        layer, ("Invalid `output_shape`", "Pass None"), output_shape=[8.0, 0]
    ),
    **each(layer, ("below 2**32", "Pass a smaller"), seed=[2**32]),
    **each(
        block,
        COUNT,
        num_heads=[0, "2"],
        hidden_dim=[True, 0],
        key_dim=[0],
        num_key_value_heads=[0],
        sliding_window=[0],
        chunk_size=[0],
    ),
    **each(block, FLAG, causal=["no"], gated=["silu"], sinks=[0.0]),
    **each(
        block,
        OPTION,
        norm=["batch", ["rms"]],
        norm_placement=[None],
        remat=[True],
    ),
    **each(block, RATE, dropout=[-0.1], attention_dropout=["0.1"]),
    **each(block, AT_LEAST_0, epsilon=[NAN, -1.0], seed=["1"]),
    **each(block, POSITIVE, soft_cap=[0, "50"]),
    **each(block, ROTARY, rotary=[10000]),
    **each(layers.BlockwiseFeedForward, COUNT, hidden_dim=[True, 0, "8"]),
    **each(feed_layer, COUNT, chunk_size=[1.5, None]),
    **each(feed_layer, FLAG, gated=["no"], use_bias=[None]),
    **each(feed_layer, RATE, dropout=[True, 1]),
    **each(feed_layer, AT_LEAST_0, seed=[-1]),
    **each(
        layers.RotaryEmbedding,
        POSITIVE,
        max_wavelength=[INF, True, 0],
        scaling_factor=["2", NAN],
    ),
    **each(
        layers.RotaryEmbedding, WHOLE, sequence_axis=[1.0], feature_axis=[None]
    ),
    **each(
        layers.RotaryEmbedding,
        ("integer of at least 2", "Pass 2"),
        rotary_dim=[4.0, 0, True],
    ),
    **each(layers.RotaryEmbedding, ("be even", "Pass 2 or 4"), rotary_dim=[3]),
    **each(layers.PositionEmbedding, COUNT, sequence_length=[True, 4.0, 0]),
    **each(layers.LanguageModelHead, COUNT, vocabulary_size=[True, 0, 5.0]),
    **each(head_layer, POSITIVE, soft_cap=["30", 0, INF]),
    **each(head_layer, FLAG, accuracy=["no"], use_bias=["yes"]),
    **each(chunked, RATE, label_smoothing=["0.1", 1.0]),
    **each(chunked, AT_LEAST_0, z_loss=[-1, NAN]),
    **each(chunked, WHOLE, ignore_class=[0.5, True]),
    **each(chunked, COUNT, chunk_size=[0]),
    **each(chunked, ("the LanguageModelHead", "Pass the layer"), head=["last"]),
    **each(masks.SlidingWindow, COUNT, size=[0, 2.0]),
    **each(masks.BlockCausal, COUNT, size=[True, None]),
    **each(masks.PrefixLM, AT_LEAST_0, length=[-1, 2.0, True, None]),
    **each(
        strategy,
        COUNT,
        sequence_parallel=["2", None, 0, -2],
        data_parallel=[0, True, 2.0],
    ),
    **each(strategy, NAMES, devices=[[], 5, {"cpu:0"}, ("",), "cpu:0", [0]]),
    **each(strategy, BALANCE, balance=["always", 1, None]),
    **each(strategy, POSITIVE, timeout=["60", NAN, 0, True]),
    **each(kr.config.set_kernel, ("a kernel", "Choose one"), name=[None, "x"]),
    **each(attend, FINITE, scale=["1", True, INF]),
    **each(attend, POSITIVE, soft_cap=[-1.0, True]),
    **each(attend, RATE, dropout=["0.1", 1.0]),
    **each(attend, FLAG, return_lse=["no", None]),
    **each(entropy, RATE, label_smoothing=[1.5]),
    **each(entropy, AT_LEAST_0, z_loss=["0"]),
    **each(entropy, POSITIVE, soft_cap=[INF, True]),
    **each(entropy, WHOLE, ignore_index=[True, 0.0]),
    **each(entropy, COUNT, chunk_size=[0, "all"]),
    **each(feed, COUNT, chunk_size=[0.5]),
    **each(feed, RATE, dropout=["0.1"]),
}

OPERATIONS = {
    "op-query-none": (
        lambda: ring_attention(None, X, X),
        "tensor",
        "query=None",
        "Pass a NumPy",
    ),
    "op-key-text": (
        lambda: attend(key="keys"),
        "array of numbers",
        "key='keys'",
        "Pass a NumPy",
    ),
    "op-symbolic": (
        lambda: attend(query=symbol(8, 2, 4)),
        "tensor with values",
        "KerasTensor",
        "inside of a layer",
    ),
    "op-rank": (
        lambda: attend(query=X),
        "rank 4",
        "query.shape=(2, 6, 4)",
        "keras.ops.reshape",
    ),
    "op-int": (
        lambda: attend(query=np.ones((2, 6, 2, 4), "int32")),
        "floating-point dtype",
        "query.dtype=int32",
        "Cast",
    ),
    "op-dtypes": (
        lambda: attend(key=np.ones((2, 6, 2, 4), "float16")),
        "share one",
        "key.dtype=float16",
        "Cast",
    ),
    "op-no-keys": (
        lambda: attend(key=floats(2, 0, 2, 4)),
        "length (axis 1) of 1 or more",
        "key.shape=(2, 0, 2, 4)",
        "Leave",
    ),
    "op-no-queries": (
        lambda: attend(query=floats(2, 0, 2, 4)),
        "length (axis 1) of 1 or more",
        "query.shape=(2, 0, 2, 4)",
        "Leave",
    ),
    "op-no-heads": (
        lambda: attend(key=floats(2, 6, 0, 4)),
        "number of heads (axis 2)",
        "key.shape=(2, 6, 0, 4)",
        "Leave",
    ),
    "op-no-width": (
        lambda: attend(query=floats(2, 6, 2, 0)),
        "head_dim (axis 3)",
        "query.shape=(2, 6, 2, 0)",
        "Leave",
    ),
    "op-heads": (
        lambda: attend(query=floats(2, 6, 3, 4)),
        "multiple of",
        "query.shape=(2, 6, 3, 4)",
        "Use a divisor",
    ),
    "op-batch": (
        lambda: attend(key=floats(1, 6, 2, 4)),
        "same batch size",
        "key.shape=(1, 6, 2, 4)",
        "Repeat",
    ),
    "op-head-dim": (
        lambda: attend(key=floats(2, 6, 2, 3), value=floats(2, 6, 2, 3)),
        "same head_dim",
        "key.shape=(2, 6, 2, 3)",
        "Project",
    ),
    "op-value-length": (
        lambda: attend(value=floats(2, 5, 2, 4)),
        "same length",
        "value.shape=(2, 5, 2, 4)",
        "Make both",
    ),
    "op-scale-tensor": (
        lambda: attend(scale=ops.ones(2)),
        "finite number",
        "scale=<",
        "Pass one",
    ),
    "op-bias-int": (
        lambda: attend(bias=np.zeros((2, 6, 1, 6), "int32")),
        "floating point",
        "bias.dtype=int32",
        "Cast",
    ),
    "op-bias-shape": (
        lambda: attend(bias=SCORES),
        "(batch or 1, query_length",
        "shape=(2, 6, 6)",
        "Transpose",
    ),
    "op-bias-text": (
        lambda: attend(bias="none"),
        "array of numbers",
        "bias='none'",
        "Pass a NumPy",
    ),
    "op-alibi-true": (
        lambda: attend(alibi=True),
        "floating point",
        "alibi.dtype=bool",
        "Cast",
    ),
    "op-alibi-nan": (
        lambda: attend(alibi=[0.5, NAN]),
        "finite number",
        "alibi=nan",
        "Pass one",
    ),
    "op-alibi-count": (
        lambda: attend(alibi=[0.5]),
        "each query head",
        "alibi.shape=(1,)",
        "Give it",
    ),
    "op-sinks-int": (
        lambda: attend(sinks=np.zeros(2, "int32")),
        "floating point",
        "sinks.dtype=int32",
        "Cast",
    ),
    "op-dropout-no-seed": (
        lambda: attend(dropout=0.1),
        "two integers",
        "dropout_seed=None",
        "Draw",
    ),
    "op-seed-float": (
        lambda: attend(dropout=0.1, dropout_seed=floats(2)),
        "integers",
        "dropout_seed.dtype=float32",
        "Cast",
    ),
    "op-seed-number": (
        lambda: attend(dropout=0.1, dropout_seed=1),
        "two integers",
        "dropout_seed=",
        "Draw",
    ),
    "op-mask-array": (
        lambda: attend(mask=VALID),
        "keras_ring.masks.Mask",
        "<ndarray of shape (2, 6)",
        "Wrap",
    ),
    "op-mask-class": (
        lambda: attend(mask=masks.Causal),
        "keras_ring.masks.Mask",
        "Causal",
        "make an object",
    ),
    "feed-op-none": (
        lambda: feed(up_kernel=None),
        "array of numbers",
        "up_kernel=None",
        "Pass a NumPy",
    ),
    "feed-op-int": (
        lambda: feed(X.astype("int32")),
        "floating-point dtype",
        "inputs.dtype=int32",
        "Cast",
    ),
    "feed-op-dtypes": (
        lambda: feed(down_kernel=np.ones((8, 4), "float16")),
        "share one",
        "down_kernel.dtype=float16",
        "Cast",
    ),
    "feed-op-width": (
        lambda: feed(up_kernel=floats(3, 8)),
        "shape (4, 8)",
        "up_kernel.shape=(3, 8)",
        "Transpose",
    ),
    "feed-op-empty": (
        lambda: feed(up_kernel=floats(4, 0), down_kernel=floats(0, 4)),
        "of 1 or more",
        "up_kernel.shape=(4, 0)",
        "Leave",
    ),
    "feed-op-length": (
        lambda: feed(X[:, :0]),
        "length (axis 1) of 1 or more",
        "inputs.shape=(2, 0, 4)",
        "Leave",
    ),
    "feed-op-gate": (
        lambda: feed(gate_bias=floats(8)),
        "`gate_bias` needs",
        "gate_bias.shape=(8,)",
        "Pass both",
    ),
    "feed-op-seed": (
        lambda: feed(dropout=0.5, dropout_seed=[1, 2, 3]),
        "two integers",
        "dropout_seed=<",
        "Draw",
    ),
    "entropy-labels": (
        lambda: entropy(TOKENS.astype("float64")),
        "integers",
        "labels.dtype=float",
        "Cast",
    ),
    "entropy-labels-bool": (
        lambda: entropy(VALID),
        "integers",
        "labels.dtype=bool",
        "Cast",
    ),
    "entropy-features": (
        lambda: entropy(features=X.astype("int32")),
        "floating-point dtype",
        "features.dtype=int32",
        "Cast",
    ),
    "entropy-no-classes": (
        lambda: entropy(kernel=floats(4, 0)),
        "classes (axis 1) of 1 or more",
        "kernel.shape=(4, 0)",
        "Leave",
    ),
    "dropout-int": (
        lambda: positional_dropout(X.astype("int32"), [1, 2], 0.1),
        "floating point",
        "inputs.dtype=int32",
        "Cast",
    ),
    "dropout-rate": (
        lambda: positional_dropout(X, [1, 2], "0.1"),
        "from 0 to less than 1",
        "rate='0.1'",
        "Pass 0.0",
    ),
    "dropout-seed": (
        lambda: positional_dropout(X, None, 0.1),
        "two integers",
        "seed=None",
        "Draw",
    ),
    "dropout-rank": (
        lambda: positional_dropout(X[0], [1, 2], 0.1),
        "rank 3",
        "inputs.shape=(6, 4)",
        "keras.ops.reshape",
    ),
    "positions-axis": (
        lambda: sequence_positions(X, axis=1.0),
        "integer",
        "axis=1.0",
        "Pass a whole",
    ),
    "gather-axis": (
        lambda: gather_sequence(X, axis=True),
        "integer",
        "axis=True",
        "Pass a whole",
    ),
    "batch-list": (
        lambda: gather_batch([[1.0]]),
        "tensor or an array",
        "[[1.0]]",
        "numpy.asarray",
    ),
    "batch-flag": (
        lambda: gather_batch(X, sequence="no"),
        "True or False",
        "sequence='no'",
        "Pass one",
    ),
    "batch-rank": (
        lambda: gather_batch(X[:, 0, 0]),
        "must have a batch axis",
        "shape=(2,)",
        "Pass sequence=False",
    ),
    "position-float": (
        lambda: take_position(X, 1.0),
        "integer",
        "index=1.0",
        "Pass 0",
    ),
    "position-outside": (
        lambda: take_position(X, LENGTH),
        "position of the sequence",
        "index=6",
        "from -6 to 5",
    ),
    "position-list": (
        lambda: take_position([[1.0]], 0),
        "tensor or an array",
        "[[1.0]]",
        "numpy.asarray",
    ),
    "position-rank": (
        lambda: take_position(X[:, 0, 0], 0),
        "(batch, length, ...)",
        "tensor.shape=(2,)",
        "Pass a whole",
    ),
    "gather-list": (
        lambda: gather_sequence([[1.0]]),
        "tensor or an array",
        "[[1.0]]",
        "numpy.asarray",
    ),
    "own-axis": (
        lambda: own_chunk(X, axis=3),
        "axis of the tensor",
        "axis=3",
        "Use an axis",
    ),
}

MASKS = {
    "padding-added": (
        lambda: attend(mask=masks.Padding(ADDED)),
        "boolean mask",
        "Padding(valid).dtype=float32",
        "pass `mask == 0`",
    ),
    "padding-rank": (
        lambda: attend(mask=masks.Padding(VALID[..., None])),
        "(batch, length)",
        "(2, 6, 1)",
        "keras.ops.reshape",
    ),
    "padding-length": (
        lambda: attend(mask=masks.Padding(VALID[:, :5])),
        "batch and the length",
        "(2, 5)",
        "broadcast",
    ),
    "padding-list": (
        lambda: attend(mask=masks.Padding([[True]])),
        "tensor or an array",
        "[[True]]",
        "numpy.asarray",
    ),
    "padding-none": (
        lambda: attend(mask=masks.Causal() & masks.Padding(None)),
        "tensor or an array",
        "=None",
        "numpy.asarray",
    ),
    "explicit-added": (
        lambda: attend(mask=masks.Explicit(SCORES[:, :, None])),
        "boolean mask",
        "dtype=float32",
        "give it to `ring_attention` as `bias=`",
    ),
    "explicit-rank": (
        lambda: attend(mask=masks.Explicit(SCORES == 0)),
        "query_length",
        "shape=(2, 6, 6)",
        "Transpose",
    ),
    "segments-float": (
        lambda: attend(mask=masks.Segments(ADDED, ADDED)),
        "integers",
        "Segments(query_ids).dtype=float32",
        "Cast",
    ),
    "segments-bool": (
        lambda: attend(mask=masks.Segments(TOKENS, VALID)),
        "integers",
        "Segments(key_ids).dtype=bool",
        "Cast",
    ),
    "segments-rank": (
        lambda: attend(mask=masks.Segments(TOKENS[0], TOKENS)),
        "(batch, length)",
        "(6,)",
        "keras.ops.reshape",
    ),
    "prefix-floats": (
        lambda: attend(mask=masks.PrefixLM(floats(2))),
        "integers",
        "dtype=float32",
        "Cast",
    ),
    "prefix-rank": (
        lambda: attend(mask=masks.PrefixLM(TOKENS)),
        "each sample",
        "length.shape=(2, 6)",
        "Reshape",
    ),
    "mask-and": (
        lambda: masks.Causal() and masks.Padding(VALID),
        "`and`",
        "bool(Causal)",
        "with `&`",
    ),
    "mask-or": (
        lambda: masks.PrefixLM(2) or masks.Causal(),
        "`or`",
        "bool(PrefixLM)",
        "`|`",
    ),
    "mask-not": (
        lambda: not masks.Padding(VALID),
        "`not`",
        "bool(Padding)",
        "`mask is None`",
    ),
    "mask-and-array": (
        lambda: masks.Causal() & VALID,
        "two masks",
        "<ndarray of shape (2, 6)",
        "Wrap",
    ),
    "array-or-mask": (
        lambda: VALID | masks.Causal(),
        "two masks",
        "<ndarray of shape (2, 6)",
        "Wrap",
    ),
    "mask-and-class": (
        lambda: masks.Padding(VALID) & masks.Causal,
        "two masks",
        "Causal",
        "make an object",
    ),
    "and-none": (
        lambda: attend(mask=masks.And(masks.Causal(), None)),
        "two masks",
        "None",
        "Wrap",
    ),
}

LAYERS = {
    "layer-alibi-inf": (
        lambda: layer(alibi=[INF, 1.0]),
        "finite number",
        "alibi=inf",
        "Pass one",
    ),
    "layer-from-dense": (
        lambda: layers.RingAttention.from_keras_layer(keras.layers.Dense(2)),
        "must be a keras.layers",
        "type Dense",
        "Build a",
    ),
    "layer-mask-added": (
        lambda: layer()(X, attention_mask=SCORES),
        "boolean mask",
        "attention_mask.dtype=float32",
        "`attention_bias=`",
    ),
    "layer-mask-symbolic": (
        lambda: layer()(symbol(None, 4), attention_mask=symbol(None, None)),
        "boolean mask",
        "attention_mask.dtype=float32",
        "`attention_bias=`",
    ),
    "layer-query-mask": (
        lambda: layer()(X, query_mask=ADDED),
        "boolean mask",
        "query_mask.dtype=float32",
        "pass `mask == 0`",
    ),
    "layer-value-mask": (
        lambda: layer()(X, X, value_mask=ADDED),
        "boolean mask",
        "value_mask.dtype=float32",
        "pass `mask == 0`",
    ),
    "layer-key-mask": (
        lambda: layer()(X, X, key_mask=ADDED),
        "boolean mask",
        "key_mask.dtype=float32",
        "pass `mask == 0`",
    ),
    "layer-bias-bool": (
        lambda: layer()(X, attention_bias=SCORES == 0),
        "floating point",
        "attention_bias.dtype=bool",
        "Cast",
    ),
    "layer-segments": (
        lambda: layer()(X, segment_ids=ADDED),
        "integers",
        "segment_ids.dtype=float32",
        "Cast",
    ),
    "layer-prefix": (
        lambda: layer()(X, prefix_length=floats(2)),
        "integers",
        "prefix_length.dtype=float32",
        "Cast",
    ),
    "layer-causal-call": (
        lambda: layer()(X, use_causal_mask="no"),
        "True or False",
        "use_causal_mask='no'",
        "Pass one",
    ),
    "layer-scores-call": (
        lambda: layer()(X, return_attention_scores="no"),
        "True or False",
        "return_attention_scores='no'",
        "Pass one",
    ),
    "layer-int": (
        lambda: layer()(TOKENS[..., None]),
        "floating point",
        "query.dtype=int32",
        "Cast",
    ),
    "layer-int-symbolic": (
        lambda: layer()(symbol(None, 4, dtype="int32")),
        "floating point",
        "query.dtype=int32",
        "Cast",
    ),
    "layer-rank": (
        lambda: layer()(X[0]),
        "same rank, 3 or more",
        "query_shape=(6, 4)",
        "Add the",
    ),
    "layer-no-keys": (
        lambda: layer()(X, X[:, :0]),
        "must not be empty",
        "value_shape=(2, 0, 4)",
        "Leave",
    ),
    "layer-no-features": (
        lambda: layer()(X[..., :0]),
        "must not be empty",
        "query_shape=(2, 6, 0)",
        "Leave",
    ),
    "block-groups": (
        lambda: block(num_key_value_heads=3),
        "divisible",
        "num_key_value_heads=3",
        "Choose",
    ),
    "block-no-heads": (
        lambda: block(num_heads=None),
        "`num_heads` must be a positive integer",
        "num_heads=None",
        "Pass 1 or more",
    ),
    "block-int": (
        lambda: block()(TOKENS[..., None].repeat(4, -1)),
        "floating point",
        "inputs.dtype=int32",
        "Cast",
    ),
    "block-mask": (
        lambda: block()(X, mask=ADDED),
        "boolean mask",
        "mask.dtype=float32",
        "pass `mask == 0`",
    ),
    "block-segments": (
        lambda: block()(symbol(None, 4), segment_ids=symbol(None)),
        "integers",
        "segment_ids.dtype=float32",
        "Cast",
    ),
    "block-features": (
        lambda: block(num_heads=3)(X),
        "multiple of `num_heads`",
        "num_heads=3",
        "Choose",
    ),
    "block-rank": (
        lambda: block()(X[0]),
        "(batch, length, features)",
        "input_shape=(6, 4)",
        "keras.ops.reshape",
    ),
    "block-no-features": (
        lambda: block()(X[..., :0]),
        "features of 1 or more",
        "input_shape=(2, 6, 0)",
        "keras.ops.reshape",
    ),
    "feed-int": (
        lambda: layers.BlockwiseFeedForward(8)(X.astype("int32")),
        "floating point",
        "inputs.dtype=int32",
        "Cast",
    ),
    "feed-int-symbolic": (
        lambda: layers.BlockwiseFeedForward(8)(symbol(None, 4, dtype="int32")),
        "floating point",
        "inputs.dtype=int32",
        "Cast",
    ),
    "rotary-int": (
        lambda: layers.RotaryEmbedding()(X.astype("int32")),
        "floating point",
        "inputs.dtype=int32",
        "Cast",
    ),
    "rotary-int-symbolic": (
        lambda: layers.RotaryEmbedding()(symbol(None, 4, dtype="int64")),
        "floating point",
        "inputs.dtype=int64",
        "Cast",
    ),
    "rotary-no-features": (
        lambda: layers.RotaryEmbedding()(X[..., :0]),
        "positive and even",
        "(2, 6, 0)",
        "Set `rotary_dim`",
    ),
    "rotary-start": (
        lambda: layers.RotaryEmbedding()(X, start_index=1.5),
        "integer",
        "start_index=1.5",
        "Pass a whole",
    ),
    "rotary-start-each": (
        lambda: layers.RotaryEmbedding()(X, start_index=TOKENS[:, 0]),
        "one number",
        "of shape (2,)",
        "Give each",
    ),
    "rotary-positions": (
        lambda: layers.RotaryEmbedding()(X, positions=floats(LENGTH)),
        "integers",
        "positions.dtype=float32",
        "Cast",
    ),
    "positions-start": (
        lambda: layers.PositionEmbedding(9)(X, start_index=True),
        "integer",
        "start_index=True",
        "Pass a whole",
    ),
    "positions-beyond": (
        lambda: layers.PositionEmbedding(9)(X, start_index=4),
        "must have a vector",
        "sequence_length=9",
        "larger",
    ),
    "positions-rank": (
        lambda: layers.PositionEmbedding(9)(X[0]),
        "(batch, length, features)",
        "(6, 4)",
        "keras.ops.reshape",
    ),
    "head-int": (
        lambda: layers.LanguageModelHead(5)(X.astype("int32")),
        "floating point",
        "inputs.dtype=int32",
        "Cast",
    ),
    "head-logits": (
        lambda: head().logits(X[..., :3]),
        "4 features",
        "features.shape=(2, 6, 3)",
        "Pass the output",
    ),
    "head-unbuilt": (
        lambda: layers.LanguageModelHead(5).logits(X),
        "before it is built",
        "not built",
        "Call it",
    ),
    "gathered-ring": (
        lambda: layers.Gathered(layer()),
        "given the whole sequence",
        "RingAttention",
        "Use it outside",
    ),
    "gathered-none": (
        lambda: layers.Gathered(None),
        "layer of Keras",
        "layer=None",
        "Pass the layer",
    ),
}

OTHERS = {
    "loss-labels": (
        lambda: loss(TOKENS.astype("float32")),
        "integers",
        "y_true.dtype=float32",
        "Cast",
    ),
    "loss-labels-text": (
        lambda: loss("labels"),
        "array of numbers",
        "y_true='labels'",
        "Pass a NumPy",
    ),
    "loss-labels-shape": (
        lambda: loss(TOKENS[:, :5]),
        "batch and the length",
        "labels.shape=(2, 5)",
        "Give every",
    ),
    "loss-labels-hot": (
        lambda: loss(np.ones((BATCH, LENGTH, CLASSES), "int32")),
        "(batch, length)",
        "labels.shape=(2, 6, 5)",
        "keras.ops.reshape",
    ),
    "loss-rounded": (
        lambda: loss(vocabulary=300, dtype="bfloat16"),
        "exactly",
        "dtype=bfloat16",
        "Pass dtype='float32'",
    ),
    "loss-bind": (
        lambda: losses.ChunkedCrossEntropy().bind(None),
        "keras.Model",
        "model=None",
        "Pass the model",
    ),
    "loss-no-head": (
        lambda: losses.ChunkedCrossEntropy()(TOKENS, X),
        "needs the LanguageModelHead",
        "no head",
        "Call loss.bind",
    ),
    "run-no-function": (
        lambda: one_device(3.0, X),
        "function",
        "function=3.0",
        "Pass the function",
    ),
    "run-text": (
        lambda: one_device(lambda x: x, "text"),
        "array of numbers",
        "tensors[0]='text'",
        "Pass a NumPy",
    ),
    "run-none": (
        lambda: one_device(lambda x, y: x, X, None),
        "array of numbers",
        "tensors[1]=None",
        "Pass a NumPy",
    ),
    "run-empty": (
        lambda: one_device(lambda x: x, X[:0]),
        "of 1 or more",
        "tensors[0].shape=(0, 6, 4)",
        "Leave",
    ),
    "run-returns-none": (
        lambda: one_device(lambda x: None, X),
        "must return a tensor",
        "None",
        "Return the",
    ),
    "run-returns-part": (
        lambda: one_device(lambda x: {"a": x, "b": None}, X),
        "must return a tensor",
        "None",
        "Return the",
    ),
    "run-returns-text": (
        lambda: one_device(lambda x: (x, "ok"), X),
        "must return a tensor",
        "'ok'",
        "Return the",
    ),
    "summary-text": (
        lambda: strategy(sequence_parallel=1).summary("out"),
        "function",
        "print_fn='out'",
        "Pass the function",
    ),
    "empty-rows": (
        lambda: layer(empty_rows="mean"),
        "must be one of",
        "empty_rows='mean'",
        "'stock'",
    ),
    "empty-rows-sinks": (
        lambda: layer(empty_rows="stock", sinks=True),
        "no sinks",
        "sinks=True",
        "Use empty_rows",
    ),
    "strip-masks": (
        lambda: layer(strip_masks="yes"),
        "True or False",
        "strip_masks='yes'",
        "Pass one",
    ),
    "mesh-float": (
        lambda: strategy().mesh_shape(2.0),
        "positive integer",
        "available=2.0",
        "Pass 1",
    ),
}

WRONG = {**ARGUMENTS, **OPERATIONS, **MASKS, **LAYERS, **OTHERS}

# What Python itself raises for a wrong operand.
TYPE_ERRORS = {
    *("mask-and", "mask-or", "mask-not", "mask-and-array", "array-or-mask"),
    *("mask-and-class", "and-none"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_refused(name):
    call, rule, received, fix = WRONG[name]
    error = TypeError if name in TYPE_ERRORS else ValueError
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "Received" in message
    for part in (rule, received, fix):
        assert part in message, message


def test_every_public_name_is_here():
    """A name that is new needs wrong calls of its own."""
    assert len(WRONG) > 200
    source = Path(__file__).read_text(encoding="utf-8")
    # Results and the parts of a mask's protocol take what they are given.
    passive = {"AttentionResult", "CrossEntropy", "Carried", "Mask", "Span"}
    names = {"DistributedStrategy", "set_kernel"}
    for module in (kr.layers, kr.losses, kr.masks, kr.ops):
        names |= set(module.__all__) - passive
    names.discard("Or")  # As `And`, of which it is the pair.
    missing = [name for name in names if source.count(name) < 1]
    assert not missing


# What is right and is no plain Python number.
RIGHT = {
    "attention": lambda: layer(
        num_heads=np.int64(2),
        key_dim=np.int32(2),
        scale=np.float32(0.5),
        soft_cap=np.float64(30),
        dropout=np.float32(0.1),
        alibi=np.array([0.5, 0.25]),
        sliding_window=np.uint8(3),
        causal=np.True_,
        seed=np.int64(3),
        use_bias=1,
    )(X, use_causal_mask=0),
    "block": lambda: block(
        hidden_dim=np.int64(8), epsilon=np.float32(1e-5), gated=np.False_
    )(X),
    "rotary": lambda: layers.RotaryEmbedding(
        np.float32(1000), rotary_dim=np.int64(2)
    )(X, start_index=np.int64(2)),
    "positions": lambda: layers.PositionEmbedding(np.int64(9))(
        X, start_index=np.int32(3)
    ),
    "loss": lambda: loss(TOKENS.astype("uint8"), ignore_class=np.int64(0)),
    "operation": lambda: attend(
        mask=masks.SlidingWindow(np.int64(2))
        & masks.BlockCausal(np.int32(2))
        & masks.PrefixLM(np.int64(1))
        & masks.Padding(VALID.astype("int64"))
        & masks.Segments(TOKENS, TOKENS.astype("int64")),
        scale=np.float32(1),
        soft_cap=2,
        alibi=(1, 2),
        sinks=[0, 0],
        dropout=np.float64(0.5),
        dropout_seed=[1, 2],
    ),
    "strategy": lambda: kr.DistributedStrategy(
        np.int64(1), np.int32(1), balance=np.False_, timeout=np.float32(9)
    ).run(lambda x: {"x": x, "one": 1.0}, X)["x"],
}


@pytest.mark.dealt
@pytest.mark.parametrize("name", RIGHT)
def test_numbers_of_numpy_work(name):
    assert np.isfinite(ops.convert_to_numpy(RIGHT[name]())).all()


@pytest.mark.parametrize("make", [layer, block], ids=["attention", "block"])
def test_what_numpy_gave_is_saved_as_plain_numbers(make):
    options = {"num_heads": np.int64(2), "soft_cap": np.float32(2)}
    made = make(**options, sliding_window=np.int64(3), seed=np.int64(1))
    config = made.get_config()
    assert type(made).from_config(config).get_config() == config
    for name in ("num_heads", "soft_cap", "sliding_window", "seed"):
        assert type(config[name]) in (int, float), name


def test_flags_of_numpy_are_saved_as_plain_ones():
    made = layer(flash_attention=np.False_, alibi=np.array(True))
    config = made.get_config()
    assert config["flash_attention"] is False
    assert config["alibi"] == layer(alibi=True).get_config()["alibi"]
    assert layer(alibi=np.array(False)).get_config()["alibi"] is None


@pytest.mark.parametrize("dtype", ["int32", "uint8", "int64"])
def test_positions_beyond_the_table_are_seen(dtype):
    """None is taken for another, such as the last for -1."""
    embedding = layers.PositionEmbedding(LENGTH)
    embedding.build(X.shape)
    given = np.arange(LENGTH).astype(dtype)
    given[1], given[2] = LENGTH - 1, LENGTH
    if dtype != "uint8":
        given[0] = -1
    out = ops.convert_to_numpy(embedding(X, positions=given))
    table = ops.convert_to_numpy(embedding.position_embeddings)
    inside = (given >= 0) & (given < LENGTH)
    assert np.isnan(out[:, ~inside]).all()
    np.testing.assert_array_equal(out[0, inside], table[given[inside]])


def test_a_start_beyond_the_table_is_seen():
    """A tensor's value is not known before; the last vectors would be taken
    for others."""
    embedding = layers.PositionEmbedding(LENGTH + 2)
    inside = embedding(X, start_index=ops.convert_to_tensor(2, "int32"))
    want = ops.convert_to_numpy(embedding.position_embeddings)[2:]
    np.testing.assert_array_equal(ops.convert_to_numpy(inside)[1], want)
    try:
        beyond = embedding(X, start_index=ops.convert_to_tensor(3, "int32"))
    # A framework may look itself.
    except Exception:  # noqa: BLE001
        return
    assert np.isnan(ops.convert_to_numpy(beyond)).all()
