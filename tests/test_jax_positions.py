"""What the compiler makes of position layers on a split sequence."""

import re

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import keras_ring as kr

LENGTH, FEATURES = 2048, 8


def test_positions_gather_nothing():
    """No transfer of a sequence, and nothing of full length but the table
    of learned vectors and its gradient."""
    strategy = kr.DistributedStrategy(sequence_parallel=4)
    with strategy.scope():
        rotary = kr.layers.RotaryEmbedding()
        learned = kr.layers.PositionEmbedding(LENGTH)
        learned.build((None, None, FEATURES))

        def loss(x, table):
            x = x + learned.stateless_call([table], [], x)[0]
            return (rotary(x) ** 2).sum()

        x = jax.device_put(
            np.ones((2, LENGTH, FEATURES), "float32"),
            NamedSharding(strategy.world.mesh, PartitionSpec("batch", "seq")),
        )
        table = learned.position_embeddings.value
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        text = step.lower(x, table).compile().as_text()
    assert "all-gather" not in text
    full = set(re.findall(rf"\w+\[[\d,]*{LENGTH}[\d,]*\]", text))
    assert full <= {f"f32[{LENGTH},{FEATURES}]"}
