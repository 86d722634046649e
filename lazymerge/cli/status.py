"""lazymerge status: how far an output is."""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING

from .options import JsonOption, OutputArgument

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..output.status import OutputStatus


def status(output: OutputArgument, as_json: JsonOption = False) -> None:
    """Say how far a merge is: what is done, what is left, whether a process is at work on it."""
    from .. import api

    found = api.status(output)
    if as_json:
        from dataclasses import asdict

        from .console import print_json

        print_json(asdict(found))
        return
    from .console import results

    console = results()
    console.print(_view(found))
    if found.state == "unfinished":
        console.print(f"go on with: lazymerge resume {shlex.quote(output)}", soft_wrap=True)


def _view(found: OutputStatus) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    from ..sizes import counted, format_bytes, format_seconds

    style = {"complete": "green", "running": "cyan", "unfinished": "yellow"}[found.state]
    state = Text(found.state, style=style)
    if found.owner is not None:
        state.append(f", {found.owner}", style="default")
    share = found.bytes / found.total_bytes if found.total_bytes else 1.0
    rows: list[tuple[str, RenderableType]] = [
        ("state", state),
        ("recipe", found.recipe if found.part is None else f"{found.recipe}: {found.part}"),
        (
            "done",
            f"{share * 100:.0f} % · {format_bytes(found.bytes)} of "
            f"{format_bytes(found.total_bytes)} · {found.tensors} of "
            f"{counted(found.total_tensors, 'tensor')}",
        ),
    ]
    if found.state != "complete":
        left = f"{format_bytes(max(0, found.total_bytes - found.bytes))}"
        if found.bytes_per_second is not None:
            left += f" · {format_bytes(found.bytes_per_second)}/s written"
        if found.seconds_left is not None:
            left += f" · {format_seconds(found.seconds_left)}"
        rows.append(("left", left))
        if found.began is not None:
            times = f"begun {_when(found.began)}"
            if found.last is not None:
                times += f", last tensor {_when(found.last)}"
            if found.sessions > 1:
                times += f", in {found.sessions} runs"
            rows.append(("time", times))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, fact in rows:
        table.add_row(label, fact)
    return table


def _when(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "at an unknown time"
