"""Whatever goes wrong: its exit code, one message, no traceback, nothing left behind."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import (
    TASK_ARITHMETIC,
    Answer,
    Command,
    files_under,
    llama_tensors,
    write_recipe,
)
from safetensors.torch import load_file

from conftest import write_checkpoint

pytest_plugins = ["command_fixtures"]

USAGE, DOES_NOT_FIT = 2, 3

Change = Callable[[dict[str, Any], Path], None]


def fails(lazymerge: Command, place: Path, code: int, *arguments: object) -> str:
    """Runs a command that must fail and leave every file as it is; returns its message."""
    before = files_under(place)
    answer: Answer = lazymerge(*arguments)
    assert answer.code == code, answer
    assert files_under(place) == before
    return answer.message()


def missing_model(recipe: dict[str, Any], place: Path) -> None:
    shutil.rmtree(place / "two")


def missing_shard(recipe: dict[str, Any], place: Path) -> None:
    (place / "one" / "model-00002-of-00002.safetensors").unlink()


def truncated_shard(recipe: dict[str, Any], place: Path) -> None:
    file = place / "one" / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def index_of_missing_tensor(recipe: dict[str, Any], place: Path) -> None:
    file = place / "one" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.0.extra.weight"] = "model-00001-of-00002.safetensors"
    file.write_text(json.dumps(index))


def other_shape(recipe: dict[str, Any], place: Path) -> None:
    tensors = llama_tensors(2)
    tensors["model.norm.weight"] = torch.zeros(17, dtype=torch.bfloat16)
    write_checkpoint(place / "two", tensors)


def unknown_method(recipe: dict[str, Any], place: Path) -> None:
    recipe["merge_method"] = "task_aritmetic"


def unknown_parameter(recipe: dict[str, Any], place: Path) -> None:
    recipe["models"][1]["parameters"]["wieght"] = 1.0


def parameter_out_of_range(recipe: dict[str, Any], place: Path) -> None:
    recipe["merge_method"] = "ties"
    recipe["models"][0]["parameters"]["density"] = 1.5


INPUTS: dict[Change, list[str]] = {
    missing_model: ["'two'", "not found"],
    missing_shard: ["one", "model-00002-of-00002.safetensors", "absent"],
    truncated_shard: ["one/model-00002-of-00002.safetensors"],
    index_of_missing_tensor: [
        "one/model.safetensors.index.json",
        "model.layers.0.extra.weight",
        "does not hold it",
    ],
    other_shape: ["model.norm.weight", "17", "16"],
    unknown_method: ["recipe.yml:1:", "task_aritmetic", "did you mean", "task_arithmetic"],
    unknown_parameter: ["recipe.yml:10:", "wieght", "did you mean", "weight"],
    parameter_out_of_range: ["recipe.yml:7:", "density", "1.5"],
}
"""What is done to the recipe or the models, and what the message must name."""


@pytest.mark.parametrize("change", INPUTS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("arguments", [["plan", "--dry-run"], ["run", "-o", "out"]], ids=" ".join)
def test_inputs(lazymerge: Command, place: Path, change: Change, arguments: list[str]) -> None:
    recipe = copy.deepcopy(TASK_ARITHMETIC)
    change(recipe, place)
    write_recipe(place, recipe)
    command, *options = arguments
    message = fails(lazymerge, place, USAGE, command, "recipe.yml", *options)
    for word in INPUTS[change]:
        assert word in message


def test_every_problem_of_a_recipe_has_its_line(lazymerge: Command, place: Path) -> None:
    recipe = copy.deepcopy(TASK_ARITHMETIC)
    unknown_parameter(recipe, place)
    recipe["dtyp"] = "float16"
    write_recipe(place, recipe)
    answer = lazymerge("plan", "recipe.yml", "--dry-run")
    lines = answer.err.splitlines()
    assert (answer.code, answer.out, len(lines)) == (USAGE, "", 2)
    assert all(line.startswith("lazymerge: recipe.yml:") for line in lines)
    assert "wieght" in lines[0]
    assert "dtyp" in lines[1]


def test_recipe_not_found(lazymerge: Command, place: Path) -> None:
    message = fails(lazymerge, place, USAGE, "run", "nowhere.yml", "-o", "out")
    assert "nowhere.yml" in message


def test_recipe_is_a_folder(lazymerge: Command, place: Path) -> None:
    assert "base" in fails(lazymerge, place, USAGE, "run", "base", "-o", "out")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"format": 99}'])
def test_a_plan_that_is_none(lazymerge: Command, place: Path, content: bytes) -> None:
    (place / "plan.json").write_bytes(content)
    assert "plan.json" in fails(lazymerge, place, USAGE, "run", "plan.json", "-o", "out")


@pytest.mark.parametrize("command", ["plan", "run"])
def test_output_folder_is_not_empty(lazymerge: Command, place: Path, command: str) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("years of work")
    message = fails(lazymerge, place, USAGE, command, "recipe.yml", "-o", "out")
    assert "out is not empty" in message
    assert "thesis.txt" in message


@pytest.mark.parametrize("command", ["plan", "run"])
def test_output_is_a_file(lazymerge: Command, place: Path, command: str) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    (place / "out").write_text("a file")
    message = fails(lazymerge, place, USAGE, command, "recipe.yml", "-o", "out")
    assert "out exists and is not a folder" in message


def test_output_under_a_file(lazymerge: Command, place: Path) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    (place / "file").write_text("a file")
    message = fails(lazymerge, place, USAGE, "run", "recipe.yml", "-o", "file/out")
    assert "is not a folder" in message


@pytest.mark.parametrize("output", ["base", "./one/", "link"])
def test_output_folder_is_an_input(lazymerge: Command, place: Path, output: str) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    (place / "link").symlink_to("two")
    arguments = ["run", "recipe.yml", "-o", output, "--overwrite"]
    message = fails(lazymerge, place, USAGE, *arguments)
    assert "is the folder of an input model" in message


@pytest.mark.parametrize("command", ["plan", "run"])
def test_disk_is_too_small(
    lazymerge: Command, place: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=12_345_678))
    message = fails(lazymerge, place, DOES_NOT_FIT, command, "recipe.yml", "-o", "out")
    assert "out has 12.3 MB free" in message


def test_memory_is_too_small_and_the_smallest_named_works(lazymerge: Command, place: Path) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    for command in (["plan", "recipe.yml", "--dry-run"], ["run", "recipe.yml", "-o", "out"]):
        message = fails(lazymerge, place, DOES_NOT_FIT, *command, "--memory", "1MiB")
        smallest = message.rpartition("--memory ")[2]
        assert "the limit is 1.00 MiB" in message
        below = f"{int(smallest.removesuffix('MiB')) - 1}MiB"
        assert smallest in fails(lazymerge, place, DOES_NOT_FIT, *command, "--memory", below)
        assert lazymerge(*command, "--memory", smallest).code == 0
    assert (place / "out" / "lazymerge.json").is_file()


@pytest.mark.parametrize("memory", ["much", "", "-1", "2XB", "1e999"])
def test_memory_is_no_size(lazymerge: Command, place: Path, memory: str) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    message = fails(lazymerge, place, USAGE, "run", "recipe.yml", "-o", "out", "--memory", memory)
    assert f"{memory!r} is not a size" in message


def test_shard_size_is_no_size(lazymerge: Command, place: Path) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    options = ["-o", "out", "--max-shard-size", "big"]
    assert "'big' is not a size" in fails(lazymerge, place, USAGE, "run", "recipe.yml", *options)


@pytest.mark.parametrize("overwrite", [False, True])
def test_integers_that_differ_are_found_while_running(
    lazymerge: Command, place: Path, overwrite: bool
) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    name = "model.rotary.positions"
    for number, model in enumerate(["base", "one", "two"]):
        tensors = llama_tensors(number)
        tensors[name] = torch.tensor([1, 2, 3 if model == "two" else 4])
        for file in (place / model).glob("model*"):
            file.unlink()
        write_checkpoint(place / model, tensors)
    assert lazymerge("plan", "recipe.yml", "--dry-run").code == 0
    options = ["--overwrite"] if overwrite else []
    arguments = ["run", "recipe.yml", "-o", "new/out", "-q", *options]
    message = fails(lazymerge, place, USAGE, *arguments)
    assert name in message


def test_an_input_that_changed_after_it_was_planned(lazymerge: Command, place: Path) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    assert lazymerge("plan", "recipe.yml", "--save", "plan.json").code == 0
    write_checkpoint(place / "two", llama_tensors(3))
    message = fails(lazymerge, place, USAGE, "run", "plan.json", "-o", "out")
    assert "two" in message
    assert "plan the recipe again" in message


@pytest.mark.parametrize("overwrite", [False, True])
def test_overwrite_replaces_an_earlier_merge(
    lazymerge: Command, place: Path, overwrite: bool
) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    assert lazymerge("run", "recipe.yml", "-o", "out", "--max-shard-size", "8kB").code == 0
    earlier = files_under(place / "out")
    shards = [name for name in earlier if name.endswith(".safetensors")]
    assert len(shards) > 1
    if not overwrite:
        message = fails(lazymerge, place, USAGE, "run", "recipe.yml", "-o", "out")
        assert "--overwrite" in message
        return
    recipe = copy.deepcopy(TASK_ARITHMETIC)
    recipe["models"].pop()
    write_recipe(place, recipe)
    assert lazymerge("run", "recipe.yml", "-o", "out", "--overwrite").code == 0
    assert [f.name for f in (place / "out").glob("*.safetensors*")] == ["model.safetensors"]
    # base + 1.0 (one − base)
    merged = load_file(place / "out" / "model.safetensors")
    expected = llama_tensors(1)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.mark.parametrize("is_merge", [False, True])
def test_overwrite_refuses_the_files_of_others(
    lazymerge: Command, place: Path, is_merge: bool
) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    if is_merge:
        assert lazymerge("run", "recipe.yml", "-o", "out").code == 0
        (place / "out" / "thesis.txt").write_text("years of work")
    else:  # somebody's model, all of whose files have the names that a merge's have
        write_checkpoint(place / "out", llama_tensors(5), {"model_type": "llama"})
    message = fails(lazymerge, place, USAGE, "run", "recipe.yml", "-o", "out", "--overwrite")
    assert ("thesis.txt" if is_merge else "model.safetensors") in message
