"""Small checkpoints of several dtypes, with changes of several kinds.

A set is a base and five models that were made from it:

    first … fourth   every tensor changed, by little or by much
    fourth           besides, embeddings equal to those of the third
    fifth            norms and head as in the base, every third row of its matrices too
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from make_synthetic_checkpoint import LlamaShape, make_checkpoint, perturb_checkpoint

SHAPE = LlamaShape(hidden=96, intermediate=224, layers=3, heads=4, kv_heads=2, vocabulary=331)

ROLES = ("base", "first", "second", "third", "fourth", "fifth")

SCALES = (0.002, 0.004, 0.01, 0.02, 0.0005)
"""Standard deviations of the changes; the base's is 0.02."""

SETS: dict[str, tuple[str, ...]] = {
    "float32": ("float32",) * 6,
    "bfloat16": ("bfloat16",) * 6,
    "float16": ("float16",) * 6,
    "mixed": ("bfloat16", "float32", "float16", "float32", "float32", "bfloat16"),
}
"""Torch dtypes by the name of the set, in the order of ROLES."""


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


@cache
def load_exactly(folder: Path) -> Mapping[str, NDArray[np.float64]]:
    """Every tensor of an input in float64; kept, since the inputs are used again and again."""
    return {name: tensor.to(torch.float64).numpy() for name, tensor in load_tensors(folder).items()}


def make_inputs(
    folder: Path, seed: int, sets: Sequence[str] = tuple(SETS)
) -> dict[str, list[Path]]:
    """The checkpoints of each set, the base first."""
    inputs: dict[str, list[Path]] = {}
    for number, name in enumerate(sets):
        paths = [folder / f"{name}-{role}" for role in ROLES]
        base, *models = paths
        base_dtype, *dtypes = SETS[name]
        first_seed = (seed * len(SETS) + number) * len(ROLES)
        make_checkpoint(base, SHAPE, dtype=base_dtype, seed=first_seed, overwrite=True)
        for place, (path, dtype, scale) in enumerate(zip(models, dtypes, SCALES, strict=True), 1):
            perturb_checkpoint(
                path, base, dtype=dtype, scale=scale, seed=first_seed + place, overwrite=True
            )
        _share_embeddings(models[2], models[3])
        _take_back(base, models[4])
        inputs[name] = paths
    return inputs


def _share_embeddings(source: Path, target: Path) -> None:
    tensors = load_tensors(target)
    name = "model.embed_tokens.weight"
    tensors[name] = load_tensors(source)[name].to(tensors[name].dtype)
    save_file(tensors, target / "model.safetensors")


def _take_back(base: Path, target: Path) -> None:
    tensors = load_tensors(target)
    for name, original in load_tensors(base).items():
        tensor = tensors[name]
        if tensor.ndim == 1 or name == "lm_head.weight":
            tensors[name] = original.to(tensor.dtype)
        else:
            tensor[::3] = original[::3].to(tensor.dtype)
    save_file(tensors, target / "model.safetensors")
