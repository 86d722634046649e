"""A run on a cluster as a simulation of discrete events.

    coordinator ─► scheduler ─► worker: fixed part, then its bytes ─► scheduler ─► coordinator
      one at a time   one at a time        all at once, sharing the storage          one at a time

Coordinator and scheduler do one thing at a time, in the order in which it comes; what they do
besides for every worker that there is slows them down. Bytes move at a worker's own rate, or at an
equal share of the storage's where that is less.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

COORDINATOR, SCHEDULER, STORAGE = "command", "scheduler", "storage"


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured. Seconds of a processor, but for the worker's.

    coordinator_group_s, coordinator_tensor_s: of a group, and of each of its tensors beside.
    scheduler_group_s: of a group.
    coordinator_watch_s, scheduler_watch_s: of each worker that there is, every second.
    worker_group_s: that a worker takes for a group beside its bytes.
    worker_rate: bytes read and written a second, where storage is no limit.
    """

    coordinator_group_s: float
    coordinator_tensor_s: float
    scheduler_group_s: float
    coordinator_watch_s: float
    scheduler_watch_s: float
    worker_group_s: float
    worker_rate: float


@dataclass(frozen=True, slots=True)
class Simulated:
    """A run. seconds: from the first group given to the last taken.

    busy: share of that time, of coordinator, scheduler and storage.
    """

    seconds: float
    busy: dict[str, float]

    @property
    def busiest(self) -> str:
        """What limits; the workers where nothing else is busy for most of the time."""
        name = max(self.busy, key=lambda name: self.busy[name])
        return name if self.busy[name] > 0.8 else "workers"


@dataclass(slots=True)
class _Server:
    """Does one thing at a time. slowed: by what it does besides (1: nothing)."""

    slowed: float
    free_at: float = 0.0
    busy_s: float = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """When something that comes now will be done."""
        self.busy_s += seconds
        self.free_at = max(now, self.free_at) + seconds * self.slowed
        return self.free_at


@dataclass(slots=True)
class _Storage:
    """Moves the bytes of all who ask at one rate each: what one group has received since the
    beginning, all have, so a group is done when that is more by its bytes than when it came."""

    rate: float
    most_each: float
    moved_each: float = 0.0
    at: float = 0.0
    busy_s: float = 0.0
    ends: list[tuple[float, int]] = field(default_factory=list)

    def _rate_each(self) -> float:
        return min(self.most_each, self.rate / len(self.ends))

    def advance(self, now: float) -> None:
        if self.ends:
            each = self._rate_each()
            self.busy_s += (now - self.at) * each * len(self.ends) / self.rate
            self.moved_each += (now - self.at) * each
        self.at = now

    def begin(self, worker: int, size_bytes: float) -> None:
        heapq.heappush(self.ends, (self.moved_each + size_bytes, worker))

    def next_end(self) -> float:
        """When the first of those that are moving will be done."""
        if not self.ends:
            return float("inf")
        return self.at + (self.ends[0][0] - self.moved_each) / self._rate_each()


def simulate(
    groups: Sequence[tuple[int, int]],
    workers: int,
    costs: Costs,
    storage_rate: float = 1e18,
    latency_s: float = 0.0005,
) -> Simulated:
    """A run of groups (bytes, tensors) by so many workers.

    storage_rate: bytes a second, of all together. latency_s: of the network, one way.
    """
    coordinator = _Server(_slowed(workers * costs.coordinator_watch_s))
    scheduler = _Server(_slowed(workers * costs.scheduler_watch_s))
    storage = _Storage(storage_rate, costs.worker_rate)
    waiting = deque(groups)
    events: list[tuple[float, int, Callable[[float], None]]] = []
    order = 0
    last = 0.0

    def at(when: float, happens: Callable[[float], None]) -> None:
        nonlocal order
        order += 1
        heapq.heappush(events, (when, order, happens))

    def give(now: float, worker: int) -> None:
        if not waiting:
            return
        size_bytes, tensors = waiting.popleft()
        half = (costs.coordinator_group_s + tensors * costs.coordinator_tensor_s) / 2
        halves[worker] = half
        sent = coordinator.serve(now, half)

        def passed_on(now: float) -> None:
            ready = scheduler.serve(now, costs.scheduler_group_s / 2)
            at(ready + latency_s + costs.worker_group_s, lambda now: begin(worker, size_bytes))

        at(sent + latency_s, passed_on)

    def begin(worker: int, size_bytes: int) -> None:
        storage.begin(worker, size_bytes)

    def made(now: float, worker: int) -> None:
        def come_back(now: float) -> None:
            nonlocal last
            last = coordinator.serve(now, halves[worker])
            at(last, lambda now: give(now, worker))

        def passed_on(now: float) -> None:
            at(scheduler.serve(now, costs.scheduler_group_s / 2) + latency_s, come_back)

        at(now + latency_s, passed_on)

    halves: dict[int, float] = {}
    for worker in range(workers):
        at(0.0, lambda now, worker=worker: give(now, worker))  # type: ignore[misc]
    while events or storage.ends:
        end = storage.next_end()
        if end <= (events[0][0] if events else float("inf")):
            storage.advance(end)
            made(end, heapq.heappop(storage.ends)[1])
        else:
            now, _, happens = heapq.heappop(events)
            storage.advance(now)
            happens(now)
    return Simulated(
        last,
        {
            COORDINATOR: coordinator.busy_s / last + workers * costs.coordinator_watch_s,
            SCHEDULER: scheduler.busy_s / last + workers * costs.scheduler_watch_s,
            STORAGE: storage.busy_s / last,
        },
    )


def _slowed(share: float) -> float:
    """How much longer something takes for who does other things in a share of the time."""
    return 1 / max(0.01, 1 - share)
