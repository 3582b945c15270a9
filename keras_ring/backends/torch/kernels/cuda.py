"""Fused attention of PyTorch for CUDA devices.

Three operations, all private, each with its own shapes and limits; presence
is checked here, results in `keras_ring.attention.selection`:

- flash (Dao 2023, arXiv 2307.08691) and cuDNN compute in half precision and
  round each partial result to it; they are given no masks, and only squares
  of a causal one, because releases differ in where they put its corner;
- cuDNN takes no single key or query, and with a mask its gradient is NaN at
  some lengths (pytorch issue 196678), which is one more reason for the above;
- the memory-efficient one (Rabe and Staats 2021, arXiv 2112.05682) takes
  float32 too and a tensor that is added to the scores, whose rows must begin
  at multiples of 16 bytes; its log-sum-exp is padded to 32 rows, it wants as
  many key heads as query heads, and its gradient is garbage where the result
  does not have its heads behind its rows in memory.

All want widths that are multiples of 8. None drops anything here: the states
of their random numbers, which their gradients ask for, are not read.
"""

from typing import Any

import torch

from keras_ring.backends.torch.kernels.fused import Call, Operation, added
from keras_ring.backends.torch.kernels.pieces import COARSE

HALF = (torch.float16, torch.bfloat16)
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Cuda(Operation):
    """Base of the `Operation`s for GPUs; they differ in `name`, that of the
    operation, and in what it is called with."""

    device = "cuda"
    multiple = 8
    widest: float = 256
    masks = False
    square = True
    grain = COARSE
    name: str
    dtypes: tuple[torch.dtype, ...] = HALF

    def there(self) -> bool:
        names = self.name, self.name + "_backward"
        return torch.cuda.is_available() and all(
            hasattr(torch.ops.aten, name) for name in names
        )

    def dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        return dtype if dtype in self.dtypes else None

    @property
    def _forward(self) -> Any:
        return getattr(torch.ops.aten, self.name)

    @property
    def _backward(self) -> Any:
        return getattr(torch.ops.aten, self.name + "_backward")


class CudaFlash(_Cuda):
    """FlashAttention 2."""

    description = "FlashAttention, on CUDA devices in half precision"

    name = "_scaled_dot_product_flash_attention"

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self._forward(
            *(query, key, value, 0.0, call.causal, False), scale=call.scale
        )
        return out, lse

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: Call,
    ) -> Gradients:
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)
        found: Gradients = self._backward(
            *(grad_out, query, key, value, out, lse.contiguous()),
            *(None, None, query.shape[2], key.shape[2], 0.0, call.causal),
            *(state, state[0]),
            scale=call.scale,
        )
        return found


class CuDnn(_Cuda):
    """The attention of NVIDIA's cuDNN."""

    description = "cuDNN, on CUDA devices in half precision"

    name = "_scaled_dot_product_cudnn_attention"
    widest: float = 128
    fewest = 2

    def __init__(self) -> None:
        # Releases differ in whether the log-sum-exp has a last axis of 1.
        self.axes = 3

    def there(self) -> bool:
        # As in PyTorch itself: its gradients are not the same in every run.
        strict = (
            torch.are_deterministic_algorithms_enabled()
            and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        return super().there() and not strict

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self._forward(
            *(query, key, value, None, True, 0.0, call.causal, False),
            scale=call.scale,
        )
        self.axes = lse.ndim
        return out, lse.reshape(out.shape[:3])

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: Call,
    ) -> Gradients:
        state = torch.zeros((), dtype=torch.int64, device=query.device)
        lse = lse.contiguous()
        lse = lse[..., None] if self.axes == 4 else lse
        found: Gradients = self._backward(
            *(grad_out, query, key, value, out, lse, state, state, None),
            *(None, None, query.shape[2], key.shape[2], 0.0, call.causal),
            scale=call.scale,
        )
        return found


class Efficient(_Cuda):
    """Memory-efficient attention, of float32 too and with masks."""

    description = (
        "the memory-efficient operation, on CUDA devices; float32 as well"
    )

    name = "_scaled_dot_product_efficient_attention"
    dtypes = (*HALF, torch.float32)
    masks = True
    grouped = False

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = self._forward(
            *(query, key, value, _aligned(call.mask, query)),
            *(True, 0.0, call.causal),
            scale=call.scale,
        )
        return out, lse[:, :, : query.shape[2]]

    def backward(
        self,
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: Call,
    ) -> Gradients:
        state = torch.zeros((), dtype=torch.int64, device=query.device)
        # It takes for granted that heads lie behind the rows.
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        grads = self._backward(
            *(grad_out, query, key, value, _aligned(call.mask, query)),
            *(out, padded(lse), state, state, 0.0),
            *([True, True, True, False], call.causal),
            scale=call.scale,
        )
        return grads[0], grads[1], grads[2]


def padded(lse: torch.Tensor) -> torch.Tensor:
    """(B, H, R) -> (B, H, R and up to 31 more)."""
    more = -lse.shape[2] % 32
    return torch.nn.functional.pad(
        lse, (0, more), value=float("inf")
    ).contiguous()


def _aligned(
    mask: torch.Tensor | None, query: torch.Tensor
) -> torch.Tensor | None:
    """Terms to be added to (B, H, R, C) scores, every row of it on a multiple
    of 16 bytes."""
    if mask is None:
        return None
    columns = mask.shape[3]
    mask = torch.nn.functional.pad(mask, (0, -columns % 16))
    rows = query.shape[0], query.shape[1], query.shape[2]
    added_all = added(mask, query.dtype)[..., :columns]
    return added_all.expand(*rows, columns)
