"""Sharded weights on PyTorch: the parts that a process keeps, and the whole.

With `shard="weights"` a process keeps an equal part of each weight, of its
gradient and of what the optimizer keeps of it (ZeRO-3; Rajbhandari et al. 2019,
https://arxiv.org/abs/1910.02054). Code that reads a weight gets the whole of
it, gathered from everyone; the gradient of that is added up, and each process
gets its part. A gathered weight that PyTorch would keep for the backward is
forgotten, and gathered once more there. With `shard="optimizer"` (ZeRO-1) the
weights are whole, and each process updates its part of them.

Parts are parts of the flattened weight, since the optimizers of `BY_ELEMENT`
know nothing of its shape.
"""

import contextlib
import enum
import math
import zlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from keras_ring.backends.torch.member import Member
from keras_ring.backends.torch.processes import groups

# Optimizers whose update of a number follows from its own gradient alone.
BY_ELEMENT = (
    *("SGD", "RMSprop", "Adam", "AdamW", "Adamax", "Nadam", "Adagrad"),
    *("Adadelta", "Lion", "Ftrl"),
)
# Numbers that are gathered in one transfer after an update.
BUCKET = 1 << 24
# Values of one variable that are compared between processes.
SAMPLE = 4096

_PART = "_keras_ring_part"


class Reading(enum.Enum):
    """Values that a variable of which the process keeps a part may have.

    Attributes:
        WHOLE: the whole of it; everywhere but in what follows.
        PART: this process' part, and the shape of that: for optimizers, also
            of a weight that is whole on each process.
        KEPT: what the process keeps: for PyTorch's parameters of a layer.
    """

    WHOLE = "whole"
    PART = "part"
    KEPT = "kept"


_READING: ContextVar[Reading] = ContextVar(
    "keras_ring_reading", default=Reading.WHOLE
)


class Part:
    """Part of a variable that this process keeps.

    Attributes:
        world: the processes.
        shape: of the whole variable.
        keeps_whole: whether the process has the whole variable as well, as it
            does with the weights of `shard="optimizer"`.
        start, stop: of the part in the flattened variable.
        digest: of the whole values that it was given; the same on everyone.
    """

    def __init__(
        self, world: Member, shape: Sequence[int], keeps_whole: bool = False
    ):
        self.world = world
        self.shape = tuple(shape)
        self.keeps_whole = keeps_whole
        self.numel = math.prod(self.shape)
        # All but the last parts have this size.
        self.size = -(-self.numel // world.size)
        self.start = min(world.rank * self.size, self.numel)
        self.stop = min(self.start + self.size, self.numel)
        self.digest = 0

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process' part of a whole tensor, a view if that can be."""
        return tensor.detach().reshape(-1)[self.start : self.stop]

    def remember(self, whole: Any) -> None:
        """Take note of a value that this process' part is cut from."""
        values = sample(torch.as_tensor(whole))
        self.digest = zlib.crc32(values.tobytes(), self.digest)

    def padded(self, part: torch.Tensor) -> torch.Tensor:
        """A part in the size of all parts."""
        missing = self.size - part.numel()
        return torch.nn.functional.pad(part, (0, missing)) if missing else part

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """The whole tensor of everyone's part; each process calls this."""
        own = self.padded(part.detach())
        every = self.world.everyone.all_gather(own, 0)
        return every[: self.numel].reshape(self.shape)

    def summed(self, gradient: torch.Tensor) -> torch.Tensor:
        """This process' part of the sum of everyone's whole tensor, float32
        for half precision."""
        short = gradient.dtype in (torch.float16, torch.bfloat16)
        flat = gradient.detach().reshape(-1)
        flat = flat.to(torch.float32) if short else flat
        missing = self.size * self.world.size - self.numel
        flat = torch.nn.functional.pad(flat, (0, missing)) if missing else flat
        everyone: Any = self.world.everyone
        return everyone.sum_of_parts(flat)[: self.stop - self.start]


def sample(tensor: torch.Tensor) -> np.ndarray:
    """Numbers of a tensor that tell it from another one."""
    flat = tensor.detach().reshape(-1)
    few = flat[:: max(flat.numel() // SAMPLE, 1)]
    values: np.ndarray = few.to("cpu", torch.float64).contiguous().numpy()
    return values


def part_of(variable: Any) -> Part | None:
    """The part of a variable that this process keeps; None for one that every
    process has for itself."""
    return vars(variable).get(_PART)


def lies_in_parts(variable: Any) -> bool:
    """True for a variable that no process has whole."""
    part = part_of(variable)
    return part is not None and not part.keeps_whole


def shared(world: Member | None, level: str) -> bool:
    """True if processes share what is named by a value of `shard`."""
    if world is None or world.size == 1:
        return False
    return world.strategy.shard == "weights" or (
        level == "optimizer" and world.strategy.shard == "optimizer"
    )


def keep_part(variable: Any, world: Member) -> None:
    """Keep this process' part of a new variable, of the value that it has on
    rank 0. Every process makes the same variables in the same order."""
    parameter = variable._value
    # NCCL sends from GPUs only.
    device = groups.keras_device()
    whole = parameter.detach().to(device).contiguous()
    everyone: Any = world.everyone
    with everyone.reporting:
        dist.broadcast(whole, src=0, group=everyone.group)
    part = Part(world, whole.shape)
    vars(variable)[_PART] = part
    variable._value = torch.nn.Parameter(
        part.cut(whole).clone().to(parameter.device),
        requires_grad=parameter.requires_grad,
    )


def keep_whole(variable: Any, world: Member) -> None:
    """Let this process update its part of a variable that it keeps whole."""
    if part_of(variable) is None:
        value = variable._value
        # So that a part is a view, which can be changed in place.
        value.data = value.data.contiguous()
        vars(variable)[_PART] = Part(world, variable.shape, keeps_whole=True)


def keep_slot(slot: Any, weight: Any) -> None:
    """Say of what an optimizer keeps of a part of a weight that it is one."""
    part = part_of(weight)
    if part is not None:
        vars(slot)[_PART] = Part(part.world, part.shape)
        slot._shape, slot._ndim = part.shape, len(part.shape)


@contextlib.contextmanager
def reading(kind: Reading) -> Iterator[None]:
    """Inside, variables have this as their values."""
    token = _READING.set(kind)
    try:
        yield
    finally:
        _READING.reset(token)


def reads(kind: Reading) -> bool:
    """True inside of `reading` of a kind."""
    return _READING.get() is kind


def flat(variable: Any, part: Part) -> torch.Tensor:
    """A part's values, which can be changed in place."""
    value: torch.Tensor = variable._value
    if not part.keeps_whole:
        return value
    return value.detach().view(-1)[part.start : part.stop]


def gathered(
    part: Part, value: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """A weight for use, with its gradient.

    Args:
        part: of the weight.
        value: of the part.
        dtype: of the result.
    """
    whole: torch.Tensor = _Gather.apply(value, part, dtype)
    _remember(whole, _Source(part, value, value._version, dtype))
    return whole


def with_gradient(part: Part, value: torch.Tensor) -> torch.Tensor:
    """A weight after a backward, for a step of the user's own: the gradient at
    it is that of the whole weight, averaged over everyone."""
    gradient = value.grad
    assert gradient is not None  # The callers have looked.
    whole = gathered(part, value, value.dtype)
    if whole.requires_grad:
        whole.retain_grad()
    whole.grad = part.whole(gradient) / part.world.size
    return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, part: Part, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.part, ctx.dtype = part, value.dtype
        return part.whole(value.detach().to(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.part.summed(gradient).to(ctx.dtype), None, None


class _Source(NamedTuple):
    """Origin of a gathered weight."""

    part: Part
    value: torch.Tensor
    version: int
    dtype: torch.dtype


class _View(NamedTuple):
    """A gathered weight, or a view of it, that can be had again."""

    source: _Source
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


# By the memory of gathered weights, which is known to be theirs as long as
# somebody holds it.
_GATHERED: dict[StorageWeakRef, _Source] = {}


def forget() -> None:
    """Let go of the parts of weights that nobody holds whole."""
    for known in [known for known in _GATHERED if known.expired()]:
        del _GATHERED[known]


def _remember(whole: torch.Tensor, source: _Source) -> None:
    forget()
    _GATHERED[StorageWeakRef(whole.untyped_storage())] = source


@contextlib.contextmanager
def gathering_again() -> Iterator[None]:
    """Inside, PyTorch keeps no gathered weight for the backward, which gathers
    it again."""
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        forget()


def _pack(tensor: torch.Tensor) -> Any:
    source = None
    if _GATHERED and tensor.layout is torch.strided:
        storage = tensor.untyped_storage()
        source = _GATHERED.get(StorageWeakRef(storage))
    if source is None or source.dtype != tensor.dtype:
        return tensor
    offset = int(tensor.storage_offset())
    return _View(source, tensor.size(), tensor.stride(), offset)


def _unpack(kept: Any) -> torch.Tensor:
    if not isinstance(kept, _View):
        return kept
    part, value, version, dtype = kept.source
    if value._version != version:
        raise RuntimeError(
            "A weight that the backward needs must not change before it. "
            f"Received: a weight of shape {part.shape}, changed since it was "
            "used. Apply gradients after the backward."
        )
    whole = part.whole(value.detach().to(dtype))
    return whole.as_strided(kept.size, kept.stride, kept.offset)


def gather_updated(variables: Sequence[Any]) -> None:
    """Give every process the parts of whole weights that others updated."""
    waiting: list[Any] = []
    count = 0
    for variable in [*variables, None]:
        part = None if variable is None else part_of(variable)
        full = part is None or count + part.numel > BUCKET
        other = (
            waiting
            and variable is not None
            and (waiting[0]._value.dtype != variable._value.dtype)
        )
        if waiting and (full or other):
            _gather_bucket(waiting)
            waiting, count = [], 0
        if part is not None and part.keeps_whole:
            waiting.append(variable)
            count += part.numel


def _gather_bucket(variables: Sequence[Any]) -> None:
    parts: list[Any] = [part_of(variable) for variable in variables]
    own = torch.cat(
        [
            part.padded(flat(variable, part))
            for variable, part in zip(variables, parts, strict=True)
        ]
    )
    world = parts[0].world
    every = world.everyone.all_gather(own[None], 0)
    start = 0
    for variable, part in zip(variables, parts, strict=True):
        rows = every[:, start : start + part.size].reshape(-1)
        variable._value.detach().copy_(rows[: part.numel].reshape(part.shape))
        start += part.size


def alike(world: Member, gradients: Sequence[Any]) -> list[Any]:
    """Parts of gradients; where someone's have an infinite number so do
    everyone's, so that all leave a step out or none does."""
    given = [g for g in gradients if g is not None]
    if not given:
        return list(gradients)
    bad = sum((~torch.isfinite(g)).sum() for g in given)
    total = world.everyone.sum(torch.as_tensor(bad).to(torch.float32))
    if not total:
        return list(gradients)
    # A part may have no number that could tell.
    return [
        None if g is None else g.new_full((max(g.numel(), 1),), torch.nan)
        for g in gradients
    ]


def norms(world: Member, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of each whole gradient, of the parts of it."""
    squares = [
        torch.sum(g.to(torch.promote_types(g.dtype, torch.float32)) ** 2)
        for g in gradients
    ]
    return torch.sqrt(world.everyone.sum(torch.stack(squares)))
