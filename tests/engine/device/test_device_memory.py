"""Limits of device memory and what becomes of them: planned, fitted, refused, saved, printed."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import lazymerge
import pytest
import torch
from device_cases import DEVICE_BLOCK, MEMORY, RECIPES, VRAM, models, on_device, run_on
from lazymerge.cli.main import app
from lazymerge.engine import blocks
from lazymerge.engine.device import memory as device_memory
from lazymerge.engine.device.host import HostDevice
from lazymerge.engine.device.memory import RESERVED_BYTES, fit_to_device, open_lanes
from lazymerge.engine.plan import Plan
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.saved_plans import load_plan
from lazymerge.engine.stages import DeviceLayout, RawLayout, stage_layout
from lazymerge.errors import DoesNotFitError, InputError
from typer.testing import CliRunner

from conftest import write_checkpoint
from merging import plan_of

MIB = 1 << 20


@pytest.fixture(params=["linear", "slerp", "ties, rescaled"])
def plan(request: pytest.FixtureRequest, tmp_path: Path) -> Plan:
    """Real block sizes; the large tensor has one block and a bit."""
    large = {"w": torch.zeros(blocks.DEVICE_BLOCK_ELEMENTS + 1, dtype=torch.bfloat16)}
    return plan_of(tmp_path, RECIPES[request.param], dict.fromkeys(("base", "a", "b"), large))


def test_the_smallest_limit_that_is_named_works_and_a_mib_less_does_not(plan: Plan) -> None:
    with pytest.raises(DoesNotFitError) as caught:
        on_device(plan, vram=MIB)
    assert caught.value.exit_code == 3
    found = re.search(r"smallest limit that works is --vram (\d+)MiB", str(caught.value))
    assert found is not None
    smallest = int(found[1])
    fitting = on_device(plan, 4, smallest * MIB)
    assert fitting.memory.workers == 1
    assert fitting.memory.vram is not None
    assert fitting.memory.vram.projected_bytes <= smallest * MIB
    with pytest.raises(DoesNotFitError, match=r"most for w\), the limit is .*--device cpu"):
        on_device(plan, vram=(smallest - 1) * MIB)


def test_fewer_workers_first(plan: Plan) -> None:
    found = {}
    for vram in range(100, 2000, 20):
        try:
            memory = on_device(plan, 4, vram * MIB).memory
        except DoesNotFitError:
            assert not found
            continue
        assert memory.vram is not None
        assert memory.vram.projected_bytes <= vram * MIB == memory.vram.limit_bytes
        found[vram] = memory.workers
    assert sorted(found.values()) == list(found.values())
    assert set(found.values()) == {1, 2, 3, 4}


def test_host_memory_bounds_the_workers_too(plan: Plan) -> None:
    def planned(limit: int) -> Plan:
        resources = Resources(limit, 4, device="cuda", vram_limit_bytes=8 << 30)
        return plan.with_resources(resources)

    with pytest.raises(DoesNotFitError, match="--memory") as caught:
        planned(RESERVED_BYTES)
    found = re.search(r"works is --memory (\d+)MiB", str(caught.value))
    assert found is not None
    one = planned(int(found[1]) * MIB).memory
    assert one.workers == 1
    assert one.projected_bytes <= one.limit_bytes
    assert planned(one.limit_bytes + one.arena_bytes).memory.workers == 2
    output_bytes = 2  # of bfloat16 and float16
    widths = 2 * len(plan.checkpoints) + output_bytes
    assert one.arena_bytes >= 2 * blocks.DEVICE_BLOCK_ELEMENTS * widths  # two blocks of each
    with pytest.raises(DoesNotFitError):
        planned((int(found[1]) - 1) * MIB)


def test_the_arena_is_what_the_hungriest_stage_needs(plan: Plan) -> None:
    planned = on_device(plan)
    layouts = [
        stage_layout(planned.graph, stage, planned.execution)
        for task in planned.tasks
        for stage in task.stages
    ]
    device = max(layout.device_bytes for layout in layouts if isinstance(layout, DeviceLayout))
    assert planned.memory.vram is not None
    assert 0 <= planned.memory.vram.arena_bytes - device < 512
    assert planned.memory.arena_bytes == max(layout.size_bytes for layout in layouts)


def test_lanes_lie_apart(plan: Plan) -> None:
    planned = on_device(plan, 3)
    assert planned.memory.vram is not None
    device = HostDevice(8 << 30)
    lanes = open_lanes(device, planned.memory)
    size = planned.memory.vram.arena_bytes
    places = [lane.memory.data_ptr() for lane in lanes]
    assert [b - a for a, b in pairwise(places)] == [size] * 2
    assert {lane.memory.nbytes for lane in lanes} == {size}
    assert device.peak_bytes() == 3 * size <= planned.memory.vram.projected_bytes


def test_without_a_limit_the_device_decides(plan: Plan) -> None:
    planned = on_device(plan, 4, vram=None)
    assert planned.memory.vram is not None
    assert planned.memory.vram.limit_bytes is None
    assert planned.memory.vram.projected_bytes <= device_memory.PLANNED_VRAM_BYTES
    smallest = planned.memory.vram.smallest_limit_bytes
    roomy = fit_to_device(planned, HostDevice(100 << 30)).memory
    tight = fit_to_device(planned, HostDevice(int(smallest / 0.8) + 10)).memory
    assert (roomy.workers, tight.workers) == (planned.memory.workers, 1)
    assert roomy.reserved_bytes == planned.memory.reserved_bytes
    assert tight.vram is not None
    assert tight.vram.limit_bytes is not None
    assert smallest <= tight.vram.limit_bytes <= smallest + 10
    with pytest.raises(DoesNotFitError, match=r"processor has .* free \(80% of them are used"):
        fit_to_device(planned, HostDevice(smallest))


def test_a_limit_beyond_what_is_free(plan: Plan) -> None:
    planned = on_device(plan, 4, vram=64 << 30)
    assert planned.memory.vram is not None
    smallest = planned.memory.vram.smallest_limit_bytes
    assert fit_to_device(planned, HostDevice(smallest)).memory.workers == 1
    with pytest.raises(DoesNotFitError, match=r"processor has .* free; the smallest"):
        fit_to_device(planned, HostDevice(smallest - 1))


def test_copies_need_no_device_memory(tmp_path: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": "a"}]}
    plan = on_device(plan_of(tmp_path, recipe, {"a": {"w": torch.zeros(1000)}}), vram=1)
    assert plan.memory.vram is not None
    assert plan.memory.vram.projected_bytes == 0
    layout = stage_layout(plan.graph, plan.graph.writes[0], plan.execution)
    assert isinstance(layout, RawLayout)
    report, merged = run_on(HostDevice(1), plan, tmp_path / "out")
    assert report.measured_vram_bytes == 0
    assert merged["w"].tolist() == [0.0] * 1000


# ------------------------------------------------------------------- plans, manifests, command line


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe file and its models."""
    monkeypatch.setattr(blocks, "DEVICE_BLOCK_ELEMENTS", DEVICE_BLOCK)
    for name, tensors in models().items():
        write_checkpoint(tmp_path / name, tensors)
    lines = ["merge_method: linear", "models:"]
    for name in ("base", "a"):
        lines.append(f"  - {{model: {tmp_path / name}, parameters: {{weight: 0.5}}}}")
    (tmp_path / "recipe.yml").write_text("\n".join(lines))
    return tmp_path / "recipe.yml"


def test_the_class_of_device_is_part_of_the_fingerprint(small: Path) -> None:
    cpu = lazymerge.plan(small, memory=MEMORY)
    gpu = lazymerge.plan(small, memory=MEMORY, device="cuda")
    limited = lazymerge.plan(small, memory="6GiB", device="cuda", vram="1GiB", workers=1)
    assert cpu.fingerprint != gpu.fingerprint == limited.fingerprint
    assert cpu.fingerprint == lazymerge.plan(small, memory=MEMORY, device="cpu").fingerprint


def test_a_saved_plan_keeps_its_device(small: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    plan = lazymerge.plan(small, memory=MEMORY, device="cuda", vram=VRAM)
    plan.save(saved)
    loaded = load_plan(saved, Resources(MEMORY, vram_limit_bytes=VRAM))
    assert loaded.execution.device == "cuda"
    assert loaded.fingerprint == plan.fingerprint
    assert load_plan(saved, Resources(MEMORY, device="cuda")).fingerprint == plan.fingerprint
    with pytest.raises(InputError, match=r"was made for --device cuda.*--device cpu"):
        load_plan(saved, Resources(MEMORY, device="cpu"))
    document = json.loads(saved.read_text())
    saved.write_text(json.dumps({**document, "device": "abacus"}))
    with pytest.raises(InputError, match="damaged"):
        load_plan(saved, Resources(MEMORY))
    saved.write_text(json.dumps({**document, "device": "cpu"}))
    with pytest.raises(InputError, match="altered"):
        load_plan(saved, Resources(MEMORY))


def test_plan_and_manifest_tell(small: Path, tmp_path: Path) -> None:
    plan = lazymerge.plan(small, memory=MEMORY, device="cuda", vram="1GiB")
    assert re.search(r"^device +cuda, .* of its memory, limit 1\.00 GiB$", plan.summary(), re.M)
    open_ended = lazymerge.plan(small, memory=MEMORY, device="cuda")
    assert "limit 80% of what is free when it runs" in open_ended.summary()
    document = plan.as_dict()
    assert document["device"] == "cuda"
    assert document["memory"]["vram"]["limit_bytes"] == 1 << 30
    report, _ = run_on(HostDevice(VRAM), plan, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "lazymerge.json").read_text())
    assert (manifest["device"], manifest["device_name"]) == ("cuda", "processor")
    vram = manifest["memory"]["vram"]
    measured = manifest["memory"]["measured_vram_bytes"]
    assert measured == report.measured_vram_bytes
    assert 0 < measured <= vram["projected_bytes"] <= vram["limit_bytes"] == 1 << 30


def test_there_are_no_other_devices(small: Path) -> None:
    with pytest.raises(InputError, match="there is no device 'tpu', only cpu, cuda"):
        lazymerge.plan(small, device="tpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--vram bounds the memory of a GPU"):
        lazymerge.plan(small, vram="1GiB")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_is_planned_and_not_run(small: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    options = [str(small), "--device", "cuda", "--memory", "6GiB"]
    shown = runner.invoke(app, ["plan", *options, "--dry-run", "--vram", "2GiB"])
    assert shown.exit_code == 0, shown.output
    assert "limit 2.00 GiB" in shown.output
    plan = lazymerge.plan(small, memory=MEMORY, device="cuda")
    with pytest.raises(InputError, match=r"^--device cuda: torch .*; use --device cpu$") as caught:
        run_plan(plan, tmp_path / "out")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_plan_for_the_processor_takes_no_device(small: Path, tmp_path: Path) -> None:
    plan = lazymerge.plan(small, memory=MEMORY)
    with pytest.raises(ValueError, match="planned for the processor"):
        run_plan(plan, tmp_path / "out", device=HostDevice(VRAM))
    assert plan.memory.vram is None
