"""Finding the kernels: what is missing, broken or of another version is done without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash._xxhash
import yaml
from lazymerge.engine.execution import default_kernels
from lazymerge.engine.native import library
from lazymerge.engine.resources import Resources
from lazymerge.engine.stages import NativeLayout, TorchLayout, stage_layout

from conftest import needs_kernels, write_checkpoint
from merging import bits, plan_of, run

LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": name, "parameters": {"weight": 0.3}} for name in ("a", "b")],
}
BUILT = Path(library.__file__).parent / f"_kernels{EXTENSION_SUFFIXES[0]}"


def models() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return {name: {"w": torch.randn(1000, generator=generator)} for name in ("a", "b")}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that is searched for the library; empty at first."""
    folder = tmp_path / "native"
    folder.mkdir()
    monkeypatch.setattr(library, "__file__", str(folder / "library.py"))
    library._library.cache_clear()
    yield folder
    library._library.cache_clear()


def assert_done_without(tmp_path: Path) -> None:
    """Plans say torch, and give the bytes that torch gives."""
    assert not library.is_available()
    assert default_kernels() == "torch"
    plan = plan_of(tmp_path, LINEAR, models())
    assert plan.execution.kernels == "torch"
    assert plan.memory.libraries == "torch"
    (stage,) = plan.tasks[0].stages
    assert isinstance(stage_layout(plan.graph, stage, plan.execution), TorchLayout)
    merged = run(plan, tmp_path / "out")
    by_torch = run(plan.with_resources(Resources(kernels="torch")), tmp_path / "torch")
    assert bits(merged["w"]) == bits(by_torch["w"])


@needs_kernels
def test_they_are_used_where_they_are_built(tmp_path: Path) -> None:
    assert library.is_available()
    assert default_kernels() == "native"
    plan = plan_of(tmp_path, LINEAR, models())
    assert (plan.execution.kernels, plan.memory.libraries) == ("native", "numpy")
    (stage,) = plan.tasks[0].stages
    assert isinstance(stage_layout(plan.graph, stage, plan.execution), NativeLayout)


def test_a_variable_turns_them_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAZYMERGE_KERNELS", "torch")
    assert_done_without(tmp_path)


@needs_kernels
@pytest.mark.parametrize("value", ["", "native"])
def test_other_values_of_the_variable_leave_them_on(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LAZYMERGE_KERNELS", value)
    assert library.is_available()


@pytest.mark.usefixtures("elsewhere")
def test_none_was_built(tmp_path: Path) -> None:
    assert library.chunk_elements() == 0
    assert_done_without(tmp_path)


def test_a_file_that_is_no_library(elsewhere: Path, tmp_path: Path) -> None:
    (elsewhere / BUILT.name).write_bytes(b"not a library")
    assert_done_without(tmp_path)


def test_a_library_of_something_else(elsewhere: Path, tmp_path: Path) -> None:
    shutil.copy(str(xxhash._xxhash.__file__), elsewhere / BUILT.name)
    assert_done_without(tmp_path)


@needs_kernels
def test_a_library_of_another_version(
    elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(BUILT, elsewhere / BUILT.name)
    assert library.is_available()  # the copy is sound
    library._library.cache_clear()
    monkeypatch.setattr(library, "INTERFACE_VERSION", library.INTERFACE_VERSION + 1)
    assert_done_without(tmp_path)


@needs_kernels
def test_one_that_was_left_does_not_hide_the_right_one(elsewhere: Path) -> None:
    """Extensions may be named in several ways; the first of them is not always the newest."""
    (elsewhere / f"_kernels{EXTENSION_SUFFIXES[0]}").write_bytes(b"old")
    shutil.copy(BUILT, elsewhere / f"_kernels{EXTENSION_SUFFIXES[-1]}")
    assert library.is_available()


@needs_kernels
def test_a_plan_made_with_kernels_is_run_without_them(tmp_path: Path, elsewhere: Path) -> None:
    """Saved on one machine, loaded on another: who computes is decided there."""
    from lazymerge.engine.saved_plans import load_plan

    shutil.copy(BUILT, elsewhere / BUILT.name)
    plan = plan_of(tmp_path, LINEAR, models())
    assert plan.execution.kernels == "native"
    (tmp_path / "plan.json").write_text(json.dumps(plan.as_dict()))
    expected = run(plan, tmp_path / "native out")
    (elsewhere / BUILT.name).unlink()
    library._library.cache_clear()
    loaded = load_plan(tmp_path / "plan.json")
    assert (loaded.execution.kernels, loaded.fingerprint) == ("torch", plan.fingerprint)
    assert bits(run(loaded, tmp_path / "torch out")["w"]) == bits(expected["w"])


# ---------------------------------------------------------------------- what a run imports

SCRIPT = """
import json, sys
import lazymerge as lm

recipe, output, resources = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
plan = lm.plan(recipe, **resources)
before = sorted({"torch", "numpy"} & set(sys.modules))
lm.run(plan, output)
after = sorted({"torch", "numpy"} & set(sys.modules))
print(json.dumps([plan.memory.libraries, before, after]))
"""


def imported(folder: Path, recipe: dict[str, Any], **variables: str) -> Any:
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(path), str(folder / "out"), "{}"],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, (name, dtype) in enumerate(
        (("base", torch.bfloat16), ("a", torch.float16), ("b", torch.float32))
    ):
        tensors = {
            "w": torch.full((3000,), float(number)).to(dtype),
            "f8": torch.full((30,), float(number)).to(torch.float8_e5m2),
            "ids": torch.arange(9),
        }
        write_checkpoint(tmp_path / name, tensors, {"model_type": "llama"})
    return tmp_path


def changes(method: str, **own: float) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": "base",
        "out_dtype": "bfloat16",
        "models": [{"model": name, "parameters": {"weight": 0.5, **own}} for name in ("a", "b")],
    }


ALL_NATIVE: dict[str, dict[str, Any]] = {
    "linear": changes("linear"),
    "task_arithmetic": changes("task_arithmetic"),
    "ties": changes("ties", density=0.4),
    "slerp": {
        "merge_method": "slerp",
        "base_model": "base",
        "out_dtype": "float32",
        "models": [{"model": "base"}, {"model": "b"}],
        "parameters": {"t": 0.3},
    },
    "passthrough": {"merge_method": "passthrough", "models": [{"model": "a"}]},
}


@needs_kernels
@pytest.mark.parametrize("method", ALL_NATIVE)
def test_a_run_of_native_stages_imports_no_torch(folder: Path, method: str) -> None:
    libraries, before, after = imported(folder, ALL_NATIVE[method])
    assert libraries == "numpy"
    assert before == []
    assert "torch" not in after


@needs_kernels
def test_a_run_that_needs_torch_says_so_beforehand(folder: Path) -> None:
    in_f8 = {**changes("linear"), "out_dtype": "float8_e5m2"}
    for recipe, variables in ((in_f8, {}), (changes("linear"), {"LAZYMERGE_KERNELS": "torch"})):
        libraries, before, after = imported(folder, recipe, **variables)
        shutil.rmtree(folder / "out")
        assert libraries == "torch"
        assert before == []
        assert after == ["numpy", "torch"]
