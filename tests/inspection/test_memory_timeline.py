"""Memory over the schedule: what a second, slow way of adding it up says, and the plan's claim."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lazymerge.engine.stages import statistics_bytes
from lazymerge.inspection import timeline
from lazymerge.inspection.forms import forms_of
from lazymerge.inspection.timeline import memory_timeline

from page_plans import small_plan


@pytest.mark.parametrize("read_mode", ["pread", "mmap"])
def test_the_highest_moment_is_the_claim(tmp_path: Path, read_mode: str) -> None:
    plan = small_plan(tmp_path, read_mode=read_mode)
    line = memory_timeline(plan, forms_of(plan))
    assert line.peak_bytes == line.projected_bytes == plan.memory.projected_bytes
    assert line.limit_bytes == 4 << 30
    assert (plan.memory.mapped_bytes > 0) == (read_mode == "mmap")


def test_moments_go_through_all_bytes(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    line = memory_timeline(plan, forms_of(plan))
    assert [moment.tensor for moment in line.moments] == list(range(len(plan.tensors)))
    moved = [moment.moved_bytes for moment in line.moments]
    assert moved == sorted(moved)
    assert moved[0] == 0
    written = sum(tensor.size_bytes for shard in plan.shards for tensor in shard.tensors)
    assert line.moved_bytes == plan.bytes_read + written


def test_statistics_are_those_of_as_many_tensors_as_workers(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    line = memory_timeline(plan, forms_of(plan))
    own = [statistics_bytes(plan.graph, task) for task in plan.tasks]
    for place, moment in enumerate(line.moments):
        expected = sum(own[place : place + plan.memory.workers])
        assert moment.statistics_bytes == min(expected, plan.memory.statistics_bytes)


def test_fewer_moments_keep_the_highest(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    forms = forms_of(plan)
    whole = memory_timeline(plan, forms)
    few = memory_timeline(plan, forms, most_points=4)
    assert len(few.moments) <= 4
    assert few.peak_bytes == whole.peak_bytes
    assert few.moments[0].moved_bytes == 0


def test_sums_and_highest_ahead(random: np.random.Generator) -> None:
    for _ in range(50):
        values = [int(v) for v in random.integers(0, 9, random.integers(0, 20))]
        length = int(random.integers(1, 6))
        windows = [values[n : n + length] for n in range(len(values))]
        assert timeline._sum_ahead(values, length) == [sum(w) for w in windows]
        assert timeline._highest_ahead(values, length) == [max(w) for w in windows]
