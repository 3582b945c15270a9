"""The kernel of cuDNN on JAX, on a GPU: `JAX_PLATFORMS=cuda pytest` on this
file.

The other tests of JAX want devices that a CPU is split into; without that
variable this file is not collected (see conftest.py). What is around the
kernel is tested everywhere, in test_jax_cudnn.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import keras_ring
from keras_ring import backends, masks
from keras_ring.attention import selection
from keras_ring.attention.kernel import Inputs
from keras_ring.attention.scoring import Scoring
from keras_ring.attention.visit import Visit
from keras_ring.backends.jax.kernels import cudnn
from tests.kernel_choice import tensors
from tests.test_jax_cudnn import TOLERANCE, traced
from tests.visits import CASES, CheckedVisit, Refusing

# One call each: nothing has to be masked pair by pair.
FUSED = [
    *("full", "full-long", "full-cross", "grouped-query", "wide-values"),
    *("narrow-values", "causal", "causal-long", "causal-grouped"),
    *("causal-same-place", "causal-earlier-chunk", "causal-later-chunk"),
]
OTHERS = ["causal-beside", "causal-more-keys", "window", "padding", "pairs"]


@pytest.mark.parametrize("name", FUSED + OTHERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("pull", [False, True])
def test_it_is_right(name, dtype, pull):
    case = dataclasses.replace(CASES[name], dtype=dtype)
    other = Refusing() if name in FUSED else backends.load().kernel.KERNEL
    visit = CheckedVisit(case, rest=0 if pull else 40, pull=pull)
    visit.check(cudnn.CuDnnKernel(other), TOLERANCE[dtype])


@pytest.mark.parametrize("name", [*FUSED, "causal-beside", "window"])
@pytest.mark.parametrize("pull", [False, True])
def test_it_is_right_where_places_are_traced(name, pull):
    case = dataclasses.replace(CASES[name], dtype="bfloat16")
    visit = CheckedVisit(case, rest=0 if pull else 40, pull=pull)
    kernel = cudnn.CuDnnKernel(backends.load().kernel.KERNEL)
    visit.check(traced(kernel), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_agrees_with_the_reference(dtype, automatic, recwarn):
    """Also while another function is traced."""
    chosen = []

    @jax.jit
    def attend(*arrays):
        chosen.append(selection.choose(dtype, "gpu"))
        return keras_ring.ops.ring_attention(*arrays, mask=masks.Causal())

    attend(*tensors(dtype))
    assert [k.name for k in chosen] == ["cudnn"], [
        str(w.message) for w in recwarn
    ]


def test_balanced_chunks_are_taken_apart():
    draw = np.random.default_rng(0)
    arrays = [
        jnp.asarray(draw.normal(size=(1, 2, 256, 64)), "bfloat16")
        for _ in range(3)
    ]
    visit = Visit((0, 896), (896, 0), Scoring(scale=0.125, mask=masks.Causal()))
    reference = backends.load().kernel.KERNEL
    parts = [
        kernel.forward(Inputs(*arrays), visit, None)
        for kernel in (cudnn.CuDnnKernel(Refusing()), reference)
    ]
    for have, want in zip(*parts, strict=True):
        np.testing.assert_allclose(have, want, 2e-2, 2e-2)
