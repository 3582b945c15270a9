"""PyTorch's fused attention for CPUs.

It is private, so its presence is checked here and its results in
`keras_ring.attention.selection`. What it is known to get wrong is kept from
it by `FusedKernel`, and here:

- a last axis with a stride other than 1 gives garbage without a word;
- an empty tensor ends the process;
- a row that sees nothing has a log-sum-exp of 0 and not of `-inf`;
- a causal mask with a scale that is not positive gives NaN;
- it takes no dropout, and values only as wide as the keys;
- it rounds its results to the dtype of its inputs, so that partial results
  in half precision would lose more with every member of a ring: they are
  computed in float32.
"""

import torch

from keras_ring.backends.torch.kernels.fused import (
    Call,
    Operation,
    accumulation_dtype,
    added,
)
from keras_ring.backends.torch.kernels.pieces import FINE

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


class CpuFlash(Operation):
    """For any dtype; half precision in float32."""

    description = "PyTorch's fused attention for CPUs"
    device = "cpu"
    grain = FINE

    def there(self) -> bool:
        return all(hasattr(torch.ops.aten, n) for n in (FORWARD, BACKWARD))

    def dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        found: torch.dtype = accumulation_dtype(dtype)
        return found

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = getattr(torch.ops.aten, FORWARD)(
            *(query, key, value, 0.0, call.causal),
            attn_mask=added(call.mask, query.dtype),
            scale=call.scale,
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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = getattr(
            torch.ops.aten, BACKWARD
        )(
            *(grad_out, query, key, value, out, lse, 0.0, call.causal),
            attn_mask=added(call.mask, query.dtype),
            scale=call.scale,
        )
        return found
