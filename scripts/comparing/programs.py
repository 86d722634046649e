"""The two programs, told to merge a recipe."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from lazymerge.engine.plan import Plan
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.resources import Resources
from lazymerge.engine.run import run_plan
from lazymerge.recipe import parse_recipe

from benchmarking.processes import SCRIPTS, BenchError, offline_environment

DRIVER = SCRIPTS / "comparing" / "merge_with_mergekit.py"

LIMIT_BYTES = 8 << 30
"""Of lazymerge; bytes do not depend on it, and this process holds much itself."""


class Refused(Exception):
    """A program does not merge this recipe."""


class Mergekit:
    """mergekit in a process of its own, which merges one recipe after the other.

    venv: mergekit's virtual environment. log: what it says is written there.
    """

    def __init__(self, venv: Path, log: Path) -> None:
        self._log = log
        self._errors = log.open("wb")
        self._process = subprocess.Popen(
            [str(venv / "bin" / "python"), str(DRIVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=offline_environment(),
            text=True,
        )

    def __enter__(self) -> Mergekit:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(60)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def merge(self, document: Mapping[str, Any], output: Path, seed: int) -> None:
        """Merges a recipe into a folder.

        Raises:
            Refused: mergekit cannot.
            BenchError: its process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        recipe = yaml.safe_dump(dict(document), sort_keys=False)
        try:
            print(
                json.dumps({"recipe": recipe, "output": str(output), "seed": seed}),
                file=self._process.stdin,
                flush=True,
            )
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            self._errors.flush()
            said = self._log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise BenchError(f"mergekit has ended:\n{said}")
        error = json.loads(answer).get("error")
        if error:
            raise Refused(error)


def merge_with_lazymerge(
    document: Mapping[str, Any], output: Path, seed: int, before: Sequence[Mapping[str, Any]] = ()
) -> Plan:
    """Merges a recipe into a folder; returns the plan, which says how parameters were resolved.

    before: other documents of the recipe, whose results it uses.

    Raises:
        LazymergeError: as make_plan and run_plan do.
    """
    text = yaml.safe_dump_all([*before, {**document, "seed": seed}], sort_keys=False)
    plan = make_plan(parse_recipe(text, "recipe.yml", signatures()), Resources(LIMIT_BYTES))
    run_plan(plan, output, overwrite=True, fsync=False)
    return plan
