"""Who does what next.

Work is handed out in spans of consecutive blocks. A tensor's stages follow one another, and so do
a stage's passes; within a pass the spans are independent and go to whichever worker asks first.
While the last spans of a pass are still being computed, workers begin the next tensor, and come
back as soon as there is more to do for the earlier one: the ready spans are kept in a heap
ordered by tensor. No more tensors are open than there are workers, so that there is a bound on
the memory of their statistics.

    worker 1   t0 pass 1 ▓▓▓▓▓▓▓▓  t0 pass 2 ▓▓▓▓▓▓▓▓ ...
    worker 2   t0 pass 1 ▓▓▓▓▓▓  t1 ▓▓  t0 pass 2 ▓▓▓ ...

Partial results are stored by block number and combined in that order, so none of this shows in
the output.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..graph.graph import Graph
from ..graph.node import Apply, Reduce, Write
from ..graph.operation import Done, Pass, apply_operation, reduce_operation
from .blocks import DeviceClass, block_count, block_range, elements_per_block
from .inputs import Pieces
from .pairs import Pairs
from .stages import TensorTask, row_elements

SPAN_BLOCKS = 16
"""Blocks per span: 8 MB of each bfloat16 input. Mapped pages are released once per span;
releasing every block costs up to four times the run (docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class Job:
    """A span of blocks of one pass, to be run by one worker.

    stage: index into the task's stages.
    first, blocks: the span, as block numbers; for a sample, block 0.
    pieces: of each block.
    state: of the reduction's pass; None in the write stage.
    prepared: scalars of the stage's Apply nodes, by id.
    """

    task_index: int
    task: TensorTask
    stage: int
    first: int
    pieces: Sequence[Pieces]
    state: Any
    prepared: dict[str, Any]


@dataclass(slots=True)
class _Active:
    """A tensor that has been begun."""

    index: int
    task: TensorTask
    stage: int = -1
    state: Any = None
    prepared: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    partials: list[Any] = field(default_factory=list)
    pairs: Pairs[Any] | None = None
    open_jobs: int = 0


Finished = Callable[[Write, Sequence[Any]], None]
"""Called once per output tensor, with the results of its blocks in block order."""


class Scheduler:
    """Hands out jobs and takes back their results; safe to use from several threads."""

    def __init__(
        self,
        graph: Graph,
        tasks: Sequence[TensorTask],
        finished: Finished,
        device: DeviceClass = "cpu",
        most_open: int | None = None,
        began: Callable[[str], None] = lambda _: None,
    ) -> None:
        """device: decides where blocks begin and end.

        most_open: tensors that may be begun and not finished at a time, each with the partial
            results of its reductions; None: any number.
        began: is told the name of every output tensor that is begun.
        """
        self._graph = graph
        self._device = device
        self._tasks = tasks
        self._finished = finished
        self._began = began
        self._most_open = len(tasks) if most_open is None else most_open
        self._next_task = 0
        self._active: dict[int, _Active] = {}
        self._ready: list[tuple[int, int, Job]] = []
        self._sequence = 0
        self._changed = threading.Condition()
        self._stopped = False
        self.error: BaseException | None = None

    def take(self) -> Job | None:
        """The next job; waits while others must finish first; None when there is no more."""
        while True:
            with self._changed:
                while True:
                    if self._stopped:
                        return None
                    if self._ready:
                        return heapq.heappop(self._ready)[2]
                    is_open = len(self._active) < self._most_open
                    if is_open and self._next_task < len(self._tasks):
                        active = _Active(self._next_task, self._tasks[self._next_task])
                        self._active[active.index] = active
                        self._next_task += 1
                        break
                    if not self._active:
                        return None
                    self._changed.wait()
            self._began(active.task.write.name)
            self._advance(active, None)

    def give(self, job: Job, partials: Sequence[Any]) -> None:
        """Takes back the results of a job's blocks, or the one that they were joined to."""
        active = self._active[job.task_index]
        with self._changed:
            if active.pairs is None:
                active.partials[job.first : job.first + len(partials)] = partials
            else:
                active.pairs.add(job.first // SPAN_BLOCKS, partials[0])
            active.open_jobs -= 1
            if active.open_jobs:
                return
        self._finish_pass(active)

    def stop(self, error: BaseException | None = None) -> None:
        """Hands out no more jobs; the first error given is kept."""
        with self._changed:
            self._stopped = True
            if self.error is None:
                self.error = error
            self._changed.notify_all()

    @property
    def is_stopped(self) -> bool:
        return self._stopped

    def _finish_pass(self, active: _Active) -> None:
        stage = active.task.stages[active.stage]
        if isinstance(stage, Reduce):
            following = reduce_operation(stage.operation).finish(
                dict(stage.parameters),
                stage.element_count,
                active.state,
                active.partials if active.pairs is None else [active.pairs.result],
            )
            self._advance(active, following)
        else:
            self._complete(active)

    def _advance(self, active: _Active, following: Pass | Done[Any] | None) -> None:
        """Goes on with what follows a pass: another pass, the next stage, or the end."""
        stages = active.task.stages
        while following is None or isinstance(following, Done):
            if isinstance(following, Done):
                stage = stages[active.stage]
                active.results[stage.id] = following.result
            active.stage += 1
            stage = stages[active.stage]
            if stage.element_count == 0:
                self._complete(active)  # nothing to read, nothing to write
                return
            active.prepared = self._prepare(active, stage)
            if isinstance(stage, Write):
                following = Pass(None)
            else:
                operation = reduce_operation(stage.operation)
                following = operation.first_pass(
                    dict(stage.parameters),
                    [active.results[node] for node in stage.statistics],
                    stage.element_count,
                    block_count(
                        stage.element_count, self._device, row_elements(self._graph, stage)
                    ),
                )
        self._open_pass(active, following)

    def _prepare(self, active: _Active, stage: Reduce | Write) -> dict[str, Any]:
        """The scalars of every Apply node that the stage evaluates."""
        prepared: dict[str, Any] = {}
        # no function that calls itself: it would be a cycle that holds what has been prepared
        waiting = list(stage.inputs if isinstance(stage, Reduce) else (stage.source,))
        while waiting:
            node = self._graph[waiting.pop()]
            if isinstance(node, Apply) and node.id not in prepared:
                statistics = [active.results[source] for source in node.statistics]
                operation = apply_operation(node.operation)
                prepared[node.id] = operation.prepare(dict(node.parameters), statistics)
                waiting += node.inputs
        return prepared

    def _open_pass(self, active: _Active, following: Pass) -> None:
        stage = active.task.stages[active.stage]
        elements = stage.element_count
        active.state = following.state
        if following.sample is not None:
            sample = following.sample
            spacing = (elements - sample.run_elements) / max(1, sample.runs - 1)
            starts = [round(run * spacing) for run in range(sample.runs)]
            blocks: list[Pieces] = [[(start, start + sample.run_elements) for start in starts]]
        elif following.only_block is not None:
            row = row_elements(self._graph, stage)
            blocks = [(block_range(following.only_block, elements, self._device, row),)]
        else:
            length = elements_per_block(self._device, row_elements(self._graph, stage))
            blocks = [
                ((start, min(start + length, elements)),) for start in range(0, elements, length)
            ]
        active.pairs = None
        if isinstance(stage, Reduce) and reduce_operation(stage.operation).is_joined:
            spans = -(-len(blocks) // SPAN_BLOCKS)
            active.pairs = Pairs(reduce_operation(stage.operation).joined, spans)
        active.partials = [None] * len(blocks)
        jobs = [
            Job(
                active.index,
                active.task,
                active.stage,
                first,
                blocks[first : first + SPAN_BLOCKS],
                active.state,
                active.prepared,
            )
            for first in range(0, len(blocks), SPAN_BLOCKS)
        ]
        with self._changed:
            active.open_jobs = len(jobs)
            for job in jobs:
                self._sequence += 1
                heapq.heappush(self._ready, (active.index, self._sequence, job))
            self._changed.notify_all()

    def _complete(self, active: _Active) -> None:
        self._finished(active.task.write, active.partials)
        with self._changed:
            del self._active[active.index]
            self._changed.notify_all()
