"""The memory that a merge will occupy while it goes through its tensors.

    reserved    the same from beginning to end
    arenas      the same: every worker touches all of its buffers before its first block
    statistics  of the tensors that may be open: as many as there are workers, from the first
                that is not finished
    mapped      windows of the inputs of these, where files are mapped

The plan's claim adds the largest of each, whether they come together or not, so no moment is above
it, and the highest is equal to it where the hungriest tensors are neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint.tensor import DTYPES
from ..engine.plan import Plan
from ..engine.stages import (
    joined_statistics_bytes,
    mapped_bytes,
    statistics_bytes,
    temporary_bytes,
)
from .bytes_by_model import bytes_of_form
from .forms import Form, Forms

MOST_POINTS = 480
"""More than a chart on a screen can show; of a longer schedule, moments are taken together."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What is occupied from the beginning of a tensor on. Sizes in bytes.

    tensor: place of the tensor in the output's order.
    moved_bytes: read and written before it.
    statistics_bytes, mapped_bytes: the most until the next moment.
    """

    tensor: int
    moved_bytes: int
    statistics_bytes: int
    mapped_bytes: int


@dataclass(frozen=True, slots=True)
class Timeline:
    """A schedule's memory. Sizes in bytes.

    reserved_bytes, arenas_bytes: at every moment.
    limit_bytes: the user's. projected_bytes: the plan's claim.
    moved_bytes: all that is read and written.
    """

    reserved_bytes: int
    arenas_bytes: int
    limit_bytes: int
    projected_bytes: int
    moved_bytes: int
    moments: tuple[Moment, ...]

    @property
    def peak_bytes(self) -> int:
        """The most at any moment."""
        varying = (moment.statistics_bytes + moment.mapped_bytes for moment in self.moments)
        return self.reserved_bytes + self.arenas_bytes + max(varying, default=0)


@dataclass(frozen=True, slots=True)
class _Needs:
    """Of one tensor: its statistics, those of every worker at it, its windows, its bytes moved."""

    statistics: int
    by_worker: int
    mapped: int
    moved: int


def memory_timeline(plan: Plan, forms: Forms, most_points: int = MOST_POINTS) -> Timeline:
    """What a plan will occupy, moment by moment.

    most_points: moments to tell, at least 1; the highest one is always told.
    """
    needs = [_needs(plan, form) for form in forms.forms]
    of_tensor = [needs[number] for number in forms.numbers]
    memory = plan.memory
    moments, moved = [], 0
    by_worker = _highest_ahead([need.by_worker for need in of_tensor], memory.workers)
    windows = _highest_ahead([need.mapped for need in of_tensor], memory.workers)
    opened = _sum_ahead([need.statistics for need in of_tensor], memory.workers)
    for place, need in enumerate(of_tensor):
        statistics = opened[place] + memory.workers * by_worker[place]
        mapped = memory.workers * windows[place]
        moments.append(
            Moment(
                place,
                moved,
                min(statistics, memory.statistics_bytes),
                min(mapped, memory.mapped_bytes),
            )
        )
        moved += need.moved
    return Timeline(
        reserved_bytes=memory.reserved_bytes,
        arenas_bytes=memory.workers * memory.arena_bytes,
        limit_bytes=memory.limit_bytes,
        projected_bytes=memory.projected_bytes,
        moved_bytes=moved,
        moments=tuple(_fewer(moments, moved, most_points)),
    )


def _needs(plan: Plan, form: Form) -> _Needs:
    graph, device, task = plan.graph, plan.execution.device, form.first
    stages = [stage for stage in task.stages if stage.element_count]
    written = task.write.element_count * DTYPES[task.write.dtype].item_bytes
    is_mapped = plan.execution.read_mode == "mmap"
    return _Needs(
        statistics=statistics_bytes(graph, task, device),
        by_worker=max((joined_statistics_bytes(graph, s, device) for s in stages), default=0)
        + max((temporary_bytes(graph, s, device) for s in stages), default=0),
        mapped=max((mapped_bytes(graph, s, device) for s in stages), default=0) * is_mapped,
        moved=bytes_of_form(graph, form) + written,
    )


def _sum_ahead(values: Sequence[int], length: int) -> list[int]:
    """Of every place: the sum of so many values from there on."""
    sums = [0]
    for value in values:
        sums.append(sums[-1] + value)
    last = len(values)
    return [sums[min(place + length, last)] - sums[place] for place in range(last)]


def _highest_ahead(values: Sequence[int], length: int) -> list[int]:
    """Of every place: the highest of so many values from there on."""
    highest = [0] * len(values)
    candidates: deque[int] = deque()
    for place in reversed(range(len(values))):
        while candidates and values[candidates[-1]] <= values[place]:
            candidates.pop()
        candidates.append(place)
        if candidates[0] >= place + length:
            candidates.popleft()
        highest[place] = values[candidates[0]]
    return highest


def _fewer(moments: Sequence[Moment], moved: int, most: int) -> list[Moment]:
    """The moments, neighbours taken together until there are few enough."""
    if len(moments) <= most:
        return list(moments)
    kept: dict[int, Moment] = {}
    for moment in moments:
        bucket = min(most - 1, moment.moved_bytes * most // max(1, moved))
        before = kept.get(bucket)
        if before is None:
            kept[bucket] = moment
            continue
        highest = max(before, moment, key=lambda m: m.statistics_bytes + m.mapped_bytes)
        kept[bucket] = Moment(
            highest.tensor, before.moved_bytes, highest.statistics_bytes, highest.mapped_bytes
        )
    return list(kept.values())
