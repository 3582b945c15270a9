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

from keras_ring import precision
from keras_ring.attention.kernel import (
    FallbackKernel,
    Gradients,
    Inputs,
    Kernel,
    Rows,
)
from keras_ring.attention.numerics import Partial
from keras_ring.attention.visit import Visit
from keras_ring.backends.torch.kernels.pieces import (
    Grain,
    Piece,
    apart,
    columns,
    joined,
    pieces,
    rows_of,
    samples,
    squared,
)


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
        description: for `Kernel.description`.
        device: the kind of device that it is for.
        multiple: what a width has to be a multiple of.
        widest: the largest width.
        masks: whether it takes a mask of pairs.
        square: whether a causal rectangle must have as many columns as rows.
        grouped: whether it takes fewer key/value heads than query heads.
        grain: how finely visits are cut for it.
        fewest: the smallest number of rows and of columns it takes.
    """

    description: str
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


class FusedKernel(FallbackKernel):
    """Fused calls where they fit, another kernel where they do not.

    Args:
        name: for `config.set_kernel`.
        fallback: computes what does not fit.
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
        fallback: Kernel,
        plain: Operation,
        masked: Operation | None = None,
    ):
        self.name = name
        self.description = plain.description
        super().__init__(fallback)
        self.plain = plain
        self.masked = masked or plain
        if not self.masked.masks:
            raise ValueError("`masked` must be an operation that takes masks.")

    def available(self) -> bool:
        """True if the operations are there."""
        return all(operation.there() for operation in (self.plain, self.masked))

    def preferred(self, device: str | None, dtype: str) -> bool:
        return (
            device in (None, self.plain.device)
            and self.available()
            and self._dtype(getattr(torch, dtype)) is not None
        )

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

    def compute(
        self, inputs: Inputs, visit: Visit, carry: Partial | None
    ) -> Partial:
        query, key, value = inputs
        partial, width = carry, max(query.shape[3], value.shape[3])
        accumulate = accumulation_dtype(query.dtype)
        values = value.shape[3]
        query, key, value = self._ready(width, query, key, value)
        for piece in self._pieces(visit, query.shape[2], key.shape[2]):
            part = self._forward(piece, Inputs(query, key, value), visit)
            part = Partial(
                part.out[..., :values].to(accumulate), part.lse.to(accumulate)
            )
            if partial is None and piece.covers(query.shape[2], key.shape[2]):
                partial = Partial(*(joined(t, piece) for t in part))
                continue
            if partial is None:
                partial = _nothing(query, values, accumulate)
            part = Partial(*(apart(t, piece) for t in part))
            merge(Partial(*(rows_of(t, piece) for t in partial)), part)
        if partial is None:
            return _nothing(query, values, accumulate)
        return partial

    def backward(
        self,
        inputs: Inputs,
        rows: Rows,
        visit: Visit,
        carry: torch.Tensor | None,
    ) -> Gradients:
        if rows.delta is None and not self.fits(inputs, visit, rows):
            nothing = torch.zeros_like(rows.lse)
            delta = super().row_delta(rows.out, rows.grad_out, nothing)
            rows = rows._replace(delta=delta)
        return super().backward(inputs, rows, visit, carry)

    def compute_gradients(
        self,
        inputs: Inputs,
        rows: Rows,
        visit: Visit,
        carry: torch.Tensor | None,
    ) -> Gradients:
        query, key, value = inputs
        key_width, value_width = query.shape[3], value.shape[3]
        accumulate = accumulation_dtype(query.dtype)
        width, more = self._backward_width(inputs, rows)
        assert rows.out is not None
        out, grad_out = rows.out.to(accumulate), rows.grad_out.to(accumulate)
        if rows.delta is not None:
            grad_out = torch.nn.functional.pad(grad_out, (0, more), value=1.0)
            terms = split(rows.delta, more, self._dtype(query.dtype))
            out = torch.cat([torch.zeros_like(out), terms], dim=-1)
        query, key, value, out, grad_out = self._ready(
            width, query, key, value, out, grad_out
        )
        # exp(score - inf) = 0: a row that sees nothing gives nothing.
        lse = torch.where(rows.lse == -float("inf"), float("inf"), rows.lse)
        inputs = Inputs(query, key, value)
        rows = Rows(out, lse, rows.delta, grad_out)
        widths = key_width, key_width, value_width
        grads: list[Any] = [carry, None, None]

        def empty(i: int) -> torch.Tensor:
            return _zeros(inputs[i], widths[i], accumulate)

        for piece in self._pieces(visit, query.shape[2], key.shape[2]):
            shares = self._backward(piece, inputs, rows, visit)
            covers = piece.covers(query.shape[2], key.shape[2])
            for i, (share, side) in enumerate(
                zip(shares, (rows_of, columns, columns), strict=True)
            ):
                share = share[..., : widths[i]]
                if grads[i] is None and covers:
                    grads[i] = joined(share.to(accumulate), piece)
                    continue
                if grads[i] is None:
                    grads[i] = empty(i)
                total = side(grads[i], piece)
                total += apart(share, piece)
        return Gradients(
            *(empty(i) if g is None else g for i, g in enumerate(grads))
        )

    def add(self, total: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        return total.add_(share)

    def _backward_width(self, inputs: Inputs, rows: Rows) -> tuple[int, int]:
        """Width of the tensors of a backward, and its columns for `delta`.

        The operation makes delta of `out` and `grad_out`. Where the
        log-sum-exp has a gradient of its own they are given columns more, in
        which the values are 0, and their product is delta.
        """
        query, _, value = inputs
        more = 0 if rows.delta is None else self._terms(query.dtype)
        return max(query.shape[3], value.shape[3] + more), more

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
        self, inputs: Inputs, visit: Visit, rows: Rows | None = None
    ) -> bool:
        """True if fused calls can compute a block, of all tensors in the
        width of the widest."""
        scoring = visit.scoring
        query, _, value = inputs
        width = max(query.shape[3], value.shape[3])
        if rows is not None:
            width, _ = self._backward_width(inputs, rows)
        return (
            query.device.type == self.plain.device
            and self._dtype(query.dtype) is not None
            and self._width(width) <= min(self.plain.widest, self.masked.widest)
            and all(tensor.numel() for tensor in inputs)
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

    def _pieces(self, visit: Visit, queries: int, keys: int) -> list[Piece]:
        found = pieces(visit, queries, keys, self.plain.grain)
        if not self.plain.square:
            return found
        return [part for piece in found for part in squared(piece)]

    def _operation(self, piece: Piece) -> Operation:
        fits = min(piece.rows, piece.columns) >= self.plain.fewest
        return self.plain if piece.mask is None and fits else self.masked

    def _forward(self, piece: Piece, inputs: Inputs, visit: Visit) -> Partial:
        """Attention of the rows of a piece over its columns; rectangles of
        one piece are further samples.

        Args:
            piece: of the visit.
            inputs: (B, H, Q, W), (B, K, S, W), (B, K, S, W).
            visit: which it is.

        Returns:
            `Partial` of (B * count, H, rows, W) and (B * count, H, rows).
        """
        query, key, value = inputs
        call = _call(piece, query, visit)
        operation, heads = self._operation(piece), query.shape[1]
        key, value = (
            _repeated(samples(columns(t, piece), piece), heads, operation)
            for t in (key, value)
        )
        query = samples(rows_of(query, piece), piece)
        out, lse = operation.forward(query, key, value, call)
        if call.mask is not None:
            seen = call.mask.any(dim=-1)
            lse = torch.where(seen, lse, -float("inf"))
            out = torch.where(seen[..., None], out, 0.0)
        return Partial(out, lse)

    def _backward(
        self, piece: Piece, inputs: Inputs, rows: Rows, visit: Visit
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients that a piece adds to those of its rows and columns.

        Args:
            piece: of the visit.
            inputs: (B, H, Q, W), (B, K, S, W), (B, K, S, W).
            rows: `out` and `grad_out` (B, H, Q, W), over all keys of the
                sequence; `lse` (B, H, Q), `inf` for a row that sees nothing.
            visit: which it is.

        Returns:
            (B * count, H, rows, W), (B * count, K, columns, W) twice.
        """
        operation = self._operation(piece)
        query, key, value = inputs
        key_heads, heads = key.shape[1], query.shape[1]
        keys, values = (
            _repeated(samples(columns(t, piece), piece), heads, operation)
            for t in (key, value)
        )
        call = _call(piece, query, visit)
        grad_out, query, out, lse = (
            samples(rows_of(t, piece), piece)
            for t in (rows.grad_out, query, rows.out, rows.lse)
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


def _call(piece: Piece, query: torch.Tensor, visit: Visit) -> Call:
    mask = None if piece.mask is None else piece.allowed(query.device)
    return Call(piece.causal, mask, visit.scoring.scale)


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
    """`precision.accumulation_dtype`, as PyTorch has it."""
    return getattr(torch, precision.accumulation_dtype(dtype))
