"""The determinism check: what it tries, and that it sees a difference."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import signatures
from lazymerge.engine.run import run_plan
from lazymerge.recipe import Recipe, parse_recipe
from safetensors.torch import load_file, save_file

import check_determinism as check
from conftest import write_checkpoint
from method_recipes import recipe_for


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    generator = torch.Generator().manual_seed(1)
    folders = []
    for name in ("base", "a", "b"):
        tensors = {key: torch.randn(3, 5, generator=generator) for key in ("v.weight", "w.weight")}
        folders.append(write_checkpoint(tmp_path / name, tensors))
    document = recipe_for(signatures()["linear"], folders, 3, random=Random(0))
    return parse_recipe(yaml.safe_dump(document), "linear.yml", signatures())


def run_here(plan: Plan, output: Path) -> None:
    run_plan(plan, output, fsync=False)


ROOMY = check.Setting(1, "4GiB", "5GB", "pread", "planned", "torch")
REVERSED = check.Setting(2, "4GiB", "1MB", "mmap", "reversed", "torch")


def test_all_combinations_are_tried() -> None:
    tried = check.settings_to_try()
    native = [setting for setting in tried if setting.kernels == "native"]
    assert len(native) == 4 * 3 * 2 * 2 * 2 == len(set(native))
    others = {(s.workers, s.read_mode) for s in tried if s.kernels == "torch"}
    assert others == set(product((1, 2, 3, 5), ("pread", "mmap")))
    assert all(setting.kernels == "torch" for setting in check.settings_to_try(kernels=["torch"]))
    assert len(check.settings_to_try(quick=True)) < 20


def test_reversed_order_reverses_and_nothing_differs(recipe: Recipe, tmp_path: Path) -> None:
    orders = []

    def run(plan: Plan, output: Path) -> None:
        orders.append([task.write.name for task in plan.tasks])
        run_here(plan, output)

    verdict = check.compare(recipe, [ROOMY, REVERSED], tmp_path, run)
    assert orders == [["v.weight", "w.weight"], ["w.weight", "v.weight"]]
    assert (verdict.runs, verdict.raised, str(verdict)) == (2, 0, "equal")
    assert not (tmp_path / "merged").exists()


def test_a_different_bit_is_found(recipe: Recipe, tmp_path: Path) -> None:
    def run(plan: Plan, output: Path) -> None:
        run_here(plan, output)
        if isinstance(plan, check.ReversedPlan):
            tensors = load_file(output / "model.safetensors")
            tensors["w.weight"].view(torch.uint8)[-1, -1] ^= 1
            save_file(tensors, output / "model.safetensors")

    setting = check.Setting(1, "4GiB", "5GB", "pread", "reversed", "torch")
    verdict = check.compare(recipe, [ROOMY, setting], tmp_path, run)
    assert verdict.differences == [(setting, ["w.weight"])]
    assert str(verdict) == "**1 differ**"
    (problem,) = verdict.problems()
    assert "order reversed" in problem
    assert "w.weight" in problem


def test_a_run_that_fails_is_a_failure(recipe: Recipe, tmp_path: Path) -> None:
    def run(plan: Plan, output: Path) -> None:
        raise RuntimeError("broken")

    verdict = check.compare(recipe, [ROOMY, REVERSED], tmp_path, run)
    assert str(verdict) == "**2 failed**"
    assert next(verdict.problems()).endswith(": broken")


def test_a_limit_that_is_too_small_is_raised(recipe: Recipe, tmp_path: Path) -> None:
    setting = check.Setting(1, "1MiB", "5GB", "pread", "planned", "torch")
    limits = []

    def run(plan: Plan, output: Path) -> None:
        limits.append(plan.memory.limit_bytes)
        run_here(plan, output)

    verdict = check.compare(recipe, [setting], tmp_path, run)
    assert verdict.raised == 1
    assert limits[-1] >= 64 << 20


def test_the_script(tmp_path: Path) -> None:
    small = ("--quick", "--inputs", "mixed", "--vocabulary", "100", "--work", str(tmp_path))
    done = subprocess.run(
        [sys.executable, check.__file__, *small, "--methods", "linear"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| linear | mixed | " in done.stdout
    assert done.stdout.rstrip().endswith("| equal |")
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_fails() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(check.__file__).parent)!r})
from check_determinism import in_child
from lazymerge.errors import DoesNotFitError

def refuse():
    raise DoesNotFitError("too large")

in_child(lambda: None)
for work in (refuse, lambda: 1 / 0):
    try:
        in_child(work)
    except Exception as error:
        print(type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["DoesNotFitError", "RuntimeError"]
    assert "ZeroDivisionError" in done.stderr
