"""lazymerge plan --html: the plan as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError

if TYPE_CHECKING:
    from ..engine.intermediates import Output
    from ..engine.plan import Plan
    from ..inspection.estimate import Estimate

HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html",
        metavar="FILE",
        help="Draw the plan as one self-contained page; with what the run measured, if OUT is "
        "complete.",
        rich_help_panel="Pictures",
    ),
]


def write_page(
    outputs: Sequence[Output],
    place: Path,
    file: Path,
    estimate: Estimate | None,
    *,
    is_given: bool,
) -> None:
    """Writes the page of the last of the outputs.

    estimate: how long it takes, if that was estimated.
    place: the output folder, or where its disk space is looked for. is_given: the former.

    Raises:
        InputError: the file cannot be written.
    """
    from ..output.folder import free_disk_bytes
    from ..page.plan_page import write_plan_page
    from ..sizes import format_bytes
    from .plan_time import time_lines

    plan = outputs[-1].plan
    needed = sum(each.plan.bytes_written for each in outputs)
    where = str(place) if is_given else "the current folder"
    facts = [
        ("before it", f"{each.name} in {each.folder}: {dict(each.plan.facts())['output']}")
        for each in outputs[:-1]
    ]
    facts.append(("takes", "; ".join(time_lines(plan, estimate))))
    free = free_disk_bytes(place)
    enough = "" if free > needed else "; not enough"
    facts.append(
        ("disk", f"needs {format_bytes(needed)}, {format_bytes(free)} free at {where}{enough}")
    )
    try:
        write_plan_page(plan, file, _manifest(plan, place) if is_given else None, facts)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}") from error


def _manifest(plan: Plan, folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished run of this plan; None where there is none."""
    from ..output.manifest import MANIFEST_NAME, read_document

    try:
        document = read_document(folder / MANIFEST_NAME)
    except InputError:
        return None
    return document if document.get("fingerprint") == plan.fingerprint else None
