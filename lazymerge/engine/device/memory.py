"""What a run allocates on a device, and on the host for it, added up before it starts.

    device   one arena: the buffers of every worker, each two blocks of its inputs and its output,
             the operation's own, and what reductions work in; and what torch adds to that
    host     a worker's arena: pinned, two blocks of every input and of the output; and inputs that
             lie elsewhere, fetched ahead as for workers on the processor

The device's own context (300 to 500 MB on NVIDIA GPUs) belongs to the driver and is not counted: no
program can decide over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import DoesNotFitError
from ...graph.graph import Graph
from ...sizes import format_memory
from ..execution import Execution
from ..likeness import Kind
from ..memory import (
    MIB,
    MemoryPlan,
    VramPlan,
    available_memory_bytes,
    fetched_text,
    least_fetch_bytes,
    table_bytes,
    with_window,
)
from ..needed_ranges import FetchNeeds
from ..stages import (
    DeviceLayout,
    joined_statistics_bytes,
    mapped_bytes,
    stage_layout,
    statistics_bytes,
    temporary_bytes,
)
from .frame import Lane
from .interface import Device

if TYPE_CHECKING:
    from ..plan import Plan

RESERVED_BYTES = 1536 * MIB
"""Interpreter, torch with its CUDA libraries, and the host's side of the CUDA context: an estimate,
until it has been measured on hardware."""

NODE_BYTES = 3000
"""Per node of the graph, headers included, as on the processor."""

DEFAULT_LIMIT_BYTES = 4 << 30
"""Of host memory: twice what it is without a device, for the libraries take most of that."""

DEFAULT_WORKERS = 4
"""A processor core copies and hashes some 5 GB/s, the bus takes 25: more than one must feed it."""

PLANNED_VRAM_BYTES = 4 << 30
"""What is planned for where neither the user nor a device says how much there is."""

USED_SHARE = 0.8
"""Of the free device memory, where the user sets no limit."""

SEGMENT_BYTES = 2 * MIB
SMALLEST_SEGMENT_BYTES = 20 * MIB
"""torch's allocator takes an arena from the driver in multiples of the one, at least the other."""

SCAN_BYTES = 2 * MIB
"""Per worker: the segment from which torch takes what a running count needs, 35 KiB a block."""

ALIGNMENT = 512


def default_device_limit_bytes() -> int:
    """Of host memory: the smaller of 4 GiB and half of what is available."""
    return min(DEFAULT_LIMIT_BYTES, available_memory_bytes() // 2)


def plan_device_memory(
    graph: Graph,
    kinds: Sequence[Kind],
    limit_bytes: int,
    workers: int,
    execution: Execution,
    held_bytes: int = 0,
    beside_bytes: int = 0,
    planning_bytes: int = 0,
    fetches: FetchNeeds | None = None,
) -> MemoryPlan:
    """Chooses the number of workers that fits both limits.

    workers: how many are wanted.
    held_bytes: what the process occupies already.
    beside_bytes: what the plan holds beside the graph.
    planning_bytes: what planning has taken for a while, when there were no buffers yet.
    fetches: what must be held of inputs that lie elsewhere; None: there are none.

    Raises:
        DoesNotFitError: even one worker does not fit; the message names the smallest limit that
            works.
    """
    host_bytes, hungriest = 0, ""
    device_bytes, device_hungriest = 0, ""
    window_bytes = joined_bytes = 0
    statistics = [0]
    for kind in kinds:
        task = kind.first
        statistics += [statistics_bytes(graph, task, execution.device)] * kind.count
        for stage in task.stages:
            if not stage.element_count:
                continue
            layout = stage_layout(graph, stage, execution)
            if layout.size_bytes > host_bytes:
                host_bytes, hungriest = layout.size_bytes, task.write.name
            if isinstance(layout, DeviceLayout) and layout.device_bytes > device_bytes:
                device_bytes, device_hungriest = layout.device_bytes, task.write.name
            joined = joined_statistics_bytes(graph, stage, execution.device)
            joined += temporary_bytes(graph, stage, execution.device)
            joined_bytes = max(joined_bytes, joined)
            if execution.read_mode == "mmap":
                window_bytes = max(window_bytes, mapped_bytes(graph, stage, execution.device))
    statistics.sort(reverse=True)
    device_bytes = -(-device_bytes // ALIGNMENT) * ALIGNMENT
    beside_bytes += table_bytes(graph)
    # planning comes first, when no accelerator's library is loaded yet
    reserved = max(RESERVED_BYTES + beside_bytes, held_bytes, planning_bytes)
    reserved += len(graph) * NODE_BYTES

    def vram(count: int) -> int:
        if not device_bytes:
            return 0
        arena = -(-count * device_bytes // SEGMENT_BYTES) * SEGMENT_BYTES
        return max(arena, SMALLEST_SEGMENT_BYTES) + count * SCAN_BYTES

    def plan(count: int) -> MemoryPlan:
        return MemoryPlan(
            limit_bytes=limit_bytes,
            reserved_bytes=reserved,
            libraries="torch",
            workers=count,
            arena_bytes=host_bytes,
            statistics_bytes=sum(statistics[:count]) + count * joined_bytes,
            mapped_bytes=count * window_bytes,
            hungriest=hungriest,
            smallest_limit_bytes=0,
            fetch_bytes=least_fetch_bytes(count, fetches, execution.network),
            vram=VramPlan(
                limit_bytes=execution.vram_limit_bytes,
                projected_bytes=vram(count),
                arena_bytes=device_bytes,
                hungriest=device_hungriest,
                smallest_limit_bytes=vram(1),
            ),
        )

    one = plan(1)
    smallest = -(-one.projected_bytes // MIB) * MIB
    if one.projected_bytes > limit_bytes:
        raise DoesNotFitError(
            f"the merge needs {format_memory(smallest)} of memory with one worker, the limit is "
            f"{format_memory(limit_bytes)}: {format_memory(reserved)} for Python and the libraries "
            f"of the device (an estimate), {format_memory(host_bytes)} of pinned buffers (most for "
            f"{hungriest}), {format_memory(one.statistics_bytes)} of statistics"
            f"{fetched_text(one.fetch_bytes, fetches)}; "
            f"the smallest limit that works is --memory {smallest // MIB}MiB"
        )
    limit = execution.vram_limit_bytes
    if limit is not None and vram(1) > limit:
        raise _no_vram(vram(1), device_hungriest, f"the limit is {format_memory(limit)}")
    for count in range(max(1, workers), 1, -1):
        chosen = plan(count)
        fits = vram(count) <= (PLANNED_VRAM_BYTES if limit is None else limit)
        if fits and chosen.projected_bytes <= limit_bytes:
            break
    else:
        chosen = one
    chosen = replace(chosen, smallest_limit_bytes=smallest)
    return with_window(chosen, fetches, execution.network)


def fit_to_device(plan: Plan, device: Device) -> Plan:
    """The plan as it can run on a device, with fewer workers if need be.

    Raises:
        DoesNotFitError: the device has too little memory free.
    """
    memory = memory_on_device(plan.graph, plan.kinds, plan.memory, plan.execution, device)
    return replace(plan, memory=memory)


def memory_on_device(
    graph: Graph, kinds: Sequence[Kind], memory: MemoryPlan, execution: Execution, device: Device
) -> MemoryPlan:
    """What is planned of a run's memory as it can be on a device, with fewer workers if need be.
    What is set aside for fetching stays as it is: fewer need no more.

    Raises:
        DoesNotFitError: the device has too little memory free.
    """
    assert memory.vram is not None
    free = device.memory().free_bytes
    limit = memory.vram.limit_bytes
    usable = int(free * USED_SHARE) if limit is None else min(limit, free)
    if memory.vram.smallest_limit_bytes > usable:
        share = f" ({USED_SHARE:.0%} of them are used without --vram)" if limit is None else ""
        problem = f"{device.name} has {format_memory(free)} free{share}"
        raise _no_vram(memory.vram.smallest_limit_bytes, memory.vram.hungriest, problem)
    fitting = plan_device_memory(
        graph,
        kinds,
        memory.limit_bytes - memory.fetch_bytes,
        memory.workers,
        replace(execution, vram_limit_bytes=usable),
        held_bytes=memory.reserved_bytes - len(graph) * NODE_BYTES,
    )
    assert fitting.vram is not None
    return replace(
        fitting,
        limit_bytes=memory.limit_bytes,
        smallest_limit_bytes=memory.smallest_limit_bytes,
        fetch_bytes=memory.fetch_bytes,
        window_bytes=memory.window_bytes,
        vram=replace(fitting.vram, limit_bytes=limit or usable),
    )


def open_lanes(device: Device, memory: MemoryPlan) -> list[Lane]:
    """Allocates the device arena and gives every worker its share of it."""
    assert memory.vram is not None
    share = memory.vram.arena_bytes
    arena = device.allocate(memory.workers * share)
    return [
        Lane(
            arena[number * share : (number + 1) * share],
            incoming=device.queue(),
            computing=device.queue(),
            outgoing=device.queue(),
        )
        for number in range(memory.workers)
    ]


def _no_vram(needed: int, hungriest: str, problem: str) -> DoesNotFitError:
    smallest = -(-needed // MIB)
    return DoesNotFitError(
        f"the merge needs {smallest} MiB of device memory with one worker (most for {hungriest}), "
        f"{problem}; the smallest limit that works is --vram {smallest}MiB, "
        "and --device cpu needs none"
    )
