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
from keras_ring.blockwise import BlockGradients
from keras_ring.numerics import Partial
from keras_ring.scoring import Scoring
from keras_ring.tiling import Block
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
    ) -> BlockGradients: ...

    def branch(self, predicate: Any, yes: Any, no: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Ring:
    """Attention around one ring, forward and backward.

    Attributes:
        transport: moves chunks between the members.
        kernel: computes one visit.
        scoring: what makes the scores, over the own tensors.
        balanced: whether the chunks are the balanced ones of `placement`.
    """

    transport: Transport
    kernel: Kernel
    scoring: Scoring
    balanced: bool = False

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        """Attention of the own queries over the keys of every member.

        Returns:
            `Partial` over all keys, in the accumulation dtype.
        """
        first, last = self._hops(query, key)

        def visit(hop: Any, visiting: list[Tensor]) -> Partial:
            key, value, *tensors = visiting
            some, block = self._block(hop, query, key, tensors)
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

        visiting = self._first_visit(first, key, value)
        if first == last:
            return visit(last, visiting)
        visiting, partial = self.transport.repeat(
            last - first, hop_body, (visiting, _nothing(query, value)), first
        )
        return numerics.merge(partial, visit(last, visiting))

    def backward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor,
    ) -> BlockGradients:
        """Gradients of what this member owns.

        The gradients of a chunk travel with it, one hop behind: what is
        sent at a hop is what was complete before its compute began, so that
        the transfer and the compute do not wait for each other.

        Returns:
            In the accumulation dtype; the bias' gradient is that of the own
            rows over all keys, the slopes' is the member's term of a sum.
        """
        first, last = self._hops(query, key)
        dtype = numerics.accumulation_dtype(query.dtype)
        lse = ops.cast(lse, dtype)
        delta = numerics.row_delta(
            ops.cast(out, dtype),
            ops.cast(grad_out, dtype),
            ops.cast(grad_lse, dtype),
        )

        def visit(hop: Any, visiting: list[Tensor]) -> BlockGradients:
            key, value, *tensors = visiting
            some, block = self._block(hop, query, key, tensors)
            return self.kernel.branch(
                some,
                lambda: self.kernel.block_backward(
                    query, key, value, out, lse, delta, grad_out, block
                ),
                lambda: _no_gradients(query, key, value, block.scoring),
            )

        def add(
            hop: Any, visiting: Any, travelling: Any, staying: Any
        ) -> tuple[Any, list[Tensor]]:
            """Compute a visit while `travelling` is under way."""
            share = visit(hop, visiting)
            behind = travelling.wait()
            return (
                self._add_staying(hop, staying, share),
                [behind[0] + share.key, behind[1] + share.value],
            )

        def hop_body(hop: Any, carry: Any) -> Any:
            visiting, grads, staying = carry
            arriving = self.transport.start_shift(visiting)
            travelling = self.transport.start_shift(grads)
            staying, grads = add(hop, visiting, travelling, staying)
            return arriving.wait(), grads, staying

        visiting = self._first_visit(first, key, value)
        if first == last:
            share = visit(last, visiting)
            staying = self._staying(last, share, key)
            grads = [share.key, share.value]
        else:
            arriving = self.transport.start_shift(visiting)
            share = visit(first, visiting)
            staying = self._staying(first, share, key)
            grads = [share.key, share.value]
            visiting, grads, staying = self.transport.repeat(
                last - first - 1,
                hop_body,
                (arriving.wait(), grads, staying),
                first=first + 1,
            )
            travelling = self.transport.start_shift(grads)
            staying, grads = add(last, visiting, travelling, staying)
        # The chunk is `last` hops away from its owner: all of them at once.
        if last % self.transport.size:
            grads = self.transport.shift(grads, by=-last)
        grad_key, grad_value = grads
        return BlockGradients(
            staying["query"],
            grad_key,
            grad_value,
            self._all_keys(staying.get("bias")),
            staying.get("slopes"),
        )

    def _staying(
        self, hop: Any, share: BlockGradients, key: Tensor
    ) -> dict[str, Tensor]:
        """The gradients of what stays where it is, after one visit."""
        staying = {"query": share.query}
        if share.slopes is not None:
            staying["slopes"] = share.slopes
        if share.bias is not None:
            # Padding of the keys may make their chunks reach past the bias.
            columns = ops.shape(key)[2] * self.transport.size
            rows = ops.shape(share.bias)[:3]
            empty = ops.zeros((*rows, columns), dtype=share.bias.dtype)
            staying["bias"] = self._with_columns(hop, empty, share.bias)
        return staying

    def _add_staying(
        self, hop: Any, staying: dict[str, Tensor], share: BlockGradients
    ) -> dict[str, Tensor]:
        """Add the share of one visit; it has its own columns of the bias."""
        staying = dict(staying, query=staying["query"] + share.query)
        if share.slopes is not None:
            staying["slopes"] = staying["slopes"] + share.slopes
        if share.bias is not None:
            staying["bias"] = self._with_columns(
                hop, staying["bias"], share.bias
            )
        return staying

    def _with_columns(self, hop: Any, bias: Tensor, columns: Tensor) -> Tensor:
        """The gradient of the bias with the columns of one visit."""
        starts = self._starts(self._source(hop), columns.shape[3])
        parts = ops.split(columns, len(starts), axis=3)
        for start, part in zip(starts, parts, strict=True):
            zero = start * 0  # JAX wants all of them in one dtype.
            bias = ops.slice_update(bias, (zero, zero, zero, start), part)
        return bias

    def _all_keys(self, grad_bias: Tensor | None) -> Tensor | None:
        if grad_bias is None:
            return None
        return grad_bias[..., : ops.shape(self.scoring.bias)[3]]

    def _hops(self, query: Tensor, key: Tensor) -> tuple[int, int]:
        """The first and the last hop at which some member has work."""
        size, mask = self.transport.size, self.scoring.mask
        if mask is None or self.balanced:
            return 0, size - 1
        lengths = ops.shape(query)[2], ops.shape(key)[2]
        return placement.hops(size, *lengths, mask.reach())

    def _first_visit(
        self, first: int, key: Tensor, value: Tensor
    ) -> list[Tensor]:
        """The chunk that visits first, with what travels with its keys."""
        visiting = [key, value, *self.scoring.carried().key]
        return self.transport.shift(visiting, by=first) if first else visiting

    def _starts(self, index: Any, length: Any) -> tuple[Any, ...]:
        size = self.transport.size
        return placement.starts(index, length, size, self.balanced)

    def _source(self, hop: Any) -> Any:
        index = self.transport.index()
        return placement.source(index, hop, self.transport.size)

    def _block(
        self, hop: Any, query: Tensor, key: Tensor, key_tensors: list[Tensor]
    ) -> tuple[Any, Block]:
        """Whether some pair of a visit is allowed, and the visit's block."""
        lengths = ops.shape(query)[2], ops.shape(key)[2]
        carried = self.scoring.carried()._replace(key=tuple(key_tensors))
        block = Block(
            query_starts=self._starts(self.transport.index(), lengths[0]),
            key_starts=self._starts(self._source(hop), lengths[1]),
            scoring=self.scoring.replace(carried),
        )
        some, every = block.relation(*lengths)
        if every is True:
            # Known before anything runs: nothing is masked in this visit.
            block = dataclasses.replace(
                block, scoring=dataclasses.replace(block.scoring, mask=None)
            )
        return some, block


def _no_gradients(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> BlockGradients:
    """What a visit contributes in which no pair counts."""
    dtype = numerics.accumulation_dtype(query.dtype)

    def zeros(shape: Any) -> Tensor:
        return ops.zeros(tuple(shape), dtype=dtype)

    bias = slopes = None
    if scoring.bias is not None:
        bias = zeros((*ops.shape(scoring.bias)[:3], ops.shape(key)[2]))
    if scoring.slopes is not None:
        slopes = zeros(ops.shape(scoring.slopes))
    grads = [zeros(ops.shape(t)) for t in (query, key, value)]
    return BlockGradients(grads[0], grads[1], grads[2], bias, slopes)


def _nothing(query: Tensor, value: Tensor) -> Partial:
    """The partial result over no keys at all."""
    dtype = numerics.accumulation_dtype(query.dtype)
    rows = tuple(ops.shape(query)[:3])
    return Partial(
        ops.zeros((*rows, ops.shape(value)[3]), dtype=dtype),
        ops.full(rows, -float("inf"), dtype=dtype),
    )
