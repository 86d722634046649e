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
from .client import GROUP_VARIABLE
from .hooks import PACE_VARIABLE

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]

OUTPUT_NAME = "out"
"""Of all outputs: the model card has the folder's name."""

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


@dataclass(frozen=True, slots=True)
class Size:
    """Of the models, and of the pieces in which they are merged.

    shard_bytes: of the output's files. group_bytes: read and written; what a worker is given.
    worker_bytes_per_s: written by each; workers are slowed down to that.
    """

    shape: LlamaShape
    shard_bytes: int
    group_bytes: int
    worker_bytes_per_s: int


USUAL = Size(SHAPES["llama-0.1b"], 70_000_000, 16 << 20, 20_000_000)
"""268 MB in 111 tensors, 5 shards and some 40 groups. Takes three workers 4.5 s."""

SMALL = Size(LlamaShape(256, 512, 6, 4, 4, 4096), 3_000_000, 1 << 20, 2_000_000)
"""12 MB in 57 tensors. Takes three workers 2 s."""


class Bench:
    """What all trials have in common.

    folder: has room for all of it.
    """

    def __init__(self, folder: Path, size: Size = USUAL) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.size = size
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("DASK_")},
            **make_certificates(folder / "certificates"),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(HERE.parent)]),
            GROUP_VARIABLE: str(size.group_bytes),
            PACE_VARIABLE: str(size.worker_bytes_per_s),
        }
        for number, name in enumerate(("base", "a", "b")):
            make_checkpoint(folder / name, size.shape, dtype="bfloat16", seed=number)
        self.merge = self._made("merge", {"merge_method": "ties"}, {"weight": 0.6, "density": 0.5})

    @property
    def options(self) -> list[str]:
        """Of every run."""
        return ["--max-shard-size", str(self.size.shard_bytes)]

    @cached_property
    def tensors(self) -> int:
        """How many a merge has."""
        return len(json.loads((self.merge.output / MANIFEST_NAME).read_text())["tensors"])

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
        arguments = ["run", str(recipe), "-o", str(merge.output), *self.options]
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
