"""lazymerge-yaml: the arguments of mergekit-yaml, and what becomes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import TASK_ARITHMETIC, write_recipe
from lazymerge.cli.mergekit_yaml import device_of, main, parameters, parser
from lazymerge.errors import InputError

pytest_plugins = ["command_fixtures"]

SWITCHES = [
    "allow-crimes",
    "unsafe-truncate-embeddings",
    "trust-remote-code",
    "cuda",
    "low-cpu-memory",
    "lazy-unpickle",
    "read-to-gpu",
    "multi-gpu",
    "async-write",
    "copy-tokenizer",
    "clone-tensors",
    "write-model-card",
    "safe-serialization",
    "quiet",
]
"""Of mergekit-yaml 0.1.5, by its --help."""

VALUES = [
    ["--transformers-cache", "cache"],
    ["--lora-merge-cache", "cache"],
    ["--lora-merge-dtype", "float32"],
    ["--random-seed", "7"],
    ["--device", "cpu"],
    ["-j", "1"],
    ["--num-threads", "1"],
    ["--write-threads", "3"],
    ["--out-shard-size", "300M"],
    ["--gpu-rich"],
    ["-v"],
    ["-vv"],
]


@pytest.fixture
def lazymerge_yaml(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def command(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["lazymerge-yaml", *arguments])
        monkeypatch.setenv("HF_HUB_CACHE", "before")
        with pytest.raises(SystemExit) as caught:
            main()
        assert isinstance(caught.value.code, int)
        return caught.value.code, capsys.readouterr().err

    write_recipe(place, TASK_ARITHMETIC)
    return command


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_is_taken_both_ways(name: str) -> None:
    for option, value in ((f"--{name}", True), (f"--no-{name}", False)):
        chosen = parser().parse_args(["recipe.yml", "out", option])
        assert vars(chosen)[name.replace("-", "_")] is value


@pytest.mark.parametrize("words", VALUES)
def test_every_option_is_taken(words: list[str]) -> None:
    parser().parse_args([*words, "recipe.yml", "out"])
    parser().parse_args(["recipe.yml", "out", *words])


def test_a_merge(lazymerge_yaml, place: Path) -> None:
    code, said = lazymerge_yaml(
        "recipe.yml", "out", "--lazy-unpickle", "--allow-crimes", "-j", "1", "--random-seed", "5"
    )
    assert code == 0, said
    assert "notice" not in said
    manifest = json.loads((place / "out" / "lazymerge.json").read_text())
    assert manifest["recipe"]["seed"] == 5
    code, said = lazymerge_yaml("recipe.yml", "out")
    assert (code, "holds this merge, complete" in said) == (0, True)
    code, said = lazymerge_yaml("recipe.yml", "out", "--out-shard-size", "1K")
    assert (code, "--overwrite" in said) == (2, True)
    assert lazymerge_yaml("recipe.yml", "out", "--overwrite", "--quiet") == (0, "")


def test_shards_by_parameters(lazymerge_yaml, place: Path) -> None:
    assert lazymerge_yaml("recipe.yml", "out", "--out-shard-size", "1K")[0] == 0
    assert len([*(place / "out").glob("model-*.safetensors")]) > 1
    assert parameters("5B") == parameters("5b") == 5 * 10**9
    assert (parameters("1.5M"), parameters("700")) == (1_500_000, 700)
    for wrong in ("", "B", "x", "-5B", "0", "1e999", "nan"):
        with pytest.raises(InputError, match="a number of parameters is wanted"):
            parameters(wrong)


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ("--trust-remote-code", "no code of a model is ever run"),
        ("--no-copy-tokenizer", "tokenizer files are copied all the same"),
        ("--no-write-model-card", "README.md is written all the same"),
    ],
)
def test_wishes_that_are_not_fulfilled_are_named(lazymerge_yaml, option: str, word: str) -> None:
    code, said = lazymerge_yaml("recipe.yml", "out", option)
    assert (code, word in said) == (0, True)


def test_what_cannot_be_done_is_refused(lazymerge_yaml, place: Path) -> None:
    code, said = lazymerge_yaml("recipe.yml", "out", "--no-safe-serialization")
    assert (code, "safetensors alone" in said) == (2, True)
    code, said = lazymerge_yaml("recipe.yml", "out", "--device", "mps")
    assert (code, "only cpu and cuda are known" in said) == (2, True)
    assert lazymerge_yaml("recipe.yml")[0] == 2
    assert lazymerge_yaml("recipe.yml", "out", "--unheard-of")[0] == 2
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("words", "device"),
    [
        ([], None),
        (["--cuda"], "cuda"),
        (["--gpu-rich"], "cuda"),
        (["--device", "cuda:0"], "cuda"),
        (["--device", "cpu"], "cpu"),
    ],
)
def test_devices(words: list[str], device: str | None) -> None:
    assert device_of(parser().parse_args(["recipe.yml", "out", *words])) == device


def test_the_cache_of_models(lazymerge_yaml, place: Path) -> None:
    """huggingface_hub looks for it in the environment."""
    import os

    assert lazymerge_yaml("recipe.yml", "out", "--transformers-cache", "kept")[0] == 0
    assert os.environ["HF_HUB_CACHE"] == "kept"
