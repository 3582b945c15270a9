"""What the compiler makes of chunks: nothing wide has the whole length."""

import re

import keras
import numpy as np
import pytest

import keras_ring
from keras_ring.layers import LanguageModelHead, RingTransformerBlock
from keras_ring.losses import ChunkedCrossEntropy
from tests import jax_programs

# Sizes that stand for nothing else in the model.
CHUNK, HIDDEN, CLASSES, WIDTH = 13, 92, 74, 16
LENGTH = 208


def compiled_step(size, remat):
    """The optimised program of one device for one train step."""
    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        tokens = keras.Input((None,), dtype="int32")
        x = keras.layers.Embedding(CLASSES, WIDTH)(tokens)
        for _ in range(2):
            x = RingTransformerBlock(
                2, HIDDEN, causal=True, remat=remat, chunk_size=CHUNK
            )(x)
        head = LanguageModelHead(CLASSES)
        model = keras.Model(tokens, head(x))
        model.compile("sgd", ChunkedCrossEntropy(head, chunk_size=CHUNK))
        batch = np.zeros((1, LENGTH), "int32")
        return jax_programs.train_step(strategy, model, (batch, batch))


@pytest.mark.parametrize(
    "remat", [pytest.param("feed_forward", marks=pytest.mark.extra), "block"]
)
def test_nothing_wide_is_longer_than_a_chunk(remat):
    text = compiled_step(4, remat).as_text()
    shapes = {
        tuple(map(int, s.split(",")))
        for s in re.findall(r"\w+\[([\d,]+)\]", text)
    }
    for wide in (HIDDEN, CLASSES):
        sizes = [np.prod(s) // wide for s in shapes if wide in s]
        assert max(sizes) <= max(CHUNK, WIDTH)
    assert not [s for s in shapes if LENGTH in s]
