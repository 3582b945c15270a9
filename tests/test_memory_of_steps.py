"""Steps leave no tensor behind: what one needs is gone with it."""

import gc

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_ring as kr
from tests.thinning import extra_on

BACKEND = keras.backend.backend()
VOCABULARY, WIDTH = 11, 8


def tensors():
    """How many tensors the framework has in this process."""
    gc.collect()
    if BACKEND == "jax":
        import jax

        return len(jax.live_arrays())
    if BACKEND == "tensorflow":
        import tensorflow as tf

        kind = tf.Tensor
    else:
        import torch

        kind = torch.Tensor
    # Not `isinstance`, which asks objects for their class and wakes some.
    return sum(issubclass(type(o), kind) for o in gc.get_objects())


def own_loss(y, logits):
    """Of the whole sequence, gathered."""
    values = keras.losses.sparse_categorical_crossentropy(
        y, logits, from_logits=True
    )
    return ops.exp(ops.mean(values))


def growth(rows):
    """Tensors that three rounds of all kinds of steps add to those that
    two have left."""
    strategy = kr.DistributedStrategy(sequence_parallel=2)
    x = np.random.default_rng(0).integers(0, VOCABULARY, (rows, 7))
    with strategy.scope():
        tokens = keras.Input((None,), dtype="int32")
        h = layers.Embedding(VOCABULARY, WIDTH)(tokens)
        h = kr.layers.RingTransformerBlock(2, WIDTH, remat="block")(h)
        names = ("fused", "own")
        heads = [
            layers.Dense(VOCABULARY, name=name, dtype="float32")(h)
            for name in names
        ]
        model = keras.Model(tokens, dict(zip(names, heads, strict=True)))
        fused = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("adam", {"fused": fused, "own": own_loss})
        y = dict.fromkeys(names, x)

        def step(batch):
            return ops.mean(model(batch)["own"])

        if BACKEND == "tensorflow":
            import tensorflow as tf

            step = tf.function(step)

        def rounds(count):
            for _ in range(count):
                model.fit(x, y, batch_size=2, verbose=0)
                model.train_on_batch(x, y)
                model.evaluate(x, y, batch_size=2, verbose=0)
                model.predict(x, batch_size=2, verbose=0)
                strategy.run(step, x)

        rounds(2)
        # What tests before this one have left may go in the first rounds.
        for _ in range(2):
            before = tensors()
            rounds(3)
            if tensors() == before:
                break
        return tensors() - before


# Three rows are a whole batch and a smaller one. On TensorFlow a second size is
# another trace of every program, half of the time.
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(2, marks=extra_on("jax", "torch")),
        pytest.param(3, marks=extra_on("tensorflow")),
    ],
)
def test_no_tensor_is_left_behind(on_devices, rows):
    assert on_devices(2, growth, rows) == 0
