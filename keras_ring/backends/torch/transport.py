"""The ring on PyTorch: point-to-point transfers of `torch.distributed`.

On one machine's CPUs their contents go through `shared_memory`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from keras_ring.backends.torch.processes.shared_memory import Note, SharedMemory
from keras_ring.distribution.transport import (
    Pending,
    PointToPoint,
    check_permutation,
)

# Positions that travel together. The memory of transfers is bounded by it, and
# not by the chunk; a GPU wants more work for each call than a CPU.
PORTION = {"cpu": 2048, "gpu": 16384}

# Offset of a tensor in a packed buffer, so that any dtype can be viewed there.
ALIGNMENT = 16

RESTART = "Restart all processes, from a checkpoint if there is one."

# Bytes from which on a message goes through shared memory, if there is any.
SHARED = 1 << 14


class RingTransport(PointToPoint):
    """Members of one process group, in the order of their group ranks.

    The tensors of one transfer travel as one message. No gradient flows
    through a transfer: attention has its own, and everything else that moves
    tensors around the ring needs one as well.

    Args:
        group: a process group of its own, made with the same timeout.
        timeout: seconds after which a transfer is given up.
        memory: that all members see, if any.
        waits: of this process, if somebody looks at them.
    """

    eager = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        timeout: float,
        memory: SharedMemory | None = None,
        waits: "Waits | None" = None,
    ):
        self.group = group
        self.reporting = Reporting(timeout, waits)
        self.memory = memory
        self.size = dist.get_world_size(group)
        on_gpu = dist.get_backend(group) == dist.Backend.NCCL
        self.portion = PORTION["gpu" if on_gpu else "cpu"]

    def close(self) -> None:
        """Let go of the group and the memory."""
        del self.group
        self.memory = None

    def index(self) -> int:
        return dist.get_rank(self.group)

    def start_exchange(
        self, tensors: Sequence[torch.Tensor], permutation: Sequence[int]
    ) -> Pending:
        check_permutation(permutation, self.size)
        permutation = list(permutation)
        return self._start(
            tensors,
            permutation[self.index()],
            permutation.index(self.index()),
        )

    def all_gather(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        own = _as_bytes(tensor)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with self.reporting:
            dist.all_gather(parts, own, group=self.group)
        return torch.cat([_from_bytes(p, tensor) for p in parts], axis)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        _check_no_gradient([tensor])
        # Half precision is summed in float32, the same on every backend.
        short = tensor.dtype in (torch.float16, torch.bfloat16)
        total = tensor.detach().to(torch.float32) if short else tensor.detach()
        total = total.contiguous()
        total = (
            total.clone() if total.data_ptr() == tensor.data_ptr() else total
        )
        with self.reporting:
            dist.all_reduce(total, group=self.group)
        return total.to(tensor.dtype)

    def sum_of_parts(self, tensor: torch.Tensor) -> torch.Tensor:
        """This member's part of the sum of everyone's tensor.

        Args:
            tensor: of rank 1, with a multiple of `size` numbers.
        """
        _check_no_gradient([tensor])
        own = tensor.new_empty(tensor.numel() // self.size)
        # The name before PyTorch 2.13.
        older = getattr(dist, "reduce_scatter_tensor", None)
        scatter: Any = getattr(dist, "reduce_scatter_single", older)
        with self.reporting:
            scatter(own, tensor.contiguous(), group=self.group)
        return own

    def _start(
        self, tensors: Sequence[torch.Tensor], target: int, source: int
    ) -> Pending:
        """Issue one message to `target` and one from `source`."""
        if target == self.index():
            return Pending(lambda: list(tensors))
        _check_no_gradient(tensors)
        layout = Layout(tensors)
        if self.memory is not None and layout.size >= SHARED:
            return self._through_memory(tensors, layout, target, source)
        sent = layout.packed(tensors)
        received = torch.empty_like(sent)
        works = self._issue(
            (dist.isend, sent, target), (dist.irecv, received, source)
        )

        def finish() -> list[torch.Tensor]:
            self._wait(works)
            return layout.unpacked(received)

        return Pending(finish)

    def _through_memory(
        self,
        tensors: Sequence[torch.Tensor],
        layout: "Layout",
        target: int,
        source: int,
    ) -> Pending:
        """`_start` with notes for messages; a message that found no memory
        follows its note."""
        memory: Any = self.memory
        place, note = memory.outbox(target).take(layout.size)
        if place is not None:
            layout.pack(tensors, place)
        sent = torch.tensor(note)
        received = torch.empty_like(sent)
        works = self._issue(
            (dist.isend, sent, target), (dist.irecv, received, source)
        )
        if place is None:
            message = layout.packed(tensors)
            works += self._issue((dist.isend, message, target), tag=-note.slot)

        def finish() -> list[torch.Tensor]:
            self._wait(works)
            arrived = Note(*received.tolist())
            buffer = torch.empty(layout.size, dtype=torch.uint8)
            inbox = memory.inbox(source)
            if arrived.slot < 0:
                inbox.forget(arrived)
                missing = dist.irecv, buffer, source
                self._wait(self._issue(missing, tag=-arrived.slot))
            else:
                with inbox.message(arrived) as message:
                    buffer.copy_(message)
            return layout.unpacked(buffer)

        return Pending(finish)

    def _issue(
        self, *transfers: tuple[Any, torch.Tensor, int], tag: int = 0
    ) -> list[Any]:
        """Start operations on buffers and members, all at once. Those of one
        tag are received in the order in which they were sent."""
        with self.reporting:
            works: list[Any] = dist.batch_isend_irecv(
                [
                    dist.P2POp(
                        operation,
                        buffer,
                        dist.get_global_rank(self.group, peer),
                        self.group,
                        tag,
                    )
                    for operation, buffer, peer in transfers
                ]
            )
        return works

    def _wait(self, works: Sequence[Any]) -> None:
        with self.reporting:
            for work in works:
                work.wait()


class Waits:
    """Count of the waits for others that this process has begun or ended.

    Attributes:
        count: odd while it waits.
    """

    count = 0

    def explain(self, timeout: float, error: RuntimeError) -> str:
        """Explain a failed transfer to the user."""
        return (
            "A transfer between the processes failed: another process has "
            f"ended, or did not answer within timeout={timeout:g} seconds. "
            "Look at the output of the others for the first error. If none "
            "failed, check that every process runs the same calls (a fit or "
            "predict on one rank alone waits for the others), or raise "
            f"DistributedStrategy(timeout=...). {RESTART} Received: {error}"
        )


class Reporting:
    """In here a process waits for others, and says so if they fail.

    Args:
        timeout: seconds after which it waits no longer.
        waits: to be counted.
    """

    def __init__(self, timeout: float, waits: Waits | None = None):
        self.timeout = timeout
        self.waits = waits or Waits()

    def __enter__(self) -> None:
        self.waits.count += 1

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.waits.count += 1
        if isinstance(error, RuntimeError):
            raise RuntimeError(
                self.waits.explain(self.timeout, error)
            ) from error


class Layout:
    """Places of tensors in one message.

    Args:
        tensors: of the shapes and dtypes of those that are sent.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self.kinds = [(tensor.dtype, tensor.shape) for tensor in tensors]
        self.starts, self.stops = [], []
        self.size = 0
        for tensor in tensors:
            start = math.ceil(self.size / ALIGNMENT) * ALIGNMENT
            self.size = start + tensor.numel() * tensor.element_size()
            self.starts.append(start)
            self.stops.append(self.size)

    def pack(
        self, tensors: Sequence[torch.Tensor], message: torch.Tensor
    ) -> None:
        """Write tensors to a buffer of bytes."""
        for place, tensor in zip(self.unpacked(message), tensors, strict=True):
            place.copy_(tensor)

    def packed(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tensors as a buffer of bytes; one alone may be its own."""
        if len(tensors) == 1:
            return _as_bytes(tensors[0])
        device = tensors[0].device
        message = torch.empty(self.size, dtype=torch.uint8, device=device)
        self.pack(tensors, message)
        return message

    def unpacked(self, message: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in a buffer of bytes, which they share."""
        return [
            message[start:stop].view(dtype).reshape(shape)
            for start, stop, (dtype, shape) in zip(
                self.starts, self.stops, self.kinds, strict=True
            )
        ]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    _check_no_gradient([tensor])
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _from_bytes(buffer: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return buffer.view(like.dtype).reshape(like.shape)


def _check_no_gradient(tensors: Sequence[torch.Tensor]) -> None:
    """Refuse to cut a gradient silently."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            "No gradient flows through a transfer between processes. Use "
            "it inside keras_ring.backends' `custom_gradient`, or detach the "
            "tensor."
        )
