"""Recipes and models for whole runs: tensors of several blocks, every kind of method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lazymerge.engine.blocks import BLOCK_ELEMENTS

from conftest import write_checkpoint

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in (("base", 0.5), ("a", 0.3), ("b", 0.2))
        ],
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.7}},
            {"model": "b", "parameters": {"weight": [0.1, 0.6]}},
        ],
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "a"}],
        "parameters": {"t": 0.4},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.3}},
            {"model": "b", "parameters": {"weight": 0.5, "density": 0.7}},
        ],
    },
}

SHAPES = {
    "model.embed_tokens.weight": (1100, 1280),  # six blocks, and enough for ties to sample
    "model.layers.0.w.weight": (2, BLOCK_ELEMENTS),
    "model.layers.1.w.weight": (3, 100_001),
    "model.norm.weight": (97,),
}


def write_models(folder: Path) -> None:
    """base (bfloat16), a (float32) and b (bfloat16), each with a config and a tokenizer file."""
    generator = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for name, dtype in (("base", torch.bfloat16), ("a", torch.float32), ("b", torch.bfloat16)):
        tensors = {
            key: (value + 0.1 * torch.randn(value.shape, generator=generator)).to(dtype)
            for key, value in base.items()
        }
        tensors["steps"] = torch.arange(5)
        write_checkpoint(folder / name, tensors, {"model_type": "llama"})
        (folder / name / "tokenizer.json").write_text("{}")
