"""What the peak of a run's memory consists of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..checkpoint.tensor import DTYPES
from ..engine.baseline import reserved_bytes
from ..engine.memory import MIB, NODE_BYTES, MemoryPlan, table_bytes
from ..engine.plan import Plan
from ..engine.stages import (
    DeviceLayout,
    NativeLayout,
    RawLayout,
    Slot,
    StageLayout,
    TorchLayout,
    stage_layout,
)
from ..graph.node import Reduce

HUGE_BYTES = 1 << 62
"""A limit that nothing reaches."""

WORKERS_SHOWN = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """A part of the projected peak, in bytes. detail: what it is made of."""

    name: str
    size_bytes: int
    detail: str


@dataclass(frozen=True, slots=True)
class ArenaPart:
    """Buffers of one kind in a worker's arena. size_bytes: of all of them."""

    name: str
    buffers: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class WorkersNeed:
    """What a number of workers needs, without what is fetched ahead.

    is_chosen: by the plan. fits: within the limit.
    """

    workers: int
    projected_bytes: int
    is_chosen: bool
    fits: bool


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """What the peak consists of.

    parts: add up to the projected bytes. arena: of the hungriest stage.
    stage: that stage, as "Reduce OPERATION" or "Write". remedies: what would lower the peak.
    """

    memory: MemoryPlan
    parts: tuple[MemoryPart, ...]
    arena: tuple[ArenaPart, ...]
    stage: str
    needs: tuple[WorkersNeed, ...]
    remedies: tuple[str, ...]


def memory_parts(plan: Plan) -> MemoryParts:
    """Takes a plan's projected memory apart."""
    memory = plan.memory
    libraries = reserved_bytes(memory.libraries)
    loaded = min(libraries, memory.reserved_bytes)
    nodes = len(plan.graph) * NODE_BYTES
    tables = table_bytes(plan.graph)
    tokenizer = 0 if plan.tokenizer is None else plan.tokenizer.held_bytes
    other = max(0, memory.reserved_bytes - libraries - nodes - tables - tokenizer)
    stage, arena = _arena(plan)
    of_workers = f"{memory.workers} × {memory.arena_bytes} bytes, most for {memory.hungriest}"
    parts = [
        MemoryPart("libraries", loaded, f"interpreter and {memory.libraries}"),
        MemoryPart("graph", nodes, f"{len(plan.graph)} operations"),
        MemoryPart("token tables", tables, "rows of embeddings in another order"),
        MemoryPart("tokenizer", tokenizer, "its files, while the plan is held"),
        MemoryPart("planning", other, "what planning takes at its peak, before there are buffers"),
        MemoryPart("buffers", memory.workers * memory.arena_bytes, of_workers),
        MemoryPart("statistics", memory.statistics_bytes, "partial results of reductions"),
        MemoryPart("mapped pages", memory.mapped_bytes, "windows of the inputs"),
        MemoryPart(
            "fetched inputs", memory.fetch_bytes - memory.window_bytes, "that the workers need"
        ),
        MemoryPart("fetched ahead", memory.window_bytes, "as the limit allows: less is slower"),
        MemoryPart("uploads", memory.store_bytes, "output on its way, and the store's client"),
    ]
    return MemoryParts(
        memory=memory,
        parts=tuple(part for part in parts if part.size_bytes),
        arena=arena,
        stage=stage,
        needs=_needs(plan),
        remedies=tuple(_remedies(plan)),
    )


def _arena(plan: Plan) -> tuple[str, tuple[ArenaPart, ...]]:
    """The hungriest stage and its buffers."""
    task = next((t for t in plan.tasks if t.write.name == plan.memory.hungriest), None)
    if task is None:
        return "", ()
    layouts = [
        (stage, stage_layout(plan.graph, stage, plan.execution))
        for stage in task.stages
        if stage.element_count
    ]
    stage, layout = max(layouts, key=lambda each: each[1].size_bytes)
    name = f"Reduce {stage.operation}" if isinstance(stage, Reduce) else "Write"
    return name, arena_parts(layout)


def arena_parts(layout: StageLayout) -> tuple[ArenaPart, ...]:
    """A stage's buffers by kind, the largest first."""
    if isinstance(layout, RawLayout):
        named: dict[str, Sequence[Slot | None]] = {"inputs as stored": layout.raw}
    elif isinstance(layout, NativeLayout):
        named = {
            "inputs as stored": layout.raw,
            f"{layout.register_count} registers of a chunk each": [layout.registers],
            "blocks kept whole": layout.stores,
            "numbers by row or column": layout.lists,
            "room for ranking": [layout.spare],
            "output block": [layout.output],
        }
    elif isinstance(layout, TorchLayout):
        nodes = layout.nodes.values()
        named = {
            "inputs as stored": layout.raw,
            "results and temporaries": [s for n in nodes for s in (n.out, *n.scratch)],
            "result before rounding": [layout.result],
            "output block": [layout.encoded],
            "rounding": layout.rounding,
        }
    else:
        assert isinstance(layout, DeviceLayout)
        staged = [slot for side in layout.staged for slot in side]
        named = {
            "inputs on their way": staged,
            "output on its way": layout.received,
            "results of reductions": [layout.exchange],
        }
    found = []
    for name, slots in named.items():
        real = [slot for slot in slots if slot is not None]
        size = sum(slot.elements * DTYPES[slot.dtype].item_bytes for slot in real)
        if size:
            found.append(ArenaPart(name, len(real), size))
    return tuple(sorted(found, key=lambda part: -part.size_bytes))


def _needs(plan: Plan) -> tuple[WorkersNeed, ...]:
    chosen = plan.memory.workers
    needs = []
    for count in sorted({*WORKERS_SHOWN, chosen}):
        resources = replace(plan.resources, limit_bytes=HUGE_BYTES, workers=count)
        memory = replace(plan).with_resources(resources).memory
        needed = memory.projected_bytes - memory.window_bytes
        fits = needed <= plan.memory.limit_bytes
        needs.append(WorkersNeed(count, needed, count == chosen, fits))
    return tuple(needs)


def _remedies(plan: Plan) -> list[str]:
    memory = plan.memory
    remedies = []
    if memory.workers > 1:
        smallest = -(-memory.smallest_limit_bytes // MIB)
        remedies.append(f"--workers 1, or --memory {smallest}MiB, the smallest limit that works")
    if memory.mapped_bytes:
        remedies.append("--read-mode pread maps no pages of the inputs")
    if memory.libraries == "torch" and plan.execution.kernels == "torch":
        remedies.append("with the native kernels built (a C compiler at installation), no torch")
    return remedies
