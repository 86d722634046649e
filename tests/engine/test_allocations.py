"""Nothing is allocated per block but what is kept: partial results, checksums.

Every method that is known, in one thread, so that torch's dispatcher and tracemalloc see all of it.
Torch's own memory is seen tensor by tensor; numpy's and Python's by tracemalloc.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from lazymerge.engine import blocks, frame, streaming
from lazymerge.engine import run as run_module
from lazymerge.engine.execution import Kernels
from lazymerge.engine.plan import Plan
from lazymerge.engine.resources import Resources
from lazymerge.engine.scheduler import Scheduler
from lazymerge.engine.stages import joined_statistics_bytes, statistics_bytes
from lazymerge.engine.worker import Worker
from lazymerge.graph import vector
from lazymerge.graph.operations import selection
from lazymerge.methods import METHODS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import needs_kernels
from merging import plan_of
from method_recipes import model_counts, recipe_for

BLOCK = 8192
ROW = 500
"""Elements of a row: no whole number of them makes a block."""
SCALAR_BYTES = 64

methods = pytest.mark.parametrize("method", METHODS)
every_kernels = pytest.mark.parametrize(
    "kernels", [pytest.param("native", marks=needs_kernels), "torch"]
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", BLOCK)
    monkeypatch.setattr(selection, "CANDIDATES", 2 * BLOCK)
    monkeypatch.setattr(selection, "ALL_CANDIDATES", 4 * BLOCK)
    # to the candidates as they are in earnest, and a sample must fit a block
    monkeypatch.setattr(selection, "SAMPLE_RUNS", 8)
    monkeypatch.setattr(selection, "NARROWING_SAMPLE", 2048)
    monkeypatch.setattr(vector, "SLICE_ELEMENTS", 128)
    monkeypatch.setattr(vector, "SLICE_ROWS", 8)


@pytest.fixture(autouse=True)
def small_numpy_buffers() -> Iterator[None]:
    """numpy takes a buffer of 64 KiB where a row meets a matrix, however long the block is: here
    it would be larger than a block."""
    before = np.setbufsize(16)
    yield
    np.setbufsize(before)


@pytest.fixture(autouse=True)
def in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(scheduler: Scheduler, workers: Sequence[Worker], wake: Any, **_: bool) -> None:
        (worker,) = workers
        worker.run()
        if scheduler.error is not None:
            raise scheduler.error

    monkeypatch.setattr(streaming, "run_workers", work)


def plan_for(folder: Path, method: str, kernels: Kernels, count: int, dtype: str = "F32") -> Plan:
    """A merge of one tensor of `count` blocks (the last of them ragged)."""
    signature = METHODS[method].signature
    document = recipe_for(
        signature,
        [Path(f"m{number}") for number in range(5)],
        model_counts(signature, 3)[-1],
        setting="flags",
        random=Random(2),
        out_dtype="bfloat16",
    )
    generator = torch.Generator().manual_seed(count)
    wide = torch.float64 if dtype == "F64" else torch.float32
    models = {
        f"m{number}": {
            "w": torch.randn(count * BLOCK // ROW, ROW, generator=generator).to(
                torch.float16 if number == 1 else wide
            )
        }
        for number in range(5)
    }
    return plan_of(folder, document, models, Resources(8 << 30, 1, kernels=kernels))


# --------------------------------------------------------------------------------- torch


class Allocations(TorchDispatchMode):
    """Sizes of the storages that are made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs or {}))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in given:
                    self.made.append((str(func), storage.nbytes()))
        return result


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Allocations:
    """What TorchFrame.encode and reduce allocate."""
    seen = Allocations()
    reals = {name: getattr(frame.TorchFrame, name) for name in ("encode", "reduce")}
    for name, method in reals.items():

        def spied(*arguments: Any, real: Any = method) -> Any:
            with seen:
                return real(*arguments)

        monkeypatch.setattr(frame.TorchFrame, name, spied)
    return seen


@methods
@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_torch_makes_no_tensor_in_the_block_loop(
    tmp_path: Path, allocations: Allocations, method: str, dtype: str
) -> None:
    plan = plan_for(tmp_path, method, "torch", 5, dtype)
    run_module.run_plan(plan, tmp_path / "out", fsync=False)
    assert allocations.calls >= 5
    large = [(name, size) for name, size in allocations.made if size > SCALAR_BYTES]
    assert large == []


def test_a_tensor_made_in_the_block_loop_would_be_seen(allocations: Allocations) -> None:
    block = torch.zeros(1000)
    with allocations:
        block.add_(1).mul_(2)[:500].abs_()
        torch.hardshrink(block, 0.5, out=block)
        assert allocations.made == []
        (block + 1).sum()
    assert [size for _, size in allocations.made] == [4000, 4]


# ------------------------------------------------------------------------ numpy and Python


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def peak_of_work(plan: Plan, output: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most memory that Python and numpy hold while blocks are computed, above what they held
    before the first."""
    peaks = []
    inline = streaming.run_workers

    def work(scheduler: Scheduler, workers: Sequence[Worker], wake: Any, **more: bool) -> None:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        inline(scheduler, workers, wake, **more)
        peaks.append(tracemalloc.get_traced_memory()[1] - before)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "run_workers", work)
        run_module.run_plan(plan, output, fsync=False)
    (peak,) = peaks
    return peak


PER_BLOCK = 1000
"""Bytes of a checksum, a range and a job's share, or of a few floats; a block has 32,768."""


@methods
@every_kernels
@pytest.mark.usefixtures("traced")
def test_memory_grows_by_partial_results_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kernels: Kernels
) -> None:
    peaks, declared = [], []
    # once to import and cache whatever is imported and cached
    for number, count in enumerate((3, 8, 40)):
        plan = plan_for(tmp_path / str(number), method, kernels, count)
        peaks.append(peak_of_work(plan, tmp_path / str(number) / "out", monkeypatch))
        joined = [
            joined_statistics_bytes(plan.graph, stage)
            for task in plan.tasks
            for stage in task.stages
        ]
        statistics = sum(statistics_bytes(plan.graph, task) for task in plan.tasks)
        declared.append(statistics + max(joined))
    _, few, many = peaks
    # 8 blocks are searched without a sample, all values kept; statistics are bounded, not equal
    # (a block that was allocated each time would show as 32 times 32,768 bytes)
    assert many <= max(few, declared[2]) + 96 * PER_BLOCK
    assert (
        few <= declared[1] + 64 * PER_BLOCK + 4 * BLOCK
    )  # a block's values before they are spread


@methods
@every_kernels
@pytest.mark.usefixtures("traced")
def test_a_block_is_written_without_allocating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kernels: Kernels
) -> None:
    """Each block on its own, or a span of them: the second and all that follow take a few small
    objects."""
    peaks: list[int] = []

    def measured_at_once(write: Any) -> Any:
        def spied(self: Any, start: int, stop: int, sink: Any) -> Any:
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            outcome = write(self, start, stop, sink)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
            return outcome

        return spied

    def measured(run: Any) -> Any:
        def spied(self: Any, pieces: Any, state: Any) -> Iterator[Any]:
            iterator = run(self, pieces, state)
            while True:
                before, _ = tracemalloc.get_traced_memory()
                tracemalloc.reset_peak()
                outcome = next(iterator, None)
                if outcome is None:
                    return
                if isinstance(outcome, memoryview):
                    peaks.append(tracemalloc.get_traced_memory()[1] - before)
                yield outcome

        return spied

    for kind in (frame.NativeFrame, frame.RawFrame, frame.TorchFrame):
        monkeypatch.setattr(kind, "run", measured(kind.run))
    write_at_once = measured_at_once(frame.NativeFrame.write)
    monkeypatch.setattr(frame.NativeFrame, "write", write_at_once)
    plan = plan_for(tmp_path, method, kernels, 40)
    run_module.run_plan(plan, tmp_path / "out", fsync=False)
    assert len(peaks) >= 3
    row = 40 * ROW if method.startswith("della") else 0  # numpy sorts one in memory of its own
    assert np.median(peaks) < BLOCK + row  # bytes; views and their headers. A block has 32,768
    assert sorted(peaks)[-2] < 2 * BLOCK + row  # the first may import, record, or open a file
