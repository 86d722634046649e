"""Contestants that take turns, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarking.inputs import tensor_bytes, warm_page_cache
from benchmarking.processes import BenchError, Run, delete, run_measured


@dataclass(frozen=True, slots=True)
class Contestant:
    """A command that is run many times.

    inputs: checkpoints it reads; prepare is called with them before every run.
    output: the folder it writes, deleted before and after every run; None: it writes nothing.
    may_fail: a failure takes it out of the contest and does not end the benchmark.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    inputs: Sequence[Path] = ()
    output: Path | None = None
    prepare: Callable[[Sequence[Path]], None] = warm_page_cache
    may_fail: bool = False


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often each contestant runs.

    short: rounds in general. long: rounds when the first took more than long_s seconds.
    """

    short: int = 5
    long: int = 2
    long_s: float = 60.0


@dataclass(slots=True)
class Contest:
    """What happened: the runs of every contestant, and why one was taken out."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def wall_s(self, name: str) -> float:
        """Median wall seconds, from start to end of the process."""
        return statistics.median(run.wall_s for run in self.runs[name])

    def loop_s(self, name: str) -> float:
        """Median seconds from first block to last of a lazymerge that was run with --json."""
        return statistics.median(loop_seconds(run) for run in self.runs[name])

    def peak_rss_bytes(self, name: str) -> float:
        """Highest peak of any run: a bound is judged by the worst."""
        return max(run.peak_rss_bytes for run in self.runs[name])

    def peak_anonymous_bytes(self, name: str) -> float:
        """As peak_rss_bytes, without the pages of files."""
        return max(run.peak_anonymous_bytes for run in self.runs[name])


def loop_seconds(run: Run) -> float:
    """Seconds from first block to last, as `lazymerge run --json` printed them."""
    return float(json.loads(run.stdout)["seconds"])


def take_turns(
    contestants: Sequence[Contestant], rounds: Rounds, log_folder: Path, label: str
) -> Contest:
    """Run every contestant once a round; another one begins each round.

    Raises BenchError when a contestant fails that may not.
    """
    contest = Contest(runs={contestant.name: [] for contestant in contestants})
    number, wanted = 0, rounds.short
    while number < wanted:
        start = number % len(contestants)
        round_s = 0.0
        for contestant in [*contestants[start:], *contestants[:start]]:
            if contestant.name in contest.failures:
                continue
            try:
                run = _measure(contestant, log_folder)
            except BenchError as error:
                if not contestant.may_fail:
                    raise
                print(f"{label}, {contestant.name}: {error}", file=sys.stderr)
                contest.failures[contestant.name] = str(error).splitlines()[-1]
                continue
            contest.runs[contestant.name].append(run)
            round_s += run.wall_s
            print(
                f"{label}, round {number + 1}, {contestant.name}: {run.wall_s:.2f} s, "
                f"CPU {run.cpu_s:.2f} s, peak {run.peak_rss_bytes / 2**20:.0f} MiB",
                file=sys.stderr,
            )
        if number == 0 and round_s > rounds.long_s:
            wanted = min(rounds.short, rounds.long)
        number += 1
    for name in contest.failures:
        del contest.runs[name]
    return contest


def _measure(contestant: Contestant, log_folder: Path) -> Run:
    outputs = [] if contestant.output is None else [contestant.output]
    delete(outputs)
    contestant.prepare(contestant.inputs)
    logs = log_folder / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"{re.sub('[^a-z0-9.]+', '-', contestant.name)}.log"
    try:
        run = run_measured(contestant.command, contestant.environment, log)
        for output in outputs:
            if tensor_bytes(output) == 0:
                raise BenchError(f"{contestant.name} ended well but left no tensors in {output}")
    finally:
        delete(outputs)
    return run
