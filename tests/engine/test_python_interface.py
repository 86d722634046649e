"""`import lazymerge as lm`: plan, look at it, run; the names that the package promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lazymerge as lm
import pytest
import torch
import yaml
from lazymerge.engine.memory import MIB
from safetensors.torch import load_file

from conftest import write_checkpoint


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The mean of a model of ones and one of threes, 40 bytes a tensor."""
    for name, value in (("a", 1.0), ("b", 3.0)):
        tensors = {f"model.layers.{n}.w": torch.full((10,), value) for n in range(3)}
        write_checkpoint(tmp_path / name, tensors, {"model_type": "llama"})
    return write_recipe(tmp_path)


def write_recipe(folder: Path, **changes: Any) -> Path:
    models = [{"model": str(folder / n), "parameters": {"weight": 0.5}} for n in ("a", "b")]
    document = {"merge_method": "linear", "models": models, **changes}
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_plan_and_run(recipe: Path, tmp_path: Path) -> None:
    plan = lm.plan(recipe, memory="4GiB", workers=2, max_shard_size="0.08kB")
    assert isinstance(plan, lm.Plan)
    assert [len(shard.tensors) for shard in plan.shards] == [2, 1]
    assert (plan.memory.limit_bytes, plan.memory.workers) == (4096 * MIB, 2)
    report = lm.run(plan, tmp_path / "out", fsync=False)
    assert isinstance(report, lm.RunReport)
    assert report.output == str(tmp_path / "out")
    merged = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        merged.update(load_file(file))
    assert sorted(merged) == [f"model.layers.{n}.w" for n in range(3)]
    assert all(torch.equal(tensor, torch.full((10,), 2.0)) for tensor in merged.values())


def test_sizes_may_be_numbers_and_paths_texts(recipe: Path, tmp_path: Path) -> None:
    plan = lm.plan(str(recipe), memory=4096 * MIB, read_mode="mmap", max_shard_size=0)
    assert (plan.read_mode, len(plan.shards)) == ("mmap", 3)
    assert plan.memory.limit_bytes == 4096 * MIB
    lm.run(plan, str(tmp_path / "out"), fsync=False)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3


def test_a_saved_plan(recipe: Path, tmp_path: Path) -> None:
    plan = lm.plan(recipe, memory="1GiB", workers=2)
    plan.save(tmp_path / "plan.json")
    loaded = lm.plan(tmp_path / "plan.json", memory="512MiB", workers=1)
    assert loaded.fingerprint == plan.fingerprint
    assert (loaded.memory.limit_bytes, loaded.memory.workers) == (512 * MIB, 1)


def test_planning_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    lm.plan(recipe).summary()
    assert sorted(tmp_path.rglob("*")) == before


def test_summary(recipe: Path, tmp_path: Path) -> None:
    lines = lm.plan(recipe, memory="512MiB", workers=2).summary().splitlines()
    assert lines[0] == f"linear  {recipe}"
    assert lines[1].startswith(f"model       {tmp_path / 'a'}: 30 parameters, 120 B, F32")
    labels = [line.split()[0] for line in lines[1:]]
    assert labels[:2] == ["model", "model"]
    assert labels[2:8] == ["output", "beside", "operations", "passes", "data", "memory"]
    facts = {line[:12].strip(): line[12:] for line in lines[3:]}
    assert facts["output"].startswith("3 tensors, 30 parameters, F32, ")
    assert facts["output"].endswith(" in 1 shard")
    assert facts["beside it"] == "config.json, README.md, lazymerge.json"
    assert facts["passes"] == "1 over 3 tensors"
    assert facts["data"].startswith("reads 240 B, writes ")
    assert facts["memory"].endswith(" peak with 2 workers, limit 512 MiB")


def test_errors_are_those_of_the_package(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(lm.DoesNotFitError, match="the smallest limit that works"):
        lm.plan(recipe, memory="10MiB")
    with pytest.raises(lm.InputError, match="is not a size"):
        lm.plan(recipe, memory="plenty")
    with pytest.raises(lm.InputError, match="is the folder of an input model"):
        lm.run(lm.plan(recipe), tmp_path / "a")
    with pytest.raises(lm.RecipeError) as caught:
        lm.plan(write_recipe(tmp_path, merge_method="linera"))
    assert str(caught.value).startswith(f"{recipe}:1:")
    for error in (lm.DoesNotFitError, lm.InputError, lm.RecipeError):
        assert issubclass(error, lm.LazymergeError)


def test_every_promised_name_is_there() -> None:
    assert all(hasattr(lm, name) for name in lm.__all__)
    with pytest.raises(AttributeError, match=r"module 'lazymerge' has no attribute 'merge'"):
        lm.merge  # noqa: B018


def test_importing_the_package_is_light() -> None:
    script = "import sys, lazymerge; print(sorted(m for m in sys.modules if m in sys.argv))"
    heavy = ["torch", "numpy", "yaml", "pydantic", "typer", "safetensors"]
    done = subprocess.run(
        [sys.executable, "-c", script, *heavy], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
