#!/usr/bin/env python3
"""Measure the pages of large plans: time to write them, time to open them, size.

    python scripts/measure_pages.py
    python scripts/measure_pages.py --only llama2-13b --keep pages

The checkpoints are those of scripts/measure_planning.py: headers and holes. Opening is from the
navigation to the moment when everything is drawn and the tensors are unpacked, in Chromium without
a window; the slowest of three is told, and must take
less than 2 s.

A Markdown table goes to stdout.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarking.processes import lazymerge_environment, run_measured
from browsing import browser, find_browser
from measure_planning import MODELS, write_checkpoint

MIB = 1 << 20
OPENINGS = 3

MOST_SECONDS = 2.0
"""To open a page."""

RECIPE = """\
merge_method: ties
base_model: {folder}/0
models:
  - model: {folder}/1
    parameters: {{weight: [0.2, 0.6, 0.4], density: 0.5}}
  - model: {folder}/2
    parameters: {{weight: 0.3, density: 0.5}}
dtype: bfloat16
"""


def write_page(name: str, folder: Path, page: Path) -> str:
    """Plans a merge of three models of a kind with its page; the first cells of its row."""
    tensors, config = MODELS[name]
    for number in range(3):
        write_checkpoint(folder / str(number), tensors, config)
    recipe = folder / "recipe.yml"
    recipe.write_text(RECIPE.format(folder=folder))
    command = [sys.executable, "-m", "lazymerge", "plan", str(recipe), "--dry-run"]
    environment = lazymerge_environment()
    without = run_measured(command, environment, folder / "log")
    run = run_measured([*command, "--html", str(page)], environment, folder / "log")
    return (
        f"| {name} | {len(tensors):,} | {without.wall_s:.1f} s | {run.wall_s:.1f} s "
        f"| {run.peak_rss_bytes / MIB:.0f} MiB | {page.stat().st_size / 1e6:.2f} MB |"
    )


def slowest_opening(page: Path, program: str) -> float:
    """Seconds until the page is ready, in a browser that has not seen it."""
    seconds = []
    for _ in range(OPENINGS):
        with browser(program) as tab:
            seconds.append(tab.open(page))
            assert not tab.complaints, tab.complaints
    return max(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--keep", type=Path, help="folder that the pages are left in")
    arguments = parser.parse_args()
    program = find_browser()
    print("| three models | tensors | plan | with the page | peak memory | page | opens in |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        pages = arguments.keep or Path(scratch)
        pages.mkdir(parents=True, exist_ok=True)
        for name in arguments.only:
            page = pages / f"{name}.html"
            row = write_page(name, Path(scratch, name), page)
            seconds = None if program is None else slowest_opening(page, program)
            opens = "no browser" if seconds is None else f"{seconds:.2f} s"
            print(f"{row} {opens} |", flush=True)
            if seconds is not None and seconds > MOST_SECONDS:
                raise SystemExit(f"{page.name} must open within {MOST_SECONDS:.0f} s")


if __name__ == "__main__":
    main()
