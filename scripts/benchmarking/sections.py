"""The benchmarks. Each fills a Section as it goes, so that what was measured survives an error."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial

from lazymerge.methods import METHODS

from benchmarking.inputs import (
    ROLES,
    caches_can_be_dropped,
    cool_page_cache,
    tensor_files,
)
from benchmarking.processes import (
    BenchError,
    lazymerge_environment,
    offline_environment,
    run_measured,
)
from benchmarking.programs import BEST_FLAGS
from benchmarking.report import (
    Claim,
    Section,
    distance_from_line,
    mebibytes,
    seconds,
    speed_claim,
)
from benchmarking.turns import Contest, Contestant
from benchmarking.workplace import Merge, Workplace

LINEAR_METHODS = ("linear", "task_arithmetic", "slerp")
MERGEKIT_TIMES = {"linear": 5.0, "task_arithmetic": 5.0, "slerp": 5.0, "ties": 15.0}
"""How many times faster than mergekit each method must be."""
METHOD_TIMES = {"della": 6.0, "dare_ties": 9.0, "karcher": 8.0, "model_stock": 2.5}
"""The same of methods that were added later."""
SLOPE_TIMES = 8.0
SD_MECHA_TIMES = 9.0
STARTUP_S = 0.3
COLD_FRACTION, COLD_AIM = 0.6, 0.85
LINE_TOLERANCE = 0.1
"""Farthest that a time may lie from a straight line through the times, as a fraction of it."""
FLAT_BYTES = 32 << 20
"""What may lie between the lowest and the highest peak of a memory use that is called flat."""

MERGEKIT = "mergekit 0.1.5"


def startup(bench: Workplace, section: Section) -> None:
    """`lazymerge --help`."""
    section.title = "Start-up"
    help_command = [sys.executable, "-m", "lazymerge", "--help"]
    contest = bench.take_turns(
        [
            Contestant("lazymerge --help", help_command, lazymerge_environment()),
            Contestant("python -c pass", [sys.executable, "-c", "pass"], offline_environment()),
        ],
        "start-up",
    )
    section.add_walls("start-up", contest)
    log = bench.work / "import-times.log"
    run_measured(
        [sys.executable, "-X", "importtime", "-m", "lazymerge", "--help"],
        lazymerge_environment(),
        log,
    )
    torch = imports(log.read_text(encoding="utf-8", errors="replace"), "torch")
    wall_s = contest.wall_s("lazymerge --help")
    section.claims.append(
        Claim(
            "start-up",
            "`--help`",
            f"{wall_s:.3f} s, torch {'' if torch else 'not '}imported",
            f"{contest.wall_s('python -c pass'):.3f} s for python -c pass",
            must_be=f"under {STARTUP_S} s, no torch",
            met=wall_s < STARTUP_S and not torch,
        )
    )


def imports(import_times: str, module: str) -> bool:
    """Whether what `python -X importtime` printed names the module."""
    return re.search(rf"\|\s+{re.escape(module)}$", import_times, re.MULTILINE) is not None


def mergekit(bench: Workplace, section: Section) -> None:
    """Wall time against mergekit."""
    section.title = f"Against {MERGEKIT}, {bench.size}, both start-ups included"
    inputs = bench.checkpoints(bench.size)
    for method, times in MERGEKIT_TIMES.items():
        merge = bench.merge(method, inputs, bench.size)
        contest = bench.take_turns([bench.lazymerge(merge), bench.mergekit(merge)], method)
        section.add_walls(method, contest)
        section.claims.append(
            _speed_claim(f"{MERGEKIT}, wall time", method, contest, "mergekit", times)
        )
        bench.mergekit_contests[method] = contest


def methods(bench: Workplace, section: Section) -> None:
    """Wall time against mergekit of methods that are random, iterate, or rank."""
    section.title = f"More methods against {MERGEKIT}, {bench.size}"
    inputs = bench.checkpoints(bench.size)
    for method, times in METHOD_TIMES.items():
        merge = bench.merge(method, inputs, bench.size)
        contest = bench.take_turns([bench.lazymerge(merge), bench.mergekit(merge)], method)
        section.add_walls(method, contest)
        section.claims.append(
            _speed_claim(f"{MERGEKIT}, wall time", method, contest, "mergekit", times)
        )


def slope(bench: Workplace, section: Section) -> None:
    """Extra seconds per extra GB between two sizes, against mergekit."""
    section.title = f"Extra seconds per extra GB, from {bench.size} to {bench.large}"
    section.notes.append(
        "Two checkpoints each, so that those of the larger size stay in the page cache beside "
        "what mergekit holds. GB are 1e9 bytes of inputs and output."
    )
    inputs = {size: bench.checkpoints(size, ROLES[:2]) for size in (bench.size, bench.large)}
    for method in LINEAR_METHODS:
        merges = {size: bench.merge(method, paths, f"{size}-two") for size, paths in inputs.items()}
        contest = bench.take_turns(
            [
                contestant
                for size, merge in merges.items()
                for contestant in (
                    bench.lazymerge(merge, name=f"lazymerge {size}"),
                    bench.mergekit(merge, name=f"mergekit {size}"),
                )
            ],
            method,
        )
        section.add_walls(method, contest)
        extra_gb = (merges[bench.large].moved_bytes - merges[bench.size].moved_bytes) / 1e9
        slopes = {}
        for program in ("lazymerge", "mergekit"):
            names = [f"{program} {size}" for size in (bench.large, bench.size)]
            if all(name in contest.runs for name in names):
                large_s, small_s = map(contest.wall_s, names)
                slopes[program] = (large_s - small_s) / extra_gb
        section.claims.append(slope_claim(method, slopes))


def slope_claim(method: str, slopes: dict[str, float]) -> Claim:
    ours, theirs = slopes["lazymerge"], slopes.get("mergekit")
    ratio = theirs / ours if theirs is not None and ours > 0 else None
    return Claim(
        f"{MERGEKIT}, slope",
        method,
        f"{ours:.3f} s/GB",
        "failed" if theirs is None else f"{theirs:.3f} s/GB",
        ratio,
        f"at least {SLOPE_TIMES:g}x",
        None if ratio is None else ratio >= SLOPE_TIMES,
    )


def copy(bench: Workplace, section: Section) -> None:
    """The time from first block to last against reading and writing as much with cat and cp."""
    section.title = f"Against cat and cp of as many bytes, {bench.size}"
    merge = bench.merge("task_arithmetic", bench.checkpoints(bench.size), bench.size)
    output = bench.work / "out-copy"
    copied = shlex.join(map(str, tensor_files(merge.inputs[:1])))
    script = (
        f"cat {shlex.join(map(str, tensor_files(merge.inputs)))} > /dev/null && "
        f"mkdir {shlex.quote(str(output))} && cp {copied} {shlex.quote(str(output))}"
    )
    command = ["sh", "-c", script]
    copying = Contestant("cat and cp", command, offline_environment(), merge.inputs, output)
    contest = bench.take_turns([bench.lazymerge(merge), copying], "cat and cp")
    section.add_walls(merge.method, contest)
    loop_s, copy_s = contest.loop_s("lazymerge"), contest.wall_s("cat and cp")
    section.claims.append(
        Claim(
            "`cat` of the inputs, then `cp` of the output's size",
            merge.method,
            f"{seconds(loop_s)} first block to last",
            seconds(copy_s),
            copy_s / loop_s,
            "not slower",
            loop_s <= copy_s,
        )
    )
    section.notes.append("cp copies the base, which is as large as the output and is cached.")


def sd_mecha(bench: Workplace, section: Section) -> None:
    """Wall time against sd-mecha."""
    section.title = f"Against sd-mecha 1.1.8, {bench.size}, float32 arithmetic"
    section.notes.append(
        "sd-mecha gets the single-file checkpoints and finds out by itself what model they are."
    )
    inputs = bench.checkpoints(bench.size)
    for method in ("task_arithmetic", "slerp"):
        merge = bench.merge(method, inputs, bench.size)
        contest = bench.take_turns([bench.lazymerge(merge), bench.sd_mecha(merge)], method)
        section.add_walls(method, contest)
        section.claims.append(
            _speed_claim("sd-mecha 1.1.8", method, contest, "sd-mecha", SD_MECHA_TIMES)
        )


def peers(bench: Workplace, section: Section) -> None:
    """Wall time against mergekit's best options and mergekitty's parallel executor."""
    section.title = f"Against the best options of peers, {bench.size}"
    section.notes.append(f"mergekit with {' '.join(BEST_FLAGS)}; mergekitty --executor parallel.")
    inputs = bench.checkpoints(bench.size)
    made: dict[str, Callable[[Merge], Contestant]] = {
        f"{MERGEKIT}, best options": lambda merge: bench.mergekit(merge, *BEST_FLAGS),
        "mergekitty, parallel executor": lambda merge: bench.mergekitty(
            merge, "--executor", "parallel"
        ),
    }
    for method in ("ties", "task_arithmetic"):
        merge = bench.merge(method, inputs, bench.size)
        contestants = [bench.lazymerge(merge)]
        names: dict[str, str] = {}
        for title, make in made.items():
            try:
                contestants.append(make(merge))
                names[title] = contestants[-1].name
            except BenchError as error:
                section.claims.append(_not_installed(title, method, error))
        contest = bench.take_turns(contestants, method)
        section.add_walls(method, contest)
        section.claims += [
            _speed_claim(title, method, contest, name, 1.0) for title, name in names.items()
        ]


def memory(bench: Workplace, section: Section) -> None:
    """Peak resident memory of every method at the limit."""
    section.title = f"Peak memory at --memory {bench.memory}, {bench.size}"
    section.notes.append(
        "MiB, the highest of all runs. mergekit's is what the section against it measured: pages "
        "of mapped files included, and in brackets without them."
    )
    inputs = bench.checkpoints(bench.size)
    for method in METHODS:
        try:
            merge = bench.merge(method, inputs, bench.size)
        except BenchError as error:
            section.notes.append(f"{method} was not measured: {error}")
            continue
        contest = bench.take_turns([bench.lazymerge(merge)], method)
        section.add_walls(method, contest)
        plan = json.loads(contest.runs["lazymerge"][0].stdout)["memory"]
        peak_bytes = contest.peak_rss_bytes("lazymerge")
        theirs = bench.mergekit_contests.get(method)
        shown, ratio = "", None
        if theirs is not None and "mergekit" in theirs.runs:
            their_bytes = theirs.peak_rss_bytes("mergekit")
            anonymous = mebibytes(theirs.peak_anonymous_bytes("mergekit"))
            shown = f"{MERGEKIT}: {mebibytes(their_bytes)} ({anonymous})"
            ratio = their_bytes / peak_bytes
        section.claims.append(
            Claim(
                f"peak memory at --memory {bench.memory}",
                method,
                f"{mebibytes(peak_bytes)} of {mebibytes(plan['projected_bytes'])} projected",
                shown,
                ratio,
                f"under {mebibytes(plan['limit_bytes'])}",
                peak_bytes < plan["limit_bytes"],
            )
        )


def cold(bench: Workplace, section: Section) -> None:
    """The rate at which inputs that are not in the page cache are read, against cat."""
    section.title = f"Inputs not in the page cache, {bench.size}"
    drop_all = caches_can_be_dropped()
    section.notes.append(
        "The page cache was dropped before each run, and what Python and torch need read back."
        if drop_all
        else "/proc/sys/vm/drop_caches is not writable here: the system was asked to forget the "
        "inputs alone (posix_fadvise)."
    )
    merge = bench.merge("task_arithmetic", bench.checkpoints(bench.size), bench.size)
    prepare = partial(cool_page_cache, drop_all=drop_all)
    files = shlex.join(map(str, tensor_files(merge.inputs)))
    cat = Contestant(
        "cat",
        ["sh", "-c", f"cat {files} > /dev/null"],
        offline_environment(),
        merge.inputs,
        prepare=prepare,
    )
    contest = bench.take_turns([bench.lazymerge(merge, prepare=prepare), cat], "cold")
    section.add_walls(merge.method, contest)
    gigabytes = merge.input_bytes / 1e9
    ours = gigabytes / contest.loop_s("lazymerge")
    theirs = gigabytes / contest.wall_s("cat")
    section.claims.append(
        Claim(
            "cold cache: rate of reading against `cat`",
            merge.method,
            f"{ours:.2f} GB/s first block to last",
            f"{theirs:.2f} GB/s",
            ours / theirs,
            f"at least {COLD_FRACTION:.0%}, aim {COLD_AIM:.0%}",
            ours >= COLD_FRACTION * theirs,
        )
    )


def growth(bench: Workplace, section: Section) -> None:
    """Time and memory over sizes and over numbers of models."""
    section.title = "Growth of time and memory, task_arithmetic"
    section.columns = ("what", "GB moved", "wall s", "first block to last s", "s/GB", "peak MiB")
    section.notes.append(
        "GB are 1e9 bytes of inputs and output. Sizes: a base and one model each. Linear means: "
        "no time from first block to last is farther from a straight line through all than the "
        "bound. Flat means: the peaks differ by no more than the bound."
    )
    roles = ["base", *(f"m{number}" for number in range(1, max(bench.models)))]
    small = bench.checkpoints(bench.small, roles)
    by_count = {
        f"{count} models of {bench.small}": bench.merge(
            "task_arithmetic", small[:count], f"{bench.small}-of-{count}"
        )
        for count in bench.models
    }
    _grow(bench, section, "number of models", by_count)
    bench.forget(small[1:])
    by_size = {
        size: bench.merge("task_arithmetic", bench.checkpoints(size, ROLES[:2]), f"{size}-two")
        for size in (bench.small, bench.size, bench.large)
    }
    _grow(bench, section, "size", by_size)


def _grow(bench: Workplace, section: Section, over: str, merges: dict[str, Merge]) -> None:
    """Measure the merges against each other; add a row for each and two claims."""
    contest = bench.take_turns(
        [bench.lazymerge(merge, name=label) for label, merge in merges.items()], f"growth by {over}"
    )
    section.add_runs(f"growth by {over}", contest)
    gigabytes = [merge.moved_bytes / 1e9 for merge in merges.values()]
    loops_s = [contest.loop_s(label) for label in merges]
    peaks = [contest.peak_rss_bytes(label) for label in merges]
    for label, moved, loop_s, peak in zip(merges, gigabytes, loops_s, peaks, strict=True):
        walls = (f"{contest.wall_s(label):.2f}", f"{loop_s:.2f}", f"{loop_s / moved:.3f}")
        section.rows.append((label, f"{moved:.2f}", *walls, mebibytes(peak)))
    distance = distance_from_line(gigabytes, loops_s)
    section.claims += [
        Claim(
            f"growth with {over}: time",
            "task_arithmetic",
            f"at most {distance:.0%} from a line",
            must_be=f"linear in bytes, within {LINE_TOLERANCE:.0%}",
            met=distance <= LINE_TOLERANCE,
        ),
        Claim(
            f"growth with {over}: memory",
            "task_arithmetic",
            f"{mebibytes(min(peaks))} to {mebibytes(max(peaks))} MiB",
            must_be=f"flat, within {mebibytes(FLAT_BYTES)} MiB",
            met=max(peaks) - min(peaks) <= FLAT_BYTES,
        ),
    ]


def workers(bench: Workplace, section: Section) -> None:
    """Time from first block to last by number of workers."""
    section.title = f"Workers, {bench.size}"
    inputs = bench.checkpoints(bench.size)
    for method in ("task_arithmetic", "ties"):
        merge = bench.merge(method, inputs, bench.size)
        names = {count: f"{count} worker{'s' if count > 1 else ''}" for count in bench.workers}
        contest = bench.take_turns(
            [
                bench.lazymerge(merge, "--workers", str(count), name=name)
                for count, name in names.items()
            ],
            method,
        )
        section.add_walls(method, contest)
        first, *others = names.values()
        section.claims += [
            Claim(
                f"{other} against {first}",
                method,
                f"{seconds(contest.loop_s(other))} first block to last",
                seconds(contest.loop_s(first)),
                contest.loop_s(first) / contest.loop_s(other),
            )
            for other in others
        ]


def _speed_claim(against: str, method: str, contest: Contest, peer: str, at_least: float) -> Claim:
    """The claim about wall times of lazymerge and a peer that may have failed."""
    ours_s = contest.wall_s("lazymerge")
    if peer not in contest.runs:
        return Claim(against, method, seconds(ours_s), f"failed: {contest.failures[peer]}")
    return speed_claim(against, method, ours_s, contest.wall_s(peer), at_least)


def _not_installed(against: str, method: str, error: BenchError) -> Claim:
    return Claim(against, method, "", f"could not be installed: {str(error).splitlines()[-1]}")


SECTIONS: dict[str, Callable[[Workplace, Section], None]] = {
    "startup": startup,
    "copy": copy,
    "cold": cold,
    "mergekit": mergekit,
    "methods": methods,
    "memory": memory,
    "sd-mecha": sd_mecha,
    "peers": peers,
    "workers": workers,
    "growth": growth,
    "slope": slope,
}
"""In the order they run: memory shows what mergekit measured, the largest checkpoints come last."""


def run_sections(
    bench: Workplace, names: Sequence[str], results: list[Section], report: Callable[[], None]
) -> None:
    """Run benchmarks; results grow as they go, and report is called after each.

    What an error leaves unmeasured is noted in its section; the others run all the same.
    """
    for name, measure in SECTIONS.items():
        if name not in names:
            continue
        results.append(Section(name))
        try:
            measure(bench, results[-1])
        except BenchError as error:
            results[-1].error = str(error)
            print(f"error: {name}: {error}", file=sys.stderr)
        report()
