"""The one loop over visiting blocks of keys and values.

Ring Attention (Liu, Zaharia and Abbeel 2023, arXiv 2310.01889, section 3):
every member of the ring keeps its queries. Chunks of keys and values hop
from member to member, and each member folds the chunk that visits it into
its partial result. The backward sends keys and values around once more
with the gradients that belong to them, and recomputes the probabilities
from the log-sum-exp of the forward.

The loop receives a transport and a kernel and knows no framework. All
tensors here are heads first, `(batch, heads, length, head_dim)`, and local:
the chunk that one member holds.
"""

import dataclasses
from typing import Any, Protocol

from keras import ops

from keras_ring import numerics, placement
from keras_ring.blockwise import Block
from keras_ring.masks import Mask
from keras_ring.numerics import Partial
from keras_ring.transport import Transport

Tensor = Any


class Kernel(Protocol):
    """Attention over one visiting chunk; see `blockwise` for the shapes."""

    name: str

    def block_forward(
        self, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> Partial: ...

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
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def branch(self, predicate: Any, yes: Any, no: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Ring:
    """Attention around one ring, forward and backward.

    Attributes:
        transport: moves chunks between the members.
        kernel: computes one visit.
        scale: factor on the scores.
        mask: structure of the mask; its tensors are given to each call.
    """

    transport: Transport
    kernel: Kernel
    scale: float
    mask: Mask | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_tensors: tuple[Tensor, ...],
        key_tensors: tuple[Tensor, ...],
    ) -> Partial:
        """Attention of the own queries over the keys of every member.

        Returns:
            `Partial` over all keys, in the accumulation dtype.
        """
        size = self.transport.size

        def visit(hop: Any, visiting: list[Tensor]) -> Partial:
            key, value, *tensors = visiting
            some, block = self._block(hop, query, key, query_tensors, tensors)
            return self.kernel.branch(
                some,
                lambda: self.kernel.block_forward(query, key, value, block),
                lambda: _nothing(query, value),
            )

        def hop_body(hop: Any, carry: Any) -> Any:
            visiting, partial = carry
            arriving = self.transport.start_shift(visiting)
            partial = numerics.merge(partial, visit(hop, visiting))
            return arriving.wait(), partial

        visiting = [key, value, *key_tensors]
        if size == 1:
            return visit(0, visiting)
        visiting, partial = self.transport.repeat(
            size - 1, hop_body, (visiting, _nothing(query, value))
        )
        return numerics.merge(partial, visit(size - 1, visiting))

    def backward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_tensors: tuple[Tensor, ...],
        key_tensors: tuple[Tensor, ...],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the own queries and of the own keys and values.

        The gradients of a chunk travel with it, one hop behind: what is
        sent at a hop is what was complete before its compute began, so that
        the transfer and the compute do not wait for each other.

        Returns:
            `(grad_query, grad_key, grad_value)` in the accumulation dtype.
        """
        size = self.transport.size
        dtype = numerics.accumulation_dtype(query.dtype)
        lse = ops.cast(lse, dtype)
        delta = numerics.row_delta(
            ops.cast(out, dtype),
            ops.cast(grad_out, dtype),
            ops.cast(grad_lse, dtype),
        )

        def visit(hop: Any, visiting: list[Tensor]) -> tuple:
            key, value, *tensors = visiting
            some, block = self._block(hop, query, key, query_tensors, tensors)
            return self.kernel.branch(
                some,
                lambda: self.kernel.block_backward(
                    query, key, value, out, lse, delta, grad_out, block
                ),
                lambda: tuple(
                    ops.zeros(ops.shape(t), dtype=dtype)
                    for t in (query, key, value)
                ),
            )

        def add(
            hop: Any, visiting: Any, travelling: Any, grad_query: Any
        ) -> tuple[Tensor, list[Tensor]]:
            """Compute a visit while `travelling` is under way."""
            share = visit(hop, visiting)
            behind = travelling.wait()
            return (
                grad_query + share[0],
                [behind[0] + share[1], behind[1] + share[2]],
            )

        def hop_body(hop: Any, carry: Any) -> Any:
            visiting, grads, grad_query = carry
            arriving = self.transport.start_shift(visiting)
            travelling = self.transport.start_shift(grads)
            grad_query, grads = add(hop, visiting, travelling, grad_query)
            return arriving.wait(), grads, grad_query

        visiting = [key, value, *key_tensors]
        if size == 1:
            return visit(0, visiting)
        arriving = self.transport.start_shift(visiting)
        grad_query, *grads = visit(0, visiting)
        visiting, grads, grad_query = self.transport.repeat(
            size - 2, hop_body, (arriving.wait(), grads, grad_query), first=1
        )
        travelling = self.transport.start_shift(grads)
        grad_query, grads = add(size - 1, visiting, travelling, grad_query)
        # The chunk has come to the member before its owner: one hop home.
        grad_key, grad_value = self.transport.shift(grads)
        return grad_query, grad_key, grad_value

    def _block(
        self,
        hop: Any,
        query: Tensor,
        key: Tensor,
        query_tensors: tuple[Tensor, ...],
        key_tensors: list[Tensor],
    ) -> tuple[Any, Block]:
        """Whether some pair of a visit is allowed, and the visit's block."""
        index = self.transport.index()
        source = placement.source(index, hop, self.transport.size)
        lengths = ops.shape(query)[2], ops.shape(key)[2]
        mask = self.mask
        if mask is not None:
            mask = mask.replace(tuple(query_tensors), tuple(key_tensors))
        block = Block(
            query_start=placement.start(index, lengths[0]),
            key_start=placement.start(source, lengths[1]),
            scale=self.scale,
            mask=mask,
        )
        some, every = block.relation(*lengths)
        if every is True:
            # Known before anything runs: nothing is masked in this visit.
            block = dataclasses.replace(block, mask=None)
        return some, block


def _nothing(query: Tensor, value: Tensor) -> Partial:
    """The partial result over no keys at all."""
    dtype = numerics.accumulation_dtype(query.dtype)
    rows = tuple(ops.shape(query)[:3])
    return Partial(
        ops.zeros((*rows, ops.shape(value)[3]), dtype=dtype),
        ops.full(rows, -float("inf"), dtype=dtype),
    )
