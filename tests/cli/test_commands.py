"""What the commands answer: text and JSON that agree, each on its stream; right merges."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from command_line import (
    TASK_ARITHMETIC,
    TIES_WITH_GRADIENT_AND_FILTERS,
    Command,
    files_under,
    llama_tensors,
    write_recipe,
)
from lazymerge.cli import progress
from lazymerge.cli.main import app
from lazymerge.methods import METHODS
from lazymerge.version import __version__
from safetensors.torch import load_file

pytest_plugins = ["command_fixtures"]


def merged_tensors(output: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(output.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def expected_tensors() -> dict[str, torch.Tensor]:
    """TASK_ARITHMETIC in float64, rounded once."""
    base, one, two = (llama_tensors(seed) for seed in range(3))
    weight = 0.3
    return {
        name: (
            base[name].double()
            + (one[name].double() - base[name].double())
            + weight * (two[name].double() - base[name].double())
        ).to(torch.bfloat16)
        for name in base
    }


def subprocess_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "COLUMNS": "100", **more}


def test_every_command_explains_itself(lazymerge: Command) -> None:
    listed = lazymerge("--help")
    assert (listed.code, listed.err) == (0, "")
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert sorted(names) == [
        "diff",
        "inspect",
        "join",
        "methods",
        "plan",
        "report",
        "resume",
        "run",
        "schema",
        "status",
        "verify",
    ]
    for name in names:
        assert name in listed.out
        assert lazymerge(name, "-h").out == lazymerge(name, "--help").out != ""


def test_version(lazymerge: Command) -> None:
    answer = lazymerge("--version")
    assert (answer.code, answer.out, answer.err) == (0, f"lazymerge {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge"],
        ["plan"],
        ["run", "recipe.yml"],
        ["run", "recipe.yml", "-o", "out", "--workers", "0"],
        ["run", "recipe.yml", "-o", "out", "--read-mode", "slow"],
        ["inspect", "base", "--tensor"],
    ],
    ids=" ".join,
)
def test_wrong_usage(lazymerge: Command, place: Path, arguments: list[str]) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    before = files_under(place)
    answer = lazymerge(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert "Usage" in answer.err
    assert "Traceback" not in answer.err
    assert files_under(place) == before


def test_a_limit_of_no_cache(lazymerge: Command, place: Path) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    for command in ("plan", "run", "resume"):
        arguments = ["recipe.yml", "-o", "out"] if command != "resume" else ["out"]
        answer = lazymerge(command, *arguments, "--cache-limit", "4GB")
        assert (answer.code, answer.out) == (2, "")
        assert command == "resume" or "(--cache DIR)" in answer.err


# methods, schema


def test_methods_lists_every_method(lazymerge: Command) -> None:
    text, documents = lazymerge("methods"), lazymerge("methods", "--json").document
    assert [document["name"] for document in documents] == list(METHODS)
    for document in documents:
        assert document["name"] in text.out
    assert text.err == ""


@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_text_and_in_json(lazymerge: Command, name: str) -> None:
    text, document = lazymerge("methods", name), lazymerge("methods", name, "--json").document
    signature = METHODS[name].signature
    assert document["formula"] == signature.formula
    shown = " ".join(text.out.split())
    assert document["summary"] in shown
    assert " ".join(document["formula"].split()) in shown
    declared = {parameter.name: parameter for parameter in signature.parameters}
    assert [p["name"] for p in document["parameters"]] == list(declared)
    for parameter in document["parameters"]:
        assert parameter["name"] in text.out
        assert parameter["default"] == declared[parameter["name"]].default


def test_an_unknown_method_is_guessed(lazymerge: Command) -> None:
    answer = lazymerge("methods", "tise")
    assert answer.code == 2
    assert answer.message() == "there is no merge method 'tise'; did you mean ties?"


def test_schema_accepts_recipes_and_refuses_a_misspelt_one(lazymerge: Command) -> None:
    schema = lazymerge("schema").document
    for recipe in (TASK_ARITHMETIC, TIES_WITH_GRADIENT_AND_FILTERS):
        jsonschema.validate(recipe, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**TASK_ARITHMETIC, "dtyp": "float16"}, schema)


# inspect


def test_inspect_in_text_and_in_json(lazymerge: Command, place: Path) -> None:
    text, document = lazymerge("inspect", "one"), lazymerge("inspect", "one", "--json").document
    assert (text.code, text.err) == (0, "")
    tensors = llama_tensors(1)
    assert set(document["tensors"]) == set(tensors)
    assert document["parameters"] == sum(t.numel() for t in tensors.values())
    assert document["layer_stacks"] == [{"prefix": "model.layers", "layers": 4}]
    assert [file["path"] for file in document["files"]] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    for name, info in document["tensors"].items():
        start, stop_exclusive = info["bytes"]
        assert info["shape"] == list(tensors[name].shape)
        assert stop_exclusive - start == tensors[name].nbytes
        data = (place / "one" / info["file"]).read_bytes()[start:stop_exclusive]
        assert data == tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    assert f"{len(tensors)} tensors, 9.30k parameters" in text.out
    assert "in 2 files" in text.out
    assert "4 in model.layers" in text.out


def test_inspect_lists_every_tensor_and_takes_a_file(lazymerge: Command, place: Path) -> None:
    answer = lazymerge("inspect", "base/model.safetensors", "--tensors")
    assert answer.code == 0
    words = answer.out.split()
    assert "in 1 file\n" in "\n".join(line.rstrip() for line in answer.out.splitlines())
    assert [name for name in llama_tensors(0) if name not in words] == []


def test_inspect_shows_names_as_they_are(lazymerge: Command, place: Path) -> None:
    """Brackets are no markup, and what would steer a terminal does not reach it."""
    from conftest import write_checkpoint

    write_checkpoint(place / "[red]odd[/red]", {"[bold]name[/bold]": torch.zeros(1)})
    answer = lazymerge("inspect", "[red]odd[/red]")
    assert "[red]odd[/red]" in answer.out
    assert "[bold]name[/bold]" in answer.out


# plan


@pytest.mark.parametrize("recipe", [TASK_ARITHMETIC, TIES_WITH_GRADIENT_AND_FILTERS])
def test_plan_in_text_and_in_json(lazymerge: Command, place: Path, recipe: dict[str, Any]) -> None:
    write_recipe(place, recipe)
    before = files_under(place)
    text = lazymerge("plan", "recipe.yml", "--dry-run", "--workers", "1", "--ops")
    answer = lazymerge("plan", "recipe.yml", "--dry-run", "--workers", "1", "--json")
    assert files_under(place) == before
    assert (text.code, text.err, answer.code, answer.err) == (0, "", 0, "")
    document = answer.document
    totals = document["totals"]
    assert totals["tensors"] == len(llama_tensors(0))
    assert f"{totals['tensors']} tensors" in text.out
    for kind, count in totals["operations"].items():
        assert re.search(rf"^ {kind} +{count} ", text.out, flags=re.MULTILINE)
    (passes,) = totals["passes"]
    assert f"{passes} pass" in text.out
    assert document["memory"]["projected_bytes"] <= document["memory"]["limit_bytes"]
    assert document["disk"]["needed_bytes"] == totals["bytes_written"]
    assert [model["reference"] for model in document["models"]] == ["base", "one", "two"]


def test_plan_says_where_it_would_save(lazymerge: Command, place: Path) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    message = lazymerge("plan", "recipe.yml").message()
    assert "--dry-run" in message


@pytest.mark.parametrize("place_of_plan", ["--save", "-o"])
def test_a_saved_plan_runs_as_its_recipe_does(
    lazymerge: Command, place: Path, place_of_plan: str
) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    assert lazymerge("run", "recipe.yml", "-o", "by_recipe").code == 0
    if place_of_plan == "--save":
        planned, plan = lazymerge("plan", "recipe.yml", "--save", "plan.json"), "plan.json"
    else:
        planned, plan = lazymerge("plan", "recipe.yml", "-o", "out"), "out/.lazymerge/plan.json"
    assert planned.code == 0
    assert f"lazymerge run {plan} -o" in planned.err
    assert planned.out != ""
    answer = lazymerge("run", plan, "-o", "out", "--json")
    assert answer.code == 0, answer
    manifests = [
        json.loads((place / f / "lazymerge.json").read_text()) for f in ("by_recipe", "out")
    ]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]
    weights = [(place / f / "model.safetensors").read_bytes() for f in ("by_recipe", "out")]
    assert weights[0] == weights[1]


# run


def test_run_writes_the_merge_and_says_so_on_stderr(lazymerge: Command, place: Path) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    answer = lazymerge("run", "recipe.yml", "-o", "deep/out")
    assert (answer.code, answer.out) == (0, "")
    done, where = answer.err.splitlines()
    assert done.startswith("done in ")
    assert where == str(place / "deep" / "out")
    expected = expected_tensors()
    merged = merged_tensors(place / "deep" / "out")
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name]), name
    assert sorted(f.name for f in (place / "deep" / "out").iterdir()) == [
        "README.md",
        "config.json",
        "lazymerge.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_run_quietly_says_nothing(lazymerge: Command, place: Path) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    answer = lazymerge("run", "recipe.yml", "-o", "out", "-q", "--no-fsync")
    assert (answer.code, answer.out, answer.err) == (0, "", "")
    assert (place / "out" / "lazymerge.json").is_file()


def test_run_in_json(lazymerge: Command, place: Path) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    planned = lazymerge("plan", "recipe.yml", "--dry-run", "--json").document
    answer = lazymerge("run", "recipe.yml", "-o", "out", "--json")
    assert (answer.code, answer.err) == (0, "")
    report = answer.document
    assert report["output"] == str(place / "out")
    assert report["bytes_read"] == planned["totals"]["bytes_read"]
    assert report["bytes_written"] == sum(tensor.nbytes for tensor in llama_tensors(0).values())
    assert report["measured_bytes"] > 0


@pytest.mark.parametrize("options", [["--workers", "1"], ["--read-mode", "mmap"]], ids=" ".join)
def test_options_do_not_change_a_byte(lazymerge: Command, place: Path, options: list[str]) -> None:
    write_recipe(place, TIES_WITH_GRADIENT_AND_FILTERS)
    assert lazymerge("run", "recipe.yml", "-o", "plain", "-q").code == 0
    assert lazymerge("run", "recipe.yml", "-o", "other", "-q", *options).code == 0
    weights = [(place / f / "model.safetensors").read_bytes() for f in ("plain", "other")]
    assert weights[0] == weights[1]


def test_progress_is_plain_lines_where_there_is_no_terminal(
    lazymerge: Command, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.002)
    answer = lazymerge("run", "recipe.yml", "-o", "out", "--workers", "1")
    *lines, done, _ = answer.err.splitlines()
    assert done.startswith("done in ")
    assert lines
    assert "\x1b" not in answer.err
    assert "\r" not in answer.err
    for line in lines:
        percent, moved, tensors, rate, left, memory, *where = line.split(", ")
        assert percent.endswith(" %")
        assert 0 <= int(percent.removesuffix(" %")) <= 100
        assert " of " in moved
        assert tensors.endswith(" of 31 tensors")
        assert rate.endswith("/s")
        assert left.endswith(" left")
        assert memory.startswith("memory ")
        assert len(where) == 1


# as real processes


def real(place: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lazymerge", *arguments],
        cwd=place,
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_a_process_merges(place: Path) -> None:
    write_recipe(place, TASK_ARITHMETIC)
    done = real(place, "run", "recipe.yml", "-o", "out", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["output"] == str(place / "out")
    expected = expected_tensors()
    assert all(torch.equal(t, expected[name]) for name, t in merged_tensors(place / "out").items())


def test_a_process_refuses(place: Path) -> None:
    (place / "recipe.yml").write_text(
        yaml.safe_dump({**TASK_ARITHMETIC, "merge_method": "x\x1b[2J"})
    )
    done = real(place, "run", "recipe.yml", "-o", "out")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("lazymerge: recipe.yml:")
    assert "\x1b" not in line
    assert not (place / "out").exists()


def test_a_process_whose_reader_has_gone_says_no_more(place: Path) -> None:
    """`lazymerge inspect MODEL | head -0` ends without a traceback."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "lazymerge", "methods"],
        cwd=place,
        env=subprocess_environment(),
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "")


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom lazymerge.cli.main import main\nsys.argv = ['lazymerge', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.exit(sorted({'torch', 'numpy', 'networkx'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


DARE = {
    "merge_method": "dare_linear",
    "base_model": "base",
    "models": [{"model": "one", "parameters": {"weight": 1.0, "density": 0.5}}],
    "seed": 3,
}


def test_seeds_of_recipe_and_command(lazymerge: Command, place: Path) -> None:
    write_recipe(place, DARE)

    def checksums(*options: str) -> dict[str, str]:
        answer = lazymerge("run", "recipe.yml", "-o", "out", "--overwrite", "-q", *options)
        assert answer.code == 0, answer.err
        manifest = json.loads((place / "out" / "lazymerge.json").read_text())
        seeds.append(manifest["recipe"]["seed"])
        return {name: tensor["checksum"] for name, tensor in manifest["tensors"].items()}

    seeds: list[int] = []
    first, same, other = checksums(), checksums("--seed", "3"), checksums("--seed", "4")
    assert seeds == [3, 3, 4]
    assert first == same != other
    assert lazymerge("plan", "recipe.yml", "--save", "plan.json").code == 0
    answer = lazymerge("run", "plan.json", "-o", "again", "--seed", "4")
    assert (answer.code, "its random numbers are part of it" in answer.err) == (2, True)


def test_inf_is_named_and_strict_refuses_it(lazymerge: Command, place: Path) -> None:
    write_recipe(place, {**TASK_ARITHMETIC, "parameters": {"lambda": 1e39}})
    answer = lazymerge("run", "recipe.yml", "-o", "out")
    assert answer.code == 0
    assert "so it is the merge that leaves the range of" in answer.err
    assert "--strict makes that an error" in answer.err
    refused = lazymerge("run", "recipe.yml", "-o", "strict", "--strict")
    assert refused.code == 1
    assert "holds inf or nan" in refused.err
    assert not (place / "strict").exists()


def test_merges_that_use_others_are_shown(lazymerge: Command, place: Path) -> None:
    first = {**TASK_ARITHMETIC, "name": "both"}
    second = {
        "merge_method": "linear",
        "models": [
            {"model": "both", "parameters": {"weight": [0.25, 0.75]}},
            {"model": "one", "parameters": {"weight": 0.5}},
        ],
    }
    (place / "recipe.yml").write_text(yaml.safe_dump_all([first, second]))
    shown = lazymerge("plan", "recipe.yml", "--dry-run", "--layers").out
    assert "D  both = task_arithmetic of " in shown
    assert "0.25" in shown
    assert "0.75" in shown
