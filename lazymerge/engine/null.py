"""The null executor: walks a plan as a run would, and neither reads nor computes anything.

It asks the real scheduler for jobs and goes through their blocks, and checks at every step what
a run takes for granted: that the stage's buffers lie within the arena and apart from each
other, that a block fits into them, that the blocks written cover the output exactly.

Statistics are not known without computing them. Reductions are therefore walked as their
operations expect them to go: a sample if they begin with one, then the expected full passes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Reduce, Write
from ..graph.operation import Done, Pass, reduce_operation
from .blocks import DeviceClass
from .plan import Plan
from .scheduler import Job, Scheduler, _Active
from .stages import (
    BUFFER_ALIGNMENT,
    DeviceLayout,
    NativeLayout,
    RawLayout,
    Slot,
    StageLayout,
    TensorTask,
    bytes_between,
    bytes_per_element,
    stage_layout,
)


class IllegalPlanError(AssertionError):
    """A plan that could not run as it stands: a defect of lazymerge, not of the input."""


@dataclass(frozen=True, slots=True)
class WalkedJob:
    """A span of blocks as a worker would be given it.

    tensor: name of the output tensor.
    stage: index into the tensor's stages; operation: of a reduction, "write" for the last stage.
    first, blocks: the span, as block numbers.
    elements: of all its blocks together.
    is_sample: its one block is a sample.
    """

    tensor: str
    stage: int
    operation: str
    first: int
    blocks: int
    elements: int
    is_sample: bool


@dataclass(frozen=True, slots=True)
class Walk:
    """What a run of the plan would do.

    jobs: in the order in which one worker would do them.
    finished: output tensors in the order in which they would be complete.
    bytes_read: by output tensor, of the inputs, all expected full passes.
    sample_bytes_read: by output tensor, of samples.
    bytes_written: by output tensor.
    arena_bytes: what the hungriest stage occupies of one worker's arena.
    """

    jobs: tuple[WalkedJob, ...]
    finished: tuple[str, ...]
    bytes_read: Mapping[str, int]
    sample_bytes_read: Mapping[str, int]
    bytes_written: Mapping[str, int]
    arena_bytes: int


def walk_plan(plan: Plan) -> Walk:
    """Walks a plan with one worker.

    Raises:
        IllegalPlanError: buffers overlap or leave the arena, a block does not fit into them, or
            the blocks written are not the output.
    """
    sizes = {tensor.name: tensor.size_bytes for shard in plan.shards for tensor in shard.tensors}
    finished: list[str] = []
    scheduler = _NullScheduler(
        plan.graph,
        plan.tasks,
        lambda write, _: finished.append(write.name),
        plan.execution.device,
    )
    jobs: list[WalkedJob] = []
    full, sampled, written = (
        dict.fromkeys(sizes, 0),
        dict.fromkeys(sizes, 0),
        dict.fromkeys(sizes, 0),
    )
    arena_bytes = 0
    while (job := scheduler.take()) is not None:
        name, stage = job.task.write.name, job.task.stages[job.stage]
        layout = stage_layout(plan.graph, stage, plan.execution)
        verify_layout(layout, plan.memory.arena_bytes)
        if isinstance(layout, DeviceLayout):
            assert plan.memory.vram is not None
            room = min(layout.device_bytes, plan.memory.vram.arena_bytes)
            verify_slots(layout.device_slots, room)
        arena_bytes = max(arena_bytes, layout.size_bytes)
        walked = _walked(job, stage)
        jobs.append(walked)
        widths = [DTYPES[read.dtype].item_bytes for read in plan.graph.reads_of(stage.id)]
        rate = bytes_per_element(plan.graph, stage)
        (sampled if walked.is_sample else full)[name] += sum(
            bytes_between(rate, *piece) for pieces in job.pieces for piece in pieces
        )
        for pieces in job.pieces:
            elements = sum(stop - start for start, stop in pieces)
            is_copied = plan.execution.read_mode != "mmap" or len(pieces) > 1
            if not fits(layout, elements, widths, is_copied=is_copied):
                raise IllegalPlanError(f"{name}: a block of {elements} elements in {layout}")
            if isinstance(stage, Write):
                ((start, stop),) = pieces
                width = DTYPES[stage.dtype].item_bytes
                if start * width != written[name]:
                    raise IllegalPlanError(f"{name}: written up to {written[name]}, then {start}")
                written[name] = stop * width
        scheduler.give(job, [None] * len(job.pieces))
    if written != sizes or sorted(finished) != sorted(sizes):
        raise IllegalPlanError(f"written {written}, laid out {sizes}")
    return Walk(tuple(jobs), tuple(finished), full, sampled, written, arena_bytes)


def fits(
    layout: StageLayout, elements: int, widths: Sequence[int], *, is_copied: bool = True
) -> bool:
    """Whether a block has room in the buffers of a stage.

    widths: bytes per element of inputs. is_copied: they are not decoded where they are mapped.
    """
    if isinstance(layout, DeviceLayout):
        blocks = list(layout.block_slots)
        raw = [
            (slot, width)
            for side in (*layout.staged, *layout.raw)
            for slot, width in zip(side, widths, strict=True)
        ]
    elif isinstance(layout, NativeLayout):
        blocks = [slot for slot in (*layout.stores, layout.output) if slot is not None]
        raw = list(zip(layout.raw, widths, strict=True)) if layout.raw and is_copied else []
    else:
        blocks = [slot for slot in layout_slots(layout) if slot not in layout.raw]
        raw = [(slot, max(widths)) for slot in layout.raw]
    return all(slot.elements >= elements for slot in blocks) and all(
        slot.elements >= elements * width for slot, width in raw
    )


def layout_slots(layout: StageLayout) -> list[Slot]:
    """All buffers of a stage in a worker's arena (an accelerator's lie elsewhere). All are live
    from its first block to its last."""
    if isinstance(layout, DeviceLayout):
        return list(layout.host_slots)
    if isinstance(layout, RawLayout):
        return list(layout.raw)
    if isinstance(layout, NativeLayout):
        own = [*layout.raw, layout.registers, *layout.stores, *layout.lists]
        own += [layout.spare, layout.output]
        return [slot for slot in own if slot is not None]
    slots = [*layout.raw, layout.result, layout.encoded, *layout.rounding]
    for node in layout.nodes.values():
        slots += [node.out, *node.scratch]
    return [slot for slot in slots if slot is not None]


def verify_layout(layout: StageLayout, arena_bytes: int) -> None:
    """Checks that a stage's buffers are aligned, within the arena, and apart.

    Raises:
        IllegalPlanError: naming the buffer.
    """
    verify_slots(layout_slots(layout), min(layout.size_bytes, arena_bytes))


def verify_slots(slots: Sequence[Slot], arena_bytes: int) -> None:
    """Checks that buffers are aligned, within an arena, and apart.

    Raises:
        IllegalPlanError: naming the buffer.
    """
    end = 0
    for slot in sorted(slots, key=lambda slot: slot.offset):
        if slot.offset % BUFFER_ALIGNMENT:
            raise IllegalPlanError(f"{slot} is not aligned")
        if slot.offset < end:
            raise IllegalPlanError(f"{slot} overlaps the buffer before it")
        end = slot.offset + slot.elements * DTYPES[slot.dtype].item_bytes
        if end > arena_bytes:
            raise IllegalPlanError(f"{slot} leaves the arena of {arena_bytes} bytes")


def _walked(job: Job, stage: Reduce | Write) -> WalkedJob:
    return WalkedJob(
        tensor=job.task.write.name,
        stage=job.stage,
        operation=stage.operation if isinstance(stage, Reduce) else "write",
        first=job.first,
        blocks=len(job.pieces),
        elements=sum(stop - start for pieces in job.pieces for start, stop in pieces),
        is_sample=any(len(pieces) > 1 for pieces in job.pieces),
    )


class _NullScheduler(Scheduler):
    """The scheduler, with reductions that end after their expected passes without a result."""

    def __init__(
        self,
        graph: Graph,
        tasks: tuple[TensorTask, ...],
        finished: Any,
        device: DeviceClass = "cpu",
    ) -> None:
        super().__init__(graph, tasks, finished, device)
        self._full_passes: dict[tuple[int, int], int] = defaultdict(int)

    def _prepare(self, active: _Active, stage: Reduce | Write) -> dict[str, Any]:
        return {}

    def _open_pass(self, active: _Active, following: Pass) -> None:
        is_full = following.sample is None and following.only_block is None
        self._full_passes[active.index, active.stage] += is_full
        super()._open_pass(active, following)

    def _finish_pass(self, active: _Active) -> None:
        stage = active.task.stages[active.stage]
        if isinstance(stage, Write):
            self._complete(active)
            return
        expected = reduce_operation(stage.operation).expected_passes(dict(stage.parameters))
        done = self._full_passes[active.index, active.stage]
        self._advance(active, Pass(None) if done < expected else Done(None))
