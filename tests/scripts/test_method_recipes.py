"""Recipes made from signatures: every method's are valid, whatever is set."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.resources import Resources
from lazymerge.recipe import parse_recipe
from lazymerge.recipe.signature import BaseModel, Parameter, Scope, Signature

from conftest import write_checkpoint
from method_recipes import MOST_MODELS, SETTINGS, model_counts, recipe_for


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    tensors = {"w": torch.zeros(3, 4)}
    return [write_checkpoint(folder / str(number), tensors) for number in range(MOST_MODELS + 1)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", signatures())
def test_every_method_is_planned(method: str, setting: str, folders: list[Path]) -> None:
    signature = signatures()[method]
    for count in model_counts(signature):
        document = recipe_for(signature, folders, count, setting=setting, random=Random(count))
        recipe = parse_recipe(yaml.safe_dump(document), "recipe.yml", signatures())
        plan = make_plan(recipe, Resources(4 << 30))
        base_is_extra = signature.base is BaseModel.OPTIONAL and recipe.base_model is not None
        assert len(plan.checkpoints) == count + base_is_extra
        given = {*recipe.parameters, *(name for m in recipe.models for name in m.parameters)}
        optional = {p.name for p in signature.parameters if not p.required}
        if setting == "flags":
            assert given == {p.name for p in signature.parameters}
        if setting == "defaults":
            assert not given & optional


def parameter(name: str, kind: type, scope: Scope = Scope.GLOBAL, **more: object) -> Parameter:
    return Parameter(name, kind, scope, "", **more)  # type: ignore[arg-type]


def test_values_follow_types_bounds_and_scopes() -> None:
    signature = Signature(
        "any",
        "",
        "",
        (
            parameter("weight", float, Scope.MODEL, required=True),
            parameter("density", float, Scope.NON_BASE, default=1.0, maximum=1.0),
            parameter("angle", float, minimum=10.0, maximum=20.0, required=True),
            parameter("rounds", int, default=10),
            parameter("few", int, default=1, minimum=1),
            parameter("flag", bool, default=True),
        ),
        base=BaseModel.REQUIRED,
        min_models=2,
    )
    folders = [Path(name) for name in "abc"]
    for seed in range(20):
        document = recipe_for(signature, folders, 3, setting="flags", random=Random(seed))
        top_level = document["parameters"]
        assert document["base_model"] == "a"
        assert [model["model"] for model in document["models"]] == ["b", "c"]
        for model in document["models"]:
            assert model["parameters"].keys() == {"weight", "density"}
            assert 0.4 <= model["parameters"]["density"] <= 0.8
        assert 14 <= top_level["angle"] <= 18
        assert 4 <= top_level["rounds"] <= 8
        assert top_level["few"] == 1
        assert top_level["flag"] is False
        assert 0 < top_level["weight"] < 1  # the base's
    again = recipe_for(signature, folders, 3, setting="flags", random=Random(19))
    assert again == document


def test_a_required_text_has_no_value() -> None:
    signature = Signature("any", "", "", (parameter("word", str, required=True),))
    with pytest.raises(ValueError, match="word"):
        recipe_for(signature, [Path("a")], 1, random=Random(0))


def test_model_counts() -> None:
    assert model_counts(Signature("any", "", "")) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert model_counts(Signature("two", "", "", min_models=2, max_models=2)) == [2]
    assert model_counts(Signature("many", "", "", min_models=3), most=2) == [3]
