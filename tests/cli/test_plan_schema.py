"""The JSON Schema of plans, and the plans of everything in plans/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import CONFIG, Command, llama_tensors
from jsonschema import Draft202012Validator
from lazymerge.cli import plan_time
from lazymerge.engine.plan import PLAN_FORMAT
from lazymerge.engine.planning import signatures
from lazymerge.engine.saved_plans import load_plan
from lazymerge.inspection import measurement
from lazymerge.inspection.plan_schema import plan_schema
from lazymerge.recipe import load_recipe

from conftest import write_checkpoint

pytest_plugins = ["command_fixtures"]

PLANS = sorted((Path(__file__).parents[2] / "plans").glob("*.yml"))
VALIDATOR = Draft202012Validator(plan_schema())

TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {f"t{number}": number for number in range(32)},
        "unk_token": "t0",
    },
}


def write_models(recipe: Path, folder: Path) -> None:
    """The models that a recipe names, all small."""
    for seed, reference in enumerate(load_recipe(recipe, signatures()).models_read):
        model = write_checkpoint(folder / reference, llama_tensors(seed), CONFIG)
        (model / "tokenizer.json").write_text(json.dumps(TOKENIZER))


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(plan_schema())


@pytest.mark.parametrize("recipe", PLANS, ids=lambda path: path.stem)
def test_plans_follow_the_schema(
    lazymerge: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write_models(recipe, tmp_path)
    answer = lazymerge("plan", recipe, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    VALIDATOR.validate(answer.document)
    assert "estimate" not in answer.document
    assert lazymerge("plan", recipe, "--save", "plan.json").code == 0
    VALIDATOR.validate(json.loads(Path("plan.json").read_text()))


def test_with_an_estimate(
    lazymerge: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_time, "SMALL_BYTES", 1)
    monkeypatch.setattr(measurement, "COMPUTING_SECONDS", 0.01)
    recipe = next(path for path in PLANS if path.stem == "ties")
    write_models(recipe, tmp_path)
    document = lazymerge("plan", recipe, "--dry-run", "--json", "--measure").document
    VALIDATOR.validate(document)
    assert document["estimate"]["measured"]["seconds"] > 0
    # what is printed can be saved and run, whatever else it says
    Path("printed.json").write_text(json.dumps(document))
    assert load_plan("printed.json").fingerprint == document["fingerprint"]


def test_the_command_prints_it(lazymerge: Command) -> None:
    assert lazymerge("schema", "--plan").document == plan_schema()
    assert plan_schema()["properties"]["format"] == {"const": PLAN_FORMAT}


@pytest.mark.parametrize("key", ["format", "fingerprint", "memory", "graph"])
def test_what_is_missing_is_seen(
    lazymerge: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_models(PLANS[0], tmp_path)
    document = lazymerge("plan", PLANS[0], "--dry-run", "--json").document
    del document[key]
    assert not VALIDATOR.is_valid(document)
