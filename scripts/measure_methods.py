#!/usr/bin/env python3
"""Measure what every merge method costs: passes, and nanoseconds per element and model.

    python scripts/measure_methods.py                     every method, in a few minutes
    python scripts/measure_methods.py --methods della --runs 5 --size 1.1b

One worker merges bfloat16 checkpoints (a base and two others, or as many as the method takes) that
are in the page cache. The time is that from first block to last, the median of several runs; it is
divided by the elements of one model and the number of models read. A Markdown table goes to stdout.
docs/methods.md shows it (scripts/make_methods_page.py --costs FILE).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from lazymerge.methods import METHODS

from benchmarking.inputs import SIZES
from benchmarking.processes import BenchError
from benchmarking.turns import loop_seconds
from benchmarking.workplace import Workplace


def row(bench: Workplace, method: str, size: str, runs: int) -> str:
    """The table's row of a method."""
    merge = bench.merge(method, bench.checkpoints(size), size)
    contestant = bench.lazymerge(merge, "--workers", "1")
    contest = bench.take_turns([contestant], method)
    seconds = median(loop_seconds(run) for run in contest.runs["lazymerge"])
    report = json.loads(contest.runs["lazymerge"][0].stdout)
    elements = report["bytes_written"] / 2
    models = len(merge.inputs)
    passes = report["bytes_read"] / (2 * elements * models)
    cost = seconds / elements / models * 1e9
    return f"| {method} | {models} | {passes:.2f} | {cost:.2f} | {runs} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--size", choices=SIZES, default="0.1b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path, metavar="DIR", help="where checkpoints are, or go")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        work = parsed.work or Path(temporary)
        bench = Workplace(work=work)
        bench.rounds = type(bench.rounds)(short=parsed.runs, long=parsed.runs)
        print(f"One worker, bfloat16, {parsed.size}, {os.cpu_count()} cores, page cache warm:\n")
        print("| method | models read | passes | ns per element and model | runs |")
        print("|---|---|---|---|---|")
        try:
            for method in parsed.methods:
                print(row(bench, method, parsed.size, parsed.runs), flush=True)
        except BenchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
