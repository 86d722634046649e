"""The estimate of a run's time in words, with what it is based on."""

from __future__ import annotations

from ..engine.plan import Plan
from ..inspection.estimate import Estimate
from ..sizes import format_bytes, format_seconds

SAME = 1.25
"""Bounds that differ by less than this factor are told as one number."""


RATES_SHOWN = (100_000_000, 1_000_000_000)
"""Bytes per second: a line of 1 Gbit/s, and what a machine in a data centre gets."""

SMALL_BYTES = 64_000_000
"""What is less, to be read and written, takes no longer than starting does, and is not measured."""


def time_lines(plan: Plan, estimated: Estimate | None) -> list[str]:
    """How long a run takes, then what that follows from; one line each."""
    if estimated is None:
        moved = plan.bytes_read + plan.bytes_written
        if moved < SMALL_BYTES:
            return [f"a second or two, to move {format_bytes(moved)} (not measured)"]
        return ["not measured: --measure does"]
    return [_span(estimated), *_basis(plan, estimated)]


def rough_seconds(seconds: float) -> str:
    """Two significant digits: an estimate is no better than that."""
    if seconds < 1:
        return "less than a second"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 3570:
        return f"{seconds / 60:.0f} min"
    return format_seconds(round(seconds / 300) * 300)


def _span(estimated: Estimate) -> str:
    if estimated.network_bytes and estimated.network_seconds is None:
        rest = _span(estimated.without_network).partition(":")[0]
        return f"{rest}, or as long as the network takes"
    least, most = estimated.least_seconds, estimated.most_seconds
    if least is None:
        return "not known: nothing of it could be measured"
    if most is None:
        return f"{rough_seconds(least)} or more: not all of it could be measured"
    if most < 1 or most <= SAME * least:
        return f"about {rough_seconds(most)}"
    return f"{rough_seconds(least)} to {rough_seconds(most)}"


def _basis(plan: Plan, estimated: Estimate) -> list[str]:
    measured = estimated.measured
    if not estimated.bytes_read + estimated.bytes_written:
        return []
    lines = []
    if estimated.computing_seconds is None:
        lines.append(f"computing: not measured{_why_not(plan)}")
    else:
        rate = estimated.bytes_read / max(1e-9, estimated.computing_seconds)
        workers = f"{measured.workers} worker{'' if measured.workers == 1 else 's'}"
        lines.append(
            f"computing {rough_seconds(estimated.computing_seconds)}: "
            f"{format_bytes(estimated.bytes_read)} at {format_bytes(rate)}/s "
            f"({workers}, made-up data)"
        )
    if estimated.disk_bytes_read or not estimated.network_bytes:
        lines.append(_reading(estimated))
    return [*lines, *_network(estimated), _writing(estimated)]


def _why_not(plan: Plan) -> str:
    if plan.execution.device != "cpu":
        return f", {plan.execution.device} computes"
    return " (it would load torch: --measure does)" if plan.memory.libraries == "torch" else ""


def _reading(estimated: Estimate) -> str:
    measured = estimated.measured
    if not estimated.disk_bytes_read:
        return "reading from disk: nothing, the inputs are in the page cache"
    size = format_bytes(estimated.disk_bytes_read)
    if estimated.reading_seconds is None or measured.reading_rate is None:
        return f"reading {size}: rate not known; --measure reads a sample of the inputs"
    return (
        f"reading {rough_seconds(estimated.reading_seconds)}: {size} at "
        f"{format_bytes(measured.reading_rate)}/s (measured on {measured.reading_basis})"
    )


def _network(estimated: Estimate) -> list[str]:
    """What is fetched; where nobody knows how fast, how long it takes at some rates."""
    size = estimated.network_bytes
    if not size:
        return []
    rate = estimated.measured.network_rate
    if estimated.network_seconds is None or rate is None:
        examples = ", ".join(
            f"{rough_seconds(size / each)} at {format_bytes(each)}/s" for each in RATES_SHOWN
        )
        return [f"network: {examples} (--measure samples it)"]
    return [
        f"network {rough_seconds(estimated.network_seconds)}: {format_bytes(size)} at "
        f"{format_bytes(rate)}/s (measured on a sample)"
    ]


def _writing(estimated: Estimate) -> str:
    measured = estimated.measured
    size = format_bytes(estimated.bytes_written)
    if estimated.writing_seconds is None or measured.writing_rate is None:
        return f"writing {size}: rate not known; --measure writes a nameless file"
    basis = "measured" if measured.writing_basis == "written" else "as fast as it reads"
    return (
        f"writing {rough_seconds(estimated.writing_seconds)}: {size} at "
        f"{format_bytes(measured.writing_rate)}/s ({basis})"
    )
