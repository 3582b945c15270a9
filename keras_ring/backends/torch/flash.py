"""PyTorch's fused attention for CPUs as a kernel.

The operation behind `scaled_dot_product_attention` returns the log-sum-exp
and its gradient takes one that belongs to a longer sequence, which is what a
ring needs (Dao et al. 2022, arXiv 2205.14135, algorithms 1 and 4). It is
private, so its presence is checked here and its results in
`keras_ring.kernels`. What it is known to get wrong is kept from it:

- a last axis with a stride other than 1 gives garbage without a word;
- an empty tensor ends the process;
- a row that sees nothing has a log-sum-exp of 0 and not of `-inf`;
- a causal mask with a scale that is not positive gives NaN;
- it takes no dropout, and values only as wide as the keys;
- it rounds its results to the dtype of its inputs, so that partial results
  in half precision would lose more with every member of a ring.

The operations for GPUs need other shapes of mask and log-sum-exp. They are
left out until they can be tried on one.
"""

from collections.abc import Callable
from typing import Any

import torch

from keras_ring import numerics
from keras_ring.attention import Kernel
from keras_ring.backends.torch.pieces import Piece, pieces
from keras_ring.blockwise import BlockGradients
from keras_ring.numerics import Partial
from keras_ring.tiling import Block

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


class FlashKernel:
    """Fused calls where they fit, another kernel where they do not.

    Args:
        otherwise: computes the visits that do not fit.

    Legend: B batch, H query heads, K key/value heads, Q and S query and key
    lengths, D and E the head dimensions of query/key and of value, W the
    width that all tensors of a call have.
    """

    name = "flash"

    def __init__(self, otherwise: Kernel):
        self.otherwise = otherwise

    def available(self, device: str | None = None) -> bool:
        return device in (None, "cpu") and all(
            hasattr(torch.ops.aten, name) for name in (FORWARD, BACKWARD)
        )

    def block_forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block: Block,
    ) -> Partial:
        if not self._fits(query, key, value, block):
            return self.otherwise.block_forward(query, key, value, block)
        dtype = _accumulation_dtype(query)
        width = max(query.shape[3], value.shape[3])
        values = value.shape[3]
        query, key, value = (
            _widened(t, width, dtype) for t in (query, key, value)
        )
        rows = query.shape[:3]
        out = query.new_zeros((*rows, values), dtype=dtype)
        lse = query.new_full(rows, -float("inf"), dtype=dtype)
        parts = pieces(block, query.shape[2], key.shape[2])
        for piece in parts:
            part = _forward(piece, query, key, value, block.scoring.scale)
            part = part._replace(out=part.out[..., :values])
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
        if not self._fits(query, key, value, block):
            return self.otherwise.block_backward(
                query, key, value, out, lse, delta, grad_out, block
            )
        dtype = _accumulation_dtype(query)
        key_width, value_width = query.shape[3], value.shape[3]
        out, grad_out = out.to(dtype), grad_out.to(dtype)
        width = max(key_width, value_width)
        # The operation makes delta of `out` and `grad_out`. Where the
        # log-sum-exp has a gradient of its own they are given one column
        # more, in which the values are 0, and their product is delta.
        plain = torch.equal(torch.sum(grad_out * out, dim=-1), delta)
        if not plain:
            width = max(width, value_width + 1)
            grad_out = torch.nn.functional.pad(grad_out, (0, 1), value=1.0)
            out = torch.cat([torch.zeros_like(out), delta[..., None]], dim=-1)
        query, key, value, out, grad_out = (
            _widened(t, width, dtype)
            for t in (query, key, value, out, grad_out)
        )
        # exp(score - inf) = 0: a row that sees nothing gives nothing.
        lse = torch.where(lse == -float("inf"), float("inf"), lse)
        parts = pieces(block, query.shape[2], key.shape[2])
        grads: list[torch.Tensor] = []
        for piece in parts:
            share = _backward(
                piece,
                *(grad_out, query, key, value, out, lse),
                block.scoring.scale,
            )
            if len(parts) == 1 and (piece.rows, piece.columns) == (
                query.shape[2],
                key.shape[2],
            ):
                grads = list(share)
                break
            if not grads:
                grads = [torch.zeros_like(t) for t in (query, key, value)]
            grads[0][:, :, piece.queries] += share[0]
            grads[1][:, :, piece.keys] += share[1]
            grads[2][:, :, piece.keys] += share[2]
        if not grads:
            grads = [torch.zeros_like(t) for t in (query, key, value)]
        return BlockGradients(
            grads[0][..., :key_width],
            grads[1][..., :key_width],
            grads[2][..., :value_width],
        )

    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        return yes() if bool(predicate) else no()

    def _fits(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block: Block,
    ) -> bool:
        """Whether fused calls can compute a visit."""
        scoring = block.scoring
        return (
            self.available(query.device.type)
            and all(t.numel() for t in (query, key, value))
            and scoring.scale > 0
            and scoring.soft_cap is None
            and scoring.bias is None
            and scoring.slopes is None
            and scoring.dropout is None
        )


def _forward(
    piece: Piece,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
) -> Partial:
    """Attention of the rows of a piece over its columns.

    Args:
        piece: a rectangle of the visit.
        query: (B, H, Q, W), accumulation dtype.
        key: (B, K, S, W).
        value: (B, K, S, W).
        scale: above 0.

    Returns:
        `Partial` of (B, H, rows, W) and (B, H, rows).
    """
    allowed, added = _mask(piece, query)
    out, lse = getattr(torch.ops.aten, FORWARD)(
        query[:, :, piece.queries],
        key[:, :, piece.keys],
        value[:, :, piece.keys],
        0.0,
        piece.causal,
        attn_mask=added,
        scale=scale,
    )
    if allowed is not None:
        seen = allowed.any(dim=-1)
        lse = torch.where(seen, lse, -float("inf"))
    return Partial(out, lse)


def _backward(
    piece: Piece,
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a piece adds to the gradients of its rows and columns.

    Args:
        piece: a rectangle of the visit.
        grad_out: (B, H, Q, W), accumulation dtype.
        query: (B, H, Q, W).
        key: (B, K, S, W).
        value: (B, K, S, W).
        out: (B, H, Q, W), over all keys of the sequence.
        lse: (B, H, Q), likewise; `inf` for a row that sees nothing.
        scale: above 0.

    Returns:
        (B, H, rows, W), (B, K, columns, W), (B, K, columns, W).
    """
    _, added = _mask(piece, query)
    own, seen = piece.queries, piece.keys
    return getattr(torch.ops.aten, BACKWARD)(
        grad_out[:, :, own],
        query[:, :, own],
        key[:, :, seen],
        value[:, :, seen],
        out[:, :, own],
        lse[:, :, own],
        0.0,
        piece.causal,
        attn_mask=added,
        scale=scale,
    )


def _mask(
    piece: Piece, query: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The pairs that count, and what is added to the scores to say so."""
    if piece.mask is None:
        return None, None
    allowed = piece.allowed(query.device)
    added = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
    return allowed, added.masked_fill_(~allowed, -float("inf"))


def _widened(
    tensor: torch.Tensor, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """(..., w) -> (..., W), with zeros behind and a last stride of 1."""
    tensor = tensor.to(dtype)
    if tensor.shape[3] < width:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[3]))
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _accumulation_dtype(tensor: torch.Tensor) -> Any:
    return getattr(torch, numerics.accumulation_dtype(tensor.dtype))
