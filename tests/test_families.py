"""Merges of many families of models load in transformers and compute what the same merge, made in
memory by torch, computes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
import yaml

from families import FAMILIES, Family, outputs, perturbed

WEIGHTS = {"first": 0.7, "second": 0.4}


def merged_in_memory(base: Any, fine_tunes: dict[str, Any]) -> Any:
    """Task arithmetic over float64 copies of the parameters."""
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters())
    others = {name: dict(other.named_parameters()) for name, other in fine_tunes.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            exact = parameter.double()
            for other, weight in WEIGHTS.items():
                exact = exact + weight * (others[other][name].double() - parameter.double())
            parameter.copy_(exact)
    return model


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_a_merge_of_whole_models(family: Family, tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = family.make()
    fine_tunes = {
        name: perturbed(copy.deepcopy(base), seed) for seed, name in enumerate(WEIGHTS, 2)
    }
    for name, model in {"base": base, **fine_tunes}.items():
        model.save_pretrained(tmp_path / name)
    (tmp_path / "recipe.yml").write_text(
        yaml.safe_dump(
            {
                "merge_method": "task_arithmetic",
                "base_model": str(tmp_path / "base"),
                "models": [
                    {"model": str(tmp_path / name), "parameters": {"weight": weight}}
                    for name, weight in WEIGHTS.items()
                ],
            }
        )
    )
    plan = lazymerge.plan(tmp_path / "recipe.yml")
    assert plan.notices == ()
    lazymerge.run(plan, tmp_path / "out", fsync=False)
    loaded, said = family.load(tmp_path / "out")
    assert not said["missing_keys"], said
    assert not said["unexpected_keys"], said
    assert not said["mismatched_keys"], said
    expected = merged_in_memory(base, fine_tunes)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(
            dict(loaded.named_parameters())[name], parameter, rtol=1e-6, atol=1e-7
        )
    found = outputs(loaded.eval())
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, outputs(expected), rtol=1e-3, atol=1e-4)
