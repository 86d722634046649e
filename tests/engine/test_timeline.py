"""Moments of a run: few however long it takes, evenly spread, the last one kept."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lazymerge.engine.run import run_plan
from lazymerge.engine.timeline import COLUMNS, FIRST_INTERVAL_SECONDS, MOST_MOMENTS, Timeline
from lazymerge.output.manifest import MANIFEST_NAME, read_document
from merge_cases import RECIPES

from merging import plan_of


@pytest.mark.parametrize("seconds", [0.5, 10, 100_000])
def test_few_moments_evenly_spread(seconds: float) -> None:
    now = [0.0]
    timeline = Timeline(clock=lambda: now[0])
    steps = 20_000
    for step in range(steps + 1):
        now[0] = seconds * step / steps
        timeline.note(step, 2 * step, is_last=step == steps)
    document: Any = timeline.as_dict()
    assert document["columns"] == list(COLUMNS)
    rows = document["rows"]
    assert len(rows) <= MOST_MOMENTS
    assert rows[0][:3] == [0.0, 0, 0]
    assert rows[-1][:3] == [pytest.approx(seconds), steps, 2 * steps]
    gaps = [later[0] - earlier[0] for earlier, later in pairwise(rows)]
    assert min(gaps[:-1]) > 0
    assert max(gaps) <= max(3 * min(gaps[:-1]), seconds / steps + FIRST_INTERVAL_SECONDS)
    assert len(rows) > min(MOST_MOMENTS // 2, seconds / FIRST_INTERVAL_SECONDS) - 3
    assert all(row[3] > 1 << 20 for row in rows)


def test_a_run_leaves_its_timeline(tmp_path: Path) -> None:
    models = {name: {"w": torch.randn(400, 900)} for name in ("base", "a", "b")}
    plan = plan_of(tmp_path, RECIPES["ties"], models)
    report = run_plan(plan, tmp_path / "out", fsync=False)
    rows = read_document(tmp_path / "out" / MANIFEST_NAME)["timeline"]["rows"]
    assert rows[0][1:3] == [0, 0]
    assert rows[-1][1:3] == [report.bytes_read, report.bytes_written]
    assert all(later[0] >= earlier[0] for earlier, later in pairwise(rows))
    # the system counts pages of each thread by the dozen
    assert max(row[3] for row in rows) <= report.measured_bytes + (1 << 20)
