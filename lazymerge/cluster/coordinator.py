"""Giving groups to a cluster's workers until all are made.

    queue ─► an idle worker each ─► results ─► journal
      ▲                               │
      └── worker gone, silent, failed ┘       and when the queue is empty: what still runs elsewhere
                                              is given to idle workers too, longest running first

Every worker has one group at a time, so a worker that hangs holds up one group and no more, and
that one is made twice at the end. Nothing needs to be taken from anybody: all make the same bytes,
and where a result comes twice its checksums are compared.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from ..engine.complete import NonfiniteError
from ..engine.streaming import Told
from ..errors import LazymergeError
from .connection import line_of, paused_and_others
from .group import Division, GroupResult, packed_call
from .interrupts import noted_interrupts
from .worker import TOPIC, make_group

if TYPE_CHECKING:
    from distributed import Client, Future

WAKE_SECONDS = 0.1
"""How often the coordinator looks up when nothing happens."""

LOOK_SECONDS = 1.0
"""How often the scheduler is asked which workers there are."""

SILENT_SECONDS = 30.0
"""A worker says every second how far it is; one that has not for so long is not waited for. Its
threads may wait for a disk or a network, which come back, so it is not given up either."""

REPEAT_FACTOR = 2.0
"""When there is nothing else to do, a group that takes so many times as long as others of its size
is made by a second worker too."""

REPEAT_SECONDS = 5.0
"""And that only after so long: below, starting a group is a good part of its time."""

MOST_ATTEMPTS = 3
"""Of one group at a time."""

MOST_FAILURES = 3
"""Of one group, on several workers where there are; and of one worker without a group that it makes
in between, after which it is given none any more. A group's count are those of workers that have
made something, when there are such: some that come later and are not fit (another version, no such
filesystem) do not end a run that others can finish."""

MOST_DEATHS = 5
"""Of workers while they make one group: it kills them, most likely for want of memory."""

WITHOUT_WORKERS_SECONDS = 120.0
"""How long to wait when there is no worker: a nanny starts another in 5 to 10 seconds, a batch
system or a cloud takes longer."""

SCHEDULER_SECONDS = 60.0
"""For a scheduler to answer again: one that was started anew finds its workers again."""

RESULT_SECONDS = 10.0
"""For a result that is ready to come."""


@dataclass(slots=True)
class _Attempt:
    """A group that a worker has been given.

    began, told: when that was, and when the worker has last said something (monotonic seconds).
    is_given_up: the group is in the queue again.
    """

    number: int
    worker: str
    future: Future[GroupResult]
    began: float
    told: float
    is_given_up: bool = False


@dataclass(frozen=True, slots=True)
class _Looked:
    """Which workers there are. at: when the scheduler was asked (monotonic seconds).

    paused: those that go on with what they make, and begin nothing.
    """

    at: float
    paused: frozenset[str]
    workers: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who is told what is done.

    lost: is told of a finished tensor that is to be made again. made: of every result.
    """

    told: Told
    lost: Callable[[str], None]
    made: Callable[[GroupResult], None]


async def _results(
    client: Client, futures: Sequence[Future[GroupResult]]
) -> list[GroupResult | BaseException]:
    """What workers have given back, or why it does not come: all at once, for asking for one result
    after the other takes a round trip each."""
    waits = [
        asyncio.wait_for(client.gather(future, asynchronous=True), RESULT_SECONDS)
        for future in futures
    ]
    results: list[GroupResult | BaseException] = await asyncio.gather(
        *waits, return_exceptions=True
    )
    return results


class Coordinator:
    """The groups of one run, and who makes them."""

    def __init__(
        self,
        client: Client,
        division: Division,
        listeners: Listeners,
        token: str,
        device: str,
        address: str,
    ) -> None:
        self._client = client
        self._division = division
        self._listeners = listeners
        self._told = listeners.told
        self._token = token
        self._device = device
        self._address = address
        self._queue = deque(range(len(division)))
        self._attempts: dict[str, _Attempt] = {}
        self._ended_attempts: list[_Attempt] = []
        self._made: set[int] = set()
        self._sums: dict[int, Mapping[str, str]] = {}
        self._moved: dict[int, tuple[int, int, int]] = {}
        self._noted: set[str] = set()
        self._seconds = 0.0
        self._work_bytes = 0
        self._failures: dict[int, list[tuple[str, BaseException]]] = {}
        self._deaths: Counter[int] = Counter()
        self._bad: Counter[str] = Counter()
        self._submitted = 0
        self._used: set[str] = set()
        self._able: set[str] = set()
        self._workers: Mapping[str, int] = {}
        self._paused: frozenset[str] = frozenset()
        self._looked = self._had_workers = time.monotonic()
        self._is_told = False
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._ended = threading.Event()
        self.peak_bytes = self._projected_bytes = 0

    def begin_with(self, workers: Mapping[str, int]) -> None:
        """The workers that there are, by address, with their threads."""
        self._workers = dict(workers)

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "address": self._address,
            "workers": len(self._used),
            "groups": len(self._division),
            "repeated": self._submitted - len(self._division),
            "projected_bytes": self._projected_bytes,
        }

    def to_the_end(self, check: Callable[[], None]) -> None:
        """Has all groups made.

        check: is called every WAKE_SECONDS; if it raises, the run ends.

        Raises:
            LazymergeError: it cannot go on; what is made is kept.
        """
        self._client.subscribe_topic(TOPIC, self._events.put)
        threading.Thread(target=self._keep_looking, name="workers", daemon=True).start()
        try:
            with noted_interrupts() as check_interrupts:
                while len(self._made) < len(self._division):
                    check()
                    check_interrupts()
                    self._go_on()
        finally:
            self._ended.set()
            for attempt in self._attempts.values():
                attempt.future.release()

    def _go_on(self) -> None:
        """Gives what is to be given, and sees to what happens in the meantime."""
        self._check_cluster()
        self._drop_lost()
        self._give()
        with suppress(Empty):
            self._happened(self._events.get(timeout=WAKE_SECONDS))
            while True:
                self._happened(self._events.get_nowait())
        self._take_ended()

    def _keep_looking(self) -> None:
        """Asks which workers there are, until the run ends."""
        while not self._ended.wait(LOOK_SECONDS):
            with suppress(Exception):  # not now
                at = time.monotonic()
                self._events.put(_Looked(at, *paused_and_others(self._client, self._device)))

    def _happened(self, event: Any) -> None:
        if isinstance(event, str):
            if event in self._attempts:
                self._ended_attempts.append(self._attempts.pop(event))
        elif isinstance(event, _Looked):
            self._looked, self._workers, self._paused = event.at, event.workers, event.paused
        else:
            _, told = event  # Dask's events come with their time
            if told["token"] == self._token:
                self._was_told(told)

    def _was_told(self, event: Mapping[str, Any]) -> None:
        """A worker says how far it is."""
        number, now = int(event["group"]), time.monotonic()
        for attempt in self._attempts.values():
            if (attempt.number, attempt.worker) == (number, event["worker"]):
                attempt.told = now
        if number not in self._made:
            moved = (int(event[key]) for key in ("read", "written", "fetched"))
            self._progress(number, *moved, tensor=str(event["tensor"]))

    def _progress(self, number: int, read: int, written: int, fetched: int, *, tensor: str) -> None:
        """Accounts for what is new: a group that is made again is counted once. In bytes."""
        before = self._moved.get(number, (0, 0, 0))
        now = (max(before[0], read), max(before[1], written), max(before[2], fetched))
        self._moved[number] = now
        if now[:2] != before[:2]:
            self._told.moved(now[0] - before[0], now[1] - before[1], tensor)
        if now[2] != before[2]:
            self._told.fetched(now[2] - before[2])

    def _check_cluster(self) -> None:
        """Raises:
        LazymergeError: the scheduler is gone, or there have been no workers for a while.
        """
        now = time.monotonic()
        fit = [w for w in self._workers if self._bad[w] < MOST_FAILURES]
        at_work = {
            attempt.worker
            for attempt in self._attempts.values()
            if attempt.told > attempt.began and now - attempt.told < SILENT_SECONDS
        }
        usable = [w for w in fit if w not in self._paused or w in at_work]
        if self._client.status == "closed" or now - self._looked > SCHEDULER_SECONDS:
            raise LazymergeError(
                f"the Dask scheduler at {self._address} does not answer any more; look after it, "
                "and go on"
            )
        if self._workers and not fit:
            raise self._worst_failure()
        if usable:
            self._had_workers, self._is_told = now, False
        elif now - self._had_workers > WITHOUT_WORKERS_SECONDS:
            if self._failures:
                raise self._worst_failure()
            if fit:
                raise LazymergeError(
                    f"Dask has had all workers of {self._address} paused for "
                    f"{WITHOUT_WORKERS_SECONDS:.0f} seconds, for they hold too much memory; start "
                    "them anew, with a larger --memory-limit, and go on"
                )
            gpu = "" if self._device == "cpu" else ' with --resources "GPU=1"'
            raise LazymergeError(
                f"{self._address} has had no worker{gpu} for {WITHOUT_WORKERS_SECONDS:.0f} "
                "seconds; start some, and go on"
            )
        elif now - self._had_workers > 5 * LOOK_SECONDS and not self._is_told:
            self._is_told = True
            have = "has all workers paused by Dask" if fit else "has no workers"
            self._told.noted(f"{self._address} {have} at the moment; waiting for some")

    def _worst_failure(self) -> LazymergeError:
        """What most of the failures were about."""
        errors = [error for each in self._failures.values() for _, error in each]
        error = errors[-1]
        if isinstance(error, LazymergeError):
            return error
        return LazymergeError(f"no worker of {self._address} can make anything: {line_of(error)}")

    def _drop_lost(self) -> None:
        """Puts what workers had that are gone, or silent, into the queue again."""
        now = time.monotonic()
        for key, attempt in list(self._attempts.items()):
            is_gone = attempt.worker not in self._workers and self._looked > attempt.began
            if is_gone:
                del self._attempts[key]
                attempt.future.release()
                self._died(attempt)
            elif now - attempt.told > SILENT_SECONDS and not attempt.is_given_up:
                self._give_up(attempt)
                self._told.noted(
                    f"{attempt.worker} has said nothing for {SILENT_SECONDS:.0f} seconds; others "
                    "make what it was given"
                )

    def _give_up(self, attempt: _Attempt) -> None:
        attempt.is_given_up = True
        if attempt.number not in self._made and attempt.number not in self._queue:
            self._queue.appendleft(attempt.number)

    def _died(self, attempt: _Attempt) -> None:
        """A worker is gone while it made a group.

        Raises:
            LazymergeError: too many were.
        """
        if attempt.number in self._made:
            return
        self._deaths[attempt.number] += 1
        if self._deaths[attempt.number] >= MOST_DEATHS:
            name, *others = self._division.names(attempt.number)
            more = f" and {len(others)} more" if others else ""
            raise LazymergeError(
                f"{MOST_DEATHS} workers of {self._address} have ended while they made {name}{more}"
                ": give workers more memory, or a smaller --memory than they have"
            )
        self._give_up(attempt)

    def _give(self) -> None:
        """Gives every idle worker a group."""
        if self._client.status != "running":
            return  # it comes back, or not: _check_cluster
        busy = {attempt.worker for attempt in self._attempts.values()}
        slow: Iterator[int] | None = None
        for worker in self._workers:
            is_idle = worker not in busy and worker not in self._paused
            if not is_idle or self._bad[worker] >= MOST_FAILURES:
                continue
            number = self._next_queued(worker)
            if number is None:
                slow = self._slow_groups() if slow is None else slow
                number = next(slow, None)
            if number is not None:
                self._submit(number, worker)

    def _next_queued(self, worker: str) -> int | None:
        """The group that a worker is to make; None if none is left for it."""
        for number in self._queue:
            if not self._is_hopeless(number, worker):
                self._queue.remove(number)
                return number
        return None

    def _slow_groups(self) -> Iterator[int]:
        """Groups that take longer than others of their size, longest running first."""
        attempts = sorted(self._attempts.values(), key=lambda attempt: attempt.began)
        together: dict[int, list[_Attempt]] = {}
        for attempt in attempts:
            together.setdefault(attempt.number, []).append(attempt)
        now = time.monotonic()
        for number, same in together.items():
            if number in self._made or len(same) >= MOST_ATTEMPTS:
                continue
            usual = self._seconds * self._division.work_bytes(number) / max(1, self._work_bytes)
            first, last = same[0].began, same[-1].began
            if now - first > REPEAT_FACTOR * usual and now - last > REPEAT_SECONDS:
                yield number

    def _is_hopeless(self, number: int, worker: str) -> bool:
        """Whether a worker has failed to make a group that others may be able to."""
        failed = {address for address, _ in self._failures.get(number, ())}
        if worker not in failed:
            return False
        others = self._workers.keys() - self._paused - failed
        return any(self._bad[other] < MOST_FAILURES for other in others)

    def _submit(self, number: int, worker: str) -> None:
        key = f"lazymerge-{self._token}-{number}-{self._submitted}"
        self._submitted += 1
        self._used.add(worker)
        future = self._client.submit(
            pickle.loads,
            packed_call(make_group, self._division.group(number)),
            key=key,
            workers=[worker],
            resources={"GPU": 1} if self._device != "cpu" else None,
            pure=False,
        )
        now = time.monotonic()
        self._attempts[key] = _Attempt(number, worker, future, now, now)
        future.add_done_callback(lambda _: self._events.put(key))

    def _take_ended(self) -> None:
        """Looks at what has come of the attempts that have ended since.

        Raises:
            LazymergeError: that is the end of the run.
        """
        ended, self._ended_attempts = self._ended_attempts, []
        if not ended:
            return
        given = self._client.sync(_results, self._client, [attempt.future for attempt in ended])
        for attempt, result in zip(ended, given, strict=True):
            self._has_ended(attempt, result)
            attempt.future.release()  # here: what is raised while an object ends is lost

    def _has_ended(self, attempt: _Attempt, result: GroupResult | BaseException) -> None:
        """A worker has made its group, or has not.

        Raises:
            LazymergeError: that is the end of the run.
        """
        from distributed import KilledWorker

        is_cancelled = isinstance(result, asyncio.CancelledError)
        if attempt.future.status == "cancelled" or is_cancelled:  # the scheduler was started anew
            self._give_up(attempt)
        elif isinstance(result, KilledWorker):
            self._died(attempt)
        elif isinstance(result, NonfiniteError) or not isinstance(result, GroupResult | Exception):
            raise result
        elif isinstance(result, Exception):
            self._failed(attempt, result)
        else:
            self._bad[attempt.worker] = 0
            self._able.add(attempt.worker)
            self._done(attempt, result)

    def _failed(self, attempt: _Attempt, error: Exception) -> None:
        if attempt.number in self._made:
            return
        self._bad[attempt.worker] += 1
        failures = self._failures.setdefault(attempt.number, [])
        failures.append((attempt.worker, error))
        blaming = [worker for worker, _ in failures if worker in self._able or not self._able]
        if len(blaming) >= MOST_FAILURES:
            raise self._worst_failure()
        if self._bad[attempt.worker] >= MOST_FAILURES:
            self._told.noted(f"{attempt.worker} is given nothing any more: {line_of(error)}")
        self._give_up(attempt)

    def _done(self, attempt: _Attempt, result: GroupResult) -> None:
        number = attempt.number
        self.peak_bytes = max(self.peak_bytes, result.peak_bytes)
        self._projected_bytes = max(self._projected_bytes, result.projected_bytes)
        sums = {tensor.name: tensor.checksum for tensor in result.tensors}
        if number in self._made:
            self._compare(number, attempt.worker, sums)
            return
        self._seconds += result.seconds
        self._work_bytes += self._division.work_bytes(number)
        moved = (result.bytes_read, result.bytes_written, result.bytes_fetched)
        self._progress(number, *moved, tensor=result.tensors[0].name)
        for note in result.notes:
            if note not in self._noted:
                self._noted.add(note)
                self._told.noted(note)
        for tensor in result.tensors:
            self._told.finished(tensor)
        self._listeners.made(result)
        self._made.add(number)
        self._sums[number] = sums
        with suppress(ValueError):
            self._queue.remove(number)

    def _compare(self, number: int, worker: str, sums: Mapping[str, str]) -> None:
        """Two workers have made a group.

        Raises:
            LazymergeError: not alike. The tensors are to be made again.
        """
        unlike = [name for name, checksum in sums.items() if self._sums[number][name] != checksum]
        if not unlike:
            return
        for name in self._division.names(number):
            self._listeners.lost(name)
        raise LazymergeError(
            f"tensor {unlike[0]} was made twice, and {worker} has made other bytes of the same "
            "inputs: a machine computes or reads wrongly. Find out which, and go on without it"
        )
