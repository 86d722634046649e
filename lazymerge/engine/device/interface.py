"""What a device is, as far as merging needs to know.

Work is handed to queues. A queue does its work in order, some time after it was handed over;
queues know nothing of each other. Whoever needs what another queue does says so: a queue waits for
an event (`after`), the program waits for an event (`Event.wait`). Buffers may be read or
overwritten only behind such a wait, on both sides of a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..arena import Arena

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device's memory as it is now, in bytes."""

    free_bytes: int
    total_bytes: int


@dataclass(slots=True)
class Outcome:
    """What work returns, once it is done."""

    value: Any = None


class Event(Protocol):
    """A place in a queue."""

    def wait(self) -> None:
        """Returns when everything handed over before it has been done."""


class Queue(Protocol):
    """Work that is done in order, some time later."""

    def after(self, event: Event) -> None:
        """What is handed over from now on waits for an event (of another queue)."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copies between pinned memory and the device: equal shapes and dtypes."""

    def run(self, work: Callable[[], Any]) -> Outcome:
        """Computes: torch calls on tensors of the device, and `exchange`."""

    def exchange(self, target: Tensor, source: Tensor) -> None:
        """Copies and waits for it, in the course of `run`."""

    def record(self) -> Event:
        """The place after what has been handed over so far."""


class Device(Protocol):
    """Where blocks are computed."""

    name: str

    def memory(self) -> DeviceMemory:
        """What is free and what there is."""

    def allocate(self, size_bytes: int) -> Tensor:
        """The device arena, shape (size_bytes,), uint8; called once. Whatever it holds."""

    def pin(self, arena: Arena) -> None:
        """Makes a worker's arena memory that the device copies from and to by itself."""

    def queue(self) -> Queue:
        """A queue of its own."""

    def peak_bytes(self) -> int:
        """The most that this run has held on the device, by the allocator's own count."""

    def close(self) -> None:
        """Waits for all work and gives everything back. The arenas may be freed afterwards."""
