"""The processor as a device: the same buffers, queues and events, without an accelerator.

It can be as late as any real device: what is handed to a late queue happens only when somebody
waits for it. A buffer that is read or reused without a wait then holds the wrong bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from ..arena import Arena
from .interface import DeviceMemory, Event, Outcome

if TYPE_CHECKING:
    from torch import Tensor

POISON = 0xFF
"""What fresh device memory is filled with: nan in every float."""

QUEUES_PER_LANE = 3


class HostEvent:
    """A place in a HostQueue."""

    def __init__(self, queue: HostQueue, place: int) -> None:
        self._queue = queue
        self._place = place

    def wait(self) -> None:
        self._queue.catch_up(self._place)


class HostQueue:
    """Work done when it is handed over, or as late as can be."""

    def __init__(self, *, is_late: bool) -> None:
        self._is_late = is_late
        self._waiting: deque[Callable[[], None]] = deque()
        self._done = 0

    def _add(self, work: Callable[[], None]) -> None:
        self._waiting.append(work)
        if not self._is_late:
            self.catch_up(self._done + len(self._waiting))

    def catch_up(self, place: int) -> None:
        """Does what has been handed over, up to a place."""
        while self._done < place:
            work = self._waiting.popleft()
            self._done += 1
            work()

    def after(self, event: Event) -> None:
        self._add(event.wait)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._add(lambda: _copy(target, source))

    def run(self, work: Callable[[], Any]) -> Outcome:
        outcome = Outcome()

        def do() -> None:
            outcome.value = work()

        self._add(do)
        return outcome

    def exchange(self, target: Tensor, source: Tensor) -> None:
        _copy(target, source)

    def record(self) -> HostEvent:
        return HostEvent(self, self._done + len(self._waiting))


def _copy(target: Tensor, source: Tensor) -> None:
    assert target.shape == source.shape
    assert target.dtype == source.dtype
    target.copy_(source)


class HostDevice:
    """The processor, with some memory set aside as a device's."""

    def __init__(self, memory_bytes: int, late: Collection[int] = ()) -> None:
        """late: which of a worker's queues are late, by their number in the order of creation
        (frame.py: 0 copies in, 1 computes, 2 copies out)."""
        self.name = "processor"
        self.pinned: list[Arena] = []
        self.is_closed = False
        self._memory_bytes = memory_bytes
        self._late = late
        self._queues: list[HostQueue] = []
        self._allocated = 0
        self._peak = 0

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self._memory_bytes - self._allocated, self._memory_bytes)

    def allocate(self, size_bytes: int) -> Tensor:
        import torch

        self._allocated += size_bytes
        self._peak = max(self._peak, self._allocated)
        return torch.full((size_bytes,), POISON, dtype=torch.uint8)

    def pin(self, arena: Arena) -> None:
        self.pinned.append(arena)

    def queue(self) -> HostQueue:
        queue = HostQueue(is_late=len(self._queues) % QUEUES_PER_LANE in self._late)
        self._queues.append(queue)
        return queue

    def peak_bytes(self) -> int:
        return self._peak

    def close(self) -> None:
        self.pinned.clear()
        self._allocated = 0
        self.is_closed = True
