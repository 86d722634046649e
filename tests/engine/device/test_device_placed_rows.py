"""Rows of what a merge computes, where an accelerator computes: they are left to the processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from device_cases import on_device, run_on_host, use_small_blocks
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.resources import Resources
from lazymerge.engine.stages import DeviceLayout, stage_layout
from lazymerge.recipe import parse_recipe

from conftest import write_checkpoint
from merging import bits, run

EMBEDDING, OTHER = "model.embed_tokens.weight", "model.layers.0.up_proj.weight"
ROWS, WIDTH = 30, 7
"""Blocks end within rows."""


def write_model(folder: Path, first: int) -> str:
    """A model whose tokens are those of 60 from a number on, counted downwards."""
    generator = torch.Generator().manual_seed(first)
    shapes = {EMBEDDING: (ROWS, WIDTH), OTHER: (50, 70)}
    tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    write_checkpoint(folder, tensors, {"model_type": "llama", "vocab_size": ROWS})
    numbers = {f"t{first + ROWS - 1 - row}": row for row in range(ROWS)}
    model = {"type": "WordLevel", "vocab": numbers, "unk_token": f"t{first}"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    return str(folder)


def plan_of(folder: Path, method: str) -> Plan:
    a, b, c = (write_model(folder / name, first) for name, first in (("a", 0), ("b", 9), ("c", 20)))
    inner: dict[str, Any] = {
        "name": "inner",
        "merge_method": method,
        "base_model": a,
        "models": [{"model": b}],
        "parameters": {"weight": 0.6, **({"density": 0.5} if method == "ties" else {})},
        "tokenizer_source": "union",
    }
    last = {
        "merge_method": "slerp",
        "base_model": c,
        "models": [{"model": "inner"}],
        "parameters": {"t": 0.4},
        "tokenizer_source": "union",
    }
    text = yaml.safe_dump_all([inner, last], sort_keys=False)
    return make_plan(parse_recipe(text, "recipe.yml", signatures()), Resources(4 << 30, workers=2))


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_held_rows_are_left_to_the_processor(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, method)
    whole = run(plan, tmp_path / "whole")
    use_small_blocks(monkeypatch)
    planned = on_device(plan)
    layouts = {
        write.name: stage_layout(planned.graph, write, planned.execution)
        for write in planned.graph.writes
    }
    assert isinstance(layouts[EMBEDDING], DeviceLayout) == (method == "task_arithmetic")
    assert isinstance(layouts[OTHER], DeviceLayout)
    expected, actual = run(plan, tmp_path / "cpu"), run_on_host(planned, tmp_path / "device")
    assert actual[EMBEDDING].shape == (50, WIDTH)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(whole[name], tensor, atol=1e-6, rtol=1e-6)
    if method == "ties":
        assert bits(actual[EMBEDDING]) == bits(expected[EMBEDDING])
