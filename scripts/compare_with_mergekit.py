#!/usr/bin/env python3
"""Compare what lazymerge and mergekit make of the same random recipes, element by element.

    python scripts/compare_with_mergekit.py --work /tmp/compare --recipes 20
    python scripts/compare_with_mergekit.py --seed 7 --methods ties sce
    python scripts/compare_with_mergekit.py --seed 7 --methods ties --only 13

mergekit is the real one, in a virtual environment of its own: the one that --mergekit-venv names,
or one that is made in the work folder. Both programs merge small Llama checkpoints (float32,
bfloat16, float16, and of several dtypes) by recipes with random numbers of models, weights,
densities, gradients, filters and flags; `dtype` is float32, `out_dtype` varies.

Methods without chance: every element of both is held to the float64 reference of tests/reference.
mergekit merges each recipe a second time in float64, which tells its rounding from its meaning.
Columns of the table:

    apart        elements of the two programs more than an ulp (of the output dtype) from each other
    off          elements more than an ulp from the reference; worst: the largest distance, in ulps
    rounding     of these, explained by what rounding leaves of the terms that are added
    threshold    by a decision whose deciding quantity lies within rounding of its threshold
    departure    by a definition that is known to differ
    float32      by mergekit's float32 arithmetic alone: its float64 run agrees with the reference
    unexplained  by none of these (scripts/comparing/judging.py)

Methods that draw random numbers: a second table, of sums over tensors, each program held to the
mean and the variance of its own definition (scripts/comparing/chance.py).

Exit 1 if anything is unexplained; then examples and their recipes follow the tables.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import yaml
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import signatures
from lazymerge.errors import LazymergeError
from lazymerge.version import __version__

from benchmarking.processes import BenchError
from benchmarking.programs import PEERS, make_venv, peer_facts
from benchmarking.report import markdown_table
from comparing import chance
from comparing.chance import LIMIT_Z, RANDOM_METHODS, Tally
from comparing.expectations import expect, operands
from comparing.inputs import SETS, load_tensors, make_inputs
from comparing.judging import Verdict, judge
from comparing.programs import Mergekit, Refused, merge_with_lazymerge
from comparing.recipes import MOST_MODELS, random_recipe, with_float64

MOST_EXAMPLES = 5
"""Recipes that are shown for each method."""

COLUMNS = (
    *("method", "recipes", "elements", "apart", "worst"),
    *("lazymerge off", "worst", "mergekit off", "worst"),
    *("rounding", "threshold", "departure", "float32", "unexplained"),
)
RANDOM_COLUMNS = (
    *("method", "recipes", "elements", "program", "changed", "expected"),
    *("mean change", "expected", "gain", "largest z", "unexplained"),
)


@dataclass(slots=True)
class Found:
    """What the recipes of one method have shown.

    verdict: of methods without chance. ours, theirs: of random methods.
    refused: recipes that neither program merges.
    problems: what is unexplained, with the recipe, for people.
    """

    method: str
    recipes: int = 0
    refused: int = 0
    seconds: float = 0.0
    verdict: Verdict = field(default_factory=Verdict)
    ours: Tally = field(default_factory=Tally)
    theirs: Tally = field(default_factory=Tally)
    problems: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table of the method's kind."""
        if self.method not in RANDOM_METHODS:
            found = self.verdict
            counts = (found.rounding, found.threshold, found.departure, found.float32)
            return [
                (
                    self.method,
                    str(self.recipes),
                    f"{found.elements:,}",
                    f"{found.apart:,}",
                    _ulps(found.worst_apart),
                    f"{found.ours_off:,}",
                    _ulps(found.worst_ours),
                    f"{found.theirs_off:,}",
                    _ulps(found.worst_theirs),
                    *(f"{count:,}" for count in counts),
                    _bold(found.unexplained),
                )
            ]
        rows: list[tuple[str, ...]] = []
        for program, sums in (("lazymerge", self.ours), ("mergekit", self.theirs)):
            elements = max(1, sums.elements)
            rows.append(
                (
                    self.method,
                    str(self.recipes),
                    f"{sums.elements:,}",
                    program,
                    f"{sums.changed / elements:.5f}",
                    f"{sums.expected_changed / elements:.5f}",
                    f"{sums.change / elements:.3e}",
                    f"{sums.expected_change / elements:.3e}",
                    f"{sums.projection / (sums.expected_projection or 1.0):.5f}",
                    f"{sums.largest_z:.2f}",
                    _bold(sum(z > LIMIT_Z for z in sums.worst_z.values())),
                )
            )
        return rows


def _ulps(distance: float) -> str:
    return f"{distance:.2f}" if distance < 1000 else f"{distance:.1e}"


def _bold(count: int) -> str:
    return f"**{count:,}**" if count else "0"


class Comparison:
    """Merges recipes with both programs and judges the results.

    folder: where outputs go; they are deleted one by one.
    """

    def __init__(self, mergekit: Mergekit, folder: Path) -> None:
        self._mergekit = mergekit
        self._folder = folder

    def compare(self, found: Found, document: Mapping[str, Any], number: int, seed: int) -> None:
        """Adds one recipe to what was found."""
        outputs = [self._folder / name for name in ("ours", "theirs", "exact")]
        try:
            plan = self._merge(found, document, number, seed, outputs)
            if plan is None:
                return
            found.recipes += 1
            ours, theirs = (load_tensors(output) for output in outputs[:2])
            if ours.keys() != theirs.keys():
                names = sorted(ours.keys() ^ theirs.keys())
                self._report(found, document, number, [f"only in one output: {', '.join(names)}"])
                found.verdict.unexplained += len(names)
                return
            if found.method in RANDOM_METHODS:
                self._tally(found, document, number, plan, ours, theirs)
                return
            exact = load_tensors(outputs[2])
            verdict = Verdict()
            for resolved in plan.tensors:
                name = resolved.name
                expected = expect(found.method, operands(plan, resolved))
                verdict.add(judge(name, ours[name], theirs[name], exact[name], expected))
            found.verdict.add(verdict)
            if verdict.unexplained:
                self._report(found, document, number, [str(e) for e in verdict.examples[:3]])
        finally:
            for output in outputs:
                shutil.rmtree(output, ignore_errors=True)

    def _merge(
        self,
        found: Found,
        document: Mapping[str, Any],
        number: int,
        seed: int,
        outputs: Sequence[Path],
    ) -> Plan | None:
        """Merges with both; None where a program does not."""
        refusals = []
        plan = None
        try:
            plan = merge_with_lazymerge(document, outputs[0], seed)
        except LazymergeError as error:
            refusals.append(f"lazymerge: {error}")
        try:
            self._mergekit.merge(document, outputs[1], seed)
            if found.method not in RANDOM_METHODS:
                self._mergekit.merge(with_float64(document), outputs[2], seed)
        except Refused as error:
            refusals.append(f"mergekit: {error}")
        if len(refusals) == 1:
            self._report(found, document, number, refusals)
            found.verdict.unexplained += 1
        found.refused += len(refusals) == 2
        return None if refusals else plan

    def _tally(
        self,
        found: Found,
        document: Mapping[str, Any],
        number: int,
        plan: Plan,
        ours: Mapping[str, Any],
        theirs: Mapping[str, Any],
    ) -> None:
        for written, sums, restores_norm in (
            (ours, found.ours, False),
            (theirs, found.theirs, True),
        ):
            of_recipe = Tally()
            for resolved in plan.tensors:
                expected = chance.outcome(
                    found.method, operands(plan, resolved), restores_norm=restores_norm
                )
                of_recipe.add(chance.tally(resolved.name, written[resolved.name], expected))
            sums.add(of_recipe)
            if of_recipe.largest_z > LIMIT_Z:
                program = "mergekit" if restores_norm else "lazymerge"
                lines = [
                    f"{program}: {name} is {z:.1f} standard deviations off in "
                    f"{of_recipe.worst[name]}"
                    for name, z in of_recipe.worst_z.items()
                    if z > LIMIT_Z
                ]
                self._report(found, document, number, lines)

    def _report(
        self, found: Found, document: Mapping[str, Any], number: int, lines: Sequence[str]
    ) -> None:
        recipe = yaml.safe_dump(dict(document), sort_keys=False)
        found.problems.append("\n".join([f"{found.method}, recipe {number}:", *lines, "", recipe]))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    known = list(signatures())
    parser.add_argument("--mergekit-venv", type=Path, metavar="DIR", help="one that exists")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument(
        "--recipes", type=_positive, default=20, metavar="N", help="per method (default: 20)"
    )
    parser.add_argument(
        "--only", type=int, metavar="NUMBER", help="this recipe of each method alone, from 0"
    )
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to put files")
    return parser.parse_args(arguments)


def compare_method(
    comparison: Comparison,
    method: str,
    inputs: Mapping[str, Sequence[Path]],
    numbers: Sequence[int],
    seed: int,
) -> Found:
    """Random recipes of one method; a recipe depends on the seed, the method and its number."""
    found = Found(method)
    began = time.perf_counter()
    is_random = method in RANDOM_METHODS
    for number in numbers:
        random = Random(f"{seed} {method} {number}")
        folders = inputs[random.choice(list(SETS))]
        most = chance.MOST_MODELS if is_random else MOST_MODELS
        document = random_recipe(signatures()[method], folders, random, most)
        if is_random:
            document.pop("out_dtype", None)  # small changes must be seen
        comparison.compare(found, document, number, seed=random.randint(1, 2**31))
    found.seconds = time.perf_counter() - began
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 when something is unexplained."""
    parsed = _arguments(arguments)
    peer = PEERS["mergekit"]
    if parsed.work is not None:
        parsed.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is deleted
    numbers = range(parsed.recipes) if parsed.only is None else [parsed.only]
    results: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="compare-with-mergekit-", dir=parsed.work) as name:
        folder = Path(name)
        venv = parsed.mergekit_venv or (parsed.work or folder).resolve() / "mergekit-venv"
        try:
            if parsed.mergekit_venv is None:
                make_venv(venv, peer)
            facts = peer_facts(peer, venv)
            inputs = make_inputs(folder, parsed.seed)
            with Mergekit(venv, folder / "mergekit.log") as mergekit:
                comparison = Comparison(mergekit, folder)
                for method in parsed.methods:
                    found = compare_method(comparison, method, inputs, numbers, parsed.seed)
                    results.append(found)
                    for row in found.rows():
                        print(" ".join(row), f"{found.seconds:.0f} s", file=sys.stderr, flush=True)
        except BenchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
    command = shlex.join([Path(__file__).name, *(sys.argv[1:] if arguments is None else arguments)])
    print(f"- command: {command}, seed {parsed.seed}")
    print(f"- lazymerge: {__version__} (torch {importlib.metadata.version('torch')})")
    print(f"- mergekit: {facts}\n")
    _print_tables(results)
    return 1 if any(found.problems for found in results) else 0


def _print_tables(results: Sequence[Found]) -> None:
    for columns, is_random in ((COLUMNS, False), (RANDOM_COLUMNS, True)):
        rows = [
            row
            for found in results
            if (found.method in RANDOM_METHODS) == is_random
            for row in found.rows()
        ]
        if rows:
            print(markdown_table(columns, rows) + "\n")
    for found in results:
        if found.refused:
            print(f"{found.method}: {found.refused} recipes that neither program merges\n")
        for problem in found.problems[:MOST_EXAMPLES]:
            print(problem)


if __name__ == "__main__":
    sys.exit(main())
