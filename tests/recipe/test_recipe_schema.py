"""The JSON Schema agrees with the parser: right recipes pass, and what it refuses is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from lazymerge.errors import RecipeError
from lazymerge.recipe import json_schema, parse_recipe
from recipe_examples import GOOD
from recipe_signatures import SIGNATURES
from test_recipe_parse import spoilt_recipes

SCHEMA = json_schema(SIGNATURES)
VALIDATOR = Draft202012Validator(SCHEMA)


def errors_of(text: str) -> list[tuple[str, str]]:
    """(path of the value, message) of every error the schema finds."""
    errors = VALIDATOR.iter_errors(yaml.safe_load(text))
    return [("/".join(map(str, error.absolute_path)), error.message) for error in errors]


def test_it_is_a_schema_and_json() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert json_schema(SIGNATURES) == SCHEMA


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_right_recipes_pass(text: str) -> None:
    assert errors_of(text) == []


TIES = "merge_method: ties\nbase_model: base\n"
BAD: dict[str, tuple[str, str]] = {
    "no method": ("models: [{model: a}]", ""),
    "unknown method": ("merge_method: tie\nmodels: [{model: a}]", "merge_method"),
    "no models": ("merge_method: linear", ""),
    "empty models": ("merge_method: linear\nmodels: []", "models"),
    "model is text": ("merge_method: linear\nmodels: [a]", "models/0"),
    "model without reference": ("merge_method: linear\nmodels: [{parameters: {}}]", "models/0"),
    "a list as model": ("merge_method: linear\nmodels: [{model: [a]}]", "models/0/model"),
    "unknown key": ("merge_method: linear\nmodels: [{model: a}]\nfoo: 1", ""),
    "a name that is none": ("merge_method: linear\nmodels: [{model: a}]\nname: 5", "name"),
    "models and slices": (
        "merge_method: linear\nmodels: [{model: a}]\n"
        "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
        "",
    ),
    "no layer range": (
        "merge_method: passthrough\nslices: [{sources: [{model: a}]}]",
        "slices/0/sources/0",
    ),
    "global parameter in a source": (
        "merge_method: slerp\nbase_model: a\n"
        "slices: [{sources: [{model: a, layer_range: [0, 1], parameters: {t: 1}}]}]",
        "slices/0/sources/0/parameters",
    ),
    "module of nothing": ("merge_method: linear\nmodules: {encoder: {}}", "modules/encoder"),
    "weight beside model": ("merge_method: linear\nmodels: [{model: a, weight: 1}]", "models/0"),
    "dtype": ("merge_method: linear\nmodels: [{model: a}]\ndtype: fp16", "dtype"),
    "no base": ("merge_method: ties\nmodels: [{model: a}]", ""),
    "null base": ("merge_method: ties\nmodels: [{model: a}]\nbase_model: ~", "base_model"),
    "unknown parameter": (TIES + "models: [{model: a}]\nparameters: {t: 1}", "parameters"),
    "global parameter in a model": (
        TIES + "models: [{model: a, parameters: {lambda: 1}}]",
        "models/0/parameters",
    ),
    "out of range": (
        TIES + "models: [{model: a, parameters: {density: 1.5}}]",
        "models/0/parameters/density",
    ),
    "out of range in a gradient": (
        TIES + "models: [{model: a, parameters: {density: [1, 2]}}]",
        "models/0/parameters/density",
    ),
    "boolean as a number": (
        TIES + "models: [{model: a}]\nparameters: {weight: true}",
        "parameters/weight",
    ),
    "text as a number": (
        TIES + "models: [{model: a}]\nparameters: {weight: heavy}",
        "parameters/weight",
    ),
    "empty list": (TIES + "models: [{model: a}]\nparameters: {weight: []}", "parameters/weight"),
    "mixed list": (
        TIES + "models: [{model: a}]\nparameters: {weight: [1, {value: 1}]}",
        "parameters/weight",
    ),
    "condition without value": (
        TIES + "models: [{model: a}]\nparameters: {weight: {filter: mlp}}",
        "parameters/weight",
    ),
    "gradient of whole numbers": (
        "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {max_iter: [1, 2]}",
        "parameters/max_iter",
    ),
    "too many models": ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]", "models"),
    "too few models": ("merge_method: karcher\nmodels: [{model: a}]", "models"),
}


@pytest.mark.parametrize(("text", "path"), BAD.values(), ids=BAD)
def test_wrong_recipes_fail_in_one_place(text: str, path: str) -> None:
    assert [where for where, _ in errors_of(text)] == [path]
    with pytest.raises(RecipeError):
        parse_recipe(text, "r", SIGNATURES)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(spoilt_recipes())
def test_what_the_schema_refuses_the_parser_refuses(text: str) -> None:
    try:
        parse_recipe(text, "r", SIGNATURES)
    except RecipeError:
        return
    assert errors_of(text) == []


def _settings_in(schema: Any) -> dict[str, Any]:
    return {
        f"{block}/{name}": setting
        for block, definition in schema["$defs"].items()
        if block.endswith("parameters")
        for name, setting in definition["properties"].items()
    }


def test_every_parameter_has_its_help_default_and_bounds() -> None:
    described = _settings_in(SCHEMA)
    count = 0
    for signature in SIGNATURES.values():
        for parameter in signature.parameters:
            setting = described[f"{signature.name} parameters/{parameter.name}"]
            count += 1
            assert setting["description"] == parameter.help
            if parameter.default is not None:
                assert setting["default"] == parameter.default
            scalar = setting["anyOf"][0]
            assert scalar.get("minimum") == parameter.minimum
            assert scalar.get("maximum") == parameter.maximum
    assert count > 10
    assert "ties model parameters/density" in described
    assert "ties model parameters/lambda" not in described


def test_every_method_is_described() -> None:
    method = SCHEMA["properties"]["merge_method"]
    assert method["enum"] == list(SIGNATURES)
    assert method["enumDescriptions"] == [s.summary for s in SIGNATURES.values()]
    assert len(method["markdownEnumDescriptions"]) == len(SIGNATURES)
