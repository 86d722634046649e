#!/usr/bin/env python3
"""Check that the bytes of a merge depend on nothing but its recipe and its inputs.

    python scripts/check_determinism.py                 every method, all combinations: minutes
    python scripts/check_determinism.py --methods ties  one method
    python scripts/check_determinism.py --quick         every pair of settings in place of all

Every method merges the same checkpoints again and again, with

    workers      1, 2, 3, 5
    memory       400 MiB, 1 GiB, 4 GiB
    shards       of at most 1 MB, 5 GB
    read modes   pread, mmap
    order        of the tensors: as planned, reversed
    kernels      native; torch's with all workers and read modes, at 4 GiB

once with bfloat16 inputs and once with inputs of several dtypes. The bytes of every tensor, found
by its name, must be the same each time. Exit 1 if they are not.

A limit under which a merge is refused is doubled until it is not; the table counts how often
("raised"). A Markdown table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import yaml
from lazymerge.engine.execution import default_kernels
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.engine.stages import TensorTask, tensor_tasks
from lazymerge.errors import DoesNotFitError
from lazymerge.recipe import Recipe, parse_recipe
from lazymerge.sizes import parse_size
from xxhash import xxh3_128

from covering import covering_rows
from make_synthetic_checkpoint import LlamaShape, make_checkpoint, perturb_checkpoint, read_layout
from method_recipes import SETTINGS, model_counts, recipe_for

AXES: dict[str, tuple[Any, ...]] = {
    "workers": (1, 2, 3, 5),
    "memory": ("400MiB", "1GiB", "4GiB"),
    "max_shard": ("1MB", "5GB"),
    "read_mode": ("pread", "mmap"),
    "order": ("planned", "reversed"),
}

INPUTS: dict[str, tuple[str, ...]] = {
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
    "mixed": ("bfloat16", "float32", "float16"),
}
"""Torch dtypes of the base and the two other models, by the name of the set."""

SHAPE = LlamaShape(hidden=256, intermediate=1031, layers=2, heads=4, kv_heads=4, vocabulary=20500)
"""Embedding and head of two spans, the last block of each incomplete; matrices of two blocks, of
one, and norms."""

READ_BYTES = 1 << 20

LARGEST_LIMIT_BYTES = 8 << 30


@dataclass(frozen=True, slots=True)
class Setting:
    """What must make no difference."""

    workers: int
    memory: str
    max_shard: str
    read_mode: str
    order: str
    kernels: str

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


@dataclass(slots=True)
class Verdict:
    """What the runs of one merge have shown.

    raised: runs whose limit was too small, and doubled.
    differences: settings whose tensors differed from those of the first, with their names.
    failures: settings whose runs failed, with the reason.
    """

    runs: int = 0
    raised: int = 0
    seconds: float = 0.0
    differences: list[tuple[Setting, list[str]]] = field(default_factory=list)
    failures: list[tuple[Setting, str]] = field(default_factory=list)

    def __str__(self) -> str:
        found = []
        if self.differences:
            found.append(f"{len(self.differences)} differ")
        if self.failures:
            found.append(f"{len(self.failures)} failed")
        return f"**{', '.join(found)}**" if found else "equal"

    def problems(self) -> Iterator[str]:
        """What is wrong, a line for each run."""
        for setting, names in self.differences:
            yield f"{setting}: {len(names)} tensors differ, among them {names[0]}"
        for setting, reason in self.failures:
            yield f"{setting}: {reason}"


class ReversedPlan(Plan):
    """A plan whose output tensors are made from the last to the first."""

    @cached_property
    def tasks(self) -> tuple[TensorTask, ...]:
        return tuple(reversed(tensor_tasks(self.graph)))


def settings_to_try(
    axes: Mapping[str, Sequence[Any]] = AXES,
    kernels: Sequence[str] = ("native", "torch"),
    *,
    quick: bool = False,
) -> list[Setting]:
    """All settings that one merge is run with.

    quick: every pair of values is in some setting, and not every combination.
    """
    if quick:
        rows = covering_rows({**axes, "kernels": kernels}, Random(0))
        return [Setting(**row) for row in rows]
    first, *others = kernels
    tried = [
        Setting(**dict(zip(axes, values, strict=True)), kernels=first)
        for values in product(*axes.values())
    ]
    roomy = {name: values[-1] for name, values in axes.items()}
    for workers, read_mode, name in product(axes["workers"], axes["read_mode"], others):
        tried.append(Setting(**{**roomy, "workers": workers, "read_mode": read_mode}, kernels=name))
    return tried


def plan_with(recipe: Recipe, setting: Setting, limit_bytes: int) -> Plan:
    """The plan of a recipe under a setting.

    limit_bytes: in place of the setting's.

    Raises:
        DoesNotFitError: the limit is too small.
    """
    planned = make_plan(
        recipe,
        Resources(
            limit_bytes,
            setting.workers,
            setting.read_mode,  # type: ignore[arg-type]
            setting.kernels,  # type: ignore[arg-type]
        ),
        max_shard_bytes=parse_size(setting.max_shard),
    )
    if setting.order == "planned":
        return planned
    return ReversedPlan(**{entry.name: getattr(planned, entry.name) for entry in fields(planned)})


def in_child(work: Callable[[], object]) -> None:
    """Does something in a process forked for it: what it loads and holds goes with that process.

    Raises:
        DoesNotFitError: it did.
        RuntimeError: it failed; the child has said why.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            work()
            code = 0
        except DoesNotFitError:
            code = DoesNotFitError.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == DoesNotFitError.exit_code:
        raise DoesNotFitError("refused")
    if code:
        raise RuntimeError(f"a child ended with {code}")


def run_in_child(plan: Plan, output: Path) -> None:
    """Runs a plan in a process forked for it: a run refuses a limit that its process exceeds
    already, and this one would grow from run to run.

    Torch is loaded before forking and used only after it: it is in every child as if the child
    had loaded it, and loading it takes longer than these runs.

    Raises:
        DoesNotFitError, RuntimeError: as in_child.
    """
    if plan.memory.libraries == "torch":
        import torch  # noqa: F401
    in_child(lambda: run_plan(plan, output, fsync=False))


def run_raised(
    recipe: Recipe, setting: Setting, output: Path, run: Callable[[Plan, Path], object]
) -> bool:
    """Runs a merge under a setting, its limit doubled until it fits; tells whether it was."""
    limit_bytes = parse_size(setting.memory)
    is_raised = False
    while True:
        try:
            run(plan_with(recipe, setting, limit_bytes), output)
        except DoesNotFitError:
            if limit_bytes > LARGEST_LIMIT_BYTES:
                raise
            limit_bytes, is_raised = 2 * limit_bytes, True
        else:
            return is_raised


def tensor_digests(folder: Path) -> dict[str, str]:
    """A digest of dtype, shape and bytes of every tensor of a checkpoint, by name."""
    digests = {}
    for stored in read_layout(folder):
        digest = xxh3_128(f"{stored.tensor.dtype} {stored.tensor.shape} ".encode())
        with stored.file.open("rb") as stream:
            stream.seek(stored.start)
            left = stored.tensor.size_bytes
            while left:
                data = stream.read(min(left, READ_BYTES))
                if not data:
                    raise ValueError(f"{stored.file} ends within {stored.tensor.name}")
                digest.update(data)
                left -= len(data)
        digests[stored.tensor.name] = digest.hexdigest()
    return digests


def compare(
    recipe: Recipe,
    settings: Sequence[Setting],
    folder: Path,
    run: Callable[[Plan, Path], object] = run_in_child,
) -> Verdict:
    """Runs a merge with every setting and compares with the first.

    folder: where outputs go; they are deleted one by one.
    run: runs a plan into a folder.
    """
    verdict = Verdict()
    expected: dict[str, str] = {}
    began = time.perf_counter()
    for setting in settings:
        output = folder / "merged"
        verdict.runs += 1
        try:
            verdict.raised += run_raised(recipe, setting, output, run)
            found = tensor_digests(output)
        except RuntimeError as error:
            verdict.failures.append((setting, str(error)))
            continue
        finally:
            shutil.rmtree(output, ignore_errors=True)
        expected = expected or found
        if found != expected:
            names = sorted(
                name
                for name in found.keys() | expected.keys()
                if found.get(name) != expected.get(name)
            )
            verdict.differences.append((setting, names))
    verdict.seconds = time.perf_counter() - began
    return verdict


def recipes_of(
    method: str, folders: Sequence[Path], parameter_settings: Sequence[str]
) -> Iterator[Recipe]:
    """Recipes of a method that differ, one for each way of setting its parameters."""
    signature = signatures()[method]
    has_optional_base = signature.base.value == "optional"
    most = len(folders) - 1 if has_optional_base else len(folders)
    count = max(model_counts(signature, most))
    seen: set[str] = set()
    for parameter_setting in parameter_settings:
        document = recipe_for(
            signature, folders, count, setting=parameter_setting, random=Random(1)
        )
        text = yaml.safe_dump(document, sort_keys=False)
        if text not in seen:
            seen.add(text)
            yield parse_recipe(text, f"{method}.yml", signatures())


def make_inputs(folder: Path, names: Sequence[str], shape: LlamaShape) -> dict[str, list[Path]]:
    """The checkpoints of each set: a base of normal deviates, and two perturbations of it.

    They are made with torch: in a child, for what this process occupies counts against limits.
    """
    roles = ("base", "a", "b")
    inputs = {name: [folder / f"{name}-{role}" for role in roles] for name in names}

    def make() -> None:
        for name, folders in inputs.items():
            base_dtype, *dtypes = INPUTS[name]
            make_checkpoint(folders[0], shape, dtype=base_dtype, seed=0)
            for seed, (path, dtype) in enumerate(zip(folders[1:], dtypes, strict=True), 1):
                perturb_checkpoint(path, folders[0], dtype=dtype, scale=0.01, seed=seed)

    in_child(make)
    return inputs


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    known = list(signatures())
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["numbers"])
    parser.add_argument("--quick", action="store_true", help="every pair of settings, not all")
    parser.add_argument("--vocabulary", type=int, default=SHAPE.vocabulary, metavar="ROWS")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to put files")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; returns its exit code."""
    parsed = _arguments(arguments)
    shape = LlamaShape(**{**asdict(SHAPE), "vocabulary": parsed.vocabulary})
    kernels = list(dict.fromkeys([default_kernels(), "torch"]))
    settings = settings_to_try(kernels=kernels, quick=parsed.quick)
    if parsed.work is not None:
        parsed.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is deleted
    rows = []
    failures = []
    with tempfile.TemporaryDirectory(prefix="check-determinism-", dir=parsed.work) as name:
        folder = Path(name)
        inputs = make_inputs(folder, parsed.inputs, shape)
        for method, kind in product(parsed.methods, parsed.inputs):
            for recipe in recipes_of(method, inputs[kind], parsed.settings):
                verdict = compare(recipe, settings, folder)
                rows.append(
                    f"| {method} | {kind} | {verdict.runs} | {verdict.raised} | "
                    f"{verdict.seconds:.1f} | {verdict} |"
                )
                print(rows[-1], file=sys.stderr)
                found = list(verdict.problems())
                if found:
                    failures += [f"{method}, {kind} inputs", *found, recipe.text]
    print(f"Every tensor's bytes, with {', '.join(kernels)} kernels, {os.cpu_count()} cores:\n")
    print("| method | inputs | runs | raised | seconds | tensors |\n|---|---|---|---|---|---|")
    print("\n".join(rows))
    if failures:
        print("\n" + "\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
