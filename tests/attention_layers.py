"""Attention layers with known weights, and how results are compared."""

import numpy as np
from keras import ops

from keras_ring.layers import RingAttention

BATCH, QUERIES, KEYS, WIDTH = 2, 12, 12, 10  # 12 divides by 2, 3 and 4.

# Both sides sum some ten to hundred products of order one in float32, in
# another order.
TOLERANCE = 2e-5

MHA = {"num_heads": 2, "key_dim": 4}
GQA = {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 4}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def some(seed, *shape):
    """A mask with both values."""
    return np.random.default_rng(seed).random(shape) < 0.6


def fill(layer, *shapes):
    """Build a layer and give it weights of order one, biases included."""
    layer.build(*shapes)
    shapes = enumerate(w.shape for w in layer.weights)
    layer.set_weights([normal(70 + i, *shape) / 2 for i, shape in shapes])
    return layer


def call(layer, tensors, weights, options):
    """The layer's output as a function of inputs and weights."""
    state = [v.value for v in layer.non_trainable_variables]
    (outputs, _) = layer.stateless_call(weights, state, *tensors, **options)
    return outputs


def compare(have, want, name):
    have, want = (ops.convert_to_numpy(t) for t in (have, want))
    assert have.dtype == want.dtype, name
    np.testing.assert_allclose(
        have, want, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
    )


class Halved(RingAttention):
    """A subclass with its own attention, as those of stock layers."""

    def _compute_attention(
        self, query, key, value, attention_mask=None, training=None
    ):
        out, scores = super()._compute_attention(
            query, key, value, attention_mask, training
        )
        return out / 2, scores
