"""Fused attention as a kernel: rectangles, one call of an operation each.

An operation behind PyTorch's `scaled_dot_product_attention` returns the
log-sum-exp, and its gradient takes one that belongs to a longer sequence,
which is what a ring needs (Dao et al. 2022, arXiv 2205.14135, algorithms 1
and 4). Which operation that is, and what has to be kept from it, is said
where it is called: `flash` for CPUs, `cuda` for GPUs.
"""

import abc
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from keras_ring import numerics
from keras_ring.backends.torch.pieces import (
    Grain,
    Piece,
    apart,
    columns,
    joined,
    pieces,
    rows,
    samples,
    squared,
)
from keras_ring.kernel import BlockGradients, FoldingKernel, Kernel
from keras_ring.numerics import Partial
from keras_ring.visit import Block


class Call(NamedTuple):
    """Arguments of an operation on a rectangle, beside its tensors.

    Attributes:
        causal: whether row `i` sees the columns 0 to `i` only.
        mask: of the pairs that count, boolean and of what broadcasts to
            (B, H, rows, columns); None for all.
        scale: of the products, above 0.
    """

    causal: bool
    mask: torch.Tensor | None
    scale: float


class Operation(abc.ABC):
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
    multiple: int = 1
    widest: float = math.inf
    masks: bool = True
    square: bool = False
    grouped: bool = True
    grain: Grain
    fewest: int = 1

    @abc.abstractmethod
    def there(self) -> bool:
        """True if this release has its private names."""

    @abc.abstractmethod
    def dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """Dtype in which it computes a dtype; None if it does not."""

    @abc.abstractmethod
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

    @abc.abstractmethod
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


class FusedKernel(FoldingKernel):
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
        super().__init__(otherwise)
        self.plain = plain
        self.masked = masked or plain
        if not self.masked.masks:
            raise ValueError("`masked` must be an operation that takes masks.")

    def available(
        self, device: str | None = None, dtype: str | None = None
    ) -> bool:
        """True if the operations are there, for tensors of this kind."""
        if device not in (None, self.plain.device) or not all(
            operation.there() for operation in (self.plain, self.masked)
        ):
            return False
        return dtype is None or self._dtype(getattr(torch, dtype)) is not None

    def rounds(self, dtype: str) -> bool:
        """True if results have the precision of a dtype, and not that in which
        the package accumulates it."""
        own = getattr(torch, dtype)
        return self._dtype(own) != accumulation_dtype(own)

    def row_delta(
        self, out: torch.Tensor, grad_out: torch.Tensor, grad_lse: torch.Tensor
    ) -> torch.Tensor | None:
        """None where the log-sum-exp has no gradient: the operations make
        the rest themselves. To see that waits for the device, once for all
        visits of a backward."""
        if not bool(grad_lse.any()):
            return None
        found: torch.Tensor = super().row_delta(out, grad_out, grad_lse)
        return found

    def fold(
        self,
        partial: Partial | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block: Block,
    ) -> Partial:
        width = max(query.shape[3], value.shape[3])
        if not self.fits(query, key, value, block):
            return self.otherwise.fold(partial, query, key, value, block)
        accumulate = accumulation_dtype(query.dtype)
        values = value.shape[3]
        query, key, value = self._ready(width, query, key, value)
        for piece in self._pieces(block, query.shape[2], key.shape[2]):
            part = self._forward(piece, query, key, value, block)
            part = Partial(
                part.out[..., :values].to(accumulate), part.lse.to(accumulate)
            )
            if partial is None and piece.covers(query.shape[2], key.shape[2]):
                partial = Partial(*(joined(t, piece) for t in part))
                continue
            if partial is None:
                partial = _nothing(query, values, accumulate)
            part = Partial(*(apart(t, piece) for t in part))
            merge(Partial(*(rows(t, piece) for t in partial)), part)
        if partial is None:
            return _nothing(query, values, accumulate)
        return partial

    def fold_backward(
        self,
        grad_query: torch.Tensor | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor | None,
        grad_out: torch.Tensor,
        block: Block,
    ) -> BlockGradients:
        key_width, value_width = query.shape[3], value.shape[3]
        accumulate = accumulation_dtype(query.dtype)
        # The operation makes delta of `out` and `grad_out`. Where the
        # log-sum-exp has a gradient of its own they are given columns more,
        # in which the values are 0, and their product is delta.
        more = 0 if delta is None else self._terms(query.dtype)
        width = max(key_width, value_width + more)
        if not self.fits(query, key, value, block, width):
            if delta is None:
                delta = super().row_delta(out, grad_out, torch.zeros_like(lse))
            return self.otherwise.fold_backward(
                *(grad_query, query, key, value, out, lse, delta, grad_out),
                block,
            )
        out, grad_out = out.to(accumulate), grad_out.to(accumulate)
        if delta is not None:
            grad_out = torch.nn.functional.pad(grad_out, (0, more), value=1.0)
            terms = split(delta, more, self._dtype(query.dtype))
            out = torch.cat([torch.zeros_like(out), terms], dim=-1)
        query, key, value, out, grad_out = self._ready(
            width, query, key, value, out, grad_out
        )
        # exp(score - inf) = 0: a row that sees nothing gives nothing.
        lse = torch.where(lse == -float("inf"), float("inf"), lse)
        tensors = grad_out, query, key, value, out, lse
        widths = key_width, key_width, value_width
        grads: list[Any] = [grad_query, None, None]

        def empty(i: int) -> torch.Tensor:
            return _zeros(tensors[1 + i], widths[i], accumulate)

        for piece in self._pieces(block, query.shape[2], key.shape[2]):
            shares = self._backward(piece, *tensors, block)
            covers = piece.covers(query.shape[2], key.shape[2])
            for i, (share, side) in enumerate(
                zip(shares, (rows, columns, columns), strict=True)
            ):
                share = share[..., : widths[i]]
                if grads[i] is None and covers:
                    grads[i] = joined(share.to(accumulate), piece)
                    continue
                if grads[i] is None:
                    grads[i] = empty(i)
                total = side(grads[i], piece)
                total += apart(share, piece)
        return BlockGradients(
            *(empty(i) if g is None else g for i, g in enumerate(grads))
        )

    def add(self, total: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        return total.add_(share)

    def _terms(self, dtype: torch.dtype) -> int:
        """Number of values of the operations' precision that `delta` takes."""
        return 1 if self._dtype(dtype) == accumulation_dtype(dtype) else 3

    def _dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """Dtype in which both operations compute a dtype, if they do."""
        found = {
            operation.dtype(dtype) for operation in (self.plain, self.masked)
        }
        return found.pop() if len(found) == 1 else None

    def _width(self, width: int) -> int:
        """The next width that both operations take."""
        multiple = max(self.plain.multiple, self.masked.multiple)
        return -(-width // multiple) * multiple

    def fits(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block: Block,
        width: int | None = None,
    ) -> bool:
        """True if fused calls can compute a visit, of all tensors in the width
        of the widest or in another."""
        scoring = block.scoring
        width = width or max(query.shape[3], value.shape[3])
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
        """Attention of the rows of a piece over its columns; rectangles of
        one piece are further samples.

        Args:
            piece: of the visit.
            query: (B, H, Q, W).
            key: (B, K, S, W).
            value: (B, K, S, W).
            block: what the visit is.

        Returns:
            `Partial` of (B * count, H, rows, W) and (B * count, H, rows).
        """
        call = _call(piece, query, block)
        operation, heads = self._operation(piece), query.shape[1]
        key, value = (
            _repeated(samples(columns(t, piece), piece), heads, operation)
            for t in (key, value)
        )
        query = samples(rows(query, piece), piece)
        out, lse = operation.forward(query, key, value, call)
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
        """Gradients that a piece adds to those of its rows and columns.

        Args:
            piece: of the visit.
            grad_out: (B, H, Q, W).
            query: (B, H, Q, W).
            key: (B, K, S, W).
            value: (B, K, S, W).
            out: (B, H, Q, W), over all keys of the sequence.
            lse: (B, H, Q), likewise; `inf` for a row that sees nothing.
            block: what the visit is.

        Returns:
            (B * count, H, rows, W), (B * count, K, columns, W) twice.
        """
        operation = self._operation(piece)
        key_heads, heads = key.shape[1], query.shape[1]
        keys, values = (
            _repeated(samples(columns(t, piece), piece), heads, operation)
            for t in (key, value)
        )
        call = _call(piece, query, block)
        grad_out, query, out, lse = (
            samples(rows(t, piece), piece) for t in (grad_out, query, out, lse)
        )
        grads = operation.backward(
            grad_out, query, keys, values, out, lse, call
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


def merge(total: Partial, part: Partial) -> None:
    """`numerics.merge` of a view of partial results and the results of a
    piece, in place.

    The share of the new part is `sigmoid(part.lse - total.lse)`, which no
    difference of two log-sum-exps makes overflow.
    """
    # Of two parts that saw nothing the difference is not a number.
    share = torch.sigmoid(part.lse - total.lse).nan_to_num_(0.0)
    total.out.lerp_(part.out, share[..., None])
    total.lse.copy_(torch.logaddexp(total.lse, part.lse))


def _nothing(query: torch.Tensor, width: int, dtype: Any) -> Partial:
    """The partial result over no keys at all."""
    return Partial(
        _zeros(query, width, dtype),
        query.new_full(query.shape[:3], -float("inf"), dtype=dtype),
    )


def _zeros(like: torch.Tensor, width: int, dtype: Any) -> torch.Tensor:
    """(B, H, n, width), laid as operations lay their results."""
    batch, heads, length, _ = like.shape
    zeros = like.new_zeros((batch, length, heads, width), dtype=dtype)
    return zeros.transpose(1, 2)


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
    """Terms to be added to scores to say which pairs count, or None."""
    if mask is None:
        return None
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, -float("inf"))


def accumulation_dtype(dtype: torch.dtype) -> Any:
    """`numerics.accumulation_dtype`, as PyTorch has it."""
    return getattr(torch, numerics.accumulation_dtype(dtype))
