"""Whole merges for tests: tensors in, a plan, a run, tensors out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from lazymerge.engine.null import walk_plan
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.recipe import Recipe, parse_recipe
from safetensors.torch import load_file

from conftest import write_checkpoint

Tensors = Mapping[str, torch.Tensor]


def recipe_of(folder: Path, recipe: Mapping[str, Any]) -> Recipe:
    """A recipe whose models are named by their folders within `folder`."""
    document = copy.deepcopy(dict(recipe))
    for entry in document["models"]:
        entry["model"] = str(folder / entry["model"])
    if "base_model" in document:
        document["base_model"] = str(folder / document["base_model"])
    return parse_recipe(yaml.safe_dump(document), "recipe.yml", signatures())


def plan_of(
    folder: Path,
    recipe: Mapping[str, Any],
    models: Mapping[str, Tensors],
    resources: Resources | None = None,
    **options: Any,
) -> Plan:
    """Write the models and plan the merge.

    models: tensors by the names that the recipe gives the models.
    options: of make_plan.
    """
    for name, tensors in models.items():
        write_checkpoint(folder / name, tensors)
    return make_plan(
        recipe_of(folder, recipe), resources or Resources(4 << 30, workers=2), **options
    )


def run(plan: Plan, output: Path) -> dict[str, torch.Tensor]:
    """Walk a plan, run it, and load what it has written with the safetensors library."""
    walk_plan(plan)
    run_plan(plan, output, fsync=False, overwrite=True)
    merged: dict[str, torch.Tensor] = {}
    for file in sorted(output.glob("*.safetensors")):
        merged.update(load_file(file))
    return merged


def merge(
    folder: Path, recipe: Mapping[str, Any], models: Mapping[str, Tensors]
) -> dict[str, torch.Tensor]:
    """Write the models, plan, run and load."""
    return run(plan_of(folder, recipe, models), folder / "merged")


def bits(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, by which nan and the signs of zeros compare too."""
    if tensor.numel() == 0:
        return b""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
