"""Kernel interface: attention over one visiting chunk.

Everything is heads first and local. Legend: B batch, H query heads, K
key/value heads, Q and S query and key lengths, D and E the head dimensions of
query/key and of value.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

from keras import ops

from keras_ring import numerics
from keras_ring.numerics import Partial
from keras_ring.visit import Block

Tensor = Any


class BlockGradients(NamedTuple):
    """Gradients that one visit contributes, in the accumulation dtype.

    Attributes:
        query: (B, H, Q, D).
        key: (B, K, S, D).
        value: (B, K, S, E).
        bias: (B or 1, Q, H or 1, S), of the columns of the visiting keys;
            None without a bias.
        slopes: (H,); None without slopes.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    slopes: Tensor | None = None


class Kernel(abc.ABC):
    """Computes visits, and adds each to those before it.

    Attributes:
        name: for `config.set_kernel`.
    """

    name: str

    @abc.abstractmethod
    def block_forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> Partial:
        """Attention of the queries over the visiting keys alone.

        Args:
            query: (B, H, Q, D).
            key: (B, K, S, D).
            value: (B, K, S, E).
            block: where the chunks lie, and what makes the scores.

        Returns:
            `Partial` with `out` (B, H, Q, E) and `lse` (B, H, Q).
        """

    @abc.abstractmethod
    def block_backward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        delta: Tensor,
        grad_out: Tensor,
        block: Block,
    ) -> BlockGradients:
        """Gradients that one visit contributes.

        Args:
            query: (B, H, Q, D).
            key: (B, K, S, D).
            value: (B, K, S, E).
            out: (B, H, Q, E), over all keys of the sequence.
            lse: (B, H, Q), likewise, in the accumulation dtype.
            delta: what `row_delta` returned.
            grad_out: (B, H, Q, E).
            block: where the chunks lie, and what makes the scores.
        """

    @abc.abstractmethod
    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        """Run and return one of two nullary functions, never both. A
        Python bool decides at once."""

    def fits(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> bool:
        """True if it computes a visit itself, and does not leave it to
        another kernel."""
        return True

    def once(self) -> "Kernel":
        """The same kernel for a few visits that are not repeated, where
        there is a shorter way than a program."""
        return self

    def missing(self) -> str:
        """Why it is not there, where more is known of that."""
        return ""

    def row_delta(
        self, out: Tensor, grad_out: Tensor, grad_lse: Tensor
    ) -> Tensor:
        """`numerics.row_delta` in the accumulation dtype, (B, H, Q), or what
        else the kernel wants to have in its place."""
        dtype = numerics.accumulation_dtype(out.dtype)
        return numerics.row_delta(
            *(ops.cast(tensor, dtype) for tensor in (out, grad_out, grad_lse))
        )

    def fold(
        self,
        partial: Partial | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block: Block,
    ) -> Partial:
        """`partial` and what `block_forward` computes, merged. Nobody uses
        `partial` again, so it may be overwritten; None is nothing so far."""
        part = self.block_forward(query, key, value, block)
        return part if partial is None else numerics.merge(partial, part)

    def fold_backward(
        self,
        grad_query: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        delta: Tensor,
        grad_out: Tensor,
        block: Block,
    ) -> BlockGradients:
        """`block_backward` with `grad_query`, if any, added to the query's;
        it may be overwritten."""
        share = self.block_backward(
            query, key, value, out, lse, delta, grad_out, block
        )
        if grad_query is None:
            return share
        return share._replace(query=self.add(grad_query, share.query))

    def add(self, total: Tensor, share: Tensor) -> Tensor:
        """The sum; `total` may be overwritten."""
        return total + share


class FoldingKernel(Kernel):
    """A kernel that adds to what is there: a visit by itself adds to nothing.
    What it says itself is `fold` and `fold_backward`.

    Args:
        otherwise: computes the visits that do not fit.
    """

    def __init__(self, otherwise: Kernel):
        self.otherwise = otherwise

    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        return self.otherwise.branch(predicate, yes, no)

    def block_forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> Partial:
        return self.fold(None, query, key, value, block)

    def block_backward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        delta: Tensor,
        grad_out: Tensor,
        block: Block,
    ) -> BlockGradients:
        return self.fold_backward(
            None, query, key, value, out, lse, delta, grad_out, block
        )
