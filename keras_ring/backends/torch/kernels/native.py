"""The C++ attention on PyTorch: called with the addresses of tensors, which
may be views, so that nothing is copied. Python lets go of its lock while the
library computes."""

import array
import ctypes
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from keras_ring.attention.kernel import Gradients, Inputs, Rows
from keras_ring.attention.native import library
from keras_ring.attention.native.kernel import NativeKernel
from keras_ring.attention.numerics import Partial
from keras_ring.attention.visit import Visit
from keras_ring.backends.torch.kernels.pieces import Piece, pieces
from keras_ring.distribution import strategy
from keras_ring.masks.band import Band

# What the library computes with, whatever PyTorch's defaults are.
FLOAT = torch.float32
PLAIN: dict[str, Any] = {"dtype": FLOAT, "device": "cpu"}

# `keras_ring_visit` of `attention.h`.
VISIT = struct.Struct("@9q2P4qfiP3q")
# Numbers of a `keras_ring_tensor`: address and strides.
FIELDS = 4
# Those of them that have an address.
KINDS = torch.Tensor, torch.nn.Parameter


class Pairs(NamedTuple):
    """The pairs that count, for one call; a mask is boolean, (batch or 1,
    heads or 1, queries or 1, keys), its keys without gaps."""

    query_starts: Sequence[Any]
    key_starts: Sequence[Any]
    band: Band
    scale: float
    mask: torch.Tensor | None = None


class TorchNativeKernel(NativeKernel):
    """A block in one call, or in one for each of its `pieces` under a mask
    that is no band."""

    any_mask = True

    def load(self) -> None:
        loaded()

    def fits(
        self, inputs: Inputs, visit: Visit, rows: Rows | None = None
    ) -> bool:
        # What is traced, exported or compiled has no addresses, or none that
        # stay.
        return (
            not torch.jit.is_tracing()
            and not torch.compiler.is_compiling()
            and super().fits(inputs, visit, rows)
        )

    def _takes(self, tensor: torch.Tensor) -> bool:
        # By name it may be asked for what is elsewhere.
        return (
            type(tensor) in KINDS
            and tensor.dtype is FLOAT
            and tensor.is_cpu
            and tensor.numel() > 0
        )

    def call_forward(
        self,
        inputs: Inputs,
        visit: Visit,
        band: Band | None,
        carry: Partial | None,
    ) -> Partial:
        if band is not None:
            return _forward(inputs, _pairs(visit, band), carry)
        query, key, value = inputs
        if carry is None:
            carry = Partial(
                _empty((*query.shape[:3], value.shape[3])).zero_(),
                query.new_full(query.shape[:3], -float("inf")),
            )
        for rows, columns, pairs in _rectangles(visit, query, key):
            _forward(
                _cut(inputs, rows, columns),
                pairs,
                Partial(*(tensor[:, :, rows] for tensor in carry)),
            )
        return carry

    def call_backward(
        self,
        inputs: Inputs,
        rows: Rows,
        visit: Visit,
        band: Band | None,
        carry: torch.Tensor | None,
    ) -> Gradients:
        if band is not None:
            return _backward(inputs, rows, _pairs(visit, band), carry)
        query, key, value = inputs
        if carry is None:
            carry = _empty(query.shape).zero_()
        grads = Gradients(
            carry, *(_empty(t.shape).zero_() for t in (key, value))
        )
        for own, columns, pairs in _rectangles(visit, query, key):
            share = _backward(
                _cut(inputs, own, columns),
                # The library is not given `out`: it is in delta already.
                Rows(
                    None,
                    *(None if t is None else t[:, :, own] for t in rows[1:]),
                ),
                pairs,
                carry[:, :, own],
            )
            grads.key[:, :, columns] += share.key
            grads.value[:, :, columns] += share.value
        return grads

    def add(self, total: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        return total.add_(share)


def _rectangles(
    visit: Visit, query: torch.Tensor, key: torch.Tensor
) -> Iterator[tuple[slice, slice, Pairs]]:
    """Rows and columns of each rectangle of a visit, and what counts in it."""
    for piece in pieces(visit, query.shape[2], key.shape[2]):
        pairs = _rectangle(piece, visit.scoring.scale)
        for step in range(0, piece.count * piece.step or 1, piece.step or 1):
            rows, columns = (
                slice(side.start + step, side.stop + step)
                for side in (piece.queries, piece.keys)
            )
            yield rows, columns, pairs


def _cut(inputs: Inputs, rows: slice, columns: slice) -> Inputs:
    """The operands of a rectangle, as views."""
    query, key, value = inputs
    return Inputs(query[:, :, rows], key[:, :, columns], value[:, :, columns])


def _forward(inputs: Inputs, pairs: Pairs, carry: Partial | None) -> Partial:
    """The partial result, with what was there before, which is overwritten."""
    go_on = carry is not None
    if carry is None:
        rows = inputs.query.shape[:3]
        carry = Partial(
            _empty((*rows, inputs.value.shape[3])), torch.empty(rows, **PLAIN)
        )
    _call(loaded().keras_ring_forward, pairs, (*inputs, *carry), go_on)
    return carry


def _backward(
    inputs: Inputs, rows: Rows, pairs: Pairs, carry: torch.Tensor | None
) -> Gradients:
    """The gradients; `carry` is overwritten by its sum with the query's."""
    go_on = carry is not None
    grads = (
        _empty(inputs.query.shape) if carry is None else carry,
        *(_empty(tensor.shape) for tensor in inputs[1:]),
    )
    tensors = *inputs, rows.lse, rows.delta, rows.grad_out, *grads
    _call(loaded().keras_ring_backward, pairs, tensors, go_on)
    return Gradients(*grads)


def _call(
    function: Any, pairs: Pairs, tensors: Sequence[torch.Tensor], go_on: bool
) -> None:
    """Call a function of the library.

    Args:
        function: as loaded.
        pairs: what counts.
        tensors: query, key, value and the others. What is read may be any
            view; what is written is made here, with rows without gaps.
        go_on: whether results are there already.
    """
    query, _, value = (tensor.shape for tensor in tensors[:3])
    found: list[int] = []
    held: list[torch.Tensor] = []
    for tensor in tensors:
        if tensor.dtype is not FLOAT or not tensor.is_cpu:
            raise TypeError(
                "The C++ attention takes float32 tensors on a CPU. Received: "
                f"{tensor.dtype} on {tensor.device}."
            )
        strides = tensor.stride()
        if len(strides) == 4 and strides[3] != 1 and tensor.shape[3] > 1:
            tensor = tensor.contiguous()
            held.append(tensor)  # Until the call is over.
            strides = tensor.stride()
        found += (tensor.data_ptr(), *strides[:3])
    numbers = array.array("q", found)
    first, _ = numbers.buffer_info()
    sides = pairs.query_starts, pairs.key_starts
    starts = array.array("i", [int(start) for side in sides for start in side])
    start, _ = starts.buffer_info()
    status = function(
        VISIT.pack(
            *(query[0], query[1], value[1], query[2], value[2]),
            *(query[3], value[3], *map(len, sides)),
            *(start, start + starts.itemsize * len(pairs.query_starts)),
            *(*pairs.band, pairs.scale, torch.get_num_threads()),
            *_address(pairs.mask),
        ),
        *map(
            ctypes.c_void_p,
            range(
                first,
                first + numbers.itemsize * len(numbers),
                numbers.itemsize * FIELDS,
            ),
        ),
        int(go_on),
    )
    if status:
        raise MemoryError("Attention has no memory for its tiles.")


def _address(mask: torch.Tensor | None) -> tuple[int, ...]:
    """Of a mask and its strides; an axis of 1 is the same for all."""
    if mask is None:
        return 0, 0, 0, 0
    axes = zip(mask.shape[:3], mask.stride(), strict=False)
    return mask.data_ptr(), *(0 if size == 1 else step for size, step in axes)


def _load() -> Any:
    seconds = library.patience(strategy.current())
    path = library.build("attention", [library.ATTENTION], seconds=seconds)
    found = ctypes.CDLL(str(path))
    found.keras_ring_use_threads(_openmp())
    return found


def _openmp() -> Any:
    """PyTorch's own way to run something in its threads, which wait for work
    on their cores for a while; None where it is not found."""
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        names = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line}
        known = ("libgomp", "libiomp", "libomp")
        found = [name for name in names if Path(name).name.startswith(known)]
        beside = str(Path(torch.__file__).parent)
        own = [name for name in found if name.startswith(beside)] or found
        # Of several that others have loaded nobody says which is its own.
        return ctypes.CDLL(own[0]).GOMP_parallel if len(own) == 1 else None
    except (OSError, AttributeError):
        return None


loaded = library.Once(_load)


def _empty(shape: Sequence[int]) -> torch.Tensor:
    """(batch, heads, length, width), with the heads behind the length as
    everywhere outside of attention."""
    _, heads, length, width = shape
    strides = length * heads * width, width, heads * width, 1
    return torch.empty_strided(tuple(shape), strides, **PLAIN)


def _pairs(visit: Visit, band: Band) -> Pairs:
    return Pairs(
        visit.query_starts, visit.key_starts, band, visit.scoring.scale
    )


def _rectangle(piece: Piece, scale: float) -> Pairs:
    """The same of a rectangle with places of its own."""
    mask = None
    if piece.mask is not None:
        mask = piece.allowed(torch.device("cpu"))
        if mask.stride(3) != 1:
            mask = mask.contiguous()
    band = Band(least=0) if piece.causal else Band()
    return Pairs((0,), (0,), band, scale, mask)
