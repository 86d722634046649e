"""inspect --scan, and what run says of a recipe that looks wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import CONFIG, TASK_ARITHMETIC, Command, llama_tensors, write_recipe

from conftest import write_checkpoint

pytest_plugins = ["command_fixtures"]

WRONG = {
    "merge_method": "linear",
    "models": [
        {"model": "one", "parameters": {"weight": 0.9}},
        {"model": "two", "parameters": {"weight": 0.9}},
        {"model": "base", "parameters": {"weight": 0}},
    ],
    "parameters": {"normalize": False},
    "dtype": "float16",
}


def test_run_warns_and_goes_on(lazymerge: Command, place: Path) -> None:
    recipe = write_recipe(place, WRONG)
    answer = lazymerge("run", recipe, "-o", "out")
    assert answer.code == 0
    lines = answer.err.splitlines()
    warnings = [line for line in lines if line.startswith("warning ")]
    assert len(warnings) == 2
    assert "base has no influence on the output: its weight is 0" in warnings[0]
    assert "the weights sum to 1.8 in all tensors" in warnings[1]
    assert any(line.startswith("note ") and "F16" in line for line in lines)
    assert lines.index(warnings[1]) < [line.startswith("note ") for line in lines].index(True)


def test_run_says_it_in_json_and_not_where_it_is_quiet(lazymerge: Command, place: Path) -> None:
    recipe = write_recipe(place, WRONG)
    assert lazymerge("run", recipe, "-o", "quiet", "-q").err == ""
    document = lazymerge("run", recipe, "-o", "out", "-q", "--json").document
    assert [each["kind"] for each in document["suspicions"]] == [
        "no-influence",
        "weights-sum",
        "dtype-range",
    ]
    assert set(document["suspicions"][0]) == {"kind", "message", "severity"}


def test_run_says_nothing_of_a_sane_recipe(lazymerge: Command, place: Path) -> None:
    answer = lazymerge("run", write_recipe(place, TASK_ARITHMETIC), "-o", "out")
    assert answer.code == 0
    assert "warning" not in answer.err
    assert "note " not in answer.err


def broken_model(folder: Path) -> Path:
    tensors = llama_tensors(5)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = torch.nan
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    tensors["evil\x1b[31m[bold]name"] = torch.full((2, 2), torch.inf)
    return write_checkpoint(folder, tensors, {**CONFIG, "num_hidden_layers": 9})


def test_inspect_scan(lazymerge: Command, place: Path) -> None:
    broken_model(place / "broken")
    answer = lazymerge("inspect", "broken", "--scan", "--workers", "2")
    assert (answer.code, answer.err) == (0, "")
    text = " ".join(answer.out.split())
    assert "32 tensors read in" in text
    assert "inf or nan in 2 of them" in text
    for part in (
        "wrong 1 element is nan: mlp.up_proj.weight in layer 2 of model.layers",
        "wrong 4 elements are inf: evil\N{REPLACEMENT CHARACTER}[31m[bold]name",
        "only zeros: self_attn.o_proj.weight in layer 1 of model.layers",
        "config.json says num_hidden_layers: 9, and the layers are 4 in model.layers",
    ):
        assert part in text
    assert text.index("wrong") < text.index("note") < text.index("part tensors")


def test_inspect_scan_in_json(lazymerge: Command, place: Path) -> None:
    broken_model(place / "broken")
    document = lazymerge("inspect", "broken", "--scan", "--json").document
    assert document["format"] == 1
    scan = document["scan"]["model.layers.2.mlp.up_proj.weight"]
    assert scan["nan"] == 1
    assert {each["kind"] for each in document["suspicions"]} >= {"nan", "inf", "all-zero"}
    assert {part["name"] for part in document["parts"]} >= {"attention", "MLP", "norms"}
    assert lazymerge("inspect", "broken", "--json").document["scan"] is None


def test_inspect_scan_that_does_not_fit(lazymerge: Command, place: Path) -> None:
    answer = lazymerge("inspect", "one", "--scan", "--memory", "1MiB")
    assert answer.code == 3
    assert "a scan needs" in answer.message()


@pytest.mark.parametrize("options", [[], ["--scan"]])
def test_inspect_of_a_model_with_an_absent_shard(
    lazymerge: Command, place: Path, options: list[str]
) -> None:
    (place / "one" / "model-00002-of-00002.safetensors").unlink()
    answer = lazymerge("inspect", "one", *options)
    assert answer.code == 2
    assert "'model-00002-of-00002.safetensors', absent from the folder" in answer.message()
