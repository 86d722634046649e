"""What the page of a report is told: numbers of tensors, of a merge or of two checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from ..architecture import find_layer_stacks
from ..version import __version__
from .columns import differences, pack_names
from .measured import measured_timeline

DIGITS = 6
"""Significant digits of numbers on the page."""


@dataclass(frozen=True, slots=True)
class Series:
    """One number that every tensor may have.

    name: in words, with the model that it is about: "delta norm of B", "cosine to C".
    remarkable: which end of its numbers is to be looked at first.
    """

    name: str
    remarkable: Literal["high", "low"] = "high"


@dataclass(frozen=True, slots=True)
class ReportTensor:
    """One tensor's numbers.

    values: by name of the series; one that is absent, None or not finite has no number.
    """

    name: str
    elements: int
    values: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class ReportDocument:
    """A report, ready to be drawn.

    title: what it is about, in a line.
    models: references of the models, in the order of their letters A, B, C.
    reference: what the numbers are differences from; "" where they are not.
    series: in the order in which they are offered.
    tensors: in the order of the output.
    notes: what a person should know of it; one sentence each.
    """

    title: str
    models: tuple[str, ...]
    reference: str
    series: tuple[Series, ...]
    tensors: tuple[ReportTensor, ...]
    notes: tuple[str, ...] = ()


def report_documents(
    report: ReportDocument, manifest: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The document that is shown at once, and what is packed.

    manifest: contents of the output's lazymerge.json, for what its run measured.
    """
    stacks = find_layer_stacks(tensor.name for tensor in report.tensors)
    numbers = {stack.prefix: number for number, stack in enumerate(stacks)}
    located = [stacks.locate(tensor.name) for tensor in report.tensors]
    document = {
        "kind": "report",
        "version": __version__,
        "title": report.title,
        "models": list(report.models),
        "reference": report.reference,
        "notes": list(report.notes),
        "series": [[series.name, series.remarkable] for series in report.series],
        "tensors": len(report.tensors),
        "measured": measured_timeline(manifest),
    }
    packed = {
        "names": pack_names(tensor.name for tensor in report.tensors),
        "elements": differences(tensor.elements for tensor in report.tensors),
        "stacks": [[stack.prefix, stack.layer_count] for stack in stacks],
        "stack": differences(-1 if p is None else numbers[p.stack.prefix] for p in located),
        "layer": differences(-1 if p is None else p.index for p in located),
        "values": [
            [rounded(tensor.values.get(series.name)) for tensor in report.tensors]
            for series in report.series
        ],
    }
    return document, packed


def rounded(value: float | None) -> float | None:
    """A number with as many digits as are shown; None where it is not finite."""
    if value is None or not isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")
