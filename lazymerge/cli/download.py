"""The display of a download: on a terminal a bar, elsewhere plain lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..sizes import format_bytes
from .progress import PLAIN_SECONDS

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoint.hub import Moved
    from ..engine.plan import Plan


@contextmanager
def download_display(plan: Plan, console: Console, *, quiet: bool) -> Iterator[Moved]:
    """Shows how much of what a plan needs has arrived while the block runs, and yields what to
    tell of it. Where nothing is to be downloaded, nothing is shown."""
    missing = plan.missing_files
    if quiet or not missing:
        yield lambda _: None
        return
    total = sum(file.size_bytes for file in missing)
    for repository in dict.fromkeys(file.source.repository for file in missing):
        files = [file for file in missing if file.source.repository == repository]
        size = format_bytes(sum(file.size_bytes for file in files))
        commit = files[0].source.commit[:12]
        console.print(
            f"downloading {repository} at {commit}: {size} in {len(files)} "
            f"{'file' if len(files) == 1 else 'files'}",
            soft_wrap=True,
        )
    if not console.is_terminal:
        yield _plain(console, total)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    with Progress(
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console, transient=True
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda size: progress.advance(task, size)


def _plain(console: Console, total: int) -> Moved:
    """Prints a line now and then."""
    done, said = 0, time.monotonic()

    def moved(size: int) -> None:
        nonlocal done, said
        done += size
        if time.monotonic() - said >= PLAIN_SECONDS:
            said = time.monotonic()
            console.print(f"downloaded {format_bytes(done)} of {format_bytes(total)}")

    return moved
