"""Messages through memory that the processes of one machine share."""

import contextlib
import errno
import mmap
import os
import platform
import secrets

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import distributed

import keras_ring
from keras_ring.backends.torch.processes import shared_memory
from keras_ring.backends.torch.processes.shared_memory import Inbox, Outbox

pytestmark = pytest.mark.skipif(
    not shared_memory._possible(),
    reason="memory is shared on Linux on x86 alone; this is "
    f"{platform.machine()}",
)
# Numbers of a message, below and above what is sent through sockets.
LENGTHS = [3, 10_000, 500_000, 70_000, 1_000_000, 500_000]


def ring_of(size):
    return keras_ring.DistributedStrategy(sequence_parallel=size).world.ring()


def message(rank, number):
    draw = np.random.default_rng([rank, number])
    first = draw.standard_normal(LENGTHS[number]).astype("float32")
    return torch.from_numpy(first), torch.arange(5) * rank


def check_arrives(ring, refused=()):
    """Several messages at once, in any order, three times."""
    outbox = ring.memory.outbox((ring.index() + 1) % ring.size)
    for _ in range(3):
        pending = [
            ring.start_shift(message(ring.index(), number))
            for number in range(len(LENGTHS))
        ]
        source = (ring.index() - 1) % ring.size
        for number in (1, 0, 4, 2, 3, 5):
            for have, want in zip(
                pending[number].wait(), message(source, number), strict=True
            ):
                assert have.dtype == want.dtype
                assert torch.equal(have, want)
        distributed.barrier(group=ring.group)
        # No more than were under way at once, however often.
        assert len(outbox.slots) <= len(LENGTHS) - 1
        assert bool(outbox.slots) == (ring.index() not in refused)
        assert all(slot.free for slot in outbox.slots.values())


def open_files(name=""):
    """Files of shared memory that this process has open."""
    links = []
    prefix = f"memfd:{name or 'keras_ring-'}"
    for number in os.listdir("/proc/self/fd"):
        # The one that the list itself was read from is closed.
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return [link for link in links if prefix in link]


def check_open(outbox, inbox):
    """No more than the one that goes with a map of Python's."""
    for box in (outbox, inbox):
        assert len(open_files(f"{box.name}-")) <= len(box.slots)


def visible_files(ring):
    """What would be left of processes that are killed now."""
    names = tuple(member.name for member in ring.memory.members)
    return [name for name in os.listdir("/dev/shm") if name.startswith(names)]


def check_messages(size):
    ring = ring_of(size)
    check_arrives(ring)
    # All that was sent has been mapped, as whoever sends the next one sees.
    ring.start_shift(message(ring.index(), 1)).wait()
    check_open(
        ring.memory.outbox((ring.index() + 1) % ring.size),
        ring.memory.inbox((ring.index() - 1) % ring.size),
    )
    assert visible_files(ring) == []


@pytest.mark.parametrize("size", [2, 3])
def test_messages_arrive_and_slots_are_used_again(on_devices, size):
    on_devices(size, check_messages, size)


def check_refused(size):
    ring = ring_of(size)
    ring.memory = shared_memory.connect(ring.group)
    before = os.posix_fallocate

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if ring.index() == 1:
        os.posix_fallocate = full
    try:
        check_arrives(ring, refused=(1,))
    finally:
        os.posix_fallocate = before
    if ring.index() == 1:
        assert open_files(ring.memory.members[1].name) == []


def test_a_message_without_memory_is_sent_as_it_is(on_devices):
    """Of one process; the others do not know."""
    on_devices(3, check_refused, 3)


def check_apart(size):
    """One numbers processes in its own way, as a container does."""
    ring = ring_of(size)
    before = os.getpid
    if ring.index() == 1:
        os.getpid = lambda: os.getppid()
    try:
        assert shared_memory.connect(ring.group) is None
    finally:
        os.getpid = before


def test_processes_that_see_different_memory_share_none(on_devices):
    on_devices(3, check_apart, 3)


def test_a_slot_is_free_when_its_message_was_copied():
    name = f"keras_ring-{secrets.token_hex(8)}"
    outbox, inbox = Outbox(name), Inbox(name, os.getpid())
    first, first_note = outbox.take(100)
    first.fill_(1)
    second, second_note = outbox.take(100)
    second.fill_(2)
    assert (first_note.slot, second_note.slot) == (0, 1)
    # Nobody has fetched them, and they have no name that stays.
    assert not [file for file in os.listdir("/dev/shm") if name in file]
    with inbox.message(second_note) as found:
        assert found.tolist() == [2] * 100
        assert outbox.take(10)[1].slot == 2
    # Free again, and taken before a new one is made.
    assert outbox.take(50)[1].slot == 1
    # What is free and too small goes, here and there.
    with inbox.message(first_note) as found:
        assert found.tolist() == [1] * 100
    large, note = outbox.take(200)
    assert (note.slot, note.gone) == (3, 0)
    assert sorted(outbox.slots) == [1, 2, 3]
    large.fill_(3)
    with inbox.message(note) as found:
        assert found.tolist() == [3] * 200
    assert sorted(inbox.slots) == [1, 3]
    # A file is open until its slot is seen to be free.
    outbox.take(200)
    assert len(open_files(name)) <= 3 + 2 + 2
    del outbox, inbox, first, second, large, found
    assert open_files(name) == []


@pytest.mark.parametrize("where", [(os, "posix_fallocate"), (mmap, "mmap")])
def test_where_memory_runs_out_nothing_is_left_and_a_slot_goes(
    where, monkeypatch
):
    """Here and there, although the message itself goes another way."""
    name = f"keras_ring-{secrets.token_hex(8)}"
    outbox, inbox = Outbox(name), Inbox(name, os.getpid())
    with inbox.message(outbox.take(100)[1]):
        pass

    def full(*arguments):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        place, note = outbox.take(200)
    assert place is None
    assert (note.slot, note.gone) == (-1, 0)
    inbox.forget(note)
    assert outbox.slots == inbox.slots == {}
    assert open_files(name) == []
    # There is some again.
    with inbox.message(outbox.take(200)[1]) as found:
        assert found.numel() == 200
