"""For accelerators PyTorch computes gradients in threads of its own."""

import threading

import keras
import numpy as np

import keras_ring as kr


def check_threads():
    """What is computed again in a backward is computed around the ring,
    whichever thread asks for it."""
    strategy = kr.DistributedStrategy(sequence_parallel=2)
    draw = np.random.default_rng(0)
    x, weight = draw.normal(size=(2, 2, 7, 8)).astype("float32")
    with strategy.scope():
        keras.utils.set_random_seed(0)
        block = kr.layers.RingTransformerBlock(2, 8, remat="block")
        block.build((None, None, 8))

    def gradient(x, weight, thread):
        x = x.detach().requires_grad_()
        out = (block(x) * weight).sum()
        worker = threading.Thread(target=out.backward)
        run = worker.run if not thread else worker.start
        run()
        if thread:
            worker.join()
        return x.grad

    one, other = (
        strategy.run(lambda x, w, t=t: gradient(x, w, t), x, weight)
        for t in (False, True)
    )
    np.testing.assert_allclose(other, one, rtol=1e-6)


def test_gradients_of_other_threads(on_devices):
    on_devices(2, check_threads)
