"""The blockwise kernel one head after the other, for devices of one core.

A CPU that stands for several devices has no threads left for the products of
one of them. What counts then is that XLA's CPU compiler does the product of one
head much better than the batched one of several, even of two, and that a tile
of one head stays in the cache. On a device that has more threads than heads in
work it is the other way round, so this is not for a single one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from keras_ring.attention.kernel import (
    FallbackKernel,
    Gradients,
    Inputs,
    Kernel,
    Rows,
    merged,
    summed,
)
from keras_ring.attention.numerics import Partial
from keras_ring.attention.visit import Visit
from keras_ring.backends.jax.kernels import local
from keras_ring.backends.jax.kernels.parts import by_place


class ByHeadKernel(FallbackKernel):
    """A kernel called for one sample and key/value head at a time.

    Args:
        tiles: the kernel for one head, with tiles that fit into a cache.
        fallback: computes the blocks whose scores are more than masked
            products, or whose masks carry tensors.
    """

    name = "by_head"
    description = (
        "the reference head by head, on a CPU that stands for several devices"
    )

    def __init__(self, tiles: Kernel, fallback: Kernel):
        super().__init__(fallback)
        self.tiles = tiles

    def available(self) -> bool:
        return local.several_cpus()

    def preferred(self, device: str | None, dtype: str) -> bool:
        return device in (None, "cpu") and self.available()

    def fits(
        self, inputs: Inputs, visit: Visit, rows: Rows | None = None
    ) -> bool:
        return by_place(inputs, visit)

    def compute(
        self, inputs: Inputs, visit: Visit, carry: Partial | None
    ) -> Partial:
        def forward(visit: Visit, *tensors: Any) -> tuple:
            return self.tiles.forward(Inputs(*tensors), visit, None)

        return merged(carry, Partial(*_each(forward, visit, inputs)))

    def compute_gradients(
        self,
        inputs: Inputs,
        rows: Rows,
        visit: Visit,
        carry: jax.Array | None,
    ) -> Gradients:
        def backward(visit: Visit, *tensors: Any) -> tuple:
            inputs, rows = Inputs(*tensors[:3]), Rows(*tensors[3:])
            return self.tiles.backward(inputs, rows, visit, None)[:3]

        found = _each(backward, visit, [*inputs, *rows])
        return summed(carry, Gradients(*found))


def _each(
    function: Callable[..., tuple],
    visit: Visit,
    tensors: Sequence[jax.Array],
) -> list[jax.Array]:
    """`function(visit, *tensors)` for each sample and key/value head.

    Args:
        function: of (1, G, ...) for tensors of queries and (1, 1, ...) for
            those of keys; its results are such tensors.
        visit: its starts may be traced.
        tensors: (B, H, ...) or (B, K, ...), the second one of keys.
    """
    queries = len(visit.query_starts)

    def part(*arguments: Any) -> list[jax.Array]:
        own, starts = arguments[: len(tensors)], arguments[len(tensors) :]
        here = Visit(starts[:queries], starts[queries:], visit.scoring)
        batch, key_heads = own[1].shape[:2]

        def one(heads: tuple[jax.Array, ...]) -> tuple:
            found = function(here, *(tensor[None] for tensor in heads))
            return tuple(tensor[0] for tensor in found)

        found = lax.map(
            one,
            tuple(t.reshape(batch * key_heads, -1, *t.shape[2:]) for t in own),
        )
        return [t.reshape(batch, -1, *t.shape[2:]) for t in found]

    starts = [*visit.query_starts, *visit.key_starts]
    found: list[jax.Array] = local.on_each_device(part, tensors, starts)
    return found
