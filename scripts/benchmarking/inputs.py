"""Checkpoints and recipes to merge, and what the page cache holds of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml
from lazymerge.methods import METHODS

from benchmarking.processes import (
    SCRIPTS,
    BenchError,
    delete,
    lazymerge_environment,
    run_plain,
)
from method_recipes import recipe_for

SIZES: dict[str, tuple[str, ...]] = {
    "1m": ("128", "352", "4", "4", "4", "1000"),
    "4m": ("256", "704", "4", "4", "4", "2000"),
    "16m": ("512", "1408", "4", "8", "8", "4000"),
    "0.1b": ("llama-0.1b",),
    "1.1b": ("tinyllama-1.1b",),
    "3b": ("llama-3b",),
    "7b": ("llama2-7b",),
    "13b": ("llama2-13b",),
}
"""Shape by the name of the size: one of make_synthetic_checkpoint.py, or its six numbers."""

DIMENSIONS = ("hidden", "intermediate", "layers", "heads", "kv-heads", "vocabulary")

ROLES = ("base", "a", "b")

DROP_CACHES = Path("/proc/sys/vm/drop_caches")

DENSITY = 0.5
"""Fraction of elements that sparse methods keep: lazymerge's default of 1 would skip selection."""


def shape_options(size: str) -> list[str]:
    """The options of make_synthetic_checkpoint.py that say how large a checkpoint is."""
    shape = SIZES[size]
    if len(shape) == 1:
        return ["--shape", *shape]
    return [f"--{name}={number}" for name, number in zip(DIMENSIONS, shape, strict=True)]


def make_checkpoint(folder: Path, size: str, role: str, seed: int) -> Path | None:
    """The bfloat16 checkpoint of a role; returns its path if it had to be made.

    Any role but "base" is a perturbation of the base, which must exist.
    """
    path = folder / f"{size}-{role}"
    if (path / "config.json").exists():  # written last: the checkpoint is complete
        return None
    if role == "base":
        content = ["--random", *shape_options(size), "--dtype", "bfloat16", "--tokenizer"]
    else:
        content = ["--perturb-of", str(folder / f"{size}-base"), "--scale", "0.002"]
    script = str(SCRIPTS / "make_synthetic_checkpoint.py")
    try:
        run_plain([sys.executable, script, str(path), *content, "--seed", str(seed)], capture=True)
    except BaseException:
        delete([path])
        raise
    return path


def make_checkpoints(
    folder: Path, size: str, roles: Sequence[str] = ROLES
) -> tuple[dict[str, Path], list[Path]]:
    """Checkpoints by role, the base first, and those that had to be made."""
    made: list[Path] = []
    try:
        for seed, role in enumerate(roles, start=1):
            path = make_checkpoint(folder, size, role, seed)
            if path is not None:
                made.append(path)
    except BaseException:
        delete(made)
        raise
    return {role: folder / f"{size}-{role}" for role in roles}, made


def recipe_document(method: str, checkpoints: Sequence[Path]) -> dict[str, Any]:
    """A recipe of the method for as many of the checkpoints as it takes.

    The first is the base of methods that need one. Weights are uneven, so that no program can save
    a multiplication. Raises BenchError when there are too few checkpoints or when the method has a
    required parameter that cannot be made up.
    """
    signature = METHODS[method].signature
    most = len(checkpoints)
    try:
        document = recipe_for(
            signature,
            checkpoints,
            most if signature.max_models is None else min(most, signature.max_models),
            setting="defaults",
            random=Random(1),
        )
    except ValueError as error:
        raise BenchError(f"{method}: {error}") from error
    if most < signature.min_models:
        raise BenchError(f"{method} needs {signature.min_models} checkpoints")
    if "density" in signature.by_name:
        for model in document["models"]:
            model["parameters"]["density"] = DENSITY
    return {**document, "dtype": "bfloat16"}


def recipe_inputs(document: Mapping[str, Any]) -> list[Path]:
    """The checkpoints that a recipe names, each once, the base first."""
    named = [document["base_model"]] if "base_model" in document else []
    named += [entry["model"] for entry in document["models"]]
    return [Path(name) for name in dict.fromkeys(named)]


def write_recipe(path: Path, document: Mapping[str, Any]) -> None:
    """The recipe as YAML."""
    path.write_text(yaml.safe_dump(dict(document), sort_keys=False), encoding="utf-8")


def tensor_files(folders: Sequence[Path]) -> list[Path]:
    """The safetensors files of checkpoints, in order."""
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def tensor_bytes(*folders: Path) -> int:
    """Bytes of the safetensors files of checkpoints."""
    return sum(file.stat().st_size for file in tensor_files(folders))


def warm_page_cache(folders: Sequence[Path]) -> None:
    """Write back what earlier runs left dirty, and read the inputs once."""
    os.sync()
    buffer = bytearray(1 << 20)
    for file in tensor_files(folders):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def cool_page_cache(folders: Sequence[Path], drop_all: bool) -> None:
    """Put the inputs out of the page cache.

    drop_all: drop the whole cache, as root can; then read back what programs need to start, so
        that only the inputs are cold. Otherwise the system is asked to forget the inputs alone,
        which it does for pages that nothing else uses.
    """
    os.sync()
    if drop_all:
        DROP_CACHES.write_text("3\n", encoding="utf-8")
        command = [sys.executable, "-c", "import torch, lazymerge.cli.main, lazymerge.engine.run"]
        run_plain(command, lazymerge_environment(), capture=True)
    for file in tensor_files(folders):
        with file.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def caches_can_be_dropped() -> bool:
    """Whether this user may drop the page cache of the whole system."""
    return os.access(DROP_CACHES, os.W_OK)
