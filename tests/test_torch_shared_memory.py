"""Messages through memory that the processes of one machine share."""

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
from keras_ring.backends.torch import shared_memory
from keras_ring.backends.torch.shared_memory import Inbox, Outbox

pytestmark = pytest.mark.skipif(
    not shared_memory._possible(),
    reason="memory is shared on x86 with /dev/shm alone; this is "
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


def own_files():
    """What the processes of this one's ring have left."""
    ring = ring_of(int(os.environ["WORLD_SIZE"]))
    distributed.barrier(group=ring.group)
    return [
        path
        for path in shared_memory.FOLDER.iterdir()
        if any(path.name.startswith(name) for name in ring.memory.names)
    ]


def check_messages(size):
    check_arrives(ring_of(size))
    assert own_files() == []


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
    assert own_files() == []


def test_a_message_without_memory_is_sent_as_it_is(on_devices):
    """Of one process; the others do not know."""
    on_devices(3, check_refused, 3)


def check_apart(size, folder):
    ring = ring_of(size)
    before = shared_memory.FOLDER
    if ring.index() == 1:
        shared_memory.FOLDER = before / folder
        shared_memory.FOLDER.mkdir()
    try:
        assert shared_memory.connect(ring.group) is None
    finally:
        distributed.barrier(group=ring.group)
        if ring.index() == 1:
            shared_memory.FOLDER.rmdir()  # It is empty.
        shared_memory.FOLDER = before


def test_processes_that_see_different_memory_share_none(on_devices):
    on_devices(3, check_apart, 3, f"apart-{secrets.token_hex(4)}")


def test_a_slot_is_free_when_its_message_was_copied():
    name = f"keras_ring-test-{secrets.token_hex(8)}"
    outbox, inbox = Outbox(name), Inbox(name)
    first, first_note = outbox.take(100)
    first.fill_(1)
    second, second_note = outbox.take(100)
    second.fill_(2)
    assert (first_note.slot, second_note.slot) == (0, 1)
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
    Inbox(name)._opened(2)


@pytest.mark.parametrize("where", [(os, "posix_fallocate"), (mmap, "mmap")])
def test_where_memory_runs_out_nothing_is_left_and_a_slot_goes(
    where, monkeypatch
):
    """Here and there, although the message itself goes another way."""
    name = f"keras_ring-test-{secrets.token_hex(8)}"
    outbox, inbox = Outbox(name), Inbox(name)
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
    assert list(shared_memory.FOLDER.glob(f"{name}-*")) == []
    # There is some again.
    with inbox.message(outbox.take(200)[1]) as found:
        assert found.numel() == 200
