#!/usr/bin/env python3
"""Merge in a loop, killed at random, for an hour: what is lost, what is left behind?

    python scripts/soak.py                          an hour
    python scripts/soak.py --minutes 5 --seed 7

Each round merges one of several recipes into one folder until it is complete. Runs before the last
are ended at a random moment: those in processes of their own by SIGKILL, SIGTERM or SIGINT, those
within this process by an exception from a worker or from Ctrl-C. The files are then compared, byte
by byte, with those of an undisturbed merge; files beside them, and descriptors and threads of this
process that were not there before, are counted. Exit 1 if anything differs or is left.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random

import lazymerge
import yaml
from lazymerge.engine.report import Silent

from faults.harness import REPOSITORY, contents
from make_synthetic_checkpoint import LlamaShape, make_checkpoint

SHAPE = LlamaShape(hidden=512, intermediate=1536, layers=6, heads=8, kv_heads=8, vocabulary=16384)
"""73 MB in bfloat16: a merge takes 0.1 to 0.5 s."""

RECIPES = {
    "task_arithmetic": {"weight": 0.6},
    "ties": {"weight": 0.6, "density": 0.4},
    "dare_ties": {"weight": 0.6, "density": 0.4},
    "slerp": {},
    "model_stock": {},
}

LONGEST_SECONDS = 0.6
"""Runs are ended after a random time up to this."""

IN_THIS_PROCESS = 0.3
"""Share of the runs."""


class Injected(Exception):
    """What ends a run within this process."""


class Interrupter(Silent):
    """Ends a run at one of its blocks."""

    def __init__(self, at: int, *, by_signal: bool) -> None:
        self._left = at
        self._by_signal = by_signal
        self._lock = threading.Lock()

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        with self._lock:
            self._left -= 1
            strikes = self._left == 0
        if strikes and self._by_signal:
            os.kill(os.getpid(), signal.SIGINT)
        elif strikes:
            raise Injected


class Soak:
    """Models, recipes, what they make undisturbed, and counts of what happened."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.random = random
        self.output = folder / "out"
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.ends: list[float] = []
        """Seconds from a signal to the end of the process."""
        for number, name in enumerate(("base", "a", "b")):
            make_checkpoint(folder / name, SHAPE, dtype="bfloat16", seed=number, tokenizer=True)
        self.recipes: list[Path] = []
        self.expected: dict[Path, dict[str, bytes]] = {}
        for method, parameters in RECIPES.items():
            path = folder / f"{method}.yml"
            path.write_text(yaml.safe_dump(recipe(folder, method, parameters)))
            lazymerge.run(self.plan(path), self.output, fsync=False)
            self.expected[path] = contents(self.output)
            shutil.rmtree(self.output)
            self.recipes.append(path)
        self.others = sorted(os.listdir(folder))
        self.folder = folder

    def plan(self, path: Path) -> lazymerge.Plan:
        return lazymerge.plan(path, max_shard_size="20MB", workers=2)

    def round(self) -> None:
        """One merge, ended as often as it happens, until it is complete."""
        path = self.random.choice(self.recipes)
        before = (descriptors(), threading.active_count())
        while not (self.output / "lazymerge.json").exists():
            self.counts["runs"] += 1
            if self.random.random() < IN_THIS_PROCESS:
                self.run_here(path)
            else:
                self.run_there(path)
        if (self.output / ".lazymerge").exists():  # killed between the manifest and the end
            lazymerge.run(self.plan(path), self.output)
        found = contents(self.output)
        self.counts["merges"] += 1
        self.counts["bytes compared"] += sum(map(len, found.values()))
        if found != self.expected[path]:
            names = {
                n
                for n in {*found, *self.expected[path]}
                if found.get(n) != self.expected[path].get(n)
            }
            self.counts["mismatches"] += 1
            self.problems.append(f"{path.name}: {sorted(names)}")
        shutil.rmtree(self.output)
        leaked = set(os.listdir(self.folder)) - set(self.others)
        self.counts["leaked files"] += len(leaked)
        self.problems += [f"left behind: {name}" for name in leaked]
        time.sleep(0.01)  # threads that have ended are gone
        after = (descriptors(), threading.active_count())
        self.counts["leaked descriptors"] += max(0, after[0] - before[0])
        self.counts["leaked threads"] += max(0, after[1] - before[1])

    def run_here(self, path: Path) -> None:
        blocks = self.random.randint(1, 250)
        observer = Interrupter(blocks, by_signal=self.random.random() < 0.5)
        try:
            lazymerge.run(self.plan(path), self.output, observer=observer)
        except Injected:
            self.counts["exceptions"] += 1
        except KeyboardInterrupt:
            self.counts["Ctrl-C"] += 1
        except lazymerge.LazymergeError as error:
            self.problems.append(f"in process: {error}")

    def run_there(self, path: Path) -> None:
        command = ["run", str(path), "-o", str(self.output), "--workers", "2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "lazymerge", *command, "--max-shard-size", "20MB", "-q"],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stderr=subprocess.PIPE,
            text=True,
        )
        number = self.random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        try:
            _, err = process.communicate(timeout=self.random.uniform(0.1, LONGEST_SECONDS))
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            began = time.monotonic()
            _, err = process.communicate()
            self.counts[number.name] += 1
            if number != signal.SIGKILL:
                self.ends.append(time.monotonic() - began)
        started_lazymerge = "lazymerge: " in err
        if process.returncode not in (0, 130, -number) and started_lazymerge:
            self.problems.append(f"exit {process.returncode}: {err[-500:]}")


def recipe(folder: Path, method: str, parameters: dict[str, float]) -> dict[str, object]:
    models: list[dict[str, object]] = [
        {"model": str(folder / name), "parameters": parameters} for name in ("a", "b")
    ]
    document = {"merge_method": method, "base_model": str(folder / "base"), "models": models}
    if method == "slerp":
        document["models"] = [{"model": str(folder / "base")}, {"model": str(folder / "a")}]
        document["parameters"] = {"t": 0.4}
    return document


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def main(arguments: list[str] | None = None) -> int:
    """The script; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="default: a new one")
    parser.add_argument("--work", type=Path, help="where to put models and outputs")
    parsed = parser.parse_args(arguments)
    seed = secrets.randbits(32) if parsed.seed is None else parsed.seed
    print(f"seed {seed}", file=sys.stderr)
    # shells have what they start in the background ignore it, and children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="lazymerge-soak-", dir=parsed.work) as name:
        soak = Soak(Path(name), Random(seed))
        end = time.monotonic() + parsed.minutes * 60
        while time.monotonic() < end and not soak.problems:
            soak.round()
    counts = soak.counts
    kills = ("SIGKILL", "SIGTERM", "SIGINT", "exceptions", "Ctrl-C")
    print("| | |\n| --- | --- |")
    print(f"| minutes | {parsed.minutes:g} |")
    for what in ("merges", "runs", *kills, "bytes compared"):
        print(f"| {what} | {counts[what]:,} |")
    wrong = ("mismatches", "leaked files", "leaked descriptors", "leaked threads")
    for what in wrong:
        print(f"| {what} | {counts[what]:,} |")
    if soak.ends:
        ends = sorted(soak.ends)
        print(f"| ended after a signal, median | {ends[len(ends) // 2]:.2f} s |")
        print(f"| ended after a signal, later than 2 s | {sum(end > 2 for end in ends)} |")
        print(f"| ended after a signal, slowest | {ends[-1]:.2f} s |")
    for problem in soak.problems:
        print(problem, file=sys.stderr)
    print(f"\nseed {seed}")
    return 1 if soak.problems or any(counts[what] for what in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
