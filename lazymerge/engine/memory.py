"""What a run occupies, added up before it starts.

    limit       what the user allows
    reserved    interpreter, libraries, headers and graph
    projected   reserved + arenas + statistics + mapped pages: the plan's claim
    measured    the peak resident set that the operating system reports afterwards

Fewer workers first, refusal last.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..errors import DoesNotFitError
from ..graph.graph import Graph
from ..graph.node import Read
from ..sizes import format_memory
from .baseline import Libraries, reserved_bytes, resident_bytes
from .execution import Execution
from .likeness import Kind
from .needed_ranges import CHUNK_BYTES, FetchNeeds
from .network import CONNECTIONS, Network
from .stages import (
    TorchLayout,
    gathered_bytes,
    joined_statistics_bytes,
    mapped_bytes,
    stage_layout,
    statistics_bytes,
    temporary_bytes,
)
from .store.memory import StoreNeeds

MIB = 1 << 20

NODE_BYTES = 1500
"""Per node of the graph: planning merges of 2 to 6 models of 2,973 tensors took 0.9 to 1.1 kB each,
headers included."""

DEFAULT_LIMIT_BYTES = 2 << 30
"""Unless half of what is available is less."""


@dataclass(frozen=True, slots=True)
class VramPlan:
    """What a run may and will allocate on an accelerator. All sizes in bytes.

    limit_bytes: the user's; None: a share of what is free when the run starts.
    projected_bytes: the plan's claim. arena_bytes: buffers of one worker.
    hungriest: output tensor whose stage needs the most of them.
    smallest_limit_bytes: the limit with which one worker would do.
    """

    limit_bytes: int | None
    projected_bytes: int
    arena_bytes: int
    hungriest: str
    smallest_limit_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a run may and will occupy. All sizes in bytes.

    libraries: what is loaded for it, the largest part of what is reserved.
    workers: threads that compute.
    arena_bytes: buffers of one worker.
    statistics_bytes: partial results of reductions in progress, and what users' own methods
        allocate.
    mapped_bytes: pages of inputs that are mapped at a time.
    hungriest: output tensor whose stage needs the largest arena.
    smallest_limit_bytes: the limit with which one worker would do.
    vram: what it occupies of an accelerator, where one computes.
    fetch_bytes: inputs that lie elsewhere, on their way or being merged.
    window_bytes: of these, what is fetched further ahead than the workers need.
    store_bytes: of an output that goes into a store: what is being written or on its way, and the
        store's client.
    """

    limit_bytes: int
    reserved_bytes: int
    libraries: Libraries
    workers: int
    arena_bytes: int
    statistics_bytes: int
    mapped_bytes: int
    hungriest: str
    smallest_limit_bytes: int
    vram: VramPlan | None = None
    fetch_bytes: int = 0
    store_bytes: int = 0
    window_bytes: int = 0

    @property
    def projected_bytes(self) -> int:
        return (
            self.reserved_bytes
            + self.workers * self.arena_bytes
            + self.statistics_bytes
            + self.mapped_bytes
            + self.fetch_bytes
            + self.store_bytes
        )

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**asdict(self), "projected_bytes": self.projected_bytes}


CONNECTION_BYTES = 24 * MIB
"""What 8 requests hold of bytes that have arrived and are not in their place yet, and the threads
that wait for them: with 16, ties at the smallest limit took 4 MiB more than planned."""


def connection_bytes(network: Network) -> int:
    """What requests hold, and pieces of a cache that are being checked."""
    checked = 0 if network.cache_folder is None else CHUNK_BYTES
    return network.connections * (CONNECTION_BYTES // CONNECTIONS + checked)


WINDOW_BYTES = 384 * MIB
"""Of inputs that lie elsewhere, on their way or waiting: more brought nothing with 8 connections of
100 MB/s and answers after 50 ms. In proportion where there are more connections."""


def fetch_window_bytes(
    left_bytes: int, own_bytes: int, fetches: FetchNeeds, network: Network
) -> int:
    """What is left of the limit for what is fetched ahead, as far as it is of use: a tensor that is
    read twice stays, and what follows is on its way.

    own_bytes: set aside for fetching already.
    """
    window = WINDOW_BYTES * max(1, network.connections // CONNECTIONS)
    useful = min(window + 2 * fetches.task_bytes, fetches.total_bytes) + fetches.whole_bytes
    return min(left_bytes, max(0, connection_bytes(network) + useful - own_bytes))


def least_fetch_bytes(workers: int, fetches: FetchNeeds | None, network: Network) -> int:
    """What must be set aside for what lies elsewhere, so that no worker waits for another's."""
    if fetches is None:
        return 0
    return connection_bytes(network) + workers * fetches.job_bytes + fetches.whole_bytes


def with_window(memory: MemoryPlan, fetches: FetchNeeds | None, network: Network) -> MemoryPlan:
    """The plan, with what is left of the limit for what is fetched ahead."""
    if fetches is None:
        return memory
    left = memory.limit_bytes - memory.projected_bytes
    more = fetch_window_bytes(left, memory.fetch_bytes, fetches, network)
    return replace(memory, fetch_bytes=memory.fetch_bytes + more, window_bytes=more)


def _with_uploads(memory: MemoryPlan, needs: StoreNeeds) -> MemoryPlan:
    """The plan, with what is left of the limit for more parts on their way, as far as they are of
    use."""
    left = memory.limit_bytes - memory.projected_bytes
    more = needs.useful_bytes(memory.workers) - memory.store_bytes
    return replace(memory, store_bytes=memory.store_bytes + max(0, min(left, more)))


def fetched_text(fetch_bytes: int, fetches: FetchNeeds | None) -> str:
    """Its part in what a merge needs, for people."""
    if fetches is None:
        return ""
    whole = (
        f" ({format_memory(fetches.whole_bytes)} of files that come whole; with --cache DIR they "
        "need no memory)"
        if fetches.whole_bytes
        else ""
    )
    return f", {format_memory(fetch_bytes)} of inputs that are fetched{whole}"


def _stored_text(store_bytes: int) -> str:
    return f", {format_memory(store_bytes)} of output that is uploaded" if store_bytes else ""


def table_bytes(graph: Graph) -> int:
    """What the tables of rearranged rows occupy, each once."""
    tables = {
        node.rows.digest: len(node.rows.data)
        for node in graph
        if isinstance(node, Read) and node.rows is not None
    }
    return sum(tables.values())


def available_memory_bytes() -> int:
    """What this process could still take: of the machine, or of its cgroup if that is less."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        pass
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            allowed = int(Path(limit).read_text())
            available = min(available, max(0, allowed - int(Path(usage).read_text())))
        except (OSError, ValueError):
            continue
    return available


LIBRARY_HELD_BYTES = 256 * MIB
"""A process that occupies more than this before it plans (torch alone: 230 MiB) is somebody's
program and not the command."""


def default_limit_bytes() -> int:
    """The smaller of 2 GiB and half of what is available; in a program that uses lazymerge as a
    library and holds much already, that much more."""
    held = max(0, resident_bytes() - LIBRARY_HELD_BYTES)
    return min(DEFAULT_LIMIT_BYTES, available_memory_bytes() // 2) + held


MOST_WORKERS = 256
"""More are not started: a thread takes 1 KiB that no plan counts. Outputs do not depend on it."""


def default_workers() -> int:
    """One per processor that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def plan_memory(
    graph: Graph,
    kinds: Sequence[Kind],
    limit_bytes: int,
    workers: int,
    execution: Execution,
    held_bytes: int = 0,
    beside_bytes: int = 0,
    planning_bytes: int = 0,
    fetches: FetchNeeds | None = None,
    store: StoreNeeds | None = None,
) -> MemoryPlan:
    """Chooses the number of workers that fits the limit.

    kinds: of the output's tensors. workers: how many are wanted.
    held_bytes: what the process that will run it occupies already.
    beside_bytes: what the plan holds beside the graph.
    planning_bytes: what planning has taken for a while, when there were no buffers yet.
    fetches: what must be held of inputs that lie elsewhere; None: there are none.
    store: what must be held of an output that goes into a store; None: it is a folder.

    Raises:
        DoesNotFitError: even one worker does not fit; the message names the smallest limit that
            works and the operation to blame.
    """
    if execution.device != "cpu":
        from .device.memory import plan_device_memory

        return plan_device_memory(
            graph,
            kinds,
            limit_bytes,
            workers,
            execution,
            held_bytes,
            beside_bytes,
            planning_bytes,
            fetches,
        )
    arena_bytes, hungriest = 0, ""
    statistics: list[int] = [0]
    window_bytes = joined_bytes = temporary = 0
    libraries: Libraries = "numpy"
    kept = 0
    for kind in kinds:
        task = kind.first
        gathered = gathered_bytes(graph, task) if execution.gathers else (0, 0)
        of_one = statistics_bytes(graph, task) + gathered[0]
        statistics += [of_one] * min(kind.count, MOST_WORKERS)
        kept += kind.count * gathered[1]
        for stage in task.stages:
            if not stage.element_count:
                continue
            layout = stage_layout(graph, stage, execution)
            if layout.size_bytes > arena_bytes:
                arena_bytes, hungriest = layout.size_bytes, task.write.name
            if isinstance(layout, TorchLayout):
                libraries = "torch"
            window_bytes = max(window_bytes, mapped_bytes(graph, stage))
            joined_bytes = max(joined_bytes, joined_statistics_bytes(graph, stage))
            temporary = max(temporary, temporary_bytes(graph, stage))
    statistics.sort(reverse=True)
    beside_bytes += table_bytes(graph) + kept
    reserved = max(reserved_bytes(libraries) + beside_bytes, held_bytes) + len(graph) * NODE_BYTES
    is_mapped = execution.read_mode == "mmap"

    def plan(count: int, smallest: int) -> MemoryPlan:
        later = count * (arena_bytes + joined_bytes + temporary) + sum(statistics[:count])
        return MemoryPlan(
            limit_bytes=limit_bytes,
            reserved_bytes=max(reserved, reserved_bytes("numpy") + planning_bytes - later),
            libraries=libraries,
            workers=count,
            arena_bytes=arena_bytes,
            # no more tensors are open than workers
            statistics_bytes=sum(statistics[:count]) + count * (joined_bytes + temporary),
            mapped_bytes=count * window_bytes if is_mapped else 0,
            hungriest=hungriest,
            smallest_limit_bytes=smallest,
            fetch_bytes=least_fetch_bytes(count, fetches, execution.network),
            store_bytes=0 if store is None else store.smallest_bytes,
        )

    smallest = -(-plan(1, 0).projected_bytes // MIB) * MIB
    for count in range(min(max(1, workers), MOST_WORKERS), 0, -1):
        chosen = plan(count, smallest)
        if chosen.projected_bytes <= limit_bytes:
            chosen = chosen if store is None else _with_uploads(chosen, store)
            return with_window(chosen, fetches, execution.network)
    raise DoesNotFitError(
        f"the merge needs {format_memory(smallest)} of memory with one worker, the limit is "
        f"{format_memory(limit_bytes)}: {format_memory(reserved)} for Python and its libraries, "
        f"{format_memory(arena_bytes)} of buffers (most for {hungriest}), "
        f"{format_memory(plan(1, 0).statistics_bytes)} of statistics"
        f"{fetched_text(plan(1, 0).fetch_bytes, fetches)}{_stored_text(plan(1, 0).store_bytes)}; "
        f"the smallest limit that works is --memory {smallest // MIB}MiB"
    )
