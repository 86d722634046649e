"""What only a process of its own can show: its peak memory, its imports, the bytes it reads.

Linux keeps ru_maxrss over exec, so a child of this (large) process must not be measured by it:
VmHWM of /proc/self/status belongs to the program alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lazymerge.engine.memory import MIB

import make_synthetic_checkpoint as synthetic
from conftest import needs_kernels, write_checkpoint

SHAPE = synthetic.LlamaShape(
    hidden=640, intermediate=1728, layers=12, heads=10, kv_heads=10, vocabulary=32000
)
"""100 million parameters: 200 MB in bfloat16."""

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": name, "parameters": {"weight": 0.5, "density": 0.4}} for name in ("a", "b")
    ],
}
LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": name, "parameters": {"weight": 0.5}} for name in ("base", "a", "b")],
}


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / f"{recipe['merge_method']}.yml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base of deviates, two of zeros; what the pages hold is of no matter to memory."""
    folder = tmp_path_factory.mktemp("processes")
    synthetic.make_checkpoint(folder / "base", SHAPE, dtype="bfloat16", seed=1)
    for name in ("a", "b"):
        synthetic.make_checkpoint(folder / name, SHAPE, dtype="bfloat16", sparse=True)
    return folder


def lazymerge_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`lazymerge run` in a process of its own, in a folder."""
    command = [sys.executable, "-m", "lazymerge", "run", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def merge_in_process(models: Path, output: Path, recipe: dict[str, Any], *options: str) -> Any:
    """Merge in a process of its own, and load the document it prints."""
    path = str(write_recipe(models, recipe))
    done = lazymerge_run(models, path, "-o", str(output), "--json", "--no-fsync", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the reserve is measured on Linux")
@pytest.mark.parametrize(
    ("recipe", "read_mode", "workers", "kernels"),
    [
        pytest.param(TIES, "pread", 3, "native", marks=needs_kernels, id="ties by pread"),
        pytest.param(TIES, "mmap", 1, "native", marks=needs_kernels, id="ties mapped"),
        pytest.param(LINEAR, "mmap", 2, "native", marks=needs_kernels, id="linear mapped"),
        pytest.param(TIES, "pread", 3, "torch", id="ties by pread and torch"),
        pytest.param(LINEAR, "mmap", 2, "torch", id="linear mapped and torch"),
    ],
)
def test_the_peak_stays_below_what_was_projected(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: dict[str, Any],
    read_mode: str,
    workers: int,
    kernels: str,
) -> None:
    if kernels == "torch":
        monkeypatch.setenv("LAZYMERGE_KERNELS", "torch")
    report = merge_in_process(
        models,
        tmp_path / "out",
        recipe,
        *("--read-mode", read_mode, "--workers", str(workers), "--memory", "512MiB"),
    )
    projected = report["memory"]["projected_bytes"]
    assert report["memory"]["workers"] == workers
    assert report["memory"]["libraries"] == ("numpy" if kernels == "native" else "torch")
    assert report["measured_bytes"] <= projected <= 512 * MIB
    # a claim that can fail: three models of 200 MB do not fit in what was projected
    inputs = 3 * (models / "base" / "model.safetensors").stat().st_size
    assert inputs > 512 * MIB
    # and it is no idle claim: most of it is used, whatever the threads happen to do at once
    assert report["measured_bytes"] > projected / 2


@pytest.mark.skipif(sys.platform != "linux", reason="the reserve is measured on Linux")
@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_kernels), "torch"])
def test_the_smallest_limit_is_kept(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    if kernels == "torch":
        monkeypatch.setenv("LAZYMERGE_KERNELS", "torch")
    path = str(write_recipe(models, TIES))
    refused = lazymerge_run(models, path, "-o", str(tmp_path / "out"), "--memory", "1MiB")
    assert refused.returncode == 3
    assert not (tmp_path / "out").exists()
    smallest = refused.stderr.split("--memory ")[-1].strip()
    report = merge_in_process(models, tmp_path / "out", TIES, "--memory", smallest)
    assert report["memory"]["workers"] == 1
    assert report["measured_bytes"] <= int(smallest.removesuffix("MiB")) * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="the reserve is measured on Linux")
@pytest.mark.parametrize("kernels", [pytest.param("native", marks=needs_kernels), "torch"])
@pytest.mark.parametrize("hungry", ["inner", "last"])
def test_the_smallest_limit_is_kept_by_several_outputs(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str, hungry: str
) -> None:
    """One process writes both: what the first has left in memory is there while it writes the
    second."""
    if kernels == "torch":
        monkeypatch.setenv("LAZYMERGE_KERNELS", "torch")
    first, last = (TIES, LINEAR) if hungry == "inner" else (LINEAR, TIES)
    used = [
        {**entry, "model": {"b": "inner"}.get(entry["model"], entry["model"])}
        for entry in last["models"]
    ]
    path = models / "two.yml"
    path.write_text(yaml.safe_dump_all([{**first, "name": "inner"}, {**last, "models": used}]))
    asked = ["-o", str(tmp_path / "out"), "--write-intermediate", "inner", "--no-fsync"]
    memory, refusals = "1MiB", 0
    while (done := lazymerge_run(models, path.name, *asked, "--json", "--memory", memory)).stderr:
        refusals += 1
        assert done.returncode == 3, done.stderr
        assert refusals < 4
        assert not [*tmp_path.iterdir()]
        memory = done.stderr.split("--memory ")[-1].strip()
    report = json.loads(done.stdout)
    for each in (report, *report["intermediates"]):
        assert each["memory"]["workers"] == 1
        assert each["measured_bytes"] <= int(memory.removesuffix("MiB")) * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep it over exec")
def test_measured_memory_is_not_that_of_the_parent(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", {"w": torch.zeros(10)})
    recipe = write_recipe(
        tmp_path, {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "a")}]}
    )
    size = 700 * MIB
    parent = f"""
import mmap, subprocess, sys
held = mmap.mmap(-1, {size})
for place in range(0, {size}, mmap.PAGESIZE):
    held[place] = 1
command = [sys.executable, "-m", "lazymerge", "run", {str(recipe)!r}, "--json"]
subprocess.run([*command, "-o", {str(tmp_path / "out")!r}], check=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert report["measured_bytes"] <= report["memory"]["projected_bytes"] < size


# ------------------------------------------------------------------------ planning is light

DRY_RUN = """
import json, re, sys

def read_bytes():
    with open("/proc/self/io") as file:
        return int(re.search(r"rchar: (\\d+)", file.read())[1])

import lazymerge.api, lazymerge.cli.main, lazymerge.cli.plan_view, lazymerge.engine.plan
import lazymerge.cli.console, lazymerge.engine.run, lazymerge.output.folder
before = read_bytes()
try:
    lazymerge.cli.main.main()
except SystemExit as exit_:
    code = exit_.code
heavy = sorted({"torch", "numpy", "safetensors", "transformers", "scipy"} & set(sys.modules))
print(json.dumps([code, heavy, read_bytes() - before]), file=sys.stderr)
"""


def test_planning_a_13b_merge_imports_nothing_heavy_and_reads_headers_only(tmp_path: Path) -> None:
    size = 0
    for name in ("base", "a", "b"):
        size += synthetic.make_checkpoint(
            tmp_path / name,
            synthetic.SHAPES["llama2-13b"],
            dtype="bfloat16",
            shards=3,
            sparse=True,
        )
    assert size > 75_000_000_000
    recipe = write_recipe(tmp_path, TIES)
    arguments = ["plan", str(recipe), "--dry-run", "--json", "--memory", "2GiB"]
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUN, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    code, heavy, bytes_read = json.loads(done.stderr)
    plan = json.loads(done.stdout)
    assert code == 0
    assert heavy == []
    headers = plan["totals"]["header_bytes_read"]
    assert headers < 1_000_000
    # headers, indexes, configs, the recipe, what the libraries import late; not the 78 GB
    assert headers <= bytes_read < 10_000_000
    assert plan["totals"]["tensors"] == 363
    assert plan["totals"]["bytes_written"] == pytest.approx(size / 3, rel=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "ties.yml"]
