"""The memory plan: fewer workers first, refusal last, and the limit it names is the right one."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lazymerge.engine import memory
from lazymerge.engine.baseline import peak_resident_bytes, reserved_bytes, resident_bytes
from lazymerge.engine.execution import Execution, Kernels, ReadMode
from lazymerge.engine.memory import MIB, MemoryPlan, plan_memory
from lazymerge.engine.plan import Plan
from lazymerge.engine.resources import Resources
from lazymerge.errors import DoesNotFitError

from conftest import needs_kernels, write_checkpoint
from merging import plan_of

LARGE = 8 << 30
TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": m, "parameters": {"weight": 1, "density": 0.5}} for m in ("a", "b")],
}
LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": m, "parameters": {"weight": 1}} for m in ("base", "a", "b")],
}


@pytest.fixture(scope="module", params=["linear", "ties"])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A merge of some small tensors and one of several blocks."""
    folder = tmp_path_factory.mktemp("memory")
    for name, dtype in (("base", torch.bfloat16), ("a", torch.float32), ("b", torch.bfloat16)):
        write_checkpoint(
            folder / name,
            {
                "large": torch.zeros(700_000, dtype=dtype),
                **{f"layers.{n}.w": torch.zeros(1000 * n + 1, dtype=dtype) for n in range(5)},
            },
        )
    recipe = LINEAR if request.param == "linear" else TIES
    return plan_of(folder, recipe, {}, Resources(LARGE, workers=4))


def planned(
    plan: Plan,
    limit: int,
    workers: int,
    read_mode: ReadMode = "pread",
    kernels: Kernels = "native",
    held_bytes: int = 0,
) -> MemoryPlan:
    execution = Execution(read_mode, kernels)
    return plan_memory(plan.graph, plan.kinds, limit, workers, execution, held_bytes)


modes: st.SearchStrategy[ReadMode] = st.sampled_from(["pread", "mmap"])
kernels_of: st.SearchStrategy[Kernels] = st.sampled_from(["native", "torch"])
every_kernels = pytest.mark.parametrize("kernels", ["native", "torch"])


@given(st.data())
def test_as_many_workers_as_fit(plan: Plan, data: st.DataObject) -> None:
    mode, kernels = data.draw(modes), data.draw(kernels_of)
    workers = data.draw(st.integers(1, 16))
    projected = [
        planned(plan, LARGE, count, mode, kernels).projected_bytes for count in range(1, 18)
    ]
    assert projected == sorted(projected)
    limit = data.draw(
        st.integers(projected[0], projected[-1])
        | st.sampled_from(projected)
        | st.sampled_from(projected[1:]).map(lambda size: size - 1)
    )
    chosen = planned(plan, limit, workers, mode, kernels)
    assert chosen.limit_bytes == limit
    assert chosen.workers == max(n for n in range(1, workers + 1) if projected[n - 1] <= limit)
    assert chosen.projected_bytes == projected[chosen.workers - 1] <= limit


@every_kernels
@pytest.mark.parametrize("mode", ["pread", "mmap"])
def test_the_smallest_limit_that_is_named_works_and_a_mib_less_does_not(
    plan: Plan, mode: ReadMode, kernels: Kernels
) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        planned(plan, 1, 4, mode, kernels)
    message = str(caught.value)
    assert "(most for large)" in message
    assert "the limit is 1 B" in message
    named = re.search(r"the smallest limit that works is --memory (\d+)MiB$", message)
    assert named is not None
    smallest = int(named[1]) * MIB
    chosen = planned(plan, smallest, 4, mode, kernels)
    assert chosen.workers >= 1
    assert chosen.smallest_limit_bytes == smallest
    with pytest.raises(DoesNotFitError, match=re.escape(named[0])):
        planned(plan, smallest - MIB, 4, mode, kernels)


@every_kernels
def test_mapped_pages_are_counted_where_inputs_are_mapped(plan: Plan, kernels: Kernels) -> None:
    pread, mapped = (planned(plan, LARGE, 3, mode, kernels) for mode in ("pread", "mmap"))
    assert pread.mapped_bytes == 0
    windows = 3 * 700_000 * (2 + 4 + 2)  # the tensor is shorter than a window
    pages = 3 * 3 * 2 * mmap.ALLOCATIONGRANULARITY
    assert mapped.mapped_bytes == windows + pages
    saved = 3 * (pread.arena_bytes - mapped.arena_bytes)  # room for undecoded blocks
    assert saved >= 0
    assert mapped.projected_bytes - pread.projected_bytes == mapped.mapped_bytes - saved


@needs_kernels
def test_native_kernels_need_less(plan: Plan) -> None:
    """No torch, and a chunk instead of a block for whatever is in between."""
    native, by_torch = (planned(plan, LARGE, 2, "pread", k) for k in ("native", "torch"))
    assert (native.libraries, by_torch.libraries) == ("numpy", "torch")
    assert native.reserved_bytes < by_torch.reserved_bytes
    assert native.arena_bytes < by_torch.arena_bytes
    assert native.statistics_bytes == by_torch.statistics_bytes


def test_one_stage_that_only_torch_can_do_is_enough_to_load_it(tmp_path: Path) -> None:
    models = {
        name: {"w": torch.zeros(3), "f8": torch.zeros(3).to(torch.float8_e5m2)} for name in "ab"
    }
    recipe = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in "ab"],
    }
    assert planned(plan_of(tmp_path, recipe, models), LARGE, 1).libraries == "torch"


@every_kernels
def test_the_sum(plan: Plan, kernels: Kernels) -> None:
    chosen = planned(plan, LARGE, 2, "pread", kernels)
    assert chosen.projected_bytes == (
        chosen.reserved_bytes + 2 * chosen.arena_bytes + chosen.statistics_bytes
    )
    assert chosen.as_dict()["projected_bytes"] == chosen.projected_bytes
    assert chosen.reserved_bytes > reserved_bytes(chosen.libraries)
    assert (chosen.statistics_bytes > 0) == (plan.recipe.merge_method == "ties")


@every_kernels
def test_what_the_process_holds_already_counts_where_it_is_more(
    plan: Plan, kernels: Kernels
) -> None:
    fresh = planned(plan, LARGE, 2, "pread", kernels)
    little = planned(plan, LARGE, 2, "pread", kernels, held_bytes=MIB)
    much = planned(plan, LARGE, 2, "pread", kernels, held_bytes=1 << 30)
    assert little == fresh
    nodes = fresh.reserved_bytes - reserved_bytes(fresh.libraries)
    assert much.reserved_bytes == (1 << 30) + nodes
    with pytest.raises(DoesNotFitError, match=r"the merge needs 1\.\d+ GiB"):
        planned(plan, 1 << 30, 2, "pread", kernels, held_bytes=1 << 30)


def test_an_existing_plan_is_given_other_resources(plan: Plan) -> None:
    one = plan.with_resources(Resources(LARGE, workers=1, read_mode="mmap", kernels="torch"))
    assert (one.memory.workers, one.execution) == (1, Execution("mmap", "torch"))
    assert one.fingerprint == plan.fingerprint
    with pytest.raises(DoesNotFitError):
        plan.with_resources(Resources(MIB))


def test_defaults(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = memory.LIBRARY_HELD_BYTES
    for available, resident, limit in (
        (16 << 30, 0, 2 << 30),
        (3 << 30, 0, 3 << 29),
        (16 << 30, reserved, 2 << 30),
        (16 << 30, reserved + (1 << 30), 3 << 30),  # a large program that merges by the way
        (3 << 30, reserved + (1 << 30), 5 << 29),
    ):
        monkeypatch.setattr(memory, "available_memory_bytes", lambda free=available: free)
        monkeypatch.setattr(memory, "resident_bytes", lambda held=resident: held)
        chosen = plan.with_resources(Resources()).memory
        assert chosen.limit_bytes == limit
        assert chosen.workers == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  5000 kB\n"}, 5_120_000),
        (
            {
                "/proc/meminfo": "MemAvailable: 5000 kB\n",
                "/sys/fs/cgroup/memory.max": "max\n",
                "/sys/fs/cgroup/memory.current": "17\n",
            },
            5_120_000,
        ),
        (
            {
                "/proc/meminfo": "MemAvailable: 5000 kB\n",
                "/sys/fs/cgroup/memory.max": "1000000\n",
                "/sys/fs/cgroup/memory.current": "400000\n",
            },
            600_000,
        ),
        (
            {
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
                "/sys/fs/cgroup/memory/memory.usage_in_bytes": "4000\n",
            },
            0,
        ),
    ],
)
def test_what_is_available(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int | None
) -> None:
    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    free = memory.available_memory_bytes()
    monkeypatch.undo()
    if expected is None:
        expected = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        assert free == pytest.approx(expected, rel=0.5)  # other processes come and go
    else:
        assert free == expected


def test_measured_memory_is_a_peak() -> None:
    before = peak_resident_bytes()
    held = bytearray(32 * MIB)
    held[:: os.sysconf("SC_PAGE_SIZE")] = b"x" * len(held[:: os.sysconf("SC_PAGE_SIZE")])
    del held
    status = Path("/proc/self/status").read_text()
    high_water = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert high_water is not None
    assert peak_resident_bytes() == pytest.approx(int(high_water[1]) * 1024, rel=0.05)
    assert peak_resident_bytes() >= before
    assert resident_bytes() < before + 32 * MIB  # what was let go is not held
