"""Merges on the host device of models at addresses: the bytes of local copies of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import yaml
from device_cases import LATE, MEMORY, RECIPES, VRAM, models, use_small_blocks
from lazymerge.engine.device.host import HostDevice
from lazymerge.engine.device.memory import fit_to_device
from lazymerge.engine.memory import connection_bytes
from lazymerge.engine.plan import Plan
from lazymerge.engine.run import run_plan
from lazymerge.errors import DoesNotFitError
from safetensors.torch import save_file

from range_server import RangeServer, range_server

pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")

METHODS = ("linear", "ties", "slerp", "dare_ties", "della", "passthrough")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)
    monkeypatch.setattr("lazymerge.engine.needed_ranges.CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr("lazymerge.checkpoint.transport.FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of the models."""
    folder = tmp_path_factory.mktemp("models")
    for name, tensors in models().items():
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def server(root: Path) -> Iterator[RangeServer]:
    with range_server(root) as serving:
        yield serving


def planned(where: object, folder: Path, method: str, **options: Any) -> Plan:
    """A merge of the models in a folder or at an address, on a GPU."""
    recipe = {**RECIPES[method]}
    recipe["models"] = [{**m, "model": f"{where}/{m['model']}"} for m in recipe["models"]]
    if "base_model" in recipe:
        recipe["base_model"] = f"{where}/{recipe['base_model']}"
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    options = {"workers": 2, "device": "cuda", "vram": str(VRAM), "memory": str(MEMORY), **options}
    return lazymerge.plan(path, **options)


def merged(plan: Plan, out: Path, late: tuple[int, ...] = ()) -> bytes:
    run_plan(plan, out, fsync=False, overwrite=True, device=HostDevice(2 * VRAM, late))
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_bytes_equal_to_a_local_run(
    root: Path, server: RangeServer, tmp_path: Path, method: str
) -> None:
    expected = merged(planned(root, tmp_path, method), tmp_path / "local")
    for late in ((), LATE[-1]):
        assert merged(planned(server.address, tmp_path, method), tmp_path / "out", late) == expected


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_smallest_memory_that_is_allowed(
    root: Path, server: RangeServer, tmp_path: Path, method: str
) -> None:
    expected = merged(planned(root, tmp_path, method), tmp_path / "local")
    smallest = planned(server.address, tmp_path, method).memory.smallest_limit_bytes
    with pytest.raises(DoesNotFitError, match="inputs that are fetched"):
        planned(server.address, tmp_path, method, memory=str(smallest - (1 << 20)))
    plan = planned(server.address, tmp_path, method, memory=str(smallest))
    assert merged(plan, tmp_path / "out") == expected


def test_what_is_set_aside_stays_so_on_a_small_device(server: RangeServer, tmp_path: Path) -> None:
    """Fewer workers fit; what each of them waits for does."""
    plan = planned(server.address, tmp_path, "ties", workers=3)
    assert plan.memory.fetch_bytes > connection_bytes(plan.execution.network)
    assert plan.memory.vram is not None
    fitted = fit_to_device(plan, HostDevice(plan.memory.vram.smallest_limit_bytes)).memory
    before = replace(plan.memory, workers=1)
    assert fitted.workers == 1
    for name in ("limit_bytes", "fetch_bytes", "window_bytes", "smallest_limit_bytes"):
        assert getattr(fitted, name) == getattr(before, name), name


def test_what_lies_elsewhere_adds_memory_for_fetching_alone(
    root: Path, server: RangeServer, tmp_path: Path
) -> None:
    """Buffers and device memory are those of local copies."""
    here = planned(root, tmp_path, "ties").memory
    there = planned(server.address, tmp_path, "ties").memory
    assert (here.arena_bytes, here.vram) == (there.arena_bytes, there.vram)
    assert here.fetch_bytes == 0
    assert there.projected_bytes <= there.limit_bytes
