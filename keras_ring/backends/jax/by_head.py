"""The blockwise kernel one head after the other, for devices of one core.

A CPU that stands for several devices has no threads left for the products of
one of them. What counts then is that XLA's CPU compiler does the product of one
head much better than the batched one of several, even of two, and that a tile
of one head stays in the cache. On a device that has more threads than heads in
work it is the other way round, so this is not for a single one.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from keras_ring.backends.jax import local
from keras_ring.backends.jax.fused import by_place
from keras_ring.kernel import BlockGradients, Kernel
from keras_ring.numerics import Partial
from keras_ring.visit import Block


class ByHeadKernel(Kernel):
    """A kernel called for one sample and key/value head at a time.

    Args:
        tiles: the kernel for one head, with tiles that fit into a cache.
        otherwise: computes the visits whose scores are more than masked
            products, or whose masks carry tensors.
    """

    name = "by_head"

    def __init__(self, tiles: Kernel, otherwise: Kernel):
        self.tiles = tiles
        self.otherwise = otherwise

    def available(
        self, device: str | None = None, dtype: str | None = None
    ) -> bool:
        del dtype  # It takes all of them.
        return device in (None, "cpu") and local.several_cpus()

    def rounds(self, dtype: str) -> bool:
        return False

    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        return self.otherwise.branch(predicate, yes, no)

    def block_forward(
        self, query: jax.Array, key: jax.Array, value: jax.Array, block: Block
    ) -> Partial:
        if not by_place(query, key, value, block):
            return self.otherwise.block_forward(query, key, value, block)

        def forward(block: Block, *tensors: Any) -> tuple:
            query, key, value = tensors
            return tuple(self.tiles.block_forward(query, key, value, block))

        return Partial(*_each(forward, block, [query, key, value]))

    def block_backward(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        out: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        grad_out: jax.Array,
        block: Block,
    ) -> BlockGradients:
        if not by_place(query, key, value, block):
            return self.otherwise.block_backward(
                query, key, value, out, lse, delta, grad_out, block
            )

        def backward(block: Block, *tensors: Any) -> tuple:
            query, key, value, out, lse, delta, grad_out = tensors
            found = self.tiles.block_backward(
                query, key, value, out, lse, delta, grad_out, block
            )
            return found.query, found.key, found.value

        tensors = [query, key, value, out, lse, delta, grad_out]
        return BlockGradients(*_each(backward, block, tensors))


def _each(
    function: Callable[..., tuple], block: Block, tensors: list[jax.Array]
) -> list[jax.Array]:
    """`function(block, *tensors)` for each sample and key/value head.

    Args:
        function: of (1, G, ...) for tensors of queries and (1, 1, ...) for
            those of keys; its results are such tensors.
        block: its starts may be traced.
        tensors: (B, H, ...) or (B, K, ...), the second one of keys.
    """
    queries = len(block.query_starts)

    def part(*arguments: Any) -> list[jax.Array]:
        own, starts = arguments[: len(tensors)], arguments[len(tensors) :]
        here = Block(starts[:queries], starts[queries:], block.scoring)
        batch, key_heads = own[1].shape[:2]

        def one(heads: tuple[jax.Array, ...]) -> tuple:
            found = function(here, *(tensor[None] for tensor in heads))
            return tuple(tensor[0] for tensor in found)

        found = lax.map(
            one,
            tuple(t.reshape(batch * key_heads, -1, *t.shape[2:]) for t in own),
        )
        return [t.reshape(batch, -1, *t.shape[2:]) for t in found]

    starts = [*block.query_starts, *block.key_starts]
    found: list[jax.Array] = local.on_each_device(part, tensors, starts)
    return found
