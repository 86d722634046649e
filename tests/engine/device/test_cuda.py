"""What only a GPU can show: CUDA's bytes are the host device's, its memory keeps to the limit."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from device_cases import (
    DEVICE_BLOCK,
    RECIPES,
    models,
    on_device,
    run_on,
    run_on_host,
    use_small_blocks,
)
from lazymerge.engine import blocks
from lazymerge.engine.arena import Arena
from lazymerge.engine.device.cuda import CudaDevice
from lazymerge.engine.device.host import HostDevice
from lazymerge.engine.device.memory import open_lanes
from lazymerge.engine.plan import Plan
from lazymerge.engine.report import Silent
from lazymerge.engine.run import run_plan

from merging import bits, plan_of, run
from reference import assert_within_ulps, to_float64

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="torch.cuda.is_available() is false: these tests need an NVIDIA GPU and torch with CUDA",
)

MIB = 1 << 20


@pytest.fixture(params=RECIPES)
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> Plan:
    return plan_of(tmp_path, RECIPES[request.param], models())


def on_gpu(plan: Plan, output: Path) -> dict[str, torch.Tensor]:
    with closing(CudaDevice()) as device:
        return run_on(device, plan, output)[1]


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_are_those_of_the_host_device(
    plan: Plan, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folded sums included: their order is ours, not the device's."""
    use_small_blocks(monkeypatch)
    planned = on_device(plan, workers)
    expected = run_on_host(planned, tmp_path / "host")
    actual = on_gpu(planned, tmp_path / "gpu")
    assert {name: bits(t) for name, t in expected.items()} == {
        name: bits(t) for name, t in actual.items()
    }


def test_results_are_those_of_the_processor(plan: Plan, tmp_path: Path) -> None:
    expected = run(plan, tmp_path / "cpu")
    actual = on_gpu(on_device(plan), tmp_path / "gpu")
    for name, tensor in expected.items():
        if tensor.dtype.is_floating_point:
            assert_within_ulps(actual[name], to_float64(tensor), tensor.dtype, slack=2.0**-45)
        else:
            assert bits(actual[name]) == bits(tensor)


def large_models() -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of several real blocks."""
    generator = torch.Generator().manual_seed(1)
    elements = 2 * blocks.DEVICE_BLOCK_ELEMENTS + 12_345
    return {
        name: {
            f"model.layers.{n}.w.weight": torch.randn(elements, generator=generator).bfloat16()
            for n in range(2)
        }
        for name in ("base", "a", "b")
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", ["task_arithmetic", "slerp", "ties, rescaled"])
def test_memory_keeps_to_the_limit_and_nothing_is_allocated_later(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, RECIPES[method], large_models())
    smallest = on_device(plan, vram=64 << 30).memory.vram
    assert smallest is not None
    for limit, workers in ((smallest.smallest_limit_bytes, 1), (4 << 30, 3)):
        planned = on_device(plan, workers, limit)
        vram = planned.memory.vram
        assert vram is not None
        taken: list[int] = []

        class Watching(Silent):
            """Asks the driver's count of allocations after every block."""

            def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
                taken.append(torch.cuda.memory_stats()["num_device_alloc"])  # noqa: B023

        with closing(CudaDevice()) as device:
            report = run_plan(
                planned,
                tmp_path / "gpu",
                fsync=False,
                overwrite=True,
                observer=Watching(),
                device=device,
            )
            assert torch.cuda.max_memory_allocated() <= vram.projected_bytes
        assert report.measured_vram_bytes is not None
        assert report.measured_vram_bytes <= vram.projected_bytes <= limit
        # the arena, and a segment per worker when its stream first counts
        assert taken[-1] - taken[0] <= workers
        if method == "task_arithmetic":
            assert taken[-1] == taken[0]


def test_arenas_are_pinned_and_given_back() -> None:
    arena = Arena(5 * MIB)
    with closing(CudaDevice()) as device:
        device.pin(arena)
        assert torch.frombuffer(arena.memory, dtype=torch.uint8).is_pinned()
        queue = device.queue()
        target = device.allocate(5 * MIB)
        queue.copy(target, torch.frombuffer(arena.memory, dtype=torch.uint8))
        queue.record().wait()
    assert not torch.frombuffer(arena.memory, dtype=torch.uint8).is_pinned()


def test_queues_overlap_and_wait(tmp_path: Path) -> None:
    """A copy that must wait for a computation gets its result."""
    with closing(CudaDevice()) as device:
        memory = device.allocate(8 * MIB).view(torch.float32)
        computing, outgoing = device.queue(), device.queue()
        arena = Arena(8 * MIB)
        device.pin(arena)
        received = torch.frombuffer(arena.memory, dtype=torch.float32)

        def work() -> None:
            memory.zero_()
            for _ in range(1000):
                memory.add_(1)

        for _ in range(3):
            computing.run(work)
            outgoing.after(computing.record())
            outgoing.copy(received, memory)
            outgoing.record().wait()
            assert received.unique().tolist() == [1000.0]


def test_cuda_is_a_device_like_the_host(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)
    assert DEVICE_BLOCK == blocks.DEVICE_BLOCK_ELEMENTS
    planned = on_device(plan)
    with closing(CudaDevice()) as device:
        lanes: list[Any] = open_lanes(device, planned.memory)
        host = open_lanes(HostDevice(1 << 30), planned.memory)
        assert [lane.memory.shape for lane in lanes] == [lane.memory.shape for lane in host]
        assert device.memory().free_bytes <= device.memory().total_bytes
