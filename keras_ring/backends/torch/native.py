"""The C++ attention on PyTorch: called with the addresses of tensors, which
may be views, so that nothing is copied."""

import ctypes
import functools
from typing import Any

import torch

from keras_ring.kernel import BlockGradients
from keras_ring.native import library
from keras_ring.native.kernel import Band, NativeKernel
from keras_ring.numerics import Partial
from keras_ring.tiling import Block

Count = ctypes.c_int64


class Visit(ctypes.Structure):
    """`keras_ring_visit` of `attention.h`."""

    _fields_ = (
        *((name, Count) for name in ("batch", "heads", "key_heads")),
        *((name, Count) for name in ("queries", "keys")),
        *((name, Count) for name in ("width", "value_width")),
        *((name, Count) for name in ("query_parts", "key_parts")),
        ("query_starts", ctypes.POINTER(ctypes.c_int32)),
        ("key_starts", ctypes.POINTER(ctypes.c_int32)),
        *((name, Count) for name in ("least", "most", "stop")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
    )


class Tensor(ctypes.Structure):
    """`keras_ring_tensor` of `attention.h`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, Count) for name in ("batch", "head", "row")),
    )


class TorchNativeKernel(NativeKernel):
    """Python lets go of its lock while the library computes."""

    def load(self) -> None:
        _library()

    def forward(
        self,
        partial: Partial | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block: Block,
        band: Band,
    ) -> Partial:
        batch, heads, length, _ = query.shape
        go_on = partial is not None
        if partial is None:
            partial = Partial(
                _empty(batch, heads, length, value.shape[3]),
                torch.empty((batch, heads, length)),
            )
        _library().keras_ring_forward(
            ctypes.byref(_visit(query, key, value, block, band)),
            *_tensors(query, key, value, partial.out, partial.lse[..., None]),
            int(go_on),
        )
        return partial

    def backward(
        self,
        grad_query: torch.Tensor | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        grad_out: torch.Tensor,
        block: Block,
        band: Band,
    ) -> BlockGradients:
        go_on = grad_query is not None
        if grad_query is None:
            grad_query = _empty(*query.shape)
        grads = grad_query, _empty(*key.shape), _empty(*value.shape)
        _library().keras_ring_backward(
            ctypes.byref(_visit(query, key, value, block, band)),
            *_tensors(query, key, value, lse[..., None], delta[..., None]),
            *_tensors(grad_out, *grads),
            int(go_on),
        )
        return BlockGradients(*grads)

    def add(self, total: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        return total.add_(share)


@functools.cache
def _library() -> Any:
    return ctypes.CDLL(
        str(library.build("attention", [library.ATTENTION]))
    )


def _empty(batch: int, heads: int, length: int, width: int) -> torch.Tensor:
    """(batch, heads, length, width), with the heads behind the length as
    everywhere outside of attention."""
    return torch.empty((batch, length, heads, width)).transpose(1, 2)


def _visit(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block: Block,
    band: Band,
) -> Visit:
    starts = [
        (ctypes.c_int32 * len(side))(*map(int, side))
        for side in (block.query_starts, block.key_starts)
    ]
    return Visit(
        *(*query.shape[:2], key.shape[1], query.shape[2], key.shape[2]),
        *(query.shape[3], value.shape[3], *map(len, starts), *starts, *band),
        *(block.scoring.scale, torch.get_num_threads()),
    )


def _tensors(*tensors: torch.Tensor) -> list[Any]:
    """Addresses and strides; a tensor whose numbers of a row are no
    neighbours is copied, which is only for those that are read."""
    found = []
    for tensor in tensors:
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            tensor = tensor.contiguous()
        made = Tensor(tensor.data_ptr(), *tensor.stride()[:3])
        made.tensor = tensor  # As long as the call needs it.
        found.append(ctypes.byref(made))
    return found
