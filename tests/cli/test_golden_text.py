"""What people see, to the letter, at two widths of the terminal.

LAZYMERGE_UPDATE_GOLDEN=1 pytest tests/cli/test_golden_text.py writes the files in golden/ anew;
read their difference before committing it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import (
    CONFIG,
    LAYERS,
    TASK_ARITHMETIC,
    TIES_WITH_GRADIENT_AND_FILTERS,
    WIDTH,
    Command,
    llama_tensors,
    write_recipe,
)
from lazymerge.cli import plan_time
from lazymerge.engine import memory as engine_memory
from lazymerge.engine.native import library
from lazymerge.inspection import measurement, memory_parts
from lazymerge.inspection.measurement import Measured, MeasuredKind

from conftest import write_checkpoint

pytest_plugins = ["command_fixtures"]

GOLDEN = Path(__file__).parent / "golden"
UPDATE_VARIABLE = "LAZYMERGE_UPDATE_GOLDEN"
FREE_BYTES = 123_456_789_012

PLAN = ["--dry-run", "--workers", "2", "--memory", "1GiB"]

COMMANDS = {
    "plan_uniform": ["plan", "uniform.yml", *PLAN],
    "plan_layers": ["plan", "layers.yml", *PLAN, "--layers"],
    "plan_crowded": ["plan", "crowded.yml", *PLAN],
    "plan_crowded_all": ["plan", "crowded.yml", *PLAN, "--models", "--notices"],
    "plan_tensor": ["plan", "layers.yml", *PLAN, "--tensor", "q_proj", "--most", "1"],
    "plan_ops": ["plan", "layers.yml", *PLAN, "--ops"],
    "plan_memory": ["plan", "layers.yml", *PLAN, "--why", "memory"],
    "plan_diff": ["plan", "uniform.yml", *PLAN, "--diff", "layers.yml"],
    "methods": ["methods"],
    "methods_ties": ["methods", "ties"],
    "inspect": ["inspect", "one"],
    "inspect_scan": ["inspect", "broken", "--scan"],
}

LONG_NAMES = [f"a_fine_tune_with_a_very_long_name_number_{number}" for number in (3, 4, 5)]

CROWDED: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [
        {"model": name, "parameters": {"weight": 0.1}}
        for name in (
            "one",
            "two",
            *(f"a_fine_tune_with_a_very_long_name_number_{n}" for n in "345"),
        )
    ],
}

RESERVED_BYTES = 60 << 20

MEASURED = Measured(
    kinds=(MeasuredKind("model.layers.0.mlp.up_proj.weight", 31, 50_000, 10_000.0),),
    workers=2,
    cached_share=0.25,
    reading_rate=5_000.0,
    reading_basis="libtorch_cpu.so",
    writing_rate=5_000.0,
    writing_basis="read",
    seconds=0.5,
)
"""Of a very slow machine: no golden text depends on the one that runs it."""


@pytest.fixture
def machine(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder on a machine that is always the same."""
    write_recipe(place, TASK_ARITHMETIC, "uniform.yml")
    write_recipe(place, TIES_WITH_GRADIENT_AND_FILTERS, "layers.yml")
    write_recipe(place, CROWDED, "crowded.yml")
    for number, name in enumerate(LONG_NAMES):
        config = {**CONFIG, "rope_theta": 10_000.0 * number, "rms_norm_eps": 1e-5 / (number + 1)}
        write_checkpoint(place / name, llama_tensors(number), config)
    broken_model(place / "broken")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=FREE_BYTES))
    for module in (engine_memory, memory_parts):
        monkeypatch.setattr(module, "reserved_bytes", lambda _: RESERVED_BYTES)
    monkeypatch.setattr(measurement, "measure", lambda *_, **__: MEASURED)
    monkeypatch.setattr(plan_time, "SMALL_BYTES", 1)
    return place


def broken_model(folder: Path) -> None:
    """A mixture of experts with all that inspect looks for."""
    tensors = llama_tensors(5)
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = torch.full((4, WIDTH), 0.25 + layer)
        for expert in range(4):
            name = f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
            tensors[name] = tensors[f"model.layers.{layer}.mlp.up_proj.weight"] * (expert + 1)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 3] = torch.nan
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(WIDTH)
    del tensors["model.layers.3.mlp.experts.2.up_proj.weight"]
    config = {
        **CONFIG,
        "num_hidden_layers": 6,
        "vocab_size": 32,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }
    write_checkpoint(folder, tensors, config, shards=3)


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("name", COMMANDS)
def test_text(
    lazymerge: Command, machine: Path, monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> None:
    if name in NATIVE and not library.is_available():
        pytest.skip("the native kernels are not built: buffers are others")
    monkeypatch.setenv("COLUMNS", str(width))
    answer = lazymerge(*COMMANDS[name])
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(line.rstrip() for line in lines) + "\n"
    # the model's folder differs from run to run, and may be folded over several lines
    text = re.sub(r"^folder( +)\S+\n(?: {8,}\S+\n)*", r"folder\1FOLDER\n", text, flags=re.MULTILINE)
    # what is reserved depends on the kernels that are built
    if name not in NATIVE:
        text = re.sub(r"^(memory +)\S+ MiB peak", r"\1NNN MiB peak", text, flags=re.MULTILINE)
        text = re.sub(r"^(memory +)[\d.]+ MiB.*$", r"\1NNN MiB", text, flags=re.MULTILINE)
    text = re.sub(r"read in .+ \(.+/s\):", "read in N s (N MB/s):", text)
    file = GOLDEN / f"{name}_{width}.txt"
    if os.environ.get(UPDATE_VARIABLE):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


NATIVE = frozenset({"plan_memory"})


@pytest.mark.parametrize("name", ["plan_uniform", "plan_crowded"])
def test_the_first_screen_fits(name: str) -> None:
    for width in (80, 140):
        text = (GOLDEN / f"{name}_{width}.txt").read_text(encoding="utf-8")
        assert text.count("\n") < 24  # and the shell's prompt


def test_no_golden_file_is_left_over() -> None:
    expected = {f"{name}_{width}.txt" for name in COMMANDS for width in (80, 140)}
    assert {file.name for file in GOLDEN.iterdir()} == expected
