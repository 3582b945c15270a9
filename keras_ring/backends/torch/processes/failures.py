"""Errors on one process, and what they mean for the others.

Every process counts its calls of fit, evaluate, predict, the *_on_batch
methods and `strategy.run`. One that raises leaves a record in the store of
the default process group: the number of the call, and the error. When the
next call begins, all look at each other's records. If all failed in the same
call, what may still be under way between them is dropped with their process
groups, and the call goes on in new ones.

A process that others go on without would keep them waiting. So while a wait
is long a thread looks for records, and tells that this process waits. Once
every process has failed or waits, and has done so for a while, nothing will
ever come: the wait is ended with an error that names the first that failed.
Nothing of this runs in a step: there the waits are counted, and no more.

Gloo offers no way to end a wait, but it ends all those of a group when one of
them times out, and so the thread waits a millisecond for a message that
nobody sends.
"""

import atexit
import contextlib
import datetime
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from keras_ring.backends.torch.transport import (
    RESTART,
    RingTransport,
    Waits,
)
from keras_ring.errors import original

# Seconds between two looks of the thread, and for which nobody may have moved
# before all are given up: a message can be under way that long.
TICK = 0.25
STILL = 1.0
# Seconds that the end of a process may take for the others' sake.
LINGER = 3.0
# Characters of an error that the others are told.
LONGEST = 600
VANISHED = f"All processes waited for each other. {RESTART}"
# A message that nobody sends.
TAG = 1 << 20


class Record(NamedTuple):
    """Record of how a process ended its part.

    Attributes:
        order: the number of the record; lower ones were written before.
        call: the number of the call that failed; -1 if it is no failure of
            its own, but it waited in vain or has ended.
        moved: whether the call had sent anything.
        error: in one line.
    """

    order: int
    call: int
    moved: bool
    error: str


class Failures(Waits):
    """The failures of one process of several, and what it knows of others'.

    Args:
        store: that all processes see, for this alone.
        forget: called when the process groups are no more.
    """

    def __init__(self, store: dist.Store, forget: Callable[[], None]):
        self.store = store
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Of strategies that are still there; their groups stay for others of
        # the same shape.
        self.transports: weakref.WeakSet[RingTransport] = weakref.WeakSet()
        self._groups: set[dist.ProcessGroup] = set()
        # How often all failed alike and were given new groups.
        self.resets = 0
        self._forget = forget
        self._epoch = 0
        self._calls, self._depth, self._before = 0, 0, 0
        # This process' own failure, and why it can go on no more.
        self._own: Record | None = None
        self._lost: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, name="keras_ring failures", daemon=True
        )
        self._thread.start()
        atexit.register(self.end)

    def watch(self, transports: Sequence[RingTransport]) -> None:
        """Look after transports, and end their groups when all have failed."""
        self.transports.update(transports)
        self._groups.update(transport.group for transport in transports)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One call that all processes make; calls can nest.

        Raises:
            RuntimeError: if an earlier one failed on some processes only.
        """
        if self._depth == 0:
            self._begin()
        self._depth += 1
        try:
            yield
        except BaseException as error:
            if self._depth == 1:
                self._failed(error)
            raise
        finally:
            self._depth -= 1

    def explain(self, timeout: float, error: RuntimeError) -> str:
        """Explain a failed transfer: the first of the others' failures, if
        there is one."""
        if self._lost is None:
            # Who dies of an error has written it before.
            records = _within(1.0, self._records) or {}
            self._give_up(records, super().explain(timeout, error))
        return self._lost or ""

    def end(self) -> None:
        """The end of the process: leave no thread that holds a tensor, and
        the others not without a word."""
        self._ended.set()
        self._thread.join(LINGER)
        if self._own is None and self._lost is None:
            _within(1.0, lambda: self._write(-1, False, "it has ended"))
        self._drop_groups()
        if self._own is not None and self._lost is None:
            # The store may be this process', and others still to read it.
            _within(LINGER, lambda: self._all_records(LINGER))

    def _begin(self) -> None:
        if self._own is not None and self._lost is None:
            self._settle(self._own)
        if self._lost is not None:
            raise RuntimeError(self._lost)
        self._calls += 1
        self._before = self.count

    def _failed(self, error: BaseException) -> None:
        if self._lost is None:
            # Once more, where an error was caught in between.
            self._own = self._own or self._write(
                self._calls, self.count != self._before, _line(error)
            )

    def _settle(self, own: Record) -> None:
        """After a failure: all must have failed in the same call."""
        limit = max(t.reporting.timeout for t in self.transports)
        records = self._all_records(limit)
        alike = len(records) == self.size and all(
            record.call == own.call for record in records.values()
        )
        if not alike:
            self._lost = (
                "An earlier call failed on this process, and not on all of "
                "the others alike, so that they cannot go on together. "
                f"{RESTART} The error of rank {self.rank} was {own.error}"
            )
            return
        self._own = None
        self._epoch += 1
        if any(record.moved for record in records.values()):
            self.resets += 1
            self._drop_groups()

    def _drop_groups(self) -> None:
        """End the process groups, and with them their connections."""
        transports, groups = list(self.transports), self._groups
        self.transports.clear()
        self._groups = set()
        self._forget()
        for group in groups:
            # It may have been ended by the program.
            with contextlib.suppress(Exception):
                dist.destroy_process_group(group)
        for transport in transports:
            transport.close()

    # The store.

    def _key(self, kind: str, rank: int | str = "") -> str:
        return f"{self._epoch}/{kind}{rank}"

    def _write(self, call: int, moved: bool, error: str) -> Record:
        record = Record(0, call, moved, error)
        # The others know without it that the process with the store is gone.
        with contextlib.suppress(RuntimeError):
            order = self.store.add(self._key("order"), 1)
            record = record._replace(order=order)
            self.store.set(self._key("record", self.rank), json.dumps(record))
            if call >= 0:
                self.store.set(self._key("failed"), "yes")
        return record

    def _read(self, kind: str, rank: int) -> Any:
        key = self._key(kind, rank)
        if not self.store.check([key]):
            return None
        return json.loads(self.store.get(key))

    def _records(self) -> dict[int, Record]:
        found = {}
        for rank in range(self.size):
            record = self._read("record", rank)
            if record is not None:
                found[rank] = Record(*record)
        return found

    def _all_records(self, limit: float) -> dict[int, Record]:
        """Everyone's, or those that there are after a while."""
        records: dict[int, Record] = {}
        deadline = time.monotonic() + limit
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                records = self._records()
                if len(records) == self.size:
                    break
                time.sleep(0.02)
        return records

    def _give_up(
        self, records: dict[int, Record], otherwise: str = VANISHED
    ) -> None:
        failed = [
            (record.order, rank, record.error)
            for rank, record in records.items()
            if record.call >= 0 and rank != self.rank
        ]
        self._lost = otherwise
        if failed:
            _, rank, error = min(failed)
            self._lost = (
                f"Rank {rank} failed alone, and the other processes cannot go "
                f"on without it. {RESTART} The error of rank {rank} was "
                f"{error}"
            )
        if self._own is None:
            _within(1.0, lambda: self._write(-1, True, "it waited in vain"))

    # The thread.

    def _watch(self) -> None:
        """Find out that this process waits in vain."""
        last, told = 0, 0
        begun, before = 0.0, None
        while not self._ended.wait(TICK):
            count, now = self.count, time.monotonic()
            if count % 2 == 1 and self._lost is not None:
                # It has begun to wait again, or was not reached.
                self._wake()
                continue
            if count % 2 == 0 or count != last:
                last, before = count, None
                continue
            try:
                if not self.store.check([self._key("failed")]):
                    continue
                told += 1
                self.store.set(
                    self._key("waits", self.rank), json.dumps([count, told])
                )
                records = self._records()
                waits = self._others_waits(records)
                if not _same_waits(before, waits):
                    begun, before = now, waits
                still = now - begun >= STILL and _still_wait(before, waits)
                # What another has found is true.
                if still or any(r.call < 0 for r in records.values()):
                    self._give_up(records)
                    self._wake()
            except RuntimeError:
                # The process with the store has ended: who waits for it
                # will be told by its connection.
                continue

    def _others_waits(
        self, records: dict[int, Record]
    ) -> dict[int, list[int]] | None:
        """In which wait each other process is and how often it has told so,
        without those that have a record; None if one does something."""
        waits = {}
        for rank in range(self.size):
            if rank == self.rank or rank in records:
                continue
            waits[rank] = self._read("waits", rank)
            if waits[rank] is None:
                return None
        return waits

    def _wake(self) -> None:
        """End the waits of this process."""
        for transport in list(self.transports):
            group = transport.group
            if dist.get_backend(group) != dist.Backend.GLOO:
                continue
            # Of all the others: a connection that one of them has closed
            # fails at once, and ends no wait for another.
            for member in range(transport.size):
                if member == transport.index():
                    continue
                other = dist.get_global_rank(group, member)
                with contextlib.suppress(RuntimeError):
                    work: Any = dist.irecv(torch.empty(1), other, group, TAG)
                    work.wait(datetime.timedelta(milliseconds=1))


def _same_waits(
    before: dict[int, list[int]] | None, after: dict[int, list[int]] | None
) -> bool:
    """True if all processes that wait are where they were."""
    if before is None or after is None or before.keys() != after.keys():
        return False
    return all(before[rank][0] == after[rank][0] for rank in before)


def _still_wait(
    before: dict[int, list[int]] | None, after: dict[int, list[int]] | None
) -> bool:
    """True if all of them have told so since: what one told last stays."""
    if before is None or after is None:
        return False
    return all(after[rank][1] > before[rank][1] + 1 for rank in before)


def _line(error: BaseException) -> str:
    """An error in one line."""
    error = original(error)
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:LONGEST]}" if text else name


def _within(limit: float, function: Callable[[], Any]) -> Any:
    """Result of a function, or None if it fails or takes too long: the process
    that it asks may hang."""
    results = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            results.append(function())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    return results[0] if results else None
