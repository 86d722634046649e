"""Models and recipes of every kind of plan: one pass, two, a copy, gradients and filters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conftest import write_checkpoint

LAYERS = 4
WIDTH = 16

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}

LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [
        {"model": "one", "parameters": {"weight": 0.5}},
        {"model": "two", "parameters": {"weight": 0.5}},
    ],
}

TASK_ARITHMETIC: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [
        {"model": "one", "parameters": {"weight": 1.0}},
        {"model": "two", "parameters": {"weight": 0.3}},
    ],
}

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "one", "parameters": {"weight": [0.2, 0.8], "density": 0.5}},
        {
            "model": "two",
            "parameters": {
                "weight": [{"filter": "mlp", "value": 0.4}, {"value": 0.5}],
                "density": 0.25,
            },
        },
    ],
}

RECIPES: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "task_arithmetic": TASK_ARITHMETIC,
    "ties": TIES,
    "slerp": {
        "merge_method": "slerp",
        "base_model": "base",
        "models": [{"model": "base"}, {"model": "one"}],
        "parameters": {"t": 0.4},
    },
    "della": {
        **TIES,
        "merge_method": "della",
        "models": [{"model": "one", "parameters": {"weight": 0.5, "density": 0.5}}],
    },
    "passthrough": {"merge_method": "passthrough", "models": [{"model": "one"}]},
}


def llama_tensors(seed: int, rows: int = 32) -> dict[str, torch.Tensor]:
    """A Llama model of four thin layers. rows: of its embeddings."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": tensor(rows, WIDTH)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = tensor(WIDTH, WIDTH)
        tensors[f"{prefix}.mlp.up_proj.weight"] = tensor(2 * WIDTH, WIDTH)
        tensors[f"{prefix}.mlp.down_proj.weight"] = tensor(WIDTH, 2 * WIDTH)
        tensors[f"{prefix}.input_layernorm.weight"] = tensor(WIDTH)
    tensors["model.norm.weight"] = tensor(WIDTH)
    tensors["lm_head.weight"] = tensor(rows, WIDTH)
    return tensors


def write_models(folder: Path, rows: int = 32) -> None:
    """The models base, one and two."""
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(folder / name, llama_tensors(seed, rows), CONFIG)
