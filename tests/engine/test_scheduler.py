"""The scheduler's invariants, on random graphs of fake reductions and 1 to 5 workers.

The fake reductions make any sequence of passes (all blocks, one block, a sample), and check for
themselves that they are given what they must be given, in block order. Some want blocks of whole
rows, some want their partial results joined.
"""

from __future__ import annotations

import random as random_module
import threading
import time
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lazymerge.checkpoint.tensor import TensorInfo
from lazymerge.engine import blocks, streaming
from lazymerge.engine import run as run_module
from lazymerge.engine import scheduler as scheduler_module
from lazymerge.engine.pairs import Pairs
from lazymerge.engine.resources import Resources
from lazymerge.engine.scheduler import Job, Scheduler
from lazymerge.engine.stages import tensor_tasks
from lazymerge.graph.graph import Graph
from lazymerge.graph.node import Apply, Read, Reduce, Write, as_parameters
from lazymerge.graph.operation import (
    ApplyOperation,
    BlockInput,
    Cost,
    Done,
    Parameters,
    Pass,
    ReduceOperation,
    Sample,
    reduce_operation,
    register,
)

from merging import plan_of

BLOCK = 4
SPAN = 3
PATIENCE_SECONDS = 20
SAMPLE = Sample(runs=2, run_elements=1)


class Failure(Exception):
    """What a fake worker or reduction fails with."""


@register
class FakePasses(ReduceOperation[Any, str]):
    """passes: what to look at, one pass after another; label: its name and result; block: length
    of its blocks."""

    name = "test_fake_passes"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(0)

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        return 0

    def expected_passes(self, parameters: Parameters) -> int:
        return 1

    def first_pass(
        self, parameters: Any, statistics: Sequence[Any], element_count: int, block_count: int
    ) -> Pass | Done[str]:
        assert list(statistics) == list(parameters["needs"])
        return self._pass(parameters, 0, block_count)

    def _pass(self, parameters: Any, number: int, block_count: int) -> Pass | Done[str]:
        if number == len(parameters["passes"]):
            return Done(parameters["label"])
        state = (parameters["label"], number, block_count)
        match parameters["passes"][number]:
            case "all":
                return Pass(state)
            case "sample":
                return Pass(state, sample=SAMPLE)
            case _:
                return Pass(state, only_block=block_count - 1)

    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: Any,
        scratch: Sequence[Any],
        start: int,
    ) -> Any:
        raise NotImplementedError

    def finish(
        self, parameters: Any, element_count: int, state: Any, partials: Sequence[Any]
    ) -> Pass | Done[str]:
        label, number, block_count = state
        assert label == parameters["label"]
        starts = list(range(0, element_count, parameters["block"]))
        assert block_count == len(starts)
        expected = {
            "all": starts,
            "sample": [0],
            "one": starts[-1:],
        }[parameters["passes"][number]]
        found = self.found(partials)
        assert found == [(label, number, start) for start in expected]
        if parameters["fails"]:
            raise Failure(label)
        return self._pass(parameters, number + 1, block_count)

    def found(self, partials: Sequence[Any]) -> list[Any]:
        """What the blocks gave, in block order."""
        return list(partials)


@register
class FakePassesByRows(FakePasses):
    """Of blocks of whole rows."""

    name = "test_fake_passes_by_rows"
    is_by_rows = True


@register
class FakeJoinedPasses(FakePasses):
    """Partial results are lists, which are joined to one."""

    name = "test_fake_joined_passes"
    is_joined = True

    def joined(self, left: Any, right: Any) -> Any:
        assert left[-1] < right[0]  # neighbours, the first one first
        return [*left, *right]

    def found(self, partials: Sequence[Any]) -> list[Any]:
        (only,) = partials
        return list(only)


@register
class FakeJoinedPassesByRows(FakeJoinedPasses):
    """Of blocks of whole rows."""

    name = "test_fake_joined_passes_by_rows"
    is_by_rows = True


@register
class FakeApply(ApplyOperation):
    """Needs statistics and passes on what it is given for them."""

    name = "test_fake_apply"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(0)

    def prepare(self, parameters: Any, statistics: Sequence[Any]) -> Any:
        assert list(statistics) == list(parameters["needs"])
        return tuple(statistics)


@register
class FakeApplyByRows(FakeApply):
    """Writes blocks of whole rows."""

    name = "test_fake_apply_by_rows"
    is_by_rows = True


@dataclass(frozen=True)
class FakeReduction:
    """passes: what it looks at. needs: which of the tensor's reductions before it, by number."""

    passes: Sequence[str]
    needs: Set[int] = frozenset()
    fails: bool = False
    is_joined: bool = False
    is_by_rows: bool = False

    @property
    def operation(self) -> str:
        joined = "joined_" if self.is_joined else ""
        return f"test_fake_{joined}passes" + ("_by_rows" if self.is_by_rows else "")


@dataclass(frozen=True)
class FakeTensor:
    """An output tensor, and whether its blocks are written by whole rows."""

    rows: int
    row: int = 1
    reductions: Sequence[FakeReduction] = field(default=())
    is_by_rows: bool = False

    @property
    def elements(self) -> int:
        return self.rows * self.row

    def block(self, is_by_rows: bool) -> int:
        """Length of its blocks: as many whole rows as fit, or one."""
        return max(1, BLOCK // self.row) * self.row if is_by_rows else BLOCK

    def starts(self, is_by_rows: bool) -> list[int]:
        return list(range(0, self.elements, self.block(is_by_rows)))


def tensor_graph(graph: Graph, name: str, tensor: FakeTensor) -> None:
    """One output tensor: reductions that each need some of those before, then a Write."""
    shape, size = (tensor.rows, tensor.row), 4 * tensor.elements
    read = graph.add(Read("/m", TensorInfo(name, "F32", shape, "f", 0, size)))
    made: list[tuple[str, str]] = []
    for number, reduction in enumerate(tensor.reductions):
        label = f"{name}.{number}"
        needed = [made[i] for i in sorted(reduction.needs) if i < len(made)]
        node = Reduce(
            reduction.operation,
            as_parameters(
                {
                    "label": label,
                    "passes": tuple(reduction.passes),
                    "needs": tuple(label for label, _ in needed),
                    "fails": reduction.fails,
                    "block": tensor.block(reduction.is_by_rows),
                }
            ),
            (read,),
            tuple(node_id for _, node_id in needed),
            shape,
            "F32",
        )
        made.append((label, graph.add(node)))
    labels = tuple(label for label, _ in made)
    apply = Apply(
        "test_fake_apply_by_rows" if tensor.is_by_rows else "test_fake_apply",
        as_parameters({"needs": labels}),
        (read,),
        tuple(node_id for _, node_id in made),
        shape,
        "F32",
    )
    graph.add(Write(name, "F32", shape, graph.add(apply)))


class Crew:
    """Workers that compute nothing: they record what they are given, and dawdle at random."""

    def __init__(
        self,
        graph: Graph,
        seed: int,
        fails_at: int | None = None,
        most_open: int | None = None,
    ) -> None:
        self.graph = graph
        self.finished: list[tuple[str, list[Any]]] = []
        self.jobs: list[Job] = []
        self.fails_at = fails_at
        self.most_open = 0
        self._random = random_module.Random(seed)
        self._lock = threading.Lock()
        self.scheduler = Scheduler(graph, tensor_tasks(graph), self._finish, most_open=most_open)

    def _finish(self, write: Write, partials: Sequence[Any]) -> None:
        with self._lock:
            self.finished.append((write.name, list(partials)))

    def _work(self) -> None:
        try:
            while (job := self.scheduler.take()) is not None:
                with self._lock:
                    self.jobs.append(job)
                    self.most_open = max(self.most_open, len(self.scheduler._active))
                    if len(self.jobs) == self.fails_at:
                        raise Failure("a worker")
                    dawdle = self._random.random() * 2e-4 if self._random.random() < 0.3 else 0
                time.sleep(dawdle)
                self.scheduler.give(job, self._partials(job))
        except BaseException as error:
            self.scheduler.stop(error)

    def _partials(self, job: Job) -> list[Any]:
        """One for every block, or all of them joined to one."""
        stage = job.task.stages[job.stage]
        partials = [self._partial(job, pieces) for pieces in job.pieces]
        if not (isinstance(stage, Reduce) and reduce_operation(stage.operation).is_joined):
            return partials
        pairs = Pairs(reduce_operation(stage.operation).joined, len(partials))
        places = list(enumerate(partials))
        with self._lock:
            self._random.shuffle(places)
        for place, partial in places:
            pairs.add(place, [partial])
        return [pairs.result]

    def _partial(self, job: Job, pieces: Any) -> Any:
        stage = job.task.stages[job.stage]
        start = pieces[0][0]
        if isinstance(stage, Reduce):
            label, number, _ = job.state
            return (label, number, start)
        assert list(job.prepared.values()) == [tuple(dict(self._apply(stage).parameters)["needs"])]
        return start

    def _apply(self, write: Write) -> Apply:
        node = self.graph[write.source]
        assert isinstance(node, Apply)
        return node

    def run(self, workers: int) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + PATIENCE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in threads), "deadlock"


@pytest.fixture(autouse=True, scope="module")
def small_blocks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", BLOCK)
        patch.setattr(scheduler_module, "SPAN_BLOCKS", SPAN)
        yield


kinds = st.sampled_from(["all", "sample", "one"])
reductions = st.builds(
    FakeReduction,
    passes=st.lists(kinds, max_size=3),
    needs=st.sets(st.integers(0, 2), max_size=2),
    is_joined=st.booleans(),
    is_by_rows=st.booleans(),
)
tensors = st.lists(
    st.builds(
        FakeTensor,
        rows=st.integers(0, 60),
        row=st.sampled_from([1, 1, 2, 3, 4, 5, 9]),
        reductions=st.lists(reductions, max_size=3),
        is_by_rows=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


def graph_of(tensors: Sequence[FakeTensor]) -> Graph:
    graph = Graph()
    for number, tensor in enumerate(tensors):
        tensor_graph(graph, f"t{number}", tensor)
    return graph


@settings(max_examples=300)
@given(tensors, st.integers(1, 5), st.none() | st.integers(1, 5), st.integers(0, 2**32))
def test_every_block_of_every_pass_once_and_in_order(
    tensors: list[FakeTensor], workers: int, most_open: int | None, seed: int
) -> None:
    crew = Crew(graph_of(tensors), seed, most_open=most_open)
    crew.run(workers)
    assert crew.scheduler.error is None
    assert crew.most_open <= (most_open or len(tensors))
    # every output finished once, its blocks in order
    assert sorted(crew.finished) == sorted(
        (f"t{number}", tensor.starts(tensor.is_by_rows)) for number, tensor in enumerate(tensors)
    )
    # every block of every pass handed out once, in spans of consecutive blocks
    handed = Counter(
        (job.task_index, job.stage, str(job.state), job.first + place)
        for job in crew.jobs
        for place in range(len(job.pieces))
    )
    assert set(handed.values()) <= {1}
    expected = 0
    for tensor in tensors:
        expected += len(tensor.starts(tensor.is_by_rows))
        for reduction in tensor.reductions if tensor.elements else ():
            sizes = {"all": len(tensor.starts(reduction.is_by_rows)), "sample": 1, "one": 1}
            expected += sum(sizes[kind] for kind in reduction.passes)
    assert handed.total() == expected
    for job in crew.jobs:
        assert 1 <= len(job.pieces) <= SPAN
        tensor, stage = tensors[job.task_index], job.task.stages[job.stage]
        is_by_rows = tensor.is_by_rows
        if isinstance(stage, Reduce):
            is_by_rows = reduce_operation(stage.operation).is_by_rows
        block = tensor.block(is_by_rows)
        for place, pieces in enumerate(job.pieces):
            if len(pieces) == 1 and len(job.pieces) > 1:
                start = (job.first + place) * block
                assert pieces[0] == (start, min(start + block, stage.element_count))
    # tensors are begun in order
    begun = list(dict.fromkeys(job.task_index for job in crew.jobs))
    if workers == 1:
        assert begun == sorted(begun)


@settings(max_examples=100)
@given(tensors, st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32))
def test_an_error_of_a_worker_ends_all(
    tensors: list[FakeTensor], workers: int, fails_at: int, seed: int
) -> None:
    crew = Crew(graph_of(tensors), seed, fails_at)
    crew.run(workers)
    if len(crew.jobs) >= fails_at:
        assert isinstance(crew.scheduler.error, Failure)
        assert len(crew.jobs) < fails_at + workers  # the others end with the job they have
        assert crew.scheduler.take() is None
    else:
        assert len(crew.finished) == len(tensors)


@settings(max_examples=50)
@given(tensors, st.integers(0, 5), st.integers(1, 5), st.integers(0, 2**32), st.booleans())
def test_an_error_of_an_operation_ends_all(
    tensors: list[FakeTensor], place: int, workers: int, seed: int, joins: bool
) -> None:
    failing = FakeTensor(20, reductions=[FakeReduction(["all"], fails=True, is_joined=joins)])
    place = min(place, len(tensors))
    crew = Crew(graph_of([*tensors[:place], failing, *tensors[place:]]), seed)
    crew.run(workers)
    assert isinstance(crew.scheduler.error, Failure)
    assert str(crew.scheduler.error) == f"t{place}.0"
    assert f"t{place}" not in dict(crew.finished)


def test_the_first_error_is_kept() -> None:
    scheduler = Scheduler(Graph(), (), lambda write, partials: None)
    first, second = Failure("first"), Failure("second")
    scheduler.stop(first)
    scheduler.stop(second)
    scheduler.stop()
    assert scheduler.error is first


def test_a_stop_wakes_waiting_workers() -> None:
    graph = graph_of([FakeTensor(4, reductions=[FakeReduction(["all"])])])
    scheduler = Scheduler(graph, tensor_tasks(graph), lambda write, partials: None)
    job = scheduler.take()
    assert job is not None
    waiting = threading.Thread(target=scheduler.take, daemon=True)
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()  # there is nothing to do until the job is given back
    scheduler.stop()
    waiting.join(PATIENCE_SECONDS)
    assert not waiting.is_alive()
    assert scheduler.is_stopped
    assert scheduler.error is None


def test_an_earlier_tensor_goes_first() -> None:
    graph = graph_of([FakeTensor(8, reductions=[FakeReduction(["all"])]), FakeTensor(40)])
    scheduler = Scheduler(graph, tensor_tasks(graph), lambda write, partials: None)
    first, second = scheduler.take(), scheduler.take()
    assert first is not None
    assert second is not None
    assert (first.task_index, second.task_index) == (0, 1)  # nothing else to do for tensor 0
    scheduler.give(first, [("t0.0", 0, start) for start in (0, 4)])
    third = scheduler.take()
    assert third is not None
    assert (third.task_index, third.stage) == (0, 1)  # now there is


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_that_are_joined_wait_for_few(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory plan counts a few of them for every worker, and not one for every block."""
    most = 0
    real = Pairs.add

    def spy(self: Pairs[Any], place: int, value: Any) -> None:
        nonlocal most
        real(self, place, value)
        most = max(most, len(self._waiting))

    monkeypatch.setattr(Pairs, "add", spy)
    blocks = 40 * SPAN
    joined = FakeReduction(["all", "all"], is_joined=True)
    crew = Crew(graph_of([FakeTensor(blocks * BLOCK, reductions=[joined])]), workers)
    crew.run(workers)
    assert crew.scheduler.error is None
    levels = (40 - 1).bit_length()
    assert 1 <= most <= workers * levels
    assert all(job.first % SPAN == 0 for job in crew.jobs)


def test_rows_that_are_longer_than_a_block_are_blocks() -> None:
    by_rows = FakeReduction(["all", "one"], is_by_rows=True)
    crew = Crew(graph_of([FakeTensor(5, 9, [by_rows], is_by_rows=True)]), 1)
    crew.run(1)
    assert crew.scheduler.error is None
    rows = [(9 * row, 9 * row + 9) for row in range(5)]
    found = [[piece for (piece,) in job.pieces] for job in crew.jobs]
    assert found == [rows[:SPAN], rows[SPAN:], rows[-1:], rows[:SPAN], rows[SPAN:]]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_no_more_tensors_are_open_than_there_are_workers(workers: int) -> None:
    """The memory plan counts the statistics of so many tensors and of no more."""
    sizes = (20, 4, 4, 40, 4, 8, 30, 4) * 3
    twice = FakeReduction(["all", "all"])
    graph = graph_of([FakeTensor(size, reductions=[twice]) for size in sizes])
    crew = Crew(graph, workers, most_open=workers)
    crew.run(workers)
    assert crew.scheduler.error is None
    assert 1 <= crew.most_open <= workers


def test_runs_open_no_more_tensors_than_they_have_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the memory plan counts on is what the scheduler of a run is told."""
    told = []

    class Spy(Scheduler):
        def __init__(self, *arguments: Any, most_open: int, **options: Any) -> None:
            told.append(most_open)
            super().__init__(*arguments, most_open=most_open, **options)

    monkeypatch.setattr(streaming, "Scheduler", Spy)
    recipe = {"merge_method": "passthrough", "models": [{"model": "a"}]}
    plan = plan_of(tmp_path, recipe, {"a": {"w": torch.zeros(3)}}, Resources(8 << 30, 3))
    run_module.run_plan(plan, tmp_path / "out", fsync=False)
    assert told == [plan.memory.workers] == [3]
