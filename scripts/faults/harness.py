"""Real runs of a small merge, under faults, and what must be true afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import yaml

from make_synthetic_checkpoint import LlamaShape, make_checkpoint

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]

SHAPE = LlamaShape(hidden=32, intermediate=64, layers=2, heads=4, kv_heads=4, vocabulary=272)
"""21 tensors, 262 kB."""

SHARD_BYTES = 25_000
TIMEOUT_SECONDS = 60

USUAL_CALLS = {True: 68, False: 132}
"""Calls of an undisturbed run into one shard, or into several."""


@cache
def build_shim(folder: Path) -> Path | None:
    """The library that is preloaded, compiled; None where there is no compiler for it."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "shim.c")]
    done = subprocess.run([*command, "-ldl"], capture_output=True, text=True)
    return library if done.returncode == 0 else None


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that has ended. code: negative where a signal ended it."""

    code: int
    out: str
    err: str


class Bench:
    """Models, a recipe and what an undisturbed run makes of them.

    folder: has room for all of it. options: of every run.
    count_calls: find out how many there are; else a number that was right once is taken.
    is_one_shard: the output is one file; else several.
    """

    def __init__(
        self,
        folder: Path,
        method: str = "ties",
        options: Sequence[str] = (),
        *,
        count_calls: bool = True,
        is_one_shard: bool = False,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.output = folder / "out"
        self.recipe = folder / "recipe.yml"
        self._options = ["--max-shard-size", "1GB" if is_one_shard else str(SHARD_BYTES), *options]
        self._counts_calls = count_calls
        self._shim = build_shim(folder)
        for number, name in enumerate(("base", "a", "b")):
            make_checkpoint(folder / name, SHAPE, dtype="bfloat16", seed=number, tokenizer=True)
        parameters = {"weight": 0.6, "density": 0.5} if method == "ties" else {"weight": 0.5}
        self.recipe.write_text(
            yaml.safe_dump(
                {
                    "merge_method": method,
                    "base_model": str(folder / "base"),
                    "models": [
                        {"model": str(folder / name), "parameters": parameters}
                        for name in ("a", "b")
                    ],
                    "dtype": "bfloat16",
                }
            )
        )
        ended = self.run()
        assert ended.code == 0, ended.err
        self.expected = contents(self.output)
        self.calls = self._count_calls() if count_calls else USUAL_CALLS[is_one_shard]

    @cached_property
    def in_one_shard(self) -> Bench:
        """Another bench, whose output is one file."""
        return Bench(self.folder / "one-shard", count_calls=self._counts_calls, is_one_shard=True)

    @property
    def can_inject(self) -> bool:
        """Whether there is a compiler for the shim."""
        return self._shim is not None

    def lazymerge(self, *arguments: str, faults: Mapping[str, str] | None = None) -> Ended:
        """The command, to its end. faults: FAULTS_… variables, by what follows FAULTS_."""
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        if faults is not None:
            assert self._shim is not None
            environment["LD_PRELOAD"] = str(self._shim)
            environment |= {f"FAULTS_{key}": value for key, value in faults.items()}
        done = subprocess.run(
            [sys.executable, "-m", "lazymerge", *arguments],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    @property
    def command(self) -> list[str]:
        return [
            "run",
            str(self.recipe),
            "-o",
            str(self.output),
            "--workers",
            "2",
            *self._options,
        ]

    def run(self, *more: str, faults: Mapping[str, str] | None = None) -> Ended:
        """`lazymerge run` of the recipe into the output."""
        return self.lazymerge(*self.command, *more, faults=faults)

    def faults(self, **more: object) -> dict[str, str]:
        """Variables for faults in the output."""
        self._struck.unlink(missing_ok=True)
        return {
            "ROOT": str(self.output),
            "STRUCK": str(self._struck),
            **{key: str(value) for key, value in more.items()},
        }

    @property
    def _struck(self) -> Path:
        return self.folder / "struck"

    @property
    def was_struck(self) -> bool:
        """Whether the faults that were asked for last have struck."""
        return self._struck.exists()

    def _count_calls(self) -> int:
        """Calls of an undisturbed run into an empty folder that change its files."""
        if not self.can_inject:
            return 0
        self.clear()
        low, high = 1, 4096  # the first number that no call has
        while low < high:
            middle = (low + high) // 2
            self.clear()
            if self.run(faults=self.faults(KILL_AT=middle)).code == 0:
                high = middle
            else:
                low = middle + 1
        self.clear()
        return low - 1

    def clear(self) -> None:
        """Removes the output."""
        shutil.rmtree(self.output, ignore_errors=True)

    def problems(self, ended: Ended) -> list[str]:
        """What is wrong with an output that should be complete now."""
        if ended.code != 0:
            return [f"exit {ended.code}: {ended.err.strip()[-1000:]}"]
        found = contents(self.output)
        problems = [
            f"{name} differs" if name in self.expected else f"{name} should not be there"
            for name in found
            if found[name] != self.expected.get(name)
        ]
        return problems + [f"{name} is missing" for name in self.expected if name not in found]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output, by name; of the manifest, the part that depends on nothing but the
    merge."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = json.loads(files["lazymerge.json"]) if "lazymerge.json" in files else {}
    kept = {key: manifest.get(key) for key in ("fingerprint", "tensors", "nonfinite", "models")}
    files["lazymerge.json"] = json.dumps(kept).encode()
    return files


def complaints(ended: Ended, codes: Sequence[int]) -> list[str]:
    """What is wrong with how a run under a fault ended."""
    found = []
    if "Traceback" in ended.err:
        found.append(f"a traceback: {ended.err.strip()[-1500:]}")
    if ended.code not in codes:
        found.append(f"exit {ended.code}, not one of {list(codes)}: {ended.err.strip()[-500:]}")
    if ended.code > 0 and not ended.err.strip():
        found.append(f"exit {ended.code} and not a word")
    return found
