"""`parse_recipe` and `load_recipe`: what right recipes become, and how robust reading is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lazymerge.checkpoint.tensor import FLOAT_DTYPES_BY_TORCH_NAME
from lazymerge.errors import Position, RecipeError
from lazymerge.recipe import (
    FLOAT_DTYPE_NAMES,
    Condition,
    Conditions,
    Gradient,
    ModelEntry,
    Recipe,
    load_recipe,
    parse_recipe,
)
from lazymerge.recipe.source import PROBLEM_LIMIT
from recipe_examples import GOOD
from recipe_signatures import SIGNATURES


def parse(text: str) -> Recipe:
    return parse_recipe(text, "recipe.yml", SIGNATURES)


def value_of(method: str, name: str, written: str) -> object:
    """What a global parameter's text becomes."""
    models = {"karcher": "[{model: a}, {model: b}]"}.get(method, "[{model: a}]")
    base = "base_model: b" if method in ("task_arithmetic", "labelled", "slerp") else ""
    extra = {"task_arithmetic": "weight: 1", "labelled": "label: x"}.get(method, "")
    text = f"merge_method: {method}\n{base}\nmodels: {models}\nparameters:\n  {name}: {written}\n"
    return parse(text + (f"  {extra}\n" if extra else "")).parameters[name]


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_right_recipes_are_accepted_without_a_warning(text: str) -> None:
    recipe = parse(text)
    assert recipe.text == text
    assert recipe.path == "recipe.yml"
    assert recipe.warnings == ()


def test_every_form_of_setting_becomes_a_value() -> None:
    recipe = parse(GOOD["ties, every form of setting"])
    assert recipe == Recipe(
        merge_method="ties",
        base_model="base",
        models=(
            ModelEntry("base"),
            ModelEntry(
                "a",
                {
                    "weight": Gradient((0.0, 0.5, 1.0)),
                    "density": Conditions(
                        (
                            Condition(Gradient((0.2, 0.8)), "mlp"),
                            Condition(0.5, "self_attn"),
                            Condition(1.0),
                        )
                    ),
                },
            ),
            ModelEntry(
                "b",
                {
                    "weight": Conditions((Condition(0.5, "*"),)),
                    "density": Conditions((Condition(0.5),)),
                },
            ),
        ),
        parameters={
            "weight": 1.0,
            "lambda": 1.5,
            "normalize": Gradient((True, False)),
            "int8_mask": True,
        },
    )


def test_positions_are_kept() -> None:
    recipe = parse(GOOD["ties, every form of setting"])
    assert recipe.method_position == Position(2, 15)
    assert recipe.base_position == Position(3, 13)
    assert recipe.parameter_positions["lambda"] == Position(21, 3)
    assert [entry.position for entry in recipe.models] == [
        Position(5, 12),
        Position(6, 12),
        Position(15, 12),
    ]
    assert recipe.models[1].parameter_positions == {
        "weight": Position(8, 7),
        "density": Position(9, 7),
    }


def test_what_is_left_out_is_none() -> None:
    recipe = parse(GOOD["anchors, merge keys, nulls"])
    assert (recipe.dtype, recipe.out_dtype, recipe.parameters) == (None, None, {})
    assert [entry.parameters for entry in recipe.models] == [
        {"weight": 0.5},
        {"weight": 0.5},
        {"weight": 0.25},
    ]
    assert parse(GOOD["passthrough"]).base_position is None


def test_dtypes_are_torch_names() -> None:
    assert set(FLOAT_DTYPE_NAMES) == set(FLOAT_DTYPES_BY_TORCH_NAME)
    for name in FLOAT_DTYPE_NAMES:
        for written in (name, f"torch.{name}"):
            text = f"{GOOD['passthrough']}dtype: {written}\nout_dtype: {written}\n"
            assert (parse(text).dtype, parse(text).out_dtype) == (name, name)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("1", 1.0),
        ("-0.5", -0.5),
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("+.5e1", 5.0),
        ("'2'", 2.0),
        ("' 2.5 '", 2.5),
        ("1_000", 1000.0),
        ("0x10", 16.0),
    ],
)
def test_numbers(written: str, expected: float) -> None:
    value = value_of("task_arithmetic", "lambda", written)
    assert value == expected
    assert type(value) is float


@pytest.mark.parametrize(("written", "expected"), [("3", 3), ("3.0", 3), ("'3'", 3), ("1e1", 10)])
def test_whole_numbers(written: str, expected: int) -> None:
    value = value_of("karcher", "max_iter", written)
    assert value == expected
    assert type(value) is int


@pytest.mark.parametrize(
    ("written", "expected"),
    [("true", True), ("off", False), ("1", True), ("0", False), ("0.0", False), ("'No'", False)],
)
def test_booleans(written: str, expected: bool) -> None:
    assert value_of("task_arithmetic", "normalize", written) is expected


@pytest.mark.parametrize(
    "written",
    [".nan", "-.inf", "'nan'", "'inf'", "1e999", "'1_0'", "'١'", "'0x10'", "1.2.3", "true", "[]"],
)
def test_what_is_no_number(written: str) -> None:
    with pytest.raises(RecipeError, match=r"recipe.yml:5:11: .*'lambda'"):
        value_of("task_arithmetic", "lambda", written)


def test_bounds_are_inclusive() -> None:
    assert value_of("labelled", "temperature", "2") == 2.0
    assert value_of("karcher", "max_iter", "1") == 1
    with pytest.raises(RecipeError, match=r"must be at most 2, not 2.0000000000000004"):
        value_of("labelled", "temperature", "2.0000000000000004")


def test_entries_that_are_never_used_are_warned_about() -> None:
    recipe = parse(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\n"
        "parameters:\n  t:\n    - filter: mlp\n      value: 1\n    - value: 0\n"
        "    - filter: attn\n      value: 0.5\n"
    )
    (warning,) = recipe.warnings
    assert warning.position == Position(9, 7)
    assert "never used: the entry in line 8 has no filter" in warning.message


def test_a_setting_without_effect_on_the_base_is_warned_about() -> None:
    recipe = parse(
        "merge_method: ties\nbase_model: a\nparameters: {weight: 1}\n"
        "models:\n  - model: a\n    parameters:\n      density: 0.5\n  - model: b\n"
    )
    (warning,) = recipe.warnings
    assert warning.position == Position(7, 7)
    assert warning.message == "'density' has no effect on the base model"


def test_recipes_are_read_from_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_bytes(GOOD["linear"].replace("\n", "\r\n").encode())
    recipe = load_recipe(path, SIGNATURES)
    assert recipe.path == str(path)
    assert recipe.text == GOOD["linear"].replace("\n", "\r\n")
    assert recipe == parse(GOOD["linear"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in [
        (tmp_path / "absent.yml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (f"{tmp_path}/nul\0", "null"),
    ]:
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, SIGNATURES)
        assert str(caught.value).startswith(f"{path}: cannot read the recipe: ")
        assert reason in str(caught.value)
    (tmp_path / "latin.yml").write_bytes("a: ä".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin.yml:1:4: not UTF-8"):
        load_recipe(tmp_path / "latin.yml", SIGNATURES)


def test_messages_hold_no_control_characters_and_stay_short() -> None:
    nasty = '"\\e[31m' + "x" * 500 + '"'
    text = (
        f"merge_method: {nasty}\nmodels:\n  - {nasty}\n  - {{model: a, {nasty}: 1}}\n"
        f"{nasty}: 1\ndtype: {nasty}\nparameters: {{weight: {nasty}}}\n"
    )
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert len(caught.value.problems) == 5
    for problem in caught.value.problems:
        assert problem.message.isprintable()
        assert len(problem.message) < 400


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: linear\nmodels:\n" + "- {modle: a, weigth: 1}\n" * 4_000,
        "merge_method: linear\nmodels: [{model: a}]\n"
        + "".join(f"k{i}: 1\n" for i in range(20_000)),
        "".join(f"merge_metho{i}: 1\n" for i in range(20_000)),
    ],
)
def test_many_problems_end_quickly(text: str) -> None:
    started = time.process_time()
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert len(caught.value.problems) == PROBLEM_LIMIT + 1
    assert time.process_time() - started < 10


# Robustness: a right recipe, spoilt in any way, ends in a Recipe or a RecipeError

spoilt_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["weight", "1e-3", "linear", "slerp", "a+b", "mlp", 10**400, -1, 2]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["value", "filter", "model", "parameters", "weight", "t", "x", 1]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
spoilt_keys = st.sampled_from(
    ["weight", "density", "model", "models", "parameters", "slices", "base_model", "t", "vlaue", 1]
) | st.text(max_size=4)


def spoil(node: Any, draw: Any) -> Any:
    """The node with one value replaced, removed, renamed or added somewhere in it."""
    inside = isinstance(node, (dict, list)) and len(node) > 0 and draw(st.integers(0, 4)) > 0
    if not inside:
        return draw(spoilt_values)
    if isinstance(node, list):
        index = draw(st.integers(0, len(node) - 1))
        match draw(st.sampled_from(["into", "remove", "repeat"])):
            case "into":
                return [*node[:index], spoil(node[index], draw), *node[index + 1 :]]
            case "remove":
                return [*node[:index], *node[index + 1 :]]
            case _:
                return [*node, node[index]]
    key = draw(st.sampled_from(list(node)))
    match draw(st.sampled_from(["into", "into", "remove", "rename", "add"])):
        case "into":
            return {**node, key: spoil(node[key], draw)}
        case "remove":
            return {k: v for k, v in node.items() if k != key}
        case "rename":
            new = draw(spoilt_keys)
            return {(new if k == key else k): v for k, v in node.items()}
        case _:
            return {**node, draw(spoilt_keys): draw(spoilt_values)}


@st.composite
def spoilt_recipes(draw: Any) -> str:
    tree = yaml.safe_load(draw(st.sampled_from(list(GOOD.values()))))
    for _ in range(draw(st.integers(1, 3))):
        tree = spoil(tree, draw)
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=draw(st.booleans()))


def check_outcome(text: str) -> None:
    try:
        outcome: Recipe | RecipeError = parse(text)
    except RecipeError as error:
        outcome = error
    if isinstance(outcome, Recipe):
        assert outcome.merge_method in SIGNATURES
        assert outcome.entries
        return
    line_count = len(text.split("\n"))
    assert outcome.problems
    for problem in outcome.problems:
        assert problem.position is not None
        assert 1 <= problem.position.line <= line_count
        assert problem.message.isprintable()
    assert list(outcome.problems) == sorted(outcome.problems, key=lambda p: p.position)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spoilt_recipes())
def test_spoilt_recipes_raise_nothing_but_recipe_errors(text: str) -> None:
    check_outcome(text)


@settings(max_examples=200, deadline=None)
@given(
    text=st.sampled_from(list(GOOD.values())),
    start=st.integers(0, 400),
    length=st.integers(0, 8),
    insertion=st.text(alphabet="ab:-[]{}&*!|>'\"%@#,? \n\t1e.<~", max_size=6),
)
def test_spoilt_texts_raise_nothing_but_recipe_errors(
    text: str, start: int, length: int, insertion: str
) -> None:
    start %= len(text)
    check_outcome(text[:start] + insertion + text[start + length :])


def test_parsing_imports_no_torch_and_is_quick() -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
before = set(sys.modules)
started = time.process_time()
import lazymerge.recipe
import_seconds = time.process_time() - started
from lazymerge.recipe import json_schema, parse_recipe
from recipe_signatures import SIGNATURES
from recipe_examples import GOOD
json_schema(SIGNATURES)
text = GOOD["ties, every form of setting"]
parse_recipe(text, "r", SIGNATURES)
started = time.process_time()
for _ in range(10):
    parse_recipe(text, "r", SIGNATURES)
parse_seconds = (time.process_time() - started) / 10
heavy = {{"torch", "numpy", "pydantic", "networkx", "safetensors", "rich"}} & set(sys.modules)
assert not heavy, heavy
print(import_seconds, parse_seconds)
"""
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    ).stdout
    import_seconds, parse_seconds = map(float, output.split())
    assert import_seconds < 0.3  # 0.08 s of CPU time; the bound allows for a busy one
    assert parse_seconds < 0.01


def test_an_architecture_is_not_asked_for() -> None:
    """mergekit's key for models that it does not recognise."""
    text = """\
merge_method: linear
models:
  - model: {model: {path: a}, override_architecture: LlamaForCausalLM}
    parameters: {weight: 1}
"""
    recipe = parse_recipe(text, "recipe.yml", SIGNATURES)
    assert recipe.references == ("a",)
    (warning,) = recipe.warnings
    assert "'override_architecture' is not looked at" in warning.message
    assert warning.position is not None
    assert warning.position.line == 3
