"""Who makes the tensors that an output lacks: the threads of this process, or others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..graph.node import Read
from ..output.writer import ShardWriter
from .baseline import peak_resident_bytes
from .device.interface import Device
from .memory import available_memory_bytes
from .plan import Plan
from .stages import TensorTask
from .streaming import Conditions, Told, stream, work_of

CACHED_SHARE = 0.5
"""Of the memory that is available: what a merge may leave in the page cache, inputs and output."""


def outgrows_cache(plan: Plan) -> bool:
    """Whether inputs and output are too large to stay in the page cache together.

    What has been merged is then let out of it as the run goes on. The system would do so itself,
    but late, page by page, and while workers wait: two 3B models of 13.7 GB and their merge on a
    machine with 24 GB took 9.0 to 12.4 s from first block to last, and 2.2 to 2.6 s in this way.
    Smaller ones stay: the next merge may want them.
    """
    inputs = {
        (node.folder, node.tensor.file, node.tensor.start): node.tensor.size_bytes
        for node in plan.graph
        if isinstance(node, Read)
    }
    moved = sum(inputs.values()) + plan.bytes_written
    return moved > CACHED_SHARE * available_memory_bytes()


@dataclass(frozen=True, slots=True)
class Taken:
    """What making an output's tensors has taken.

    held_bytes: the most of fetched inputs that this process held at a time.
    elsewhere_bytes: the largest peak resident set of the other processes that did it; None: this
        one did.
    facts: for the manifest.
    """

    held_bytes: int = 0
    elsewhere_bytes: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class Account(Told, Protocol):
    """Is told what is done of an output, and may be told that it is not."""

    def lost(self, tensor: str) -> None:
        """A finished tensor is not what it should be: it is to be made again."""


class Workforce(Protocol):
    """Makes the tensors that an output lacks."""

    is_elsewhere: bool
    """Whether that is done by other processes, which have limits of memory of their own."""

    def make(
        self,
        plan: Plan,
        tasks: Sequence[TensorTask],
        writer: ShardWriter,
        account: Account,
        conditions: Conditions,
        *,
        folder: Path,
        fsync: bool,
    ) -> Taken:
        """As `stream`, of which the other parameters are.

        writer: has the shards open. fsync: bytes are on disk before they are told of, where another
            machine has written them.
        """


class ThisProcess:
    """The threads of this process."""

    is_elsewhere = False

    def __init__(self, device: Device | None = None) -> None:
        """device: the accelerator, where one computes."""
        self._device = device

    def make(
        self,
        plan: Plan,
        tasks: Sequence[TensorTask],
        writer: ShardWriter,
        account: Account,
        conditions: Conditions,
        *,
        folder: Path,
        fsync: bool,
    ) -> Taken:
        work = work_of(plan, tasks, forgets=outgrows_cache(plan))
        return Taken(stream(work, writer, account, conditions, where=folder, device=self._device))


def most_bytes(taken: Taken) -> int:
    """The most that a process of the run occupied: what is fetched is memory, though not of the
    resident set."""
    if taken.elsewhere_bytes is not None:
        return taken.elsewhere_bytes
    return peak_resident_bytes() + taken.held_bytes
