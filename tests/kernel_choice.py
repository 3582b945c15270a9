"""What tests of the choice of a kernel share."""

import numpy as np
from keras import ops


def tensors(dtype="float32"):
    draw = np.random.default_rng(0)
    return [
        ops.convert_to_tensor(draw.normal(size=(1, 24, 2, 8)), dtype)
        for _ in range(3)
    ]
