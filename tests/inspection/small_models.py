"""Models of four thin layers, and plans of recipes that merge them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import plan_recipe_file
from lazymerge.engine.resources import Resources
from lazymerge.inspection.suspicions import Suspicion, suspicions

from conftest import write_checkpoint

LAYERS = 4
WIDTH = 8
ROWS = 16

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "vocab_size": ROWS,
    "tie_word_embeddings": False,
}


def model_tensors(
    seed: int = 0, dtype: torch.dtype = torch.bfloat16, layers: int = LAYERS
) -> dict[str, torch.Tensor]:
    """The tensors of a small Llama."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    tensors = {"model.embed_tokens.weight": tensor(ROWS, WIDTH)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = tensor(WIDTH, WIDTH)
        tensors[f"{prefix}.mlp.up_proj.weight"] = tensor(2 * WIDTH, WIDTH)
        tensors[f"{prefix}.mlp.down_proj.weight"] = tensor(WIDTH, 2 * WIDTH)
        tensors[f"{prefix}.input_layernorm.weight"] = tensor(WIDTH)
    tensors["model.norm.weight"] = tensor(WIDTH)
    tensors["lm_head.weight"] = tensor(ROWS, WIDTH)
    return tensors


def write_model(
    folder: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    config: Mapping[str, Any] | None = CONFIG,
    **changed: Any,
) -> Path:
    """A small model. changed: keys of its config that are others; None: they are left out."""
    if config is not None:
        config = {k: v for k, v in {**config, **changed}.items() if v is not None}
    return write_checkpoint(folder, model_tensors(seed, dtype), config)


def write_tokenizer(
    folder: Path,
    tokens: list[str],
    added: Mapping[str, int] | None = None,
    **settings: Any,
) -> None:
    """tokenizer.json of a BPE model, and tokenizer_config.json."""
    document = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": token, "special": True}
            for token, number in (added or {}).items()
        ],
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [],
        },
    }
    text = json.dumps(document, ensure_ascii=bool(len(tokens) % 2))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def plan_of(recipe: Mapping[str, Any], folder: Path) -> Plan:
    """The plan of a recipe whose models are in a folder."""

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: place(each) if key in ("model", "base_model") else placed(each)
                for key, each in value.items()
            }
        return [placed(each) for each in value] if isinstance(value, list) else value

    def place(reference: str) -> str:
        return "+".join(str(folder / part) for part in reference.split("+"))

    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(placed(dict(recipe)), sort_keys=False))
    return plan_recipe_file(path, Resources(limit_bytes=1 << 30))


def found(recipe: Mapping[str, Any], folder: Path) -> dict[str, Suspicion]:
    """What is found of a recipe, by kind; folders are left out of the messages."""
    every = suspicions(plan_of(recipe, folder))
    return {
        each.kind: Suspicion(each.kind, each.message.replace(f"{folder}/", ""), each.severity)
        for each in every
    }


def merge(
    method: str,
    *models: Any,
    base: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """A recipe. models: references, or pairs of reference and parameters."""
    entries = [
        {"model": each}
        if isinstance(each, str)
        else {"model": each[0], "parameters": dict(each[1])}
        for each in models
    ]
    return {
        "merge_method": method,
        **({} if base is None else {"base_model": base}),
        "models": entries,
        **({} if parameters is None else {"parameters": dict(parameters)}),
        **more,
    }
