"""Checkpoints move between backends, rings and one device, optimizer included.

Between rings and one device on one backend: `test_training.py`. Here the
file comes from another backend, in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_ring

ROOT = Path(__file__).parent.parent
BACKENDS = ("jax", "tensorflow", "torch")
# The one before it first: each reads what another one writes, and with `--all`
# what both do.
PLACE = BACKENDS.index(keras.backend.backend())
OTHERS = [BACKENDS[PLACE - 1], BACKENDS[PLACE - 2]]
LENGTH = 12
STEPS = 3


def build_model():
    """Every layer with weights that the package has, and Adam's moments."""
    tokens = keras.Input((None,), dtype="int32")
    # A product and no lookup: its gradient is sparse on TensorFlow, where Adam
    # then leaves out the rows that a batch does not have.
    x = keras.layers.Dense(16)(keras.ops.one_hot(tokens, 16))
    x = x + keras_ring.layers.PositionEmbedding(LENGTH)(x)
    x = keras_ring.layers.RingTransformerBlock(
        2, 32, causal=True, gated=True, rotary=True, norm="rms", seed=3
    )(x)
    # Without biases: that of the keys has no gradient but rounding noise,
    # of which Adam makes whole steps.
    x = keras_ring.layers.RingAttention(
        2, 8, sinks=True, alibi=True, use_bias=False
    )(x)
    model = keras.Model(tokens, keras.layers.Dense(16)(x))
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def batch():
    draw = np.random.default_rng(0)
    return draw.integers(0, 16, (2, 4, LENGTH)).astype("int32")


def step(model):
    """Losses of some steps."""
    x, y = batch()
    losses = [float(model.train_on_batch(x, y)) for _ in range(STEPS)]
    # Keras reports the mean since the last reset.
    model.reset_metrics()
    return losses


def write(folder):
    """What the other backend's process does: train, save, and go on."""
    keras.utils.set_random_seed(1)
    model = build_model()
    step(model)
    path = Path(folder) / f"{keras.backend.backend()}.keras"
    model.save(path)
    losses = step(model)
    predicted = np.asarray(model.predict(batch()[0], verbose=0))
    np.savez(path.with_suffix(".npz"), losses=losses, predicted=predicted)


@pytest.fixture(
    scope="module",
    params=[OTHERS[0], pytest.param(OTHERS[1], marks=pytest.mark.extra)],
)
def checkpoint(request, tmp_path_factory):
    """The path of a checkpoint that another backend has written."""
    folder = tmp_path_factory.mktemp(f"from_{request.param}")
    subprocess.run(
        [sys.executable, "-m", "tests.test_saving", str(folder)],
        # More threads would wait for one another for longer than they work.
        env=os.environ
        | {"KERAS_BACKEND": request.param, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    return str(folder / f"{request.param}.keras")


def check_checkpoint(path, size):
    found = np.load(path.replace(".keras", ".npz"))
    strategy = keras_ring.DistributedStrategy(sequence_parallel=size)
    with strategy.scope():
        model = keras.saving.load_model(path)
        losses = step(model)
        predicted = np.asarray(model.predict(batch()[0], verbose=0))
    # Another framework sums in another order; Adam divides by the size of a
    # gradient, which makes more of it where gradients are small.
    np.testing.assert_allclose(losses, found["losses"], rtol=1e-5)
    np.testing.assert_allclose(predicted, found["predicted"], atol=1e-4)


# Each replica is traced.
RING = 2 if keras.backend.backend() == "tensorflow" else 3


@pytest.mark.mostly(size=RING)
@pytest.mark.parametrize("size", [1, RING])
def test_a_checkpoint_of_another_backend_goes_on(on_devices, checkpoint, size):
    on_devices(size, check_checkpoint, checkpoint, size)


if __name__ == "__main__":
    write(sys.argv[1])
