#!/usr/bin/env python3
"""How a 671B merge would run on 1 to 256 workers of a cluster: simulated, with costs measured here.

    python scripts/simulate_cluster.py
    python scripts/simulate_cluster.py --workers 1,8,64 --storage 1,20

What the command and Dask's scheduler do for a group of tensors is measured by having them do it:
the real run, its journal and its renames, a real scheduler with TLS in a process of its own, and
workers that wait in place of merging. Processor time is counted and not time on the clock, so other
programs do little harm. What a group costs a worker beside its bytes is measured on the smallest
group there is. Models are headers and holes.

Three tables go to stdout: the costs; the run by them, for every number of workers and rate of the
storage; and runs that were both simulated and done, by workers that wait.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest import mock

import measure_planning
from benchmarking.cluster_model import COORDINATOR, SCHEDULER, STORAGE, Costs, simulate
from benchmarking.dask_processes import (
    START_SECONDS,
    address_in,
    dask_process,
    write_certificates,
)
from benchmarking.pretended_groups import pretend

if TYPE_CHECKING:
    from lazymerge.cluster.group import Division
    from lazymerge.engine.plan import Plan
    from lazymerge.output.layout import Placement

MIB = 1 << 20
GB = 1_000_000_000

PART_LAYERS = 5
"""Of the model by which giving groups away is measured: two with experts, 3,200 tensors."""

THREADS = 2
"""Of a worker."""

MANY_WORKERS = (256, 512, 1024, 2048)
"""Of runs that ask where the limit lies when storage is none."""

SETTLED_SECONDS, WATCHED_SECONDS = 4.0, 12.0
"""How long workers that finish nothing are left alone, and then watched."""

BUSY_S = 0.03
"""What a group may take of this machine's processors when runs are simulated and done: all there is
on two of them, workers included, is three times as much as measured for 64."""


class Enough(Exception):
    """Everything is measured."""


@dataclass(frozen=True, slots=True)
class Loop:
    """What giving groups away until all are made took.

    coordinator_s, scheduler_s: of a processor.
    """

    workers: int
    groups: int
    tensors: int
    seconds: float
    coordinator_s: float
    scheduler_s: float

    @property
    def row(self) -> str:
        return (
            f"| {self.workers} | {self.groups:,} | {self.tensors / self.groups:.0f} "
            f"| {self.coordinator_s / self.groups * 1e3:.1f} ms "
            f"| {self.scheduler_s / self.groups * 1e3:.1f} ms "
            f"| {self.groups / self.seconds:.0f} |"
        )


def make_model(folder: Path, layers: int | None) -> Path:
    """Three models of the mixture of experts, and a recipe that merges them. layers: None: all."""
    tensors, config = measure_planning.MODELS["moe-671b"]
    if layers is not None:
        kept = tuple(f"model.layers.{number}." for number in range(layers))
        tensors = [t for t in tensors if ".layers." not in t[0] or t[0].startswith(kept)]
        config = {**config, "num_hidden_layers": layers}
    for number in range(3):
        measure_planning.write_checkpoint(folder / str(number), tensors, config)
    recipe = folder / "recipe.yml"
    text = measure_planning.RECIPE.format(method="task_arithmetic", folder=folder)
    recipe.write_text(text)
    return recipe


def planned(recipe: Path) -> Plan:
    import lazymerge as lm

    return lm.plan(recipe, memory="1GiB", workers=2)


def divided(plan: Plan, workers: int, folder: Path) -> Division:
    from lazymerge.cluster.group import Division, Terms
    from lazymerge.engine.stamps import stamps_of

    terms = Terms("token", str(folder), None, THREADS, False, False, True, {})
    return Division(plan, plan.tasks, workers, stamps_of(plan), terms)


def sizes_of(division: Division) -> list[tuple[int, int]]:
    """Bytes and tensors of every group."""
    return [
        (division.work_bytes(number), len(division.names(number)))
        for number in range(len(division))
    ]


@contextmanager
def cluster(workers: int, scratch: Path) -> Iterator[tuple[str, int]]:
    """A scheduler, and workers that wait; gives its address, and its process's id."""
    certificates = write_certificates(scratch)
    with mock.patch.dict(os.environ, certificates):
        import dask
        from distributed import Client

        dask.config.refresh()
        file = scratch / "address"
        file.unlink(missing_ok=True)
        log = scratch / "scheduler.log"
        with dask_process(["scheduler", str(file)], certificates, log) as scheduler:
            address = address_in(file)
            command = ["workers", address, str(workers)]
            with dask_process(command, certificates, scratch / "workers.log"):
                with Client(address, timeout=START_SECONDS, set_as_default=False) as client:
                    client.wait_for_workers(workers, timeout=START_SECONDS)
                yield address, scheduler


def run_waiting(
    plan: Plan,
    scratch: Path,
    workers: int,
    fixed_s: float,
    rate: float,
    giving: Callable[[Any, Callable[[], None], int], None],
) -> None:
    """The real run, with workers that wait: fixed_s for every group, and by its bytes at that rate.

    giving: takes the place of Coordinator.to_the_end; is given the scheduler's process besides.
    """
    from lazymerge.cluster import coordinator
    from lazymerge.cluster.connection import parse_address
    from lazymerge.cluster.workforce import DaskWorkforce
    from lazymerge.engine import preparing
    from lazymerge.engine.run import run_plan
    from lazymerge.output import writer

    with ExitStack() as stack:
        address, scheduler = stack.enter_context(cluster(workers, scratch))
        patches: list[tuple[Any, str, Any]] = [
            (coordinator, "make_group", partial(pretend, fixed_s, rate)),
            (
                coordinator.Coordinator,
                "to_the_end",
                lambda run, check: giving(run, check, scheduler),
            ),
            (writer, "_preallocate", os.ftruncate),  # a terabyte of holes
            (preparing, "check_disk", lambda *given, **named: None),
        ]
        for place, name, value in patches:
            stack.enter_context(mock.patch.object(place, name, value))
        workforce = DaskWorkforce(parse_address(address))
        run_plan(plan, scratch / "out", overwrite=True, fsync=False, workforce=workforce)


def loop(
    plan: Plan, scratch: Path, workers: int, *, fixed_s: float = 0.0, rate: float = 1e18
) -> Loop:
    """Gives all groups of a plan to workers that wait, as run_waiting says."""
    from lazymerge.cluster import coordinator

    to_the_end = coordinator.Coordinator.to_the_end
    found: list[Loop] = []

    def timed(run: Any, check: Callable[[], None], scheduler: int) -> None:
        before = processor_seconds(os.getpid()), processor_seconds(scheduler)
        began = time.perf_counter()
        to_the_end(run, check)
        found.append(
            Loop(
                workers,
                run._submitted,
                len(plan.tasks),
                time.perf_counter() - began,
                processor_seconds(os.getpid()) - before[0],
                processor_seconds(scheduler) - before[1],
            )
        )

    run_waiting(plan, scratch, workers, fixed_s, rate, timed)
    return found[0]


def watched(plan: Plan, scratch: Path, workers: int) -> tuple[float, float]:
    """What a worker that has a group and does not finish it costs the command and the scheduler:
    seconds of a processor, every second."""
    from lazymerge.cluster import coordinator

    to_the_end = coordinator.Coordinator.to_the_end
    marks: list[tuple[float, float, float]] = []

    def ended(run: Any, check: Callable[[], None], scheduler: int) -> None:
        began = time.monotonic()

        def check_clock() -> None:
            now = time.monotonic()
            if len(marks) == 2 or now < began + SETTLED_SECONDS + len(marks) * WATCHED_SECONDS:
                return
            marks.append((now, processor_seconds(os.getpid()), processor_seconds(scheduler)))
            if len(marks) == 2:
                raise Enough

        to_the_end(run, check_clock)

    with suppress(Enough):
        run_waiting(plan, scratch, workers, 3600.0, 1e18, ended)
    (began, *before), (stopped, *after) = marks
    command, scheduler = (
        (y - x) / (stopped - began) / workers for x, y in zip(before, after, strict=True)
    )
    return command, scheduler


def processor_seconds(process: int) -> float:
    """User and system time of a process."""
    import psutil

    times = psutil.Process(process).cpu_times()
    return float(times.user + times.system)


def worker_costs(division: Division, number: int, folder: Path) -> float:
    """Seconds of a processor that a group takes in a worker."""
    from lazymerge.cluster.destination import token_path
    from lazymerge.cluster.worker import make_group
    from lazymerge.output.writer import PARTIAL_SUFFIX

    group = division.group(number)
    shard = folder / (group.file + PARTIAL_SUFFIX)
    token = token_path(folder, group.token)
    token.parent.mkdir(parents=True, exist_ok=True)
    token.touch()
    with shard.open("wb") as stream:
        stream.truncate(group.file_bytes)
    seconds = []
    try:
        for _ in range(5):
            began = time.process_time()
            make_group(group)
            seconds.append(time.process_time() - began)
    finally:
        shard.unlink()
    return median(seconds)


def smallest_and_middle(division: Division) -> tuple[int, int]:
    """Numbers of the group that reads and writes least, and of one of the usual size."""
    numbers = sorted(range(len(division)), key=division.work_bytes)
    return numbers[0], numbers[len(numbers) // 2]


def division_rows(plan: Plan, counts: Sequence[int], folder: Path) -> Iterator[str]:
    """What is done for all groups before the first is given away, and for each of them."""
    yield "| workers | groups | bytes of each | dividing | one put together and packed | packed |"
    yield "|---|---|---|---|---|---|"
    for workers in counts:
        began = time.process_time()
        division = divided(plan, workers, folder)
        divided_s = time.process_time() - began
        chosen = range(0, len(division), max(1, len(division) // 50))
        began = time.process_time()
        packed = [len(pickle.dumps(division.group(number))) for number in chosen]
        each_s = (time.process_time() - began) / len(packed)
        work = sum(size for size, _ in sizes_of(division)) / len(division)
        yield (
            f"| {workers} | {len(division):,} | {work / GB:.2f} GB | {divided_s:.1f} s "
            f"| {each_s * 1e3:.1f} ms | {median(packed) / 1000:.0f} kB |"
        )


def measured_costs(
    plan: Plan, scratch: Path, counts: Sequence[int], show: Callable[[str], None]
) -> Costs:
    """What the simulation goes by. Shows what was measured."""
    show("| workers | groups | tensors of each | command | scheduler | groups a second |")
    show("|---|---|---|---|---|---|")
    loops = []
    for workers in counts:
        loops.append(loop(plan, scratch, workers))
        show(loops[-1].row)
    few, many = (pick(loops, key=lambda one: one.tensors / one.groups) for pick in (min, max))
    slope = (many.coordinator_s / many.groups - few.coordinator_s / few.groups) / (
        many.tensors / many.groups - few.tensors / few.groups
    )
    tensor_s = max(0.0, slope)
    group_s = few.coordinator_s / few.groups - tensor_s * few.tensors / few.groups
    longest = max(loops, key=lambda one: one.groups)
    scheduler_s = longest.scheduler_s / longest.groups
    most = max(counts)
    watch = watched(plan, scratch, most)
    show("")
    division = divided(plan, most, scratch / "worker")
    small, usual = smallest_and_middle(division)
    fixed_s = worker_costs(division, small, scratch / "worker")
    usual_s = worker_costs(division, usual, scratch / "worker")
    size = division.work_bytes(usual)
    rate = THREADS * size / (usual_s - fixed_s)
    costs = Costs(group_s, tensor_s, scheduler_s, *watch, fixed_s, rate)
    show(f"- the command: {group_s * 1e3:.1f} ms a group, {tensor_s * 1e6:.0f} us a tensor beside")
    show(f"- the scheduler: {scheduler_s * 1e3:.1f} ms a group")
    show(
        f"- {most} workers that finish nothing: the command {watch[0] * most:.1%} of a processor, "
        f"the scheduler {watch[1] * most:.1%}"
    )
    show(
        f"- a worker: {fixed_s * 1e3:.1f} ms a group; beside, {usual_s - fixed_s:.2f} s of a "
        f"processor for {size / GB:.2f} GB, which is {rate / GB:.1f} GB/s with {THREADS} threads"
    )
    return costs


def simulated_rows(
    plan: Plan, costs: Costs, counts: Sequence[int], rates: Sequence[float], folder: Path
) -> Iterator[str]:
    """The run on every number of workers."""
    yield (
        "| workers | storage | groups | time | speed-up | command busy | scheduler busy "
        "| storage busy | what limits |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    alone = simulate(sizes_of(divided(plan, 1, folder)), 1, costs).seconds
    for workers in counts:
        groups = sizes_of(divided(plan, workers, folder))
        for rate in rates:
            run = simulate(groups, workers, costs, rate)
            yield (
                f"| {workers} | {rate / GB:g} GB/s | {len(groups):,} | {clock(run.seconds)} "
                f"| {alone / run.seconds:.1f} | {run.busy[COORDINATOR]:.1%} "
                f"| {run.busy[SCHEDULER]:.1%} | {run.busy[STORAGE]:.0%} | {run.busiest} |"
            )


def clock(seconds: float) -> str:
    """A time, in the unit that people use for it."""
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def limit_rows(plan: Plan, costs: Costs, folder: Path) -> Iterator[str]:
    """What comes after the storage: runs with one that has no limit."""
    yield "| workers | groups | time | moved | command busy | scheduler busy | what limits |"
    yield "|---|---|---|---|---|---|---|"
    for workers in MANY_WORKERS:
        groups = sizes_of(divided(plan, workers, folder))
        run = simulate(groups, workers, costs)
        moved = sum(size for size, _ in groups) / run.seconds
        yield (
            f"| {workers:,} | {len(groups):,} | {clock(run.seconds)} | {moved / GB:,.0f} GB/s "
            f"| {run.busy[COORDINATOR]:.0%} | {run.busy[SCHEDULER]:.0%} | {run.busiest} |"
        )


def checked_rows(plan: Plan, scratch: Path, costs: Costs, counts: Sequence[int]) -> Iterator[str]:
    """Runs by workers that wait, and the same simulated."""
    from dataclasses import replace

    yield "| workers | groups | each takes | simulated | done |"
    yield "|---|---|---|---|---|"
    for workers in counts:
        groups = sizes_of(divided(plan, workers, scratch))
        mean = sum(size for size, _ in groups) / len(groups)
        each_s = max(1.0, workers * BUSY_S)  # the machine has to carry all of it
        assumed = replace(costs, worker_rate=mean / each_s)
        done = loop(plan, scratch, workers, fixed_s=costs.worker_group_s, rate=mean / each_s)
        run = simulate(groups, workers, assumed)
        yield (
            f"| {workers} | {len(groups):,} | {each_s:.1f} s | {run.seconds:.1f} s "
            f"| {done.seconds:.1f} s |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--workers", default="1,8,64,256", metavar="N,N")
    parser.add_argument(
        "--storage", default="1,5,20,100", metavar="N,N", help="GB/s of all together"
    )
    parser.add_argument("--tried", default="1,8,64", metavar="N,N", help="workers that are started")
    parsed = parser.parse_args(arguments)
    counts, tried = (numbers(text) for text in (parsed.workers, parsed.tried))
    rates = [rate * GB for rate in numbers(parsed.storage)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report(folder, counts, tried, rates)
    return 0


def report(
    folder: Path, counts: Sequence[int], tried: Sequence[int], rates: Sequence[float]
) -> None:
    """Prints everything."""
    from lazymerge.engine.baseline import peak_resident_bytes

    show = partial(print, flush=True)
    recipe = make_model(folder / "whole", None)
    began = time.process_time()
    plan = planned(recipe)
    planning_s = time.process_time() - began
    peak = peak_resident_bytes()
    part = planned(make_model(folder / "part", PART_LAYERS))
    show(
        f"{len(plan.tasks):,} tensors, {sum(t.size_bytes for t in all_placements(plan)) / 2e9:.0f} "
        f"billion parameters, {plan.bytes_read / GB:,.0f} GB read and "
        f"{plan.bytes_written / GB:,.0f} GB written. Planning: {planning_s:.1f} s of a "
        f"processor, {peak / MIB:.0f} MiB.\n"
    )
    for row in division_rows(plan, counts, folder):
        show(row)
    show("")
    costs = measured_costs(part, folder, tried, show)
    show("")
    for row in simulated_rows(plan, costs, counts, rates, folder):
        show(row)
    show("")
    for row in limit_rows(plan, costs, folder):
        show(row)
    show("")
    for row in checked_rows(part, folder, costs, tried):
        show(row)


def all_placements(plan: Plan) -> Iterator[Placement]:
    for shard in plan.shards:
        yield from shard.tensors


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
