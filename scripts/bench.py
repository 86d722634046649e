#!/usr/bin/env python3
"""Measure lazymerge: against its peers, against the hardware, and against its promises.

    python scripts/bench.py --work /tmp/bench --json bench.json
    python scripts/bench.py --only startup,copy,cold --size 0.1b --runs 3

Prints Markdown: the table of promises, then one table per benchmark with its single medians.
Within each benchmark the contestants take turns, each begins a round in its turn, and a number is
the median over --runs rounds (--long-runs where one round took longer than --long-seconds). Unless
a benchmark says otherwise, the inputs are in the page cache, dirty pages of earlier runs have been
written back, nothing is synced (--no-fsync), and lazymerge runs with --memory 400MiB.

Peers are installed in the work folder, in a virtual environment each, unless --*-venv names one.
The default sizes need up to 30 GB of disk at a time, and 24 GB of memory for the page cache to
hold what the largest need. Checkpoints that this call made are deleted at the end unless --keep is
given.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarking.inputs import SIZES
from benchmarking.processes import BenchError, delete
from benchmarking.programs import PEERS, machine_facts
from benchmarking.report import Section, document, markdown
from benchmarking.sections import SECTIONS, run_sections
from benchmarking.turns import Rounds
from benchmarking.workplace import Workplace


def _sections(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(
                f"no benchmark {name!r}; there are {', '.join(SECTIONS)}"
            )
    return names


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _counts(text: str) -> list[int]:
    counts = sorted({_positive(part) for part in text.split(",")})
    if len(counts) < 2:
        raise argparse.ArgumentTypeError("two different numbers or more, with commas")
    return counts


def argument_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where all files go (default: a temporary folder)"
    )
    parser.add_argument(
        "--only",
        type=_sections,
        default=list(SECTIONS),
        metavar="NAME,...",
        help="default: " + ",".join(SECTIONS),
    )
    parser.add_argument("--runs", type=_positive, default=5, metavar="N", help="default: 5")
    parser.add_argument("--long-runs", type=_positive, default=2, metavar="N", help="default: 2")
    parser.add_argument("--long-seconds", type=float, default=60.0, metavar="S", help="default: 60")
    parser.add_argument("--size", choices=SIZES, default="1.1b", help="default: 1.1b")
    parser.add_argument(
        "--large", choices=SIZES, default="3b", help="of slope and growth (default: 3b)"
    )
    parser.add_argument("--small", choices=SIZES, default="0.1b", help="of growth (default: 0.1b)")
    parser.add_argument(
        "--models", type=_counts, default=[2, 4, 8, 16], help="of growth (default: 2,4,8,16)"
    )
    parser.add_argument("--workers", type=_counts, default=[1, 2], help="of workers (default: 1,2)")
    parser.add_argument("--memory", default="400MiB", metavar="SIZE", help="default: 400MiB")
    for name in PEERS:
        parser.add_argument(f"--{name}-venv", type=Path, metavar="DIR", help="one that exists")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every run there")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints it makes")
    return parser


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 when a benchmark could not be run."""
    parser = argument_parser()
    parsed = parser.parse_args(arguments)
    order = [list(SIZES).index(size) for size in (parsed.small, parsed.size, parsed.large)]
    if {"growth", "slope"} & set(parsed.only) and order != sorted(set(order)):
        parser.error("--small, --size and --large must grow in this order")
    temporary = parsed.work is None
    work = Path(tempfile.mkdtemp(prefix="bench-")) if temporary else parsed.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for signal_number in (signal.SIGINT, signal.SIGTERM):  # also where a shell had them ignored
        signal.signal(signal_number, _interrupt)
    venvs = {name: getattr(parsed, f"{name}-venv".replace("-", "_")) for name in PEERS}
    bench = Workplace(
        work=work,
        size=parsed.size,
        large=parsed.large,
        small=parsed.small,
        memory=parsed.memory,
        rounds=Rounds(parsed.runs, parsed.long_runs, parsed.long_seconds),
        workers=parsed.workers,
        models=parsed.models,
        venvs={name: folder.resolve() for name, folder in venvs.items() if folder is not None},
    )
    results: list[Section] = []
    facts: dict[str, str] = {}

    def write_json() -> None:
        if parsed.json is not None:
            text = json.dumps(document({**facts, **bench.peers}, results), indent=2)
            parsed.json.write_text(text + "\n", encoding="utf-8")

    try:
        facts = machine_facts(work)
        run_sections(bench, parsed.only, results, write_json)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        if results:
            print(markdown({**facts, **bench.peers}, results))
        if not parsed.keep:
            delete([work] if temporary else bench.made)
    return 1 if any(section.error for section in results) else 0


if __name__ == "__main__":
    sys.exit(main())
