#!/usr/bin/env python3
"""Measure merges on clusters of this machine's own, against the same merge without one.

    python scripts/measure_cluster.py [--size 1.1b] [--rounds 3] [--workers 1,2]

A base and two models, page cache warm. A plain run and `--cluster local:N` take turns; processor
time is that of all processes. What a cluster takes beside the merge is measured by starting and
ending one that is given nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarking.inputs import (
    make_checkpoints,
    recipe_document,
    recipe_inputs,
    tensor_bytes,
    warm_page_cache,
    write_recipe,
)
from benchmarking.processes import Run, lazymerge_environment, run_measured

MIB = 1 << 20
MEMORY = "400MiB"


def merge(recipe: Path, folder: Path, cluster: str) -> tuple[Run, int, int]:
    """One run, the highest peak of the processes that merged, and what was planned of it.

    cluster: empty: none.
    """
    command = [sys.executable, "-m", "lazymerge", "run", str(recipe), "-o", str(folder / "out")]
    command += [
        "--overwrite",
        "--no-fsync",
        "--max-shard-size",
        "500MB",
        "--memory",
        MEMORY,
        "--json",
    ]
    if cluster:
        command += ["--cluster", cluster]
    run = run_measured(command, lazymerge_environment(), folder / "log")
    found = json.loads(run.stdout)
    planned = found["cluster"]["projected_bytes"] if cluster else projected(recipe)
    return run, int(found["measured_bytes"]), int(planned)


def projected(recipe: Path) -> int:
    """What `plan` says of a run in one process."""
    command = [
        sys.executable,
        "-m",
        "lazymerge",
        "plan",
        str(recipe),
        "--dry-run",
        "--memory",
        MEMORY,
        "--json",
    ]
    done = subprocess.run(
        command, env=lazymerge_environment(), capture_output=True, text=True, check=True
    )
    return int(json.loads(done.stdout)["memory"]["projected_bytes"])


def cluster_rows(workers: int, rounds: int) -> list[str]:
    """What starting and ending a cluster takes, in processes of their own."""
    command = [sys.executable, __file__, "--start", str(workers)]
    found = []
    for _ in range(rounds):
        done = subprocess.run(
            command, env=lazymerge_environment(), capture_output=True, text=True, check=True
        )
        found.append(json.loads(done.stdout))
    middle = {phase: median(times[phase] for times in found) for phase in found[0]}
    return [
        f"| {workers} | " + " | ".join(f"{seconds:.2f} s" for seconds in middle.values()) + " |"
    ]


def start(workers: int) -> dict[str, float]:
    """Seconds of the parts of a cluster that is given nothing."""
    began = time.perf_counter()
    import distributed  # noqa: F401
    from lazymerge.cluster.connection import check_versions, connected, parse_address
    from lazymerge.cluster.worker import versions_here

    times = {"importing Dask": time.perf_counter() - began}
    began = time.perf_counter()
    with connected(parse_address(f"local:{workers}"), threads=None, device="cpu") as client:
        times["starting"] = time.perf_counter() - began
        began = time.perf_counter()
        check_versions(client, versions_here())
        times["versions"] = time.perf_counter() - began
        began = time.perf_counter()
    times["ending"] = time.perf_counter() - began
    return times


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", default="1.1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", default="1,2", metavar="N,N")
    parser.add_argument("--folder", type=Path, help="keep the models here for the next time")
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.start:
        print(json.dumps(start(parsed.start)))
        return 0
    counts = [int(number) for number in parsed.workers.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        report(parsed.folder or Path(temporary), parsed.size, counts, parsed.rounds)
    return 0


def report(folder: Path, size: str, counts: Sequence[int], rounds: int) -> None:
    """Prints the tables."""
    checkpoints, _ = make_checkpoints(folder, size, ("base", "a", "b"))
    document = recipe_document("task_arithmetic", list(checkpoints.values()))
    recipe = folder / "recipe.yml"
    write_recipe(recipe, document)
    inputs = recipe_inputs(document)
    moved = tensor_bytes(*inputs)
    ways = ["", *(f"local:{count}" for count in counts)]
    runs: dict[str, list[tuple[Run, int, int]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            warm_page_cache(inputs)
            runs[way].append(merge(recipe, folder, way))
    print("| run | wall | processors | MB/s read | peak of a merging process | projected |")
    print("|---|---|---|---|---|---|")
    for way, found in runs.items():
        walls = [run.wall_s for run, _, _ in found]
        wall = median(walls)
        spread = f"{min(walls):.1f}-{max(walls):.1f}"
        peak = max(peak for _, peak, _ in found)
        planned = max(planned for _, _, planned in found)
        print(
            f"| {way or 'one process'} | {wall:.2f} s ({spread}) "
            f"| {median(run.cpu_s for run, _, _ in found):.1f} s | {moved / wall / 1e6:.0f} "
            f"| {peak / MIB:.0f} MiB | {planned / MIB:.0f} MiB |",
            flush=True,
        )
    print("\n| workers | importing Dask | starting | versions | ending |")
    print("|---|---|---|---|---|")
    for count in counts:
        print("\n".join(cluster_rows(count, rounds)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
