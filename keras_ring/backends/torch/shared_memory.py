"""Messages between processes of one machine, through memory that both see.

Gloo sends what it is given through sockets, which on one machine copies
every byte twice more than needed, by threads that take the cores from the
computation. Here the sender writes a message once into memory that the
receiver has mapped too, and what goes through the process group is where it
lies: a few numbers, that also wake the receiver, and fail if the sender died.

A slot of memory belongs to one sender and one receiver. The sender writes,
the receiver copies what it finds and counts that up in the slot, and the
sender takes the slot again. Nobody ever waits for a slot: if none is free
there is one more. The order in which the other process sees a copy and the
count is that of x86, so that no other processor takes part.
"""

import contextlib
import mmap
import os
import platform
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

FOLDER = Path("/dev/shm")
# Bytes in front of a message: how many were copied out of the slot so far.
HEADER = 64
NONE = -1


class Slot:
    """Memory that two processes have mapped.

    Args:
        descriptor: of its file, which may be closed afterwards.
        size: bytes of the file.
    """

    def __init__(self, descriptor: int, size: int):
        memory = mmap.mmap(descriptor, size)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.copied = whole[:8].view(torch.int64)
        self.message = whole[HEADER:]
        self.written = 0

    @property
    def free(self) -> bool:
        """Whether all that was written has been copied."""
        return int(self.copied) == self.written


class Note(NamedTuple):
    """What the receiver is told of a message.

    Attributes:
        slot: its number; below 0 where the message had to be sent, counting
            down from `NONE`.
        size: bytes of the message.
        gone: the number of a slot that is no more; `NONE` if none is.
    """

    slot: int
    size: int
    gone: int


class Outbox:
    """Slots from this process to one other.

    Args:
        name: that no other outbox has.
    """

    def __init__(self, name: str):
        self.name = name
        self.slots: dict[int, Slot] = {}
        self._next, self._refused = 0, 0

    def take(self, size: int) -> tuple[torch.Tensor | None, Note]:
        """Memory for a message, and its note; None if there is no more. The
        message is to be written at once, and the note sent after it."""
        free = {
            number: slot.message.numel()
            for number, slot in self.slots.items()
            if slot.free
        }
        fitting = [number for number, room in free.items() if room >= size]
        if fitting:
            number = min(fitting, key=lambda number: free[number])
            return self._written(number, size, NONE)
        # Messages have grown: one that none fits into makes room.
        gone = next(iter(free), NONE)
        self.slots.pop(gone, None)
        with contextlib.suppress(OSError):
            self._add(self._next, size)
            self._next += 1
            return self._written(self._next - 1, size, gone)
        self._refused += 1
        return None, Note(-self._refused, size, gone)

    def _written(
        self, number: int, size: int, gone: int
    ) -> tuple[torch.Tensor, Note]:
        slot = self.slots[number]
        slot.written += 1
        return slot.message[:size], Note(number, size, gone)

    def _add(self, number: int, size: int) -> None:
        path = _path(self.name, number)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        size += HEADER
        try:
            # Now, or what is written later ends the process if it is full.
            os.posix_fallocate(descriptor, 0, size)
            self.slots[number] = Slot(descriptor, size)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(descriptor)


class Inbox:
    """The slots of one other process' outbox.

    Args:
        name: of the outbox.
    """

    def __init__(self, name: str):
        self.name = name
        self.slots: dict[int, Slot] = {}

    def forget(self, note: Note) -> None:
        """Let go of the slot that is no more, if the message is elsewhere."""
        self.slots.pop(note.gone, None)

    @contextlib.contextmanager
    def message(self, note: Note) -> Iterator[torch.Tensor]:
        """The bytes of a message, which are the sender's again after it."""
        self.forget(note)
        if note.slot not in self.slots:
            self.slots[note.slot] = self._opened(note.slot)
        slot = self.slots[note.slot]
        yield slot.message[: note.size]
        slot.copied += 1

    def _opened(self, number: int) -> Slot:
        path = _path(self.name, number)
        descriptor = os.open(path, os.O_RDWR)
        # From here on it is there for as long as one of the two processes,
        # and leaves nothing behind, however they end.
        path.unlink()
        try:
            return Slot(descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)


class SharedMemory:
    """The outboxes and inboxes of one member of a process group.

    Args:
        names: of the members, by rank, each of its own making.
        rank: of this one.
    """

    def __init__(self, names: list[str], rank: int):
        self.names, self.rank = names, rank
        self._outboxes: dict[int, Outbox] = {}
        self._inboxes: dict[int, Inbox] = {}

    def outbox(self, target: int) -> Outbox:
        if target not in self._outboxes:
            name = f"{self.names[self.rank]}-{target}"
            self._outboxes[target] = Outbox(name)
        return self._outboxes[target]

    def inbox(self, source: int) -> Inbox:
        if source not in self._inboxes:
            name = f"{self.names[source]}-{self.rank}"
            self._inboxes[source] = Inbox(name)
        return self._inboxes[source]


def connect(group: dist.ProcessGroup) -> SharedMemory | None:
    """The shared memory of a group on CPUs; every member calls this.

    Returns:
        None for all of them unless all see the same memory: on one machine,
        and not in containers that keep theirs apart.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own = f"keras_ring-{secrets.token_hex(8)}"
    # One slot, which the next member has to find.
    trial = Outbox(own)
    memory, _ = trial.take(1) if _possible() else (None, None)
    names: list[str] = [""] * size
    dist.all_gather_object(names, own, group=group)
    found = memory is not None
    try:
        Inbox(names[rank - 1])._opened(0)
    except OSError:
        found = False
    agreed = torch.tensor([int(found)])
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
    _path(own, 0).unlink(missing_ok=True)
    return SharedMemory(names, rank) if bool(agreed) else None


def _possible() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and FOLDER.is_dir()


def _path(name: str, number: int) -> Path:
    return FOLDER / f"{name}-{number}"
