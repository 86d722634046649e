"""The recipes that are compared with mergekit's, and how merges are compared."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from lazymerge.engine.planning import signatures
from lazymerge.recipe import parse_recipe
from safetensors.torch import save_file

from compare_forms_with_mergekit import FORMS, Found, compare, compare_configs, ulp


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(3)]
    return {
        letter: write(tmp_path / letter, {name: torch.ones(4, 6) for name in names})
        for letter in "abc"
    }


@pytest.mark.parametrize("form", FORMS)
def test_recipes_are_right(form: str, models: dict[str, Path]) -> None:
    for number in range(40):
        family = FORMS[form].families[number % len(FORMS[form].families)]
        document = FORMS[form].make(models, Random(number), family)
        text = yaml.safe_dump_all([*document.pop("before", []), document], sort_keys=False)
        parse_recipe(text, "recipe.yml", signatures())


def test_ulps() -> None:
    values = torch.tensor([1.0, 1.5, 2.0, 100.0, 0.0], dtype=torch.float64)
    assert ulp(values, torch.float32).tolist() == [2**-23, 2**-23, 2**-22, 2**-17, 2**-149]


def write(folder: Path, tensors: dict[str, torch.Tensor], layers: int = 3) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": layers, "x": layers}))
    return folder


def test_what_differs_is_said(tmp_path: Path) -> None:
    values = torch.ones(5)
    ours = write(tmp_path / "ours", {"a": values, "b": values.clone()})
    theirs = write(tmp_path / "theirs", {"a": values * (1 + 2**-22), "b": values}, layers=4)
    found = Found("models")
    (said,) = compare(found, ours, theirs)
    assert said.startswith("a: up to 2.38e-07 apart")
    assert (found.tensors, found.elements, found.apart, found.worst) == (2, 10, 5, 2.0)
    assert compare_configs(ours, theirs) == ["config.json: num_hidden_layers is 3, mergekit's 4"]
    other = write(tmp_path / "other", {"a": values})
    assert "lazymerge has also ['b']" in compare(found, ours, other)[0]
    wide = write(tmp_path / "wide", {"a": values.double(), "b": values})
    assert "torch.float64" in compare(found, ours, wide)[0]
