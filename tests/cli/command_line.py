"""Running the command within the test's process, and models and recipes to run it on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lazymerge.cli.main import main

from conftest import write_checkpoint

LAYERS = 4
WIDTH = 16


@dataclass(frozen=True)
class Answer:
    """What a command did: its exit code and all it wrote to the two streams."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout as the one JSON document that --json promises."""
        return json.loads(self.out)

    def message(self) -> str:
        """The one message that a failure gives, without the program's name.

        Checked here for every failure: nothing on stdout, no traceback, one line.
        """
        assert self.out == ""
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("lazymerge: ")
        return lines[0].removeprefix("lazymerge: ")


Command = Callable[..., Answer]


def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> Answer:
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["lazymerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    shown = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return Answer(caught.value.code, shown.out, shown.err)


def llama_tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A Llama model of four thin layers."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": tensor(32, WIDTH)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = tensor(WIDTH, WIDTH)
        tensors[f"{prefix}.mlp.up_proj.weight"] = tensor(2 * WIDTH, WIDTH)
        tensors[f"{prefix}.mlp.down_proj.weight"] = tensor(WIDTH, 2 * WIDTH)
        tensors[f"{prefix}.input_layernorm.weight"] = tensor(WIDTH)
    tensors["model.norm.weight"] = tensor(WIDTH)
    tensors["lm_head.weight"] = tensor(32, WIDTH)
    return tensors


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}

TASK_ARITHMETIC: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [
        {"model": "one", "parameters": {"weight": 1.0}},
        {"model": "two", "parameters": {"weight": 0.3}},
    ],
}

TIES_WITH_GRADIENT_AND_FILTERS: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {
            "model": "one",
            "parameters": {
                "weight": [
                    {"filter": "self_attn", "value": [0.2, 0.8]},
                    {"filter": "mlp", "value": 0.4},
                    {"value": 0.5},
                ],
                "density": 0.5,
            },
        },
        {"model": "two", "parameters": {"weight": 1.0, "density": 0.25}},
    ],
    "parameters": {"normalize": False},
    "dtype": "float16",
}


def write_models(folder: Path) -> None:
    """The models base, one (in two shards) and two."""
    write_checkpoint(folder / "base", llama_tensors(0), CONFIG)
    (folder / "base" / "tokenizer.json").write_text("{}")
    write_checkpoint(folder / "one", llama_tensors(1), CONFIG, shards=2)
    write_checkpoint(folder / "two", llama_tensors(2), CONFIG)


def write_recipe(folder: Path, recipe: Mapping[str, Any], name: str = "recipe.yml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    return path


def files_under(folder: Path) -> dict[str, bytes]:
    """Every file's contents, and every folder (as no bytes), by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }
