"""Plans that pages and their parts are tested with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan
from lazymerge.engine.resources import Resources

from conftest import write_checkpoint
from merging import recipe_of

LAYERS = 5

RECIPE: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {
            "model": "one",
            "parameters": {
                "weight": [
                    {"filter": "self_attn", "value": [0.0, 1.0]},
                    {"filter": "mlp", "value": 0.25},
                    {"value": 0.5},
                ],
                "density": 0.5,
            },
        },
        {"model": "two", "parameters": {"weight": 0.75, "density": 0.25}},
    ],
    "dtype": "bfloat16",
}


def tensors(layers: int = LAYERS, experts: int = 3) -> dict[str, torch.Tensor]:
    """A small mixture of experts, all of ones."""
    made = {"model.embed_tokens.weight": torch.ones(12, 8), "lm_head.weight": torch.ones(12, 8)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        made[f"{prefix}.self_attn.q_proj.weight"] = torch.ones(8, 8)
        made[f"{prefix}.input_layernorm.weight"] = torch.ones(8)
        for expert in range(experts):
            made[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = torch.ones(16, 8)
    return {name: tensor.to(torch.bfloat16) for name, tensor in made.items()}


def small_plan(folder: Path, recipe: dict[str, Any] = RECIPE, **resources: Any) -> Plan:
    """The plan of a recipe over models of equal tensors."""
    for entry in [recipe["base_model"], *(model["model"] for model in recipe["models"])]:
        write_checkpoint(folder / entry, tensors(), shards=2)
    limits = Resources(4 << 30, workers=2, **resources)
    return make_plan(recipe_of(folder, recipe), limits, max_shard_bytes=2000)
