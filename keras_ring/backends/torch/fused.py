"""Fused attention as a kernel: rectangles, one call of an operation each.

An operation behind PyTorch's `scaled_dot_product_attention` returns the
log-sum-exp, and its gradient takes one that belongs to a longer sequence,
which is what a ring needs (Dao et al. 2022, arXiv 2205.14135, algorithms 1
and 4). Which operation that is, and what has to be kept from it, is said
where it is called: `flash` for CPUs, `cuda` for GPUs.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from keras_ring import numerics
from keras_ring.attention import Kernel
from keras_ring.backends.torch.pieces import Grain, Piece, pieces
from keras_ring.blockwise import BlockGradients
from keras_ring.numerics import Partial
from keras_ring.tiling import Block


class Call(NamedTuple):
    """What an operation is told of a rectangle beside its tensors.

    Attributes:
        causal: whether row `i` sees the columns 0 to `i` only.
        mask: of the pairs that count, boolean and of what broadcasts to
            (B, H, rows, columns); None for all.
        scale: of the products, above 0.
    """

    causal: bool
    mask: torch.Tensor | None
    scale: float


class Operation(Protocol):
    """A fused forward and its gradient, as PyTorch has them.

    Legend: B batch, H query heads, K key/value heads, R rows and C columns of
    a rectangle, W the width of all its tensors.

    Attributes:
        device: the kind of device that it is for.
        multiple: what a width has to be a multiple of.
        widest: the largest width.
        masks: whether it takes a mask of pairs.
        square: whether a causal rectangle must have as many columns as rows.
        grouped: whether it takes fewer key/value heads than query heads.
        grain: how finely visits are cut for it.
        fewest: the smallest number of rows and of columns it takes.
    """

    device: str
    multiple: int
    widest: float
    masks: bool
    square: bool
    grouped: bool
    grain: Grain
    fewest: int

    def there(self) -> bool:
        """Whether this release has its private names."""

    def dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """What it computes tensors of a dtype in; None if it does not."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, R, W), (B, K, C, W), (B, K, C, W) -> the result (B, H, R, W)
        and its log-sum-exp (B, H, R), whatever they hold in rows that see
        nothing."""

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of query, key and value. `out` (B, H, R, W) and `lse`
        (B, H, R) are over all keys of the sequence; `lse` is `inf` in a row
        that sees nothing."""


class FusedKernel:
    """Fused calls where they fit, another kernel where they do not.

    Args:
        name: for `config.set_kernel`.
        otherwise: computes the visits that do not fit.
        plain: computes rectangles that are whole or the corner of a causal
            mask.
        masked: computes those of which some pairs do not count, and those
            that are too small for `plain`; `plain` by default.

    Legend: B batch, H query heads, K key/value heads, Q and S query and key
    lengths, D and E the head dimensions of query/key and of value, W the
    width that all tensors of a call have.
    """

    def __init__(
        self,
        name: str,
        otherwise: Kernel,
        plain: Operation,
        masked: Operation | None = None,
    ):
        self.name = name
        self.otherwise = otherwise
        self.plain = plain
        self.masked = masked or plain
        # Each `delta` in use, and whether the log-sum-exp had no gradient.
        self._asked: list[tuple[Callable[[], Any], bool]] = []
        if not self.masked.masks:
            raise ValueError("`masked` must be an operation that takes masks.")

    def available(
        self, device: str | None = None, dtype: str | None = None
    ) -> bool:
        """Whether the operations are there, for tensors of this kind."""
        if device not in (None, self.plain.device) or not all(
            operation.there() for operation in (self.plain, self.masked)
        ):
            return False
        return dtype is None or self._dtype(getattr(torch, dtype)) is not None

    def rounds(self, dtype: str) -> bool:
        """Whether results have the precision of a dtype, and not that in
        which the package accumulates it."""
        own = getattr(torch, dtype)
        return self._dtype(own) != accumulation_dtype(own)

    def block_forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block: Block,
    ) -> Partial:
        width = max(query.shape[3], value.shape[3])
        if not self._fits(query, key, value, block, width):
            return self.otherwise.block_forward(query, key, value, block)
        accumulate = accumulation_dtype(query.dtype)
        values = value.shape[3]
        query, key, value = self._ready(width, query, key, value)
        rows = query.shape[:3]
        out = query.new_zeros((*rows, values), dtype=accumulate)
        lse = query.new_full(rows, -float("inf"), dtype=accumulate)
        parts = self._pieces(block, query.shape[2], key.shape[2])
        for piece in parts:
            part = self._forward(piece, query, key, value, block)
            part = Partial(
                part.out[..., :values].to(accumulate), part.lse.to(accumulate)
            )
            if len(parts) == 1 and piece.rows == query.shape[2]:
                return part
            own = piece.queries
            merged = numerics.merge(
                Partial(out[:, :, own], lse[:, :, own]), part
            )
            out[:, :, own], lse[:, :, own] = merged
        return Partial(out, lse)

    def block_backward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        grad_out: torch.Tensor,
        block: Block,
    ) -> BlockGradients:
        key_width, value_width = query.shape[3], value.shape[3]
        accumulate = accumulation_dtype(query.dtype)
        # The operation makes delta of `out` and `grad_out`. Where the
        # log-sum-exp has a gradient of its own they are given columns more,
        # in which the values are 0, and their product is delta.
        plain = self._plain(out, grad_out, delta)
        more = 0 if plain else self._terms(query.dtype)
        width = max(key_width, value_width + more)
        if not self._fits(query, key, value, block, width):
            return self.otherwise.block_backward(
                query, key, value, out, lse, delta, grad_out, block
            )
        out, grad_out = out.to(accumulate), grad_out.to(accumulate)
        if not plain:
            grad_out = torch.nn.functional.pad(grad_out, (0, more), value=1.0)
            terms = split(delta, more, self._dtype(query.dtype))
            out = torch.cat([torch.zeros_like(out), terms], dim=-1)
        query, key, value, out, grad_out = self._ready(
            width, query, key, value, out, grad_out
        )
        # exp(score - inf) = 0: a row that sees nothing gives nothing.
        lse = torch.where(lse == -float("inf"), float("inf"), lse)
        parts = self._pieces(block, query.shape[2], key.shape[2])
        tensors = grad_out, query, key, value, out, lse
        whole = query.shape[2], key.shape[2]
        if [(piece.rows, piece.columns) for piece in parts] == [whole]:
            share = self._backward(parts[0], *tensors, block)
            grads = [t.to(accumulate) for t in share]
        else:
            grads = [
                torch.zeros_like(t, dtype=accumulate)
                for t in (query, key, value)
            ]
            for piece in parts:
                share = self._backward(piece, *tensors, block)
                grads[0][:, :, piece.queries] += share[0]
                grads[1][:, :, piece.keys] += share[1]
                grads[2][:, :, piece.keys] += share[2]
        return BlockGradients(
            grads[0][..., :key_width],
            grads[1][..., :key_width],
            grads[2][..., :value_width],
        )

    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        return self.otherwise.branch(predicate, yes, no)

    def _plain(
        self, out: torch.Tensor, grad_out: torch.Tensor, delta: torch.Tensor
    ) -> bool:
        """Whether `delta` is that of a log-sum-exp without a gradient. The
        answer waits for the device, so it is asked once for all visits that
        have the same `delta`: those of the same queries in one backward."""
        asked = [(seen(), answer) for seen, answer in self._asked]
        for seen, answer in asked:
            if seen is delta:
                return answer
        own = numerics.row_delta(
            out.to(delta.dtype), grad_out.to(delta.dtype), 0.0
        )
        answer = torch.equal(own, delta)
        self._asked = [
            (weakref.ref(seen), known)
            for seen, known in [*asked, (delta, answer)]
            if seen is not None
        ]
        return answer

    def _terms(self, dtype: torch.dtype) -> int:
        """How many numbers of the operations' precision `delta` takes."""
        return 1 if self._dtype(dtype) == accumulation_dtype(dtype) else 3

    def _dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """What both operations compute a dtype in, if they do."""
        found = {
            operation.dtype(dtype) for operation in (self.plain, self.masked)
        }
        return found.pop() if len(found) == 1 else None

    def _width(self, width: int) -> int:
        """The next width that both operations take."""
        multiple = max(self.plain.multiple, self.masked.multiple)
        return -(-width // multiple) * multiple

    def _fits(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block: Block,
        width: int,
    ) -> bool:
        """Whether fused calls can compute a visit."""
        scoring = block.scoring
        return (
            query.device.type == self.plain.device
            and self._dtype(query.dtype) is not None
            and self._width(width) <= min(self.plain.widest, self.masked.widest)
            and all(t.numel() for t in (query, key, value))
            and scoring.scale > 0
            and scoring.only_products
        )

    def _ready(
        self, width: int, query: torch.Tensor, *others: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """(..., w) -> (..., W), with zeros behind and a last stride of 1, in
        what the operations compute in."""
        dtype: Any = self._dtype(query.dtype)
        width = self._width(width)
        for tensor in (query, *others):
            tensor = tensor.to(dtype)
            if tensor.shape[3] < width:
                more = width - tensor.shape[3]
                tensor = torch.nn.functional.pad(tensor, (0, more))
            yield tensor if tensor.stride(3) == 1 else tensor.contiguous()

    def _pieces(self, block: Block, queries: int, keys: int) -> list[Piece]:
        found = pieces(block, queries, keys, self.plain.grain)
        if not self.plain.square:
            return found
        return [part for piece in found for part in squared(piece)]

    def _operation(self, piece: Piece) -> Operation:
        fits = min(piece.rows, piece.columns) >= self.plain.fewest
        return self.plain if piece.mask is None and fits else self.masked

    def _forward(
        self,
        piece: Piece,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block: Block,
    ) -> Partial:
        """Attention of the rows of a piece over its columns.

        Args:
            piece: a rectangle of the visit.
            query: (B, H, Q, W).
            key: (B, K, S, W).
            value: (B, K, S, W).
            block: what the visit is.

        Returns:
            `Partial` of (B, H, rows, W) and (B, H, rows).
        """
        call = _call(piece, query, block)
        operation, heads = self._operation(piece), query.shape[1]
        key, value = (
            _repeated(t[:, :, piece.keys], heads, operation)
            for t in (key, value)
        )
        out, lse = operation.forward(
            query[:, :, piece.queries], key, value, call
        )
        if call.mask is not None:
            seen = call.mask.any(dim=-1)
            lse = torch.where(seen, lse, -float("inf"))
            out = torch.where(seen[..., None], out, 0.0)
        return Partial(out, lse)

    def _backward(
        self,
        piece: Piece,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        block: Block,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a piece adds to the gradients of its rows and columns.

        Args:
            piece: a rectangle of the visit.
            grad_out: (B, H, Q, W).
            query: (B, H, Q, W).
            key: (B, K, S, W).
            value: (B, K, S, W).
            out: (B, H, Q, W), over all keys of the sequence.
            lse: (B, H, Q), likewise; `inf` for a row that sees nothing.
            block: what the visit is.

        Returns:
            (B, H, rows, W), (B, K, columns, W), (B, K, columns, W).
        """
        operation, own = self._operation(piece), piece.queries
        key_heads, heads = key.shape[1], query.shape[1]
        keys, values = (
            _repeated(t[:, :, piece.keys], heads, operation)
            for t in (key, value)
        )
        grads = operation.backward(
            grad_out[:, :, own],
            query[:, :, own],
            keys,
            values,
            out[:, :, own],
            lse[:, :, own],
            _call(piece, query, block),
        )
        if keys.shape[1] == key_heads:
            return grads
        accumulate = accumulation_dtype(query.dtype)
        return (
            grads[0],
            *(
                t.unflatten(1, (key_heads, -1)).sum(dim=2, dtype=accumulate)
                for t in grads[1:]
            ),
        )


def squared(piece: Piece) -> list[Piece]:
    """A causal rectangle as a square and what is whole below it."""
    if not piece.causal or piece.rows == piece.columns:
        return [piece]
    side = min(piece.rows, piece.columns)
    start = piece.keys.start
    top = dataclasses.replace(
        piece,
        queries=slice(piece.queries.start, piece.queries.start + side),
        keys=slice(start, start + side),
    )
    if piece.rows == side:
        return [top]
    below = dataclasses.replace(
        piece,
        queries=slice(top.queries.stop, piece.queries.stop),
        query_start=piece.query_start + side,
        causal=False,
    )
    return [top, below]


def split(delta: torch.Tensor, count: int, dtype: Any) -> torch.Tensor:
    """(..., n): numbers that a dtype can hold and whose sum is `delta`; three
    of bfloat16 have all the digits of float32."""
    terms = []
    for _ in range(count):
        terms.append(delta.to(dtype).to(delta.dtype))
        delta = delta - terms[-1]
    return torch.stack(terms, dim=-1)


def _call(piece: Piece, query: torch.Tensor, block: Block) -> Call:
    mask = None if piece.mask is None else piece.allowed(query.device)
    return Call(piece.causal, mask, block.scoring.scale)


def _repeated(
    tensor: torch.Tensor, heads: int, operation: Operation
) -> torch.Tensor:
    """(B, K, C, W) -> (B, H, C, W), where an operation wants it so."""
    if operation.grouped or tensor.shape[1] == heads:
        return tensor
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def added(mask: torch.Tensor | None, dtype: torch.dtype) -> Any:
    """What is added to scores to say which pairs count; None for nothing."""
    if mask is None:
        return None
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, -float("inf"))


def accumulation_dtype(dtype: torch.dtype) -> Any:
    """`numerics.accumulation_dtype`, as PyTorch has it."""
    return getattr(torch, numerics.accumulation_dtype(dtype))
