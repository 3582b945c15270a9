"""The code in the guides for people who change the package."""

import dataclasses
import re
from pathlib import Path

import numpy as np
from keras import ops

import keras_ring
from keras_ring import backends, masks
from keras_ring.attention.kernel import Inputs
from keras_ring.attention.scoring import Scoring
from keras_ring.distribution import strategy
from keras_ring.distribution.transport import LOCAL
from tests import reference
from tests.conformance import KernelConformance
from tests.gradients import vjp
from tests.visits import CASES, Refusing

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


class TestAtOnce(KernelConformance):
    """The kernel of the guide, under the tests of all kernels."""

    cases = {name: CASES[name] for name in ("full", "wide-values")}  # noqa: RUF012
    left = {name: CASES[name] for name in ("causal", "grouped-query")}  # noqa: RUF012

    def make(self, fallback):
        return code("adding-a-kernel.md")["AtOnceKernel"](fallback)

    def small(self, starts=(0, 0)):
        """Without a mask: it leaves those to others."""
        inputs, visit = super().small(starts)
        inputs = inputs._replace(
            key=ops.repeat(inputs.key, 2, 1),
            value=ops.repeat(inputs.value, 2, 1),
        )
        scoring = dataclasses.replace(visit.scoring, mask=None)
        return inputs, dataclasses.replace(visit, scoring=scoring)

    def test_a_block_without_pairs_changes_nothing(self):
        """It has none: every pair counts."""
        inputs, visit = self.small()
        assert self.make(Refusing()).fits(inputs, visit)


def attend_gathered(size, arrays, valid):
    sharing = code("adding-a-sharing.md")["Gathered"]
    kernel = backends.load().kernel.KERNEL

    def attend(transport, *tensors):
        *inputs, valid = tensors
        heads_first = (ops.transpose(t, (0, 2, 1, 3)) for t in inputs)
        scoring = Scoring(0.3, masks.Causal() & masks.Padding(valid))
        found = sharing(transport, kernel).attend(Inputs(*heads_first), scoring)
        return ops.transpose(found.out, (0, 2, 1, 3))

    def with_gradients(query, key, value, pull, valid):
        def function(*inputs):
            world = strategy.current()
            transport = LOCAL if world is None else None
            if world is None:
                return attend(transport, *inputs, valid)
            return world.per_shard(attend, [*inputs, valid])

        out, grads = vjp(function, [query, key, value], pull)
        return out, *grads

    found = keras_ring.DistributedStrategy(sequence_parallel=size).run(
        with_gradients, *(a.astype("float32") for a in arrays), valid
    )
    return [ops.convert_to_numpy(tensor) for tensor in found]


def test_a_new_sharing_is_right_around_a_ring(on_devices):
    """Forward and backward, with a mask whose tensor goes with the keys."""
    draw = np.random.default_rng(0)
    arrays = [draw.normal(size=(2, 24, heads, 8)) for heads in (2, 1, 1, 2)]
    valid = draw.random((2, 24)) > 0.3
    valid[:, 0] = True
    found = on_devices(2, attend_gathered, 2, arrays, valid)
    allowed = reference.causal(24, 24) & reference.padding(valid)
    want = reference.attention(*arrays, allowed=allowed, scale=0.3)
    wanted = want.out, want.grad_query, want.grad_key, want.grad_value
    for have, array in zip(found, wanted, strict=True):
        np.testing.assert_allclose(have, array, 2e-5, 2e-5)
