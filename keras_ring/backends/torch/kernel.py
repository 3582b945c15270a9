"""The kernels of PyTorch, by preference."""

from collections.abc import Callable
from typing import Any

import torch

from keras_ring.attention.blockwise.kernel import BlockwiseKernel
from keras_ring.attention.kernel import Inputs
from keras_ring.attention.numerics import Partial
from keras_ring.attention.visit import Visit
from keras_ring.backends.torch.kernels.cuda import CudaFlash, CuDnn, Efficient
from keras_ring.backends.torch.kernels.flash import CpuFlash
from keras_ring.backends.torch.kernels.fused import (
    FusedKernel,
    accumulation_dtype,
)
from keras_ring.backends.torch.kernels.native import TorchNativeKernel


class Kernel(BlockwiseKernel):
    """The blockwise kernel in Python loops; a store is a tensor of tiles
    that is written in place.

    It runs inside `torch.autograd.Function`, where nothing is recorded.
    """

    def device(self, tensor: torch.Tensor) -> str | None:
        return tensor.device.type

    def loop(self, count: Any, body: Callable, carry: Any) -> Any:
        for i in range(int(count)):
            carry = body(i, carry)
        return carry

    def branch(self, predicate: Any, yes: Callable, no: Callable) -> Any:
        if isinstance(predicate, torch.Tensor) and predicate.is_meta:
            return yes()
        return yes() if bool(predicate) else no()

    def forward_alone(self, inputs: Inputs, visit: Visit) -> Partial:
        query, _, value = inputs
        if query.is_meta:
            # Keras is inferring shapes, maybe of a very long sequence: the
            # loops would take long, and what fails it repeats with memory.
            rows, dtype = query.shape[:3], accumulation_dtype(query.dtype)
            return Partial(
                query.new_empty((*rows, value.shape[3]), dtype=dtype),
                query.new_empty(rows, dtype=dtype),
            )
        return super().forward_alone(inputs, visit)

    def store(self, tensor: torch.Tensor, axis: int = 0) -> torch.Tensor:
        return tensor.movedim(axis, 0)

    def read(
        self, store: torch.Tensor, index: int, axis: int = 0
    ) -> torch.Tensor:
        return store[index]

    def write(
        self, store: torch.Tensor, index: int, tile: torch.Tensor, axis: int = 0
    ) -> torch.Tensor:
        store[index] = tile
        return store

    def stacked(self, store: torch.Tensor, axis: int = 0) -> torch.Tensor:
        return store.movedim(0, axis)

    def product(
        self, equation: str, left: torch.Tensor, right: torch.Tensor
    ) -> torch.Tensor:
        dtype = accumulation_dtype(left.dtype)
        return torch.einsum(equation, left.to(dtype), right.to(dtype))


KERNEL = Kernel()
FLASH = FusedKernel("flash", KERNEL, CpuFlash())
# By preference; the last is the reference.
KERNELS = (
    TorchNativeKernel(FLASH if FLASH.available() else KERNEL),
    FLASH,
    FusedKernel("cudnn", KERNEL, CuDnn(), Efficient()),
    FusedKernel("cuda_flash", KERNEL, CudaFlash(), Efficient()),
    FusedKernel("efficient", KERNEL, Efficient()),
    KERNEL,
)
