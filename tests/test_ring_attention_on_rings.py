"""`RingAttention` on rings of real devices equals it on one device."""

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
    call,
    compare,
    fill,
    normal,
    some,
)
from tests.gradients import vjp

# name: (constructor options, names of the masks that the call gets)
RING_CASES = {
    "full": (MHA, ()),
    "causal": ({**GQA, "causal": True}, ()),
    "window": ({**MHA, "sliding_window": 4}, ()),
    "value-mask": (GQA, ("value_mask",)),
    "query-mask": ({**MHA, "use_gate": True}, ("query_mask",)),
    "pairs": (MHA, ("attention_mask",)),
    "cross": ({**MHA, "value_dim": 3}, ("key_mask",)),
    "packed-rotary": (
        {**GQA, "causal": True, "rotary": True},
        ("segment_ids", "prefix_length"),
    ),
    "cross-segments": (MHA, ("segment_ids", "key_segment_ids")),
    "soft-cap-bias": (
        {**GQA, "soft_cap": 1.5, "sinks": True},
        ("attention_bias",),
    ),
    "alibi-dropout": (
        {**GQA, "alibi": True, "dropout": 0.4, "seed": 5, "causal": True},
        ("segment_ids",),
    ),
}
SIZES = [2, 3, 4]


def ids(seed, *shape):
    """Packed documents: ids that never fall along the sequence."""
    draw = np.random.default_rng(seed)
    return np.sort(draw.integers(0, 4, shape), axis=1).astype("int32")


def ring_problem(name, queries):
    options, names = RING_CASES[name]
    keys = 2 * queries if name.startswith("cross") else queries
    masks = {
        "query_mask": some(40, BATCH, queries),
        "value_mask": some(41, BATCH, keys),
        "key_mask": some(42, BATCH, keys),
        "attention_mask": some(43, BATCH, queries, keys),
        "attention_bias": normal(46, BATCH, 4, queries, keys),
        "segment_ids": ids(47, BATCH, queries),
        "key_segment_ids": ids(48, BATCH, keys),
        "prefix_length": np.array([3, 7], "int32"),
    }
    inputs = [normal(44, BATCH, queries, WIDTH)]
    if keys != queries:
        inputs.append(normal(45, BATCH, keys, 6))
    return options, inputs, {n: masks[n] for n in names}


def check_ring(size, name, queries=QUERIES):
    options, inputs, masks = ring_problem(name, queries)
    shapes = [tensor.shape for tensor in inputs]
    alone = fill(RingAttention(**options), *shapes)
    want = attended(alone, inputs, masks)
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)
    with ring.scope():
        layer = fill(RingAttention(**options), *shapes)

    def attend(*tensors):
        given = dict(zip(masks, tensors[len(inputs) :], strict=True))
        if "attention_bias" in given:
            # Spread with the queries, on axis 1.
            bias = given["attention_bias"]
            given["attention_bias"] = ops.swapaxes(bias, 1, 2)
        return attended(layer, tensors[: len(inputs)], given)

    if "attention_bias" in masks:
        masks["attention_bias"] = np.swapaxes(masks["attention_bias"], 1, 2)
    compare(ring.run(attend, *inputs, *masks.values()), want, name)


def attended(layer, inputs, masks):
    """The output in training, with the seed of a first step."""
    weights = [v.value for v in layer.trainable_variables]
    return call(layer, inputs, weights, {**masks, "training": True})


@pytest.mark.dealt(by="name")
@pytest.mark.mostly(size=3, every=4)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RING_CASES)
def test_a_ring_equals_one_device(on_devices, size, name):
    on_devices(size, check_ring, size, name)


@pytest.mark.dealt
@pytest.mark.parametrize("name", ["pairs", "soft-cap-bias", "cross-segments"])
def test_an_odd_length(on_devices, name):
    on_devices(3, check_ring, 3, name, 7)


def check_ring_gradients(size):
    """Gradients of input and weights, with everything at once."""
    options = {**GQA, "causal": True, "sliding_window": 9, "use_gate": True}
    options |= {"soft_cap": 2.0, "alibi": True, "sinks": True, "rotary": True}
    options |= {"dropout": 0.3, "seed": 3}
    x = normal(46, BATCH, QUERIES, WIDTH)
    cotangent = normal(47, BATCH, QUERIES, WIDTH)
    masks = {
        "query_mask": some(40, BATCH, QUERIES),
        "value_mask": some(41, BATCH, QUERIES),
        "attention_mask": some(43, BATCH, QUERIES, QUERIES),
        "segment_ids": ids(47, BATCH, QUERIES),
    }

    def gradients(layer):
        def function(x, cotangent, *given):
            given = dict(zip(masks, given, strict=True)) | {"training": True}
            weights = [v.value for v in layer.trainable_variables]
            output, grads = vjp(
                lambda x, *weights: call(layer, [x], list(weights), given),
                [x, *weights],
                cotangent,
            )
            # Of each weight's gradient one number, which `run` averages.
            probes = [
                ops.sum(g * normal(50 + i, *g.shape))
                for i, g in enumerate(grads[1:])
            ]
            return output, grads[0], probes

        return function

    tensors = [x, cotangent, *masks.values()]
    want = gradients(fill(RingAttention(**options), x.shape))(
        *(ops.convert_to_tensor(t) for t in tensors)
    )
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)
    with ring.scope():
        layer = fill(RingAttention(**options), x.shape)
    have = ring.run(gradients(layer), *tensors)
    compare(have[0], want[0], "output")
    compare(have[1], want[1], "gradient of the query")
    # Where a layer sees a shard, its gradients are that shard's share.
    parts = size if ring.world.layers_see_shards else 1
    for weight, ours, alone in zip(
        layer.trainable_variables, have[2], want[2], strict=True
    ):
        # Each sums some hundred gradients, each with its own rounding.
        np.testing.assert_allclose(
            ops.convert_to_numpy(ours) * parts,
            ops.convert_to_numpy(alone),
            rtol=1e-4,
            atol=1e-4,
            err_msg=weight.path,
        )


@pytest.mark.mostly(size=3)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_on_a_ring_equal_one_device(on_devices, size):
    on_devices(size, check_ring_gradients, size)


def check_free_axes(size):
    """Attention over axis 1 with another axis beside it."""
    x = normal(48, BATCH, QUERIES, 3, WIDTH)
    options = {**MHA, "attention_axes": 1, "causal": True}
    want = fill(RingAttention(**options), x.shape)(x)
    ring = keras_ring.DistributedStrategy(sequence_parallel=size)
    with ring.scope():
        layer = fill(RingAttention(**options), x.shape)
    compare(ring.run(layer, x), want, "output")


def test_free_axes_on_a_ring(on_devices):
    on_devices(2, check_free_axes, 2)
