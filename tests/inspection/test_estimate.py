"""The estimate of a run's time: its arithmetic, and what the measuring may not do."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lazymerge.cli.plan_time import rough_seconds, time_lines
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan
from lazymerge.inspection import disks, measurement
from lazymerge.inspection.disks import cached_share, reading_rate, writing_rate
from lazymerge.inspection.estimate import estimate, unique_bytes_read
from lazymerge.inspection.measurement import Measured, MeasuredKind, kinds_of, measure
from plan_cases import LINEAR, RECIPES, write_models

from conftest import needs_kernels
from merging import plan_of, recipe_of


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Reads 2 × 4,000 bytes once, writes a shard with 4,000 of float32."""
    tensors = {"w": torch.ones(10, 100)}
    return plan_of(tmp_path, LINEAR, {"one": tensors, "two": tensors})


def measured(
    cached: float | None = 0.0,
    computing: float | None = 1000.0,
    reading: float | None = 500.0,
    writing: float | None = 400.0,
) -> Measured:
    kinds = () if computing is None else (MeasuredKind("w", 1, 8000, computing),)
    return Measured(kinds, 2, cached, reading, "a file", writing, "read", 0.5)


def test_the_bounds_are_the_longer_part_and_the_sum(plan: Plan) -> None:
    found = estimate(plan, measured())
    written = plan.bytes_written / 400.0
    assert (found.computing_seconds, found.reading_seconds) == (8.0, 16.0)
    assert found.writing_seconds == written
    assert found.least_seconds == 16.0 + written
    assert found.most_seconds == 24.0 + written


def test_what_is_in_the_page_cache_is_not_read_from_the_disk(plan: Plan) -> None:
    assert estimate(plan, measured(cached=0.75)).reading_seconds == 4.0
    assert estimate(plan, measured(cached=0.97)).disk_bytes_read == 0
    assert estimate(plan, measured(cached=None)).disk_bytes_read == unique_bytes_read(plan) == 8000
    cached = estimate(plan, measured(cached=1.0, reading=None))
    assert cached.reading_seconds == 0.0
    assert cached.most_seconds is not None


def test_what_was_not_measured_is_not_made_up(plan: Plan) -> None:
    found = estimate(plan, measured(reading=None))
    assert found.most_seconds is None
    assert found.least_seconds == 8.0
    assert time_lines(plan, found)[0] == "8.0 s or more: not all of it could be measured"
    assert any("--measure reads a sample" in line for line in time_lines(plan, found))
    nothing = estimate(plan, measured(computing=None, reading=None, writing=None))
    assert nothing.least_seconds is None
    assert time_lines(plan, nothing)[0].startswith("not known")


def test_kinds_that_were_not_measured_are_taken_to_be_like_the_others(plan: Plan) -> None:
    half = replace(measured(), kinds=(MeasuredKind("w", 1, 4000, 1000.0),))
    assert estimate(plan, half).computing_seconds == 8.0


def test_repeated_passes_find_their_input_in_memory(tmp_path: Path) -> None:
    write_models(tmp_path)
    plan = make_plan(recipe_of(tmp_path, RECIPES["ties"]))
    assert unique_bytes_read(plan) < plan.bytes_read
    assert estimate(plan, measured()).disk_bytes_read == unique_bytes_read(plan)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "less than a second"),
        (3.14, "3.1 s"),
        (59.6, "60 s"),
        (98, "98 s"),
        (300, "5 min"),
        (3 * 3600 + 100, "3 h 0 min"),
    ],
)
def test_an_estimate_has_two_digits(seconds: float, words: str) -> None:
    assert rough_seconds(seconds) == words


def test_kinds_cover_the_plan(tmp_path: Path) -> None:
    write_models(tmp_path)
    for recipe in RECIPES.values():
        plan = make_plan(recipe_of(tmp_path, recipe))
        kinds = kinds_of(plan)
        assert sum(kind.bytes_read for kind in kinds) == plan.bytes_read
        assert [kind.bytes_read for kind in kinds] == sorted(
            (kind.bytes_read for kind in kinds), reverse=True
        )


@needs_kernels
def test_measuring_needs_no_byte_of_the_inputs_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models are gone by then."""
    monkeypatch.setattr(measurement, "COMPUTING_SECONDS", 0.05)
    write_models(tmp_path / "models", rows=40_000)
    computed = 0
    for name, recipe in RECIPES.items():
        plan = make_plan(recipe_of(tmp_path / "models", recipe))
        (tmp_path / "models").rename(tmp_path / "gone")
        before = sorted(path for path in tmp_path.rglob("*"))
        found = measure(plan, tmp_path / "out")
        assert sorted(path for path in tmp_path.rglob("*")) == before, name
        assert found.cached_share is None
        assert found.writing_basis in (None, "read")
        assert all(kind.bytes_per_s > 0 for kind in found.kinds)
        computed += bool(found.kinds)
        (tmp_path / "gone").rename(tmp_path / "models")
    assert computed > len(RECIPES) // 2


def test_a_sample_of_the_inputs_is_read_only_if_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Plan
) -> None:
    asked: list[bool] = []

    def reading_rate(paths: object, *, is_sample_allowed: bool) -> tuple[None, None]:
        asked.append(is_sample_allowed)
        return None, None

    monkeypatch.setattr(measurement, "reading_rate", reading_rate)
    monkeypatch.setattr(measurement, "COMPUTING_SECONDS", 0.01)
    measure(plan, tmp_path)
    assert not any(asked)
    before = sorted(tmp_path.rglob("*"))
    found = measure(plan, tmp_path / "not" / "there", touches_files=True)
    assert any(asked)
    assert sorted(tmp_path.rglob("*")) == before
    assert found.writing_basis in (None, "written")


def test_an_unnamed_file_leaves_nothing(tmp_path: Path) -> None:
    rate = writing_rate(tmp_path / "later")
    assert rate is None or rate > 0
    assert list(tmp_path.iterdir()) == []


def test_the_page_cache_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    assert cached_share([(path, 1 << 20)]) in (None, 1.0)
    assert cached_share([(path, 1 << 20)] * 1000) in (None, 1.0)
    assert cached_share([(tmp_path / "none", 10)]) is None
    assert cached_share([]) is None


def test_a_disk_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(disks.LEAST_FILE_BYTES))
    answered = threading.Event()
    monkeypatch.setattr(disks, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(disks, "READING_SECONDS", 0.05)
    monkeypatch.setattr(disks, "WRITING_SECONDS", 0.05)
    monkeypatch.setattr(os, "preadv", lambda *_: answered.wait(60))
    monkeypatch.setattr(os, "fdatasync", lambda *_: answered.wait(60))
    began = time.monotonic()
    assert reading_rate([tmp_path / "file"], is_sample_allowed=True)[0] is None
    assert writing_rate(tmp_path) is None
    assert time.monotonic() - began < 30
    answered.set()
