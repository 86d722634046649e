"""What was measured: claims and tables, as Markdown and JSON."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarking.processes import Run
from benchmarking.turns import Contest


@dataclass(frozen=True, slots=True)
class Claim:
    """One row of the table of promises.

    against: what lazymerge is compared with.
    lazymerge, other: what was measured, with its unit; other is empty where there is no other.
    ratio: above 1 lazymerge is better; None where there is none.
    must_be: what was promised; empty where a number is only shown.
    met: None where nothing was promised or nothing could be measured.
    """

    against: str
    method: str
    lazymerge: str
    other: str = ""
    ratio: float | None = None
    must_be: str = ""
    met: bool | None = None


@dataclass(slots=True)
class Section:
    """The result of one benchmark.

    columns, rows: its own table. notes: what is needed to read it. runs: every single run.
    error: what ended the benchmark before its end; empty when nothing did.
    """

    name: str
    title: str = ""
    claims: list[Claim] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def add_runs(self, label: str, contest: Contest) -> None:
        """Keep every run, and say which contestant failed."""
        for name, runs in contest.runs.items():
            self.runs += [{"label": label, "contestant": name, **asdict(run)} for run in runs]
        self.notes += [
            f"{label}: {name} failed: {reason}" for name, reason in contest.failures.items()
        ]

    def add_walls(self, label: str, contest: Contest) -> None:
        """Keep every run, and add a row per contestant to a table with the columns RUN_COLUMNS."""
        self.columns = RUN_COLUMNS
        self.add_runs(label, contest)
        self.rows += [run_row(label, name, runs) for name, runs in contest.runs.items()]


RUN_COLUMNS = (
    *("what", "program", "wall s", "(min-max)", "CPU s"),
    *("peak RSS MiB", "of it anonymous", "runs"),
)


def run_row(label: str, name: str, runs: Sequence[Run]) -> tuple[str, ...]:
    """Medians of the runs of a contestant, and the highest of their peaks."""
    walls = [run.wall_s for run in runs]
    return (
        label,
        name,
        f"{statistics.median(walls):.2f}",
        f"{min(walls):.2f}-{max(walls):.2f}",
        f"{statistics.median(run.cpu_s for run in runs):.2f}",
        mebibytes(max(run.peak_rss_bytes for run in runs)),
        mebibytes(max(run.peak_anonymous_bytes for run in runs)),
        str(len(runs)),
    )


def mebibytes(count: float) -> str:
    """A number of MiB without the unit, of a number of bytes."""
    return f"{count / 2**20:.0f}"


def seconds(number: float) -> str:
    """Seconds with the unit, in three digits or so."""
    return f"{number:.2f} s" if number < 100 else f"{number:.0f} s"


def speed_claim(
    against: str, method: str, ours_s: float, theirs_s: float, at_least: float
) -> Claim:
    """The claim that lazymerge is a number of times faster; 1: no more than faster."""
    ratio = theirs_s / ours_s
    required = "faster" if at_least == 1 else f"at least {at_least:g}x"
    return Claim(
        against=against,
        method=method,
        lazymerge=seconds(ours_s),
        other=seconds(theirs_s),
        ratio=ratio,
        must_be=required,
        met=ratio > 1 if at_least == 1 else ratio >= at_least,
    )


def distance_from_line(sizes: Sequence[float], times: Sequence[float]) -> float:
    """How far the worst time lies from the line through all, as a fraction of that time.

    The line is the one with the smallest sum of such fractions squared: a fit of seconds would
    follow the longest run and leave all its noise to the shortest.
    """
    weights = [1 / time**2 for time in times]
    mean_size, mean_time = (
        sum(map(operator.mul, weights, values)) / sum(weights) for values in (sizes, times)
    )
    from_mean = [size - mean_size for size in sizes]
    slope = sum(
        weight * size * (time - mean_time)
        for weight, size, time in zip(weights, from_mean, times, strict=True)
    ) / sum(weight * size**2 for weight, size in zip(weights, from_mean, strict=True))
    return max(
        abs(mean_time + slope * size - time) / time
        for size, time in zip(from_mean, times, strict=True)
    )


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines)


def claim_row(claim: Claim) -> tuple[str, ...]:
    """A claim as cells."""
    met = {True: "yes", False: "**no**", None: ""}[claim.met]
    ratio = "" if claim.ratio is None else f"{claim.ratio:.2f}"
    return (
        claim.against,
        claim.method,
        claim.lazymerge,
        claim.other,
        ratio,
        claim.must_be,
        met,
    )


CLAIM_COLUMNS = ("against", "method", "lazymerge", "other", "ratio", "must be", "met")


def markdown(facts: dict[str, str], sections: Sequence[Section]) -> str:
    """The whole report."""
    claims = [claim_row(claim) for section in sections for claim in section.claims]
    parts = [
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        markdown_table(CLAIM_COLUMNS, claims),
    ]
    for section in sections:
        parts.append(f"### {section.title or section.name}")
        if section.rows:
            parts.append(markdown_table(section.columns, section.rows))
        parts += section.notes
        if section.error:
            parts.append(f"Ended early: {section.error.splitlines()[-1]}")
    return "\n\n".join(parts) + "\n"


def document(facts: dict[str, str], sections: Sequence[Section]) -> dict[str, Any]:
    """The same, and every single run, for JSON."""
    return {"facts": facts, "sections": [asdict(section) for section in sections]}
