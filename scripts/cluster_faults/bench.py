"""Models, recipes, and what runs without a cluster make of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from lazymerge.output.manifest import MANIFEST_NAME

from faults.harness import Ended, complaints
from make_synthetic_checkpoint import SHAPES, LlamaShape, make_checkpoint

from .certificates import make_certificates

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]

OUTPUT_NAME = "out"
"""Of all outputs: the model card has the folder's name."""

SHARD_SIZE = "70MB"

DEPENDS_ON_THE_MERGE = ("fingerprint", "tensors", "nonfinite", "models")
"""Of the manifest; the rest are facts of the run."""


@dataclass(frozen=True, slots=True)
class Merge:
    """A recipe, and what a run of it without a cluster has made.

    plugin: a file with its method; None: it needs none.
    """

    recipe: Path
    output: Path
    plugin: Path | None = None

    def differences(self, output: Path) -> list[str]:
        """What is not as it should be of an output, in sentences."""
        there, expected = _files(output), _files(self.output)
        found = [f"{name} is missing" for name in sorted(expected - there)]
        found += [f"{name} should not be there" for name in sorted(there - expected)]
        for name in sorted(there & expected):
            if _content(output / name) != _content(self.output / name):
                found.append(f"{name} differs")
        if (output / ".lazymerge").exists():
            found.append(".lazymerge is left")
        return found


class Bench:
    """What all trials have in common.

    folder: has room for all of it.
    """

    def __init__(self, folder: Path, shape: LlamaShape | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("DASK_")},
            **make_certificates(folder / "certificates"),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(HERE.parent)]),
        }
        self._shape = shape or SHAPES["llama-0.1b"]
        for number, name in enumerate(("base", "a", "b")):
            make_checkpoint(folder / name, self._shape, dtype="bfloat16", seed=number)
        self.merge = self._made("merge", {"merge_method": "ties"}, {"weight": 0.6, "density": 0.5})

    @cached_property
    def other_merge(self) -> Merge:
        """Of the same models, and as large: every byte range is another tensor's values."""
        return self._made("other", {"merge_method": "linear"}, {"weight": 0.3})

    @cached_property
    def merge_by_plugin(self) -> Merge:
        """With a method from a file of its own."""
        plugin = self.folder / "halves.py"
        plugin.write_text(PLUGIN)
        return self._made("plugin", {"merge_method": "halves"}, {}, plugin)

    def _made(
        self,
        name: str,
        head: dict[str, object],
        parameters: dict[str, float],
        plugin: Path | None = None,
    ) -> Merge:
        models = [
            {"model": str(self.folder / each), "parameters": parameters} for each in ("a", "b")
        ]
        recipe = self.folder / f"{name}.yml"
        document = {
            **head,
            "base_model": str(self.folder / "base"),
            "models": models,
            "dtype": "bfloat16",
        }
        if head["merge_method"] == "linear":
            del document["base_model"]
        recipe.write_text(yaml.safe_dump(document))
        merge = Merge(recipe, self.folder / name / OUTPUT_NAME, plugin)
        arguments = ["run", str(recipe), "-o", str(merge.output), "--max-shard-size", SHARD_SIZE]
        if plugin is not None:
            arguments += ["--plugin", str(plugin)]
        ended = self.lazymerge(*arguments)
        assert not complaints(ended, [0]), ended.err
        return merge

    def lazymerge(self, *arguments: str) -> Ended:
        """The command without a cluster, to its end."""
        done = subprocess.run(
            [sys.executable, "-m", "lazymerge", *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    def remove_models(self) -> None:
        """Frees the disk; logs stay."""
        for name in ("base", "a", "b", "merge", "other", "plugin"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


PLUGIN = """
from lazymerge.methods.own import BaseModel, elementwise


@elementwise("halves", "The mean.", formula="out = (x₁ + x₂) / 2", base=BaseModel.UNUSED)
def halves(inputs):
    first, second = inputs.models
    return (first + second) / 2
"""


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _content(path: Path) -> object:
    if path.name != MANIFEST_NAME:
        return path.read_bytes()
    manifest = json.loads(path.read_text())
    return {key: manifest.get(key) for key in DEPENDS_ON_THE_MERGE}
