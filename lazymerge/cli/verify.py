"""lazymerge verify: check a complete output."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import LazymergeError
from .options import (
    JsonOption,
    MemoryOption,
    OutputArgument,
    PluginOption,
    WorkersOption,
    load_plugins,
)
from .running import QuietOption


def verify(
    output: OutputArgument,
    recompute: Annotated[
        int,
        typer.Option(
            "--recompute", metavar="N", min=0, help="Merge N random tensors again and compare."
        ),
    ] = 0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Which tensors.", show_default="drawn anew")
    ] = None,
    memory: MemoryOption = None,
    workers: WorkersOption = None,
    plugin: PluginOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read a merge again and compare every tensor with the checksum in its manifest.

    Exit code 1 if one differs.
    """
    from .. import api
    from ..sizes import counted, format_bytes, format_seconds
    from .console import messages, print_json, results

    load_plugins(plugin)
    console = messages()
    import time

    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
    from rich.text import Text

    total = api.status(output).total_bytes
    began = time.perf_counter()
    with Progress(
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=quiet or as_json or not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=total)
        found = api.verify(
            output,
            recompute=recompute,
            seed=seed,
            memory=memory,
            workers=workers,
            checked=lambda size, _: progress.advance(task, size),
        )
    if as_json:
        from dataclasses import asdict

        print_json(asdict(found))
    elif not quiet:
        for problem in found.problems:
            console.print(Text.assemble(("wrong", "red"), f" {problem}"), soft_wrap=True)
        if not found.problems:
            again = (
                f"; {len(found.recomputed)} merged again (--seed {found.seed}), the same bytes"
                if found.recomputed
                else ""
            )
            for name in found.edited:
                console.print(
                    Text.assemble(("notice", "yellow"), f" {name} was edited after the merge"),
                    soft_wrap=True,
                )
            results().print(
                Text.assemble(
                    ("whole", "green"),
                    f": {counted(found.tensors, 'tensor')}, {format_bytes(found.bytes)} read in "
                    f"{format_seconds(time.perf_counter() - began)}{again}",
                ),
                soft_wrap=True,
            )
    if found.problems:
        count = len(found.problems)
        raise LazymergeError(
            f"{output} is not what was merged: {count} {'problem' if count == 1 else 'problems'}; "
            "merge it again (lazymerge run … --overwrite)"
        )
