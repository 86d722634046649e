"""lazymerge report: what a merge took and what it did to its models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..output.store.address import local_place
from .options import FolderArgument, JsonOption

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ..engine.output_report import OutputReport
    from ..engine.statistics import Statistics
    from ..page.report_document import ReportDocument

HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="Draw it layer by layer as one self-contained page."
    ),
]


def report(output: FolderArgument, as_json: JsonOption = False, html: HtmlOption = None) -> None:
    """Say what a merge did: change by layer, what of each model is in it, what the run took.

    Changes are known of merges that were made with run --stats.
    """
    from ..engine.output_report import report_of

    folder = local_place(output)
    found = report_of(folder)
    if html is not None:
        from ..output.manifest import MANIFEST_NAME, read_document
        from ..page.changes import merge_document

        write_changes(merge_document(found), html, read_document(folder / MANIFEST_NAME))
    if as_json:
        from .console import print_json

        print_json(report_document(found))
        return
    from .console import results

    console = results()
    for part in _view(found, console):
        console.print(part)


def write_changes(
    document: ReportDocument, file: Path, manifest: Mapping[str, Any] | None = None
) -> None:
    """Writes the page of a report.

    Raises:
        InputError: the file cannot be written.
    """
    from ..errors import InputError
    from ..page.report_page import write_report_page

    try:
        write_report_page(document, file, manifest)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}") from error


REPORT_FORMAT = 1


def report_document(found: OutputReport) -> dict[str, Any]:
    """A report for JSON. Numbers that are none are null; `docs/statistics.md` describes it."""
    from dataclasses import asdict, replace

    facts = asdict(replace(found, statistics=None))
    del facts["statistics"]
    document: dict[str, Any] = {"format": REPORT_FORMAT, **facts}
    if found.statistics is not None:
        document["statistics"] = statistics_document(found.statistics)
    return document


def statistics_document(statistics: Statistics) -> dict[str, Any]:
    """Changes of the whole, of layers, parts and tensors, for JSON."""
    from ..engine.statistics import change_of
    from ..engine.statistics_groups import Group, by_layer, by_part, left_out

    tensors = list(statistics.tensors.values())
    whole = change_of(tensors)

    def listed(groups: tuple[Group, ...]) -> list[dict[str, Any]]:
        return [
            {"name": group.label, "tensors": group.tensors, **group.change.as_dict()}
            for group in groups
        ]

    changes = {tensor.name: change_of([tensor]) for tensor in tensors}
    return {
        "whole": None if whole is None else whole.as_dict(),
        "layers": listed(by_layer(tensors)),
        "parts": listed(by_part(tensors)),
        "tensors": {
            name: change.as_dict() for name, change in changes.items() if change is not None
        },
        "left_out": [
            {"reason": reason, "tensors": names} for reason, names in left_out(tensors).items()
        ],
    }


def _view(found: OutputReport, console: Console) -> list[RenderableType]:
    from rich.text import Text

    from ..sizes import counted, format_bytes, format_memory, format_seconds

    moved = found.bytes_read + found.bytes_written
    rate = f" ({format_bytes(moved / found.seconds)}/s)" if found.seconds else ""
    earlier = (
        f"; {counted(found.resumed_tensors, 'tensor')} by an earlier run"
        if found.resumed_tensors
        else ""
    )
    parts: list[RenderableType] = [
        _facts(
            [
                ("output", found.output),
                ("recipe", f"{found.recipe} ({found.method})"),
                ("models", ", ".join(found.models)),
                (
                    "run",
                    f"{format_seconds(found.seconds)}: {format_bytes(found.bytes_read)} read, "
                    f"{format_bytes(found.bytes_written)} written{rate}{earlier}",
                ),
                (
                    "memory",
                    f"{format_memory(found.measured_bytes)} at most, "
                    f"{format_memory(found.projected_bytes)} projected, limit "
                    f"{format_memory(found.limit_bytes)}",
                ),
            ]
        )
    ]
    if found.statistics is None:
        parts.append(Text())
        parts.append(
            Text(
                "What the merge did to the models is not known: run it with --stats, and their "
                "changes are gathered on the way."
            )
        )
        return parts
    return [*parts, *_changes(found.statistics, console)]


def _facts(rows: list[tuple[str, str]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, fact in rows:
        table.add_row(label, Text(fact))
    return table


def _changes(statistics: Statistics, console: Console) -> list[RenderableType]:
    from rich.text import Text

    from ..engine.statistics import change_of
    from ..engine.statistics_groups import by_layer, by_part, by_tensor, left_out
    from .change_view import (
        MERGE_LEGEND,
        MOST_LAYERS,
        Changes,
        between_lines,
        models_table,
    )

    tensors = list(statistics.tensors.values())
    whole = change_of(tensors)
    parts: list[RenderableType] = [Text()]
    if whole is not None:
        reference = next(iter(whole.cosines))
        singly = by_tensor(tensors)
        changes = Changes(singly, whole, console.width)
        parts += [
            Text.assemble("compared with ", (reference, "bold")),
            Text(MERGE_LEGEND, style="dim"),
            Text(),
            models_table(whole, by_layer(tensors), console.width),
            *map(Text, between_lines(whole)),
            Text(),
            changes.table("layers", "layer", by_layer(tensors, MOST_LAYERS)),
            changes.table("parts of layers", "part", by_part(tensors)),
            *changes.extremes(singly),
        ]
    for reason, names in left_out(tensors).items():
        count = f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'}"
        shown = ", ".join(names[:3]) + ("" if len(names) <= 3 else " …")
        parts.append(Text(f"not gathered for {count}: {reason} ({shown})"))
    return parts
