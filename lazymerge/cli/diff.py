"""lazymerge diff: how two models differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonOption, MemoryOption, StreamOption, WorkersOption
from .report import HtmlOption, write_changes
from .running import QuietOption

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from ..engine.comparison import Comparison, ComparisonPlan, Mismatch

EXIT_DIFFERENT = 1

MOST_NAMED = 6
"""Differences of one kind that are listed on the terminal."""

PLAIN_SECONDS = 10.0
"""Between two lines where there is no terminal."""


def diff(
    first: Annotated[str, typer.Argument(metavar="MODEL_A", help="Model that is compared with.")],
    second: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_B", help="Folder, file, id on the Hub, address, model+adapter."
        ),
    ],
    memory: MemoryOption = None,
    workers: WorkersOption = None,
    tensor: Annotated[
        str | None,
        typer.Option("--tensor", metavar="REGEX", help="Compare tensors with such names alone."),
    ] = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if the models differ.")
    ] = False,
    stream: StreamOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Compare two models tensor by tensor, in one pass over both; nothing is written."""
    from ..engine.comparing import run_comparison
    from ..engine.comparison import plan_comparison
    from ..engine.resources import Resources
    from ..sizes import parse_size
    from .console import messages, print_json, results

    limit = None if memory is None else parse_size(memory)
    resources = Resources(limit_bytes=limit, workers=workers, streams=stream)
    plan = plan_comparison(first, second, resources, _wanted(tensor))
    if plan.memory.libraries == "torch":
        from ..engine.torch_loading import load_torch

        load_torch()
    with _progress(plan, messages(), quiet=quiet or as_json) as moved:
        found = run_comparison(plan, moved)
    if html is not None:
        from ..page.changes import comparison_document

        write_changes(comparison_document(found), html)
    if as_json:
        print_json(diff_document(found))
    else:
        console = results()
        for part in _view(found, console.width):
            console.print(part)
    if exit_code and not found.is_same:
        raise typer.Exit(EXIT_DIFFERENT)


def _wanted(pattern: str | None) -> Callable[[str], bool]:
    import re

    if pattern is None:
        return lambda name: True
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise typer.BadParameter(
            f"--tensor {pattern!r} is no regular expression: {error}"
        ) from None
    return lambda name: compiled.search(name) is not None


@contextmanager
def _progress(
    plan: ComparisonPlan, console: Console, *, quiet: bool
) -> Iterator[Callable[[int, str], None]]:
    """Shows how far a comparison is while the block runs, and yields what to tell of it."""
    import time

    from ..sizes import format_bytes

    if quiet:
        yield lambda count, name: None
        return
    total = plan.bytes_read
    if console.is_terminal:
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        with Progress(
            BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console, transient=True
        ) as progress:
            task = progress.add_task("", total=total)
            yield lambda count, name: progress.advance(task, count)
        return
    done, said = 0, time.monotonic()

    def moved(count: int, name: str) -> None:
        nonlocal done, said
        done += count
        if time.monotonic() - said >= PLAIN_SECONDS:
            said = time.monotonic()
            console.print(f"read {format_bytes(done)} of {format_bytes(total)}", soft_wrap=True)

    yield moved


DIFF_FORMAT = 1


def diff_document(found: Comparison) -> dict[str, Any]:
    """A comparison for JSON; `docs/statistics.md` describes it."""
    from ..engine.statistics import change_of
    from ..engine.statistics_groups import by_layer, by_part

    plan = found.plan
    tensors = list(found.tensors.values())
    whole = change_of(tensors)
    changes = {tensor.name: change_of([tensor]) for tensor in tensors}

    def listed(differences: Sequence[Mismatch]) -> list[dict[str, str | None]]:
        return [{"name": d.name, "first": d.first, "second": d.second} for d in differences]

    def grouped(groups: Any) -> list[dict[str, Any]]:
        return [{"name": g.label, "tensors": g.tensors, **g.change.as_dict()} for g in groups]

    return {
        "format": DIFF_FORMAT,
        "models": list(plan.models),
        "same": found.is_same,
        "equal": list(found.equal),
        "unequal_integers": list(found.unequal_integers),
        "only_first": list(plan.only_first),
        "only_second": list(plan.only_second),
        "shapes": listed(plan.shapes),
        "dtypes": listed(plan.dtypes),
        "config": listed(plan.config),
        "files": listed(plan.files),
        "notices": list(plan.notices),
        "statistics": {
            "whole": None if whole is None else whole.as_dict(),
            "layers": grouped(by_layer(tensors)),
            "parts": grouped(by_part(tensors)),
            "tensors": {name: c.as_dict() for name, c in changes.items() if c is not None},
        },
        "run": {
            "seconds": round(found.seconds, 3),
            "bytes_read": found.bytes_read,
            "measured_bytes": found.measured_bytes,
        },
        "memory": plan.memory.as_dict(),
    }


def _view(found: Comparison, width: int) -> list[RenderableType]:
    from rich.text import Text

    from ..engine.statistics import change_of
    from ..engine.statistics_groups import by_layer, by_part, by_tensor
    from .change_view import (
        LEGEND,
        MOST_LAYERS,
        Changes,
        cosine,
        number,
        percent,
    )

    tensors = list(found.tensors.values())
    whole = change_of(tensors)
    parts: list[RenderableType] = [_facts(found)]
    if whole is not None and whole.norm != 0:
        to_reference = next(iter(whole.cosines.values()))
        singly = by_tensor(tensors)
        changes = Changes(singly, whole, width)
        parts += [
            Text(),
            Text(
                f"change {percent(whole.relative)}, {percent(whole.fraction)} of the elements, "
                f"cosine {cosine(to_reference)}, largest {number(whole.largest)}"
            ),
            Text(f"{LEGEND}; the reference is MODEL_A, the result MODEL_B", style="dim"),
            Text(),
            changes.table("layers", "layer", by_layer(tensors, MOST_LAYERS)),
            changes.table("parts of layers", "part", by_part(tensors)),
            *changes.extremes(singly),
        ]
    return parts


def _facts(found: Comparison) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    from ..engine.models import dtype_shares, dtype_text
    from ..sizes import format_bytes, format_count, format_memory, format_seconds

    plan = found.plan
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, name, checkpoint in zip("AB", plan.models, plan.checkpoints, strict=True):
        size = format_count(checkpoint.parameter_count)
        dtype = dtype_text(dtype_shares(checkpoint))
        table.add_row(f"model {label}", Text(f"{name}  {size} parameters, {dtype}"))
    compared = len(found.tensors) + len(plan.integers)
    equal = len(found.equal)
    table.add_row(
        "tensors",
        "none that both have and that holds anything"
        if not compared
        else f"all {compared} are equal"
        if equal == compared
        else f"{compared - equal} of {compared} differ, {equal} are equal",
    )
    for label, names in (
        ("differ", found.unequal_integers),
        ("only in A", plan.only_first),
        ("only in B", plan.only_second),
    ):
        if names:
            table.add_row(label, Text(f"{len(names)}: {_some(names)}"))
    for label, differences in (
        ("shapes", plan.shapes),
        ("dtypes", plan.dtypes),
        ("config", plan.config),
        ("files", plan.files),
    ):
        if differences:
            table.add_row(label, Text("\n".join(_lines(label, differences))))
    for notice in plan.notices:
        table.add_row("notice", Text(notice))
    rate = format_bytes(found.bytes_read / found.seconds) if found.seconds else "–"
    table.add_row(
        "read",
        f"{format_bytes(found.bytes_read)} in {format_seconds(found.seconds)} ({rate}/s), peak "
        f"memory {format_memory(found.measured_bytes)} (projected "
        f"{format_memory(plan.memory.projected_bytes)}, limit "
        f"{format_memory(plan.memory.limit_bytes)})",
    )
    return table


def _lines(label: str, differences: Sequence[Mismatch]) -> list[str]:
    lines = []
    for found in differences[:MOST_NAMED]:
        if label == "files":
            kinds = {(True, False): "only in B", (False, True): "only in A"}
            kind = kinds.get((found.first is None, found.second is None), "differs")
            lines.append(f"{found.name} {kind}")
        else:
            values = ["absent" if v is None else v[:60] for v in (found.first, found.second)]
            lines.append(f"{found.name}: {values[0]} → {values[1]}")
    more = len(differences) - MOST_NAMED
    return [*lines, *([f"and {more} more"] if more > 0 else [])]


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
