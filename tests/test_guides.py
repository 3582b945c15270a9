"""The code in the guides for people who change the package."""

import re
from pathlib import Path

import numpy as np
from keras import ops

import keras_ring
from keras_ring import masks
from tests import reference

DOCS = Path(__file__).parent.parent / "docs"


def code(guide):
    """What the Python blocks of a guide define."""
    found = {"__name__": guide}
    text = (DOCS / guide).read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, found)
    return found


def attend(size, arrays):
    mask = code("adding-a-mask.md")["Dilated"](3) & masks.Causal()
    tensors = [ops.convert_to_tensor(a, "float32") for a in arrays]
    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    return ops.convert_to_numpy(
        strategy.run(
            lambda *inputs: keras_ring.ops.ring_attention(*inputs, mask=mask),
            *tensors,
        )
    )


def test_a_new_mask_is_right_around_a_ring(on_devices):
    draw = np.random.default_rng(0)
    arrays = [draw.normal(size=(2, 22, 2, 8)) for _ in range(3)]
    have = on_devices(2, attend, 2, arrays)
    apart = np.arange(22)[:, None] - np.arange(22)
    want = reference.attention(
        *arrays, arrays[0], allowed=(apart >= 0) & (apart % 3 == 0)
    ).out
    np.testing.assert_allclose(have, want, 1e-5, 1e-5)
