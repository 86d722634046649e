"""The page of a report: where models differ, and what a merge did to every layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..output.target import write_target
from .html import PAGE_BEGINS, assemble
from .report_document import ReportDocument, report_documents

LIBRARIES = ("uPlot",)
SCRIPTS = (
    "base.js",
    "decoding.js",
    "charts.js",
    "heatmap.js",
    "folding.js",
    "layers.js",
    "report.js",
)


def report_page(report: ReportDocument, manifest: Mapping[str, Any] | None = None) -> str:
    """A report as one self-contained HTML page.

    manifest: contents of the output's lazymerge.json: what its run measured is drawn too.
    """
    document, packed = report_documents(report, manifest)
    title = f"{report.title}: lazymerge report"
    return assemble(title, document, packed, libraries=LIBRARIES, scripts=SCRIPTS)


def write_report_page(
    report: ReportDocument, path: Path, manifest: Mapping[str, Any] | None = None
) -> None:
    """Writes the page of a report, in one step.

    Raises:
        InputError: it cannot be written there, or something else is there.
    """
    write_target(path, report_page(report, manifest), *PAGE_BEGINS)
