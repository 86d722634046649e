"""Block-quantised models with a device: what dequantises is left to the processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from device_cases import on_device, run_on_host, use_small_blocks
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan
from lazymerge.engine.resources import Resources

from conftest import write_checkpoint
from merging import bits, recipe_of, run

NAME = "model.layers.0.w.weight"


@pytest.fixture(params=["task_arithmetic", "ties", "slerp"])
def plan(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    use_small_blocks(monkeypatch)
    generator = torch.Generator().manual_seed(3)
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    for model in ("base", "a", "b"):
        weight = torch.randn(70, 48, generator=generator).to(torch.float8_e4m3fn)
        scale = torch.rand(5, 3, generator=generator) + 0.5
        tensors = {NAME: weight, f"{NAME}_scale_inv": scale}
        tensors["model.norm.weight"] = torch.randn(300, generator=generator)
        write_checkpoint(tmp_path / model, tensors, {"quantization_config": quantization})
    models = ["base", "a"] if request.param == "slerp" else ["a", "b"]
    document = {
        "merge_method": request.param,
        "base_model": "base",
        "models": [{"model": model} for model in models],
        "parameters": {
            "task_arithmetic": {"weight": 0.5},
            "ties": {"weight": 0.5, "density": 0.5},
            "slerp": {"t": 0.4},
        }[request.param],
    }
    return make_plan(recipe_of(tmp_path, document), Resources(4 << 30, workers=2))


def test_the_processor_computes_them(plan: Plan, tmp_path: Path) -> None:
    expected = run(plan, tmp_path / "cpu")
    actual = run_on_host(on_device(plan), tmp_path / "device")
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.allclose(tensor.float(), expected[name].float(), rtol=2**-8, atol=0), name
    if plan.recipe.merge_method != "slerp":
        assert bits(actual[NAME]) == bits(expected[NAME])
