"""What several tests of clusters share: a small merge, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from conftest import write_checkpoint


def write_models(root: Path) -> None:
    """Folders base, a and b with 19 tensors each, some of one row."""
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"model.layers.{layer}.{part}.weight": torch.randn(
                rows, 64, generator=generator
            ).bfloat16()
            for layer in range(6)
            for part, rows in (("mlp.up_proj", 300), ("norm", 1), ("mlp.down_proj", 77))
        }
        tensors["lm_head.weight"] = torch.randn(3000, 64, generator=generator).bfloat16()
        write_checkpoint(root / name, tensors, {"model_type": "llama"})


def write_recipe(path: Path, root: object, method: str = "ties", **more: Any) -> Path:
    """A recipe of the models that lie in a folder or at an address."""
    document = {
        "merge_method": method,
        "base_model": f"{root}/base",
        "models": [{"model": f"{root}/{name}"} for name in ("a", "b")],
        "parameters": {"weight": 0.6, **({"density": 0.5} if "ties" in method else {})},
        **more,
    }
    path.write_text(yaml.safe_dump(document))
    return path


def weights(folder: Path) -> Mapping[str, bytes]:
    """The output's files of tensors, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
