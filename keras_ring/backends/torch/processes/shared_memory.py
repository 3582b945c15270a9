"""Messages between processes of one machine, through memory that both see.

Gloo sends what it is given through sockets, which on one machine copies
every byte twice more than needed, by threads that take the cores from the
computation. Here the sender writes a message once into memory that the
receiver has mapped too, and what goes through the process group is where it
lies: a few numbers, that also wake the receiver, and fail if the sender died.

The memory is a file without a name in any folder, which is gone with the last
process that has it, however that ends. The receiver opens it as a file of the
sender, by its number there.

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
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

FILES = "/proc/{process}/fd/{descriptor}"
# Bytes in front of a message: how many were copied out of the slot so far.
HEADER = 64
NONE = -1


class Slot:
    """Memory that two processes have mapped.

    Args:
        descriptor: of its file, which is the slot's from then on.
        size: bytes of the file.
    """

    def __init__(self, descriptor: int, size: int):
        self.descriptor = descriptor
        # The memory is there for as long as it is mapped, open or not.
        self.close = weakref.finalize(self, os.close, descriptor)
        memory = mmap.mmap(descriptor, size)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.copied = whole[:8].view(torch.int64)
        self.message = whole[HEADER:]
        self.written = 0

    @property
    def free(self) -> bool:
        """True if all that was written has been copied."""
        return int(self.copied) == self.written


class Note(NamedTuple):
    """A sender's note to the receiver about a message.

    Attributes:
        slot: its number; below 0 where the message had to be sent, counting
            down from `NONE`.
        size: bytes of the message.
        gone: the number of a slot that is no more; `NONE` if none is.
        descriptor: of the slot's file at the sender; only for a slot that the
            receiver does not know.
    """

    slot: int
    size: int
    gone: int
    descriptor: int = NONE


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
        free = {}
        for number, slot in self.slots.items():
            if slot.free:
                free[number] = slot.message.numel()
                # The receiver has mapped it.
                slot.close()
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
        return slot.message[:size], Note(number, size, gone, slot.descriptor)

    def _add(self, number: int, size: int) -> None:
        descriptor = os.memfd_create(f"{self.name}-{number}")
        size += HEADER
        try:
            # Now, or what is written later ends the process if there is none.
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            os.close(descriptor)
            raise
        self.slots[number] = Slot(descriptor, size)


class Inbox:
    """The slots of one other process' outbox.

    Args:
        name: of the outbox.
        process: number of the process that has it.
    """

    def __init__(self, name: str, process: int):
        self.name, self.process = name, process
        self.slots: dict[int, Slot] = {}

    def forget(self, note: Note) -> None:
        """Let go of the slot that is no more, if the message is elsewhere."""
        self.slots.pop(note.gone, None)

    @contextlib.contextmanager
    def message(self, note: Note) -> Iterator[torch.Tensor]:
        """The bytes of a message, which are the sender's again after it."""
        self.forget(note)
        if note.slot not in self.slots:
            self.slots[note.slot] = self._opened(note)
        slot = self.slots[note.slot]
        yield slot.message[: note.size]
        slot.copied += 1

    def _opened(self, note: Note) -> Slot:
        path = FILES.format(process=self.process, descriptor=note.descriptor)
        # In another container the number may be that of another process.
        found = os.readlink(path)
        if f"{self.name}-{note.slot}" not in found:
            raise FileNotFoundError(f"{path} is {found}.")
        descriptor = os.open(path, os.O_RDWR)
        slot = Slot(descriptor, os.fstat(descriptor).st_size)
        slot.close()
        return slot


class Peer(NamedTuple):
    """One process of a group, as the others know it.

    Attributes:
        name: of its outboxes; nobody else has it.
        process: its number.
        trial: of a slot that the next member has to find.
    """

    name: str
    process: int
    trial: Note


class SharedMemory:
    """The outboxes and inboxes of one member of a process group.

    Args:
        members: by rank.
        rank: of this one.
    """

    def __init__(self, members: list[Peer], rank: int):
        self.members, self.rank = members, rank
        self._outboxes: dict[int, Outbox] = {}
        self._inboxes: dict[int, Inbox] = {}

    def outbox(self, target: int) -> Outbox:
        if target not in self._outboxes:
            name = f"{self.members[self.rank].name}-{target}"
            self._outboxes[target] = Outbox(name)
        return self._outboxes[target]

    def inbox(self, source: int) -> Inbox:
        if source not in self._inboxes:
            member = self.members[source]
            name = f"{member.name}-{self.rank}"
            self._inboxes[source] = Inbox(name, member.process)
        return self._inboxes[source]


def connect(group: dist.ProcessGroup) -> SharedMemory | None:
    """The shared memory of a group on CPUs; every member calls this.

    Returns:
        None for all members, unless each can open the memory of the member
        before it. Members on other machines cannot, nor can those in
        containers that do not see each other's processes.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    name = f"keras_ring-{secrets.token_hex(8)}"
    trial = Outbox(name)
    _, note = trial.take(1) if _possible() else (None, Note(NONE, 0, NONE))
    members: Any = [None] * size
    own = Peer(name, os.getpid(), note)
    dist.all_gather_object(members, own, group=group)
    before = members[rank - 1]
    found = before.trial.slot >= 0
    if found:
        try:
            Inbox(before.name, before.process)._opened(before.trial)
        except OSError:
            found = False
    agreed = torch.tensor([int(found)])
    dist.all_reduce(agreed, dist.ReduceOp.MIN, group=group)
    return SharedMemory(members, rank) if bool(agreed) else None


def _possible() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and hasattr(
        os, "memfd_create"
    )
