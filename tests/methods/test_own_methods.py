"""Users' own methods: found, checked, planned, run; their failures have names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lazymerge.engine import blocks
from lazymerge.engine.planning import signatures
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.saved_plans import load_plan
from lazymerge.errors import DoesNotFitError, InputError, LazymergeError, RecipeError
from lazymerge.graph import operation as operations
from lazymerge.methods import METHODS, plugins
from lazymerge.methods.own import (
    BaseModel,
    Inputs,
    elementwise,
    model_parameter,
    parameter,
    rowwise,
    tensorwise,
)

from conftest import write_checkpoint
from merging import Tensors, plan_of, run

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "trimmed_mean.py"
BLOCK = 64


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test declares is gone after it; blocks are small."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", BLOCK)
    methods, known = dict(METHODS), dict(operations._apply_operations)
    modules = set(sys.modules)
    yield
    METHODS.clear()
    METHODS.update(methods)
    operations._apply_operations.clear()
    operations._apply_operations.update(known)
    for name in set(sys.modules) - modules:
        if name.startswith("lazymerge_plugin_"):
            del sys.modules[name]


def models(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensors]:
    generator = torch.Generator().manual_seed(5)
    return {
        f"m{number}": {"w": torch.randn(shape, generator=generator).to(dtype)}
        for number in range(count)
    }


def recipe(method: str, count: int, base: str | None = None, **parameters: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": f"m{number}"} for number in range(count)],
    }
    if base:
        document["base_model"] = base
    if parameters:
        document["parameters"] = parameters
    return document


def test_the_worked_example(tmp_path: Path) -> None:
    plugins.load_plugin(EXAMPLE)
    tensors = models(6, 5, 40)
    merged = run(
        plan_of(tmp_path, recipe("trimmed_mean", 6, "m0", trim=2), tensors), tmp_path / "o"
    )
    base, *others = (tensors[f"m{number}"]["w"] for number in range(6))
    changes = torch.stack([other - base for other in others]).sort(dim=0).values[2:3]
    assert torch.equal(merged["w"], base + changes.mean(dim=0))


def test_the_document_shows_the_example_as_it_is() -> None:
    text = (ROOT / "docs" / "own-methods.md").read_text("utf-8")
    (shown,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    _, _, code = EXAMPLE.read_text("utf-8").partition('"""\n\n')
    assert shown == code


def test_the_command_runs_it(tmp_path: Path) -> None:
    for name, tensors in models(4, 3, 100).items():
        write_checkpoint(tmp_path / name, tensors)
    document = recipe("trimmed_mean", 4, "m0")
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(document))

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "lazymerge", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )

    plugin = ["--plugin", str(EXAMPLE)]
    assert "extreme ones" in command("methods", "trimmed_mean", *plugin).stdout
    done = command("run", "recipe.yml", "-o", "merged", *plugin)
    assert done.returncode == 0, done.stderr
    without = command("run", "recipe.yml", "-o", "other")
    assert without.returncode == 2
    assert "unknown merge_method 'trimmed_mean'" in without.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shapes_and_dtypes_that_functions_see(tmp_path: Path, dtype: torch.dtype) -> None:
    seen: dict[str, set[Any]] = {"elementwise": set(), "rowwise": set(), "tensorwise": set()}

    def method(kind: Any) -> None:
        @kind(f"own_{kind.__name__}", "Sees.", base=BaseModel.REQUIRED)
        def function(inputs: Inputs) -> torch.Tensor:
            (first,) = inputs.models
            assert inputs.base is not None
            assert inputs.base.shape == first.shape
            seen[kind.__name__].add((tuple(first.shape), first.dtype, inputs.tensor))
            return first + inputs.base

    tensors = models(2, 5, 3, 30, dtype=dtype)
    expected = tensors["m0"]["w"].double() + tensors["m1"]["w"].double()
    for kind in (elementwise, rowwise, tensorwise):
        method(kind)
        name = f"own_{kind.__name__}"
        merged = run(
            plan_of(tmp_path / name, recipe(name, 2, "m0"), tensors), tmp_path / name / "o"
        )
        torch.testing.assert_close(merged["w"].double(), expected, rtol=1e-2, atol=1e-6)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert seen["elementwise"] == {((BLOCK,), wide, "w"), ((450 % BLOCK,), wide, "w")}
    assert seen["rowwise"] == {((2, 30), wide, "w"), ((1, 30), wide, "w")}
    assert seen["tensorwise"] == {((5, 3, 30), wide, "w")}


def test_parameters_are_checked_and_given(tmp_path: Path) -> None:
    seen = []

    @elementwise(
        "own",
        "Weighs.",
        parameters=(
            parameter("gain", "factor", 2.0, minimum=0),
            model_parameter("weight", "of the model", required=True),
        ),
    )
    def own(inputs: Inputs) -> torch.Tensor:
        seen.append((dict(inputs.parameters), [dict(own) for own in inputs.model_parameters]))
        return inputs.models[0]

    document = recipe("own", 2)
    for number, entry in enumerate(document["models"]):
        entry["parameters"] = {"weight": number + 0.5}
    run(plan_of(tmp_path, document, models(2, 10)), tmp_path / "o")
    assert seen == [({"gain": 2.0}, [{"weight": 0.5}, {"weight": 1.5}])]
    for wrong, problem in (({"gain": -1}, "gain"), ({"gian": 1}, "did you mean")):
        with pytest.raises(RecipeError, match=problem):
            plan_of(tmp_path, {**document, "parameters": wrong}, models(2, 10))
    with pytest.raises(RecipeError, match="weight"):
        plan_of(tmp_path, recipe("own", 2), models(2, 10))


def test_what_a_function_raises_names_the_tensor_and_the_method(tmp_path: Path) -> None:
    @elementwise("broken", "Breaks.")
    def broken(inputs: Inputs) -> torch.Tensor:
        return inputs.models[0] / torch.zeros(3, 3)[len(inputs.models)]

    @elementwise("short", "Returns too little.")
    def short(inputs: Inputs) -> torch.Tensor:
        return inputs.models[0][:1]

    for method, problem in (
        ("broken", "tensor w: merge method broken failed: RuntimeError"),
        ("short", r"tensor w: merge method short was given .*\(10,\) and returned \(1,\)"),
    ):
        plan = plan_of(tmp_path / method, recipe(method, 2), models(2, 10))
        with pytest.raises(LazymergeError, match=problem):
            run_plan(plan, tmp_path / method / "o", fsync=False)
        assert not (tmp_path / method / "o").exists()


def test_memory_of_whole_tensors_is_planned_and_refused(tmp_path: Path) -> None:
    @tensorwise("whole", "Whole.", temporaries=3)
    def whole(inputs: Inputs) -> torch.Tensor:
        return inputs.models[0]

    @elementwise("pieces", "In pieces.", temporaries=3)
    def pieces(inputs: Inputs) -> torch.Tensor:
        return inputs.models[0]

    size = 1 << 22
    tensors = models(2, 2, size // 8)  # 4 MiB in float32
    plans = {m: plan_of(tmp_path / m, recipe(m, 2), tensors) for m in ("whole", "pieces")}
    needed = {m: p.memory.projected_bytes - p.memory.reserved_bytes for m, p in plans.items()}
    # two inputs, a result, one read at a time; and the result and three temporaries of its own
    assert needed["whole"] >= 2 * (4 + 4) * (size // 2)
    assert needed["pieces"] < size // 4
    limit = plans["whole"].memory.smallest_limit_bytes
    plans["whole"].with_resources(Resources(limit, 1))
    with pytest.raises(DoesNotFitError, match="--memory"):
        plans["whole"].with_resources(Resources(limit - (1 << 20), 1))


def test_an_edited_function_is_another_merge(tmp_path: Path) -> None:
    text = (
        "from lazymerge.methods.own import elementwise\n"
        "@elementwise('edited', 'Edited.')\n"
        "def edited(inputs):\n    return inputs.models[0]{}\n"
    )
    prints = []
    for number, change in enumerate(("", " * 2")):
        file = tmp_path / f"plugin{number}.py"
        file.write_text(text.format(change))
        METHODS.pop("edited", None)
        operations._apply_operations.pop("own edited", None)
        plugins.load_plugin(file)
        prints.append(plan_of(tmp_path, recipe("edited", 2), models(2, 10)).fingerprint)
    assert prints[0] != prints[1]


def test_a_saved_plan_needs_the_plugin_again(tmp_path: Path) -> None:
    plugins.load_plugin(EXAMPLE)
    plan = plan_of(tmp_path, recipe("trimmed_mean", 4, "m0"), models(4, 10))
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").fingerprint == plan.fingerprint
    del METHODS["trimmed_mean"]
    with pytest.raises(LazymergeError, match="trimmed_mean"):
        load_plan(tmp_path / "plan.json")


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="'linear' is defined twice"):
        elementwise("linear", "Again.")(lambda inputs: inputs.models[0])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("def broken(:\n", r"plugin .*bad\.py, line 1: SyntaxError"),
        ("\n\nraise KeyError('x')\n", r"plugin .*bad\.py, line 3: KeyError: 'x'"),
        ("import nothing_of_that_name\n", r"line 1: ModuleNotFoundError"),
    ],
)
def test_files_that_cannot_be_loaded(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(InputError, match=problem):
        plugins.load_plugin(tmp_path / "bad.py")
    assert not [name for name in sys.modules if name.startswith("lazymerge_plugin_")]


def test_files_that_are_no_plugins(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no plugin"):
        plugins.load_plugin(tmp_path / "absent.py")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(InputError, match=r"must end in \.py"):
        plugins.load_plugin(tmp_path / "text.txt")


def test_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ImportError("no such thing")

    found = [SimpleNamespace(name="mine", value="mine.methods", load=lambda: None)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: found)
    plugins.load_installed.cache_clear()
    try:
        assert "linear" in signatures()
        assert plugins.load_installed() == ("mine",)
        found[0] = SimpleNamespace(name="mine", value="mine.methods", load=fails)
        plugins.load_installed.cache_clear()
        with pytest.raises(
            InputError, match=r"mine \(mine\.methods\) cannot be loaded: ImportError"
        ):
            signatures()
    finally:
        plugins.load_installed.cache_clear()
