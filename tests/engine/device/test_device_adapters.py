"""Adapters where an accelerator computes: what they have part in is left to the processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from device_cases import on_device, run_on_host
from lazymerge.engine.stages import DeviceLayout, stage_layout

from conftest import write_adapter
from merging import bits, plan_of, run


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_left_to_the_processor(use_dora: bool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    name, other = "model.layers.0.up_proj.weight", "model.layers.0.down_proj.weight"
    shapes = {name: (70, 50), other: (50, 70)}
    models = {
        model: {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        for model in ("base", "a")
    }
    factors = {
        "model.layers.0.up_proj.lora_A.weight": torch.randn(3, 50, generator=generator),
        "model.layers.0.up_proj.lora_B.weight": torch.randn(70, 3, generator=generator),
    }
    if use_dora:
        factors["model.layers.0.up_proj.lora_magnitude_vector"] = torch.ones(70)
    adapter = write_adapter(tmp_path / "adapter", factors, r=3, use_dora=use_dora)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": f"a+{adapter}"}],
        "parameters": {"weight": 0.6},
    }
    plan = plan_of(tmp_path, recipe, models)
    planned = on_device(plan)
    layouts = {
        write.name: stage_layout(planned.graph, write, planned.execution)
        for write in planned.graph.writes
    }
    assert not isinstance(layouts[name], DeviceLayout)
    assert isinstance(layouts[other], DeviceLayout)
    expected, actual = run(plan, tmp_path / "cpu"), run_on_host(planned, tmp_path / "device")
    assert {n: bits(t) for n, t in actual.items()} == {n: bits(t) for n, t in expected.items()}
