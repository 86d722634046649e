#!/usr/bin/env python3
"""Check what `lazymerge` says about its memory against what its processes take.

    python scripts/check_memory.py                         every method, in about ten minutes
    python scripts/check_memory.py --methods ties slerp --dtypes BF16 --workers 1 2
    python scripts/check_memory.py --seed 7 --only 12      one case again, its folder kept
    python scripts/check_memory.py --large                 a tensor of 262144 x 8192 in 512 MiB

Every case is a `lazymerge run` in a process of its own, on checkpoints with tensors of several
spans. What it says beforehand (projected_bytes) is compared with what it took: the larger of what
it reports (measured_bytes) and what the kernel tells its parent. A case fails when

- the projection is below the measurement, or above the limit;
- the projection exceeds the measurement by more than 10% of it and more than 32 MiB;
- the limit that a refusal names as the smallest does not work, or one of 1 MiB less does.

Methods, numbers of models, dtypes, limits, workers, ways of reading, kernels, contents and
settings of parameters are combined such that every pair of values occurs together in some case,
which takes a hundredth of the cases that all combinations would. In addition every method is run
once on checkpoints of thousands of small tensors. The seed that all random choices follow from is
printed. Tables go to stdout as Markdown, progress to stderr. Exit 1 if a case fails.

This process stays small (it imports neither torch nor numpy): to the kernel, the peak memory of a
child starts from that of its parent.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import yaml
from lazymerge.methods import METHODS
from lazymerge.sizes import parse_size

from covering import covering_rows
from make_synthetic_checkpoint import (
    SAFETENSORS_NAMES,
    TORCH_NAMES,
    LlamaShape,
    float_tensor,
    make_checkpoint,
    safetensors_header,
)
from method_recipes import MOST_MODELS, SETTINGS, model_counts, recipe_for

REPOSITORY = Path(__file__).resolve().parents[1]

MIB = 1 << 20

SLACK_BYTES = 32 * MIB
SLACK_SHARE = 0.10
"""A projection may exceed the measurement by the larger of both."""

MIXED = "mixed"
MIXED_DTYPES = ("BF16", "F32", "F8_E4M3", "F64", "F16")
"""Of the models of a mixed merge, in turn."""

SMALLEST = "smallest"
"""In place of a limit: the smallest that a refusal names."""

FACTORS: dict[str, tuple[Any, ...]] = {
    "dtype": ("BF16", "F16", "F32", "F64", "F8_E4M3", MIXED),
    "limit": ("400MiB", "512MiB", "1GiB", "2GiB", "4GiB", SMALLEST),
    "workers": (1, 2, 3, 4),
    "read_mode": ("pread", "mmap"),
    "kernels": ("native", "torch"),
    "setting": SETTINGS,
    "out_dtype": (None, "bfloat16", "float32", "float64", "float8_e4m3fn"),
    "content": ("normal", "zeros"),
}
"""What the cases combine, besides methods and numbers of models."""

FEW_TENSORS = LlamaShape(
    hidden=512, intermediate=4096, layers=1, heads=8, kv_heads=8, vocabulary=32768
)
"""Embedding and head of 4 spans of 16 blocks each, so that four workers are in full spans at once;
matrices of 8 blocks and of 1, and norms."""

MANY_TENSORS = LlamaShape(
    hidden=64, intermediate=64, layers=330, heads=8, kv_heads=8, vocabulary=64
)
"""3000 small tensors."""

LARGE_SHAPE = (262144, 8192)
LARGE_LIMIT = "512MiB"


@dataclass(frozen=True, slots=True)
class Case:
    """One combination. many: on checkpoints of many small tensors."""

    method: str
    models: int
    dtype: str
    limit: str
    workers: int
    read_mode: str
    kernels: str
    setting: str
    out_dtype: str | None
    content: str
    many: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case has shown.

    projected_bytes, measured_bytes: 0 where the run failed.
    problems: none if it is as promised.
    commands: that show it.
    """

    case: Case
    projected_bytes: int
    measured_bytes: int
    workers: int
    seconds: float
    problems: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def margin_bytes(self) -> int:
        """Projected above measured."""
        return self.projected_bytes - self.measured_bytes


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that has ended. peak_bytes: its peak resident set by the kernel's account."""

    command: str
    code: int
    stdout: str
    stderr: str
    peak_bytes: int
    seconds: float


# ----------------------------------------------------------------------------- which cases


def cases_of(
    methods: Sequence[str],
    models: Sequence[int],
    factors: Mapping[str, Sequence[Any]],
    seed: int,
) -> list[Case]:
    """The cases that a seed and a selection of values give; the same ones each time.

    Raises:
        ValueError: none of the methods takes any of these numbers of models.
    """
    allowed = {
        method: set(model_counts(METHODS[method].signature)) & set(models) for method in methods
    }
    methods = [method for method in methods if allowed[method]]
    if not methods:
        raise ValueError("none of the methods takes any of these numbers of models")
    counts = sorted(set().union(*(allowed[method] for method in methods)))

    def is_allowed(row: Mapping[str, Any]) -> bool:
        if "models" not in row or "method" not in row:
            return True
        return row["models"] in allowed[row["method"]]

    random = Random(seed)
    every = {"method": methods, "models": counts, **factors}
    cases = [Case(**row) for row in covering_rows(every, random, is_allowed=is_allowed)]
    for method in methods:
        others = {name: random.choice(list(values)) for name, values in factors.items()}
        count = random.choice(sorted(allowed[method]))
        cases.append(Case(method=method, models=count, many=True, **others))
    return cases


# ------------------------------------------------------------------------------- one case


class Bench:
    """Runs cases in a folder: checkpoints are made when first needed, and kept for the next."""

    def __init__(
        self, folder: Path, seed: int, shape: LlamaShape = FEW_TENSORS, *, gathers: bool = False
    ) -> None:
        """seed: of the recipes' values. shape: of checkpoints of few tensors. gathers: run with
        --stats."""
        self.folder = folder
        self._gathers = gathers
        self._seed = seed
        self._shape = shape

    def run(self, case: Case, number: int) -> Outcome:
        """Runs a case. number: names its recipe and decides its values."""
        folders = [self._checkpoint(case, index) for index in range(case.models + 1)]
        recipe = recipe_for(
            METHODS[case.method].signature,
            folders,
            case.models,
            setting=case.setting,
            out_dtype=case.out_dtype,
            random=Random(f"{self._seed}/{number}"),
        )
        path = self.folder / f"{number}.yml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        options = ["--read-mode", case.read_mode, "--workers", str(case.workers)]
        return self.judge(case, path, options, case.limit)

    def judge(self, case: Case, recipe: Path, options: Sequence[str], limit: str) -> Outcome:
        """Runs a recipe under a limit and compares; a refusal is checked, then obeyed."""
        output = self.folder / "merged"
        call = partial(lazymerge, kernels=case.kernels)
        run = ["run", str(recipe), "-o", str(output), "--json", "--no-fsync", *options]
        run += ["--stats"] * self._gathers
        problems: list[str] = []
        commands: list[str] = []
        asked = "1MiB" if limit == SMALLEST else limit
        try:
            ended = call([*run, "--memory", asked])
            commands.append(ended.command)
            if ended.code == 3:
                named = re.search(r"--memory (\d+)MiB", ended.stderr)
                if named is None:
                    problems.append(f"the refusal names no smallest limit: {ended.stderr.strip()}")
                    return Outcome(case, 0, 0, 0, 0.0, tuple(problems), tuple(commands))
                smallest = int(named[1])
                if smallest * MIB <= parse_size(asked):
                    problems.append(f"refused although it names {smallest}MiB as enough")
                plan = run if self._gathers else ["plan", str(recipe), "--dry-run", *options]
                below = call([*plan, "--memory", f"{smallest - 1}MiB"])
                commands.append(below.command)
                if below.code != 3:
                    problems.append(f"1 MiB less than the smallest limit gives exit {below.code}")
                asked = f"{smallest}MiB"
                ended = call([*run, "--memory", asked])
                commands.append(ended.command)
        finally:
            shutil.rmtree(output, ignore_errors=True)
        if ended.code != 0:
            problems.append(f"exit {ended.code}: {ended.stderr.strip()[-2000:]}")
            return Outcome(case, 0, 0, 0, ended.seconds, tuple(problems), tuple(commands))
        report = json.loads(ended.stdout)
        projected = int(report["memory"]["projected_bytes"])
        reported = int(report["measured_bytes"])
        measured = max(reported, ended.peak_bytes)
        problems += disagreements(projected, measured, parse_size(asked))
        if reported < 0.9 * ended.peak_bytes:
            problems.append(f"reports {mib(reported)}, took {mib(ended.peak_bytes)}")
        return Outcome(
            case,
            projected,
            measured,
            int(report["memory"]["workers"]),
            ended.seconds,
            tuple(problems),
            tuple(commands),
        )

    def large(self, method: str, shape: tuple[int, int]) -> Outcome:
        """Merges as few models as the method takes, of one huge tensor of zeros."""
        signature = METHODS[method].signature
        count = min(model_counts(signature), key=lambda models: (models < 2, models))
        case = Case(
            method, count, "BF16", LARGE_LIMIT, 2, "pread", "native", "numbers", None, "zeros"
        )
        folders = []
        for index in range(count + 1):
            folders.append(self.folder / f"large-{index}")
            write_large_checkpoint(folders[-1], shape)
        recipe = recipe_for(signature, folders, count, random=Random(self._seed))
        path = self.folder / f"large-{method}.yml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        outcome = self.judge(case, path, ["--workers", str(case.workers)], LARGE_LIMIT)
        if len(outcome.commands) == 1:
            return outcome
        problem = f"is refused under {LARGE_LIMIT}"
        return replace(outcome, problems=(problem, *outcome.problems))

    def _checkpoint(self, case: Case, index: int) -> Path:
        """The checkpoint of the model with that index, made if it is not there."""
        dtype = MIXED_DTYPES[index % len(MIXED_DTYPES)] if case.dtype == MIXED else case.dtype
        content = "many" if case.many else case.content
        folder = self.folder / f"{content}-{dtype}-{index}"
        if (folder / "config.json").exists():
            return folder
        shape = MANY_TENSORS if case.many else self._shape
        torch_name = TORCH_NAMES[dtype]
        if content != "normal":
            make_checkpoint(folder, shape, dtype=torch_name, sparse=True)
            return folder
        # In a process of its own: random numbers need torch, and this process must stay small.
        sizes = [
            text
            for name, value in asdict(shape).items()
            for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        script = REPOSITORY / "scripts" / "make_synthetic_checkpoint.py"
        command = [sys.executable, str(script), str(folder), *sizes, "--dtype", torch_name]
        subprocess.run(
            [*command, "--random", "--scale", "1", "--seed", str(index)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return folder


def disagreements(projected: int, measured: int, limit: int) -> list[str]:
    """What is wrong with a projection."""
    found = []
    if projected > limit:
        found.append(f"projects {mib(projected)} under a limit of {mib(limit)}")
    if measured > projected:
        found.append(f"took {mib(measured)}, {mib(measured - projected)} more than projected")
    if projected - measured > max(SLACK_BYTES, SLACK_SHARE * measured):
        found.append(
            f"projects {mib(projected)}, {mib(projected - measured)} more than it took "
            f"({(projected - measured) / measured:.0%})"
        )
    return found


def lazymerge(arguments: Sequence[str], kernels: str) -> Ended:
    """Runs lazymerge, that of this checkout, to its end."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    paths = [str(REPOSITORY), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    variables = ""
    environment.pop("LAZYMERGE_KERNELS", None)
    if kernels == "torch":
        environment["LAZYMERGE_KERNELS"] = "torch"
        variables = "LAZYMERGE_KERNELS=torch "
    command = [sys.executable, "-m", "lazymerge", *arguments]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for it again
        seconds = time.perf_counter() - began
        stdout.seek(0)
        stderr.seek(0)
        return Ended(
            variables + shlex.join(command),
            process.returncode,
            stdout.read(),
            stderr.read(),
            usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            seconds,
        )


def write_large_checkpoint(folder: Path, shape: tuple[int, int]) -> None:
    """One embedding of zeros in bfloat16 that takes no disk."""
    folder.mkdir(parents=True, exist_ok=True)
    tensor = float_tensor("model.embed_tokens.weight", SAFETENSORS_NAMES["bfloat16"], shape)
    header, _ = safetensors_header([tensor])
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + tensor.size_bytes)


# --------------------------------------------------------------------------------- words


def mib(size_bytes: float) -> str:
    """A size for people."""
    return f"{size_bytes / MIB:.1f} MiB"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def margins(outcomes: Sequence[Outcome]) -> str:
    """The smallest and the largest margin of some outcomes, in MiB; failures in bold."""
    ran = [outcome.margin_bytes / MIB for outcome in outcomes if outcome.projected_bytes]
    failures = sum(bool(outcome.problems) for outcome in outcomes)
    text = "–" if not outcomes else "no run" if not ran else f"{min(ran):+.0f}"
    if len(ran) > 1:
        text += f" … {max(ran):+.0f}"
    return f"**{text} ({failures} failed)**" if failures else text


def margin_table(outcomes: Sequence[Outcome], dtypes: Sequence[str]) -> str:
    """Worst cases by method and dtype."""
    rows = []
    for method in dict.fromkeys(outcome.case.method for outcome in outcomes):
        of_method = [outcome for outcome in outcomes if outcome.case.method == method]
        peak = max(outcome.measured_bytes for outcome in of_method)
        cells = [
            margins([outcome for outcome in of_method if outcome.case.dtype == dtype])
            for dtype in dtypes
        ]
        rows.append([method, str(len(of_method)), *cells, f"{peak / MIB:.0f}"])
    return markdown(["method", "cases", *dtypes, "highest peak"], rows)


def large_table(outcomes: Sequence[Outcome]) -> str:
    """One row per method."""
    return markdown(
        ["method", "models", "workers", "seconds", "projected MiB", "measured MiB", ""],
        [
            [
                outcome.case.method,
                str(outcome.case.models),
                str(outcome.workers),
                f"{outcome.seconds:.1f}",
                f"{outcome.projected_bytes / MIB:.1f}",
                f"{outcome.measured_bytes / MIB:.1f}",
                "**failed**" if outcome.problems else "ok",
            ]
            for outcome in outcomes
        ],
    )


def failure_text(number: int, outcome: Outcome, folder: Path) -> str:
    """What is wrong with a case, and how to see it again."""
    lines = [f"case {number}: {outcome.case}"]
    lines += [f"  {problem}" for problem in outcome.problems]
    lines += [f"  {command}" for command in outcome.commands]
    recipe = folder / f"{number}.yml"
    if recipe.exists():
        lines += [f"    {line}" for line in recipe.read_text().splitlines()]
    return "\n".join(lines)


# ------------------------------------------------------------------------------ the whole


@contextmanager
def work_folder(wanted: Path | None, keep: bool) -> Iterator[Path]:
    """A folder of our own, in `wanted` or where temporary files go; deleted unless kept."""
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="check-memory-", dir=wanted))
    try:
        yield folder
    finally:
        if keep:
            print(f"kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def check_projections(arguments: argparse.Namespace) -> bool:
    """Runs the cases; True if all are as promised."""
    factors = {name: getattr(arguments, name) for name in FACTORS}
    cases = cases_of(arguments.methods, arguments.models, factors, arguments.seed)
    numbers = arguments.only or range(1, len(cases) + 1)
    if any(not 1 <= number <= len(cases) for number in numbers):
        raise ValueError(f"there are {len(cases)} cases")
    outcomes = []
    failures = []
    began = time.perf_counter()
    print(f"seed {arguments.seed}, {len(cases)} cases", file=sys.stderr)
    keep = arguments.keep or bool(arguments.only)
    with work_folder(arguments.work, keep) as folder:
        bench = Bench(folder, arguments.seed, arguments.shape, gathers=arguments.stats)
        for number in numbers:
            outcome = bench.run(cases[number - 1], number)
            outcomes.append(outcome)
            state = "FAILED " + "; ".join(outcome.problems) if outcome.problems else "ok"
            print(
                f"{number}/{len(cases)} {outcome.case.method} x{outcome.case.models} "
                f"{outcome.case.dtype}: {mib(outcome.measured_bytes)} of "
                f"{mib(outcome.projected_bytes)}, {outcome.seconds:.1f} s, {state}",
                file=sys.stderr,
            )
            if outcome.problems:
                failures.append(failure_text(number, outcome, folder))
    print("Projected above measured memory, smallest … largest, in MiB:\n")
    print(margin_table(outcomes, arguments.dtype))
    print(
        f"\n{len(outcomes)} processes, {len(failures)} failed, "
        f"{time.perf_counter() - began:.0f} s; seed {arguments.seed}"
    )
    if failures:
        print("\n" + "\n\n".join(failures))
        if not keep:
            print("\n(--only NUMBER with the same seed and selection keeps a case's folder)")
    return not failures


def check_large(arguments: argparse.Namespace) -> bool:
    """Merges a huge tensor by every method; True if all are as promised."""
    outcomes = []
    rows, columns = arguments.large_shape
    with work_folder(arguments.work, arguments.keep) as folder:
        bench = Bench(folder, arguments.seed, gathers=arguments.stats)
        for method in arguments.methods:
            outcomes.append(bench.large(method, (rows, columns)))
            print(f"{method}: {'; '.join(outcomes[-1].problems) or 'ok'}", file=sys.stderr)
    print(f"A bfloat16 tensor of {rows} x {columns} under a limit of {LARGE_LIMIT}:\n")
    print(large_table(outcomes))
    for outcome in outcomes:
        if outcome.problems:
            print(f"\n{failure_text(0, outcome, folder)}")
    return not any(outcome.problems for outcome in outcomes)


def _shape(text: str) -> tuple[int, int]:
    rows, columns = map(int, text.split("x"))
    return rows, columns


def _limit(text: str) -> str:
    if text != SMALLEST:
        parse_size(text)
    return text


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--models",
        nargs="+",
        type=int,
        choices=range(1, MOST_MODELS + 1),
        default=list(range(1, MOST_MODELS + 1)),
    )

    def select(option: str, name: str, **more: Any) -> None:
        values = list(FACTORS[name])
        parser.add_argument(option, dest=name, nargs="+", default=values, **more)

    select("--dtypes", "dtype", choices=FACTORS["dtype"])
    select("--limits", "limit", type=_limit, metavar="SIZE")
    select("--workers", "workers", type=int, metavar="N")
    select("--read-modes", "read_mode", choices=FACTORS["read_mode"])
    select("--kernels", "kernels", choices=FACTORS["kernels"])
    select("--settings", "setting", choices=FACTORS["setting"])
    select("--out-dtypes", "out_dtype", choices=FACTORS["out_dtype"][1:])
    select("--contents", "content", choices=FACTORS["content"])
    parser.add_argument("--seed", type=int, help="default: a new one")
    parser.add_argument("--only", nargs="+", type=int, metavar="NUMBER", help="these cases")
    parser.add_argument("--stats", action="store_true", help="gather statistics in every run")
    parser.add_argument("--large", action="store_true", help="merge one huge tensor instead")
    parser.add_argument("--large-shape", type=_shape, default=LARGE_SHAPE, metavar="ROWSxCOLUMNS")
    parser.add_argument("--vocabulary", type=int, default=FEW_TENSORS.vocabulary, metavar="ROWS")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to put checkpoints")
    parser.add_argument("--keep", action="store_true", help="leave checkpoints and recipes there")
    parsed = parser.parse_args(arguments)
    if parsed.seed is None:
        parsed.seed = secrets.randbits(32)
    sizes = {**asdict(FEW_TENSORS), "vocabulary": parsed.vocabulary}
    parsed.shape = LlamaShape(**sizes)
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; returns its exit code."""
    parsed = _arguments(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that folders are deleted
    try:
        as_promised = check_large(parsed) if parsed.large else check_projections(parsed)
    except ValueError as error:
        print(f"check_memory: {error}", file=sys.stderr)
        return 2
    return 0 if as_promised else 1


if __name__ == "__main__":
    sys.exit(main())
