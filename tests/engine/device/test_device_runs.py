"""Whole merges on the host device: every method, against the processor's own path.

The host device can be as late as a real one: with every choice of late queues the bytes must be the
same. The last tests leave out one wait after the other and expect wrong bytes, so that this is
known to notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_cases import (
    COMPUTING,
    DEVICE_BLOCK,
    DRAWING,
    INCOMING,
    LATE,
    MEMORY,
    OUTGOING,
    RECIPES,
    VRAM,
    models,
    nested_plan,
    on_device,
    run_on,
    run_on_host,
    use_small_blocks,
)
from lazymerge.checkpoint import DTYPES
from lazymerge.engine import blocks, streaming
from lazymerge.engine.arena import Arena
from lazymerge.engine.device.frame import DeviceFrame
from lazymerge.engine.device.host import HostDevice, HostQueue
from lazymerge.engine.device.memory import open_lanes
from lazymerge.engine.inputs import InputFiles
from lazymerge.engine.plan import Plan
from lazymerge.engine.reference import run_reference
from lazymerge.engine.resources import Resources
from lazymerge.engine.stages import DeviceLayout, stage_layout
from lazymerge.errors import InputError
from lazymerge.graph.operation import apply_operation
from torch.utils._python_dispatch import TorchDispatchMode

from merging import bits, plan_of, run
from reference import assert_within_ulps, to_float64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


@pytest.fixture(params=RECIPES)
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> Plan:
    return plan_of(tmp_path, RECIPES[request.param], models())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype for name in one)
    return all(bits(one[name]) == bits(other[name]) for name in one)


def is_exact(plan: Plan) -> bool:
    """Whether no sum over elements of several blocks goes into the result: then a device's bytes
    are the CPU's."""
    method = plan.recipe.merge_method
    return not (method in ("slerp", "sce", "nuslerp") or "rescale" in plan.recipe.text)


def test_results_are_those_of_the_processor(plan: Plan, tmp_path: Path) -> None:
    expected = run(plan, tmp_path / "cpu")
    actual = run_on_host(on_device(plan), tmp_path / "device")
    if is_exact(plan):
        assert same(expected, actual)
    for name, tensor in expected.items():
        if tensor.dtype.is_floating_point:
            assert_within_ulps(actual[name], to_float64(tensor), tensor.dtype, slack=2.0**-45)
        else:
            assert bits(actual[name]) == bits(tensor)


SUMMED_IN_FLOAT64 = [
    name for name in RECIPES if "ties" not in name and name not in ("breadcrumbs", "della")
]
"""The others compare in float32, where a reference in float64 may choose otherwise; they are
compared with the processor above."""


@pytest.mark.parametrize("plan", SUMMED_IN_FLOAT64, indirect=True)
def test_results_are_within_an_ulp_of_the_reference(plan: Plan, tmp_path: Path) -> None:
    expected = run_reference(plan.graph)
    actual = run_on_host(on_device(plan), tmp_path / "device")
    for write in plan.graph.writes:
        if DTYPES[write.dtype].is_float:
            tensor = actual[write.name]
            assert_within_ulps(
                tensor, to_float64(expected[write.name]), tensor.dtype, slack=2.0**-45
            )


@pytest.mark.parametrize("mode", ["pread", "mmap"])
def test_bytes_do_not_depend_on_when_queues_work(plan: Plan, tmp_path: Path, mode: Any) -> None:
    expected = run_on_host(on_device(plan, workers=1), tmp_path / "expected")
    for late, workers in zip(LATE, cycle((3, 1)), strict=False):
        planned = on_device(plan, workers, read_mode=mode)
        assert planned.memory.workers == workers
        assert same(expected, run_on_host(planned, tmp_path / "out", late)), late


@pytest.mark.parametrize("late", LATE)
def test_nested_operations(tmp_path: Path, late: tuple[int, ...]) -> None:
    """Apply of Apply, Reduce of Apply, float32 results in float64 sums."""
    plan = nested_plan(tmp_path)
    expected = run(plan, tmp_path / "cpu")
    assert same(expected, run_on_host(on_device(plan), tmp_path / "out", late))


def test_every_pair_of_dtypes(tmp_path: Path) -> None:
    """Decoded and rounded as on the processor; from float64 once."""
    random = np.random.default_rng(3)
    bytes_of_any_kind = torch.from_numpy(random.integers(0, 256, 8 * 401).astype(np.uint8))
    floats = [dtype for dtype in DTYPES.values() if dtype.is_float]
    for source in floats:
        stored = bytes_of_any_kind.view(getattr(torch, source.torch_name))[:401]
        stored = torch.where(stored.double().isfinite(), stored, torch.zeros_like(stored))
        for target in floats:
            if target.item_bytes == 1:
                continue  # no recipe asks for it
            for scale in ({}, {"parameters": {"scale": 0.7}}):
                recipe = {
                    "merge_method": "passthrough",
                    "out_dtype": target.torch_name,
                    "models": [{"model": "a", **scale}],
                }
                folder = tmp_path / f"{source.name}-{target.name}-{len(scale)}"
                plan = plan_of(folder, recipe, {"a": {"t": stored}})
                expected = run(plan, folder / "cpu")
                assert same(expected, run_on_host(on_device(plan), folder / "out")), folder.name


def test_unequal_integers_are_refused(tmp_path: Path) -> None:
    unequal = models()
    unequal["b"]["steps"][150] += 1
    plan = on_device(plan_of(tmp_path, RECIPES["linear"], unequal))
    device = HostDevice(2 * VRAM)
    with pytest.raises(InputError, match=r"tensor steps .* differs between .*base and .*b;"):
        run_on(device, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_heavy_ties_are_cut_where_the_processor_cuts_them(tmp_path: Path) -> None:
    """Few values, so that thresholds are equalled by many, and one block is read again."""
    random = np.random.default_rng(17)

    def coarse() -> torch.Tensor:
        return torch.from_numpy(random.integers(-3, 4, 7 * DEVICE_BLOCK + 5) / 4)

    tensors = {name: {"w": coarse().to(torch.bfloat16)} for name in ("base", "a", "b")}
    for density in (0.01, 0.2, 0.5, 0.77):
        recipe = {
            **RECIPES["ties"],
            "models": [
                {"model": m, "parameters": {"weight": 1.0, "density": density}} for m in ("a", "b")
            ],
        }
        plan = plan_of(tmp_path, recipe, tensors)
        expected = run(plan, tmp_path / "cpu")
        for late in ((), (INCOMING, COMPUTING, OUTGOING)):
            assert same(expected, run_on_host(on_device(plan), tmp_path / "out", late))


# ---------------------------------------------------------------------------- the frame by itself


def test_one_block_at_a_time_is_the_same_as_many(tmp_path: Path) -> None:
    plan = on_device(plan_of(tmp_path, RECIPES["task_arithmetic"], models()), workers=1)
    expected = run_on_host(plan, tmp_path / "out")
    for write in plan.graph.writes:
        if write.name.startswith("model.layers"):
            with opened_frame(plan, write.name, HostDevice(VRAM, (0, 1, 2))) as frame:
                data = b"".join(
                    bytes(frame.encode(start, min(start + DEVICE_BLOCK, write.element_count)))
                    for start in range(0, write.element_count, DEVICE_BLOCK)
                )
            assert data == bits(expected[write.name])


@contextmanager
def opened_frame(plan: Plan, name: str, device: HostDevice) -> Iterator[DeviceFrame]:
    """The frame of a tensor's write stage, with its buffers."""
    write = next(write for write in plan.graph.writes if write.name == name)
    layout = stage_layout(plan.graph, write, plan.execution)
    assert isinstance(layout, DeviceLayout)
    node: Any = plan.graph.block_node(write.source)
    prepared = {node.id: apply_operation(node.operation).prepare(dict(node.parameters), ())}
    (lane,) = open_lanes(device, plan.memory)
    arena = Arena(plan.memory.arena_bytes)
    files = InputFiles()
    try:
        yield DeviceFrame(plan.graph, write, layout, arena, lane, files, prepared, "pread")
    finally:
        files.close()


# ---------------------------------------------------------------------------- nothing is allocated


class _Allocations(TorchDispatchMode):
    """Notes every operator whose result lies in memory of its own."""

    def __init__(self, known: set[int], seen: dict[str, int]) -> None:
        super().__init__()
        self.known = known
        self.seen = seen

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            address = result.untyped_storage().data_ptr()
            if result.numel() and not any(a <= address < b for a, b in list(self.known)):  # type: ignore[misc]
                self.seen[str(function)] = self.seen.get(str(function), 0) + result.nbytes
        return result


@pytest.mark.parametrize("plan", [name for name in RECIPES if name not in DRAWING], indirect=True)
def test_nothing_is_allocated_while_blocks_are_computed(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor that an operator returns lies in the device arena or in pinned memory."""
    assert not allocated(plan, tmp_path, monkeypatch)


@pytest.mark.parametrize("last", [1500, 1501, 1502, 1503])
@pytest.mark.parametrize("method", ["dare_ties", "dare_linear"])
def test_nothing_is_allocated_while_random_numbers_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, last: int
) -> None:
    """Of more than a few elements, whatever the length of the last block."""
    monkeypatch.setattr(blocks, "DEVICE_BLOCK_ELEMENTS", 2048)
    generator = torch.Generator().manual_seed(1)
    size = 2 * 2048 + last
    tensors = {m: {"w": torch.randn(size, generator=generator)} for m in ("base", "a", "b")}
    plan = plan_of(tmp_path, RECIPES[method], tensors)
    assert not allocated(plan, tmp_path, monkeypatch)


def allocated(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Operators whose results lie elsewhere than in the arenas while a plan is run on a device."""
    device = HostDevice(VRAM)
    known: set[Any] = set()
    seen: dict[str, int] = {}
    allocate = device.allocate

    def noting(size_bytes: int) -> torch.Tensor:
        arena = allocate(size_bytes)
        known.add((arena.data_ptr(), arena.data_ptr() + size_bytes))
        return arena

    monkeypatch.setattr(device, "allocate", noting)
    worker_run = streaming.Worker.run

    def watched(worker: Any) -> None:
        address, size = worker.arena.place()
        known.add((address, address + size))
        with _Allocations(known, seen):
            worker_run(worker)

    monkeypatch.setattr(streaming.Worker, "run", watched)
    run_on(device, on_device(plan), tmp_path / "out")
    return seen


# ---------------------------------------------------------------------------- the tests can fail


def waits_left_out(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    fetch, deliver = DeviceFrame._fetch, DeviceFrame._deliver

    def without(name: str, method: Any) -> Any:
        def left_out(self: DeviceFrame, *arguments: Any) -> Any:
            kept = getattr(self, name)
            setattr(self, name, [None, None])
            try:
                return method(self, *arguments)
            finally:
                new = getattr(self, name)
                setattr(self, name, [n or k for n, k in zip(new, kept, strict=True)])

        return left_out

    if which == "staging is filled again before it is copied":
        monkeypatch.setattr(DeviceFrame, "_fetch", without("_arrived", fetch))
    elif which == "an input is overwritten before it is used":
        monkeypatch.setattr(DeviceFrame, "_fetch", without("_computed", fetch))
    elif which in ("an input is used before it is there", "an output is copied before it is there"):
        monkeypatch.setattr(HostQueue, "after", lambda queue, event: None)
    else:
        assert which == "what has not arrived is written"

        def early(frame: DeviceFrame, block: Any) -> Any:
            frame._sent[block.side] = HostDevice(0).queue().record()
            return deliver(frame, block)

        monkeypatch.setattr(DeviceFrame, "_deliver", early)


@pytest.mark.parametrize(
    ("which", "late"),
    [
        ("staging is filled again before it is copied", (INCOMING, COMPUTING, OUTGOING)),
        ("an input is overwritten before it is used", (COMPUTING, OUTGOING)),
        ("an output is copied before it is there", (COMPUTING,)),
        ("an input is used before it is there", (INCOMING,)),
        ("what has not arrived is written", (INCOMING, COMPUTING, OUTGOING)),
    ],
)
def test_a_missing_wait_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, late: tuple[int, ...]
) -> None:
    plan = on_device(plan_of(tmp_path, RECIPES["linear"], models()), workers=1)
    expected = run_on_host(plan, tmp_path / "expected")
    waits_left_out(monkeypatch, which)
    assert not same(expected, run_on_host(plan, tmp_path / "out", late))


def test_the_device_is_named_and_measured(plan: Plan, tmp_path: Path) -> None:
    device = HostDevice(2 * VRAM)
    planned = on_device(plan)
    report, _ = run_on(device, planned, tmp_path / "out")
    assert report.device == "processor"
    assert planned.memory.vram is not None
    measured = report.measured_vram_bytes
    assert measured is not None
    assert measured <= planned.memory.vram.projected_bytes <= VRAM
    assert len(device.pinned) == planned.memory.workers
    on_cpu = plan.with_resources(Resources(MEMORY, 2))
    assert on_cpu.memory.vram is None
