"""What `run` and `resume` share: display, report, and what is said when a run ends early."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..engine.plan import Plan
    from ..engine.report import RunReport

MOST_SHOWN = 3
"""Tensors with inf or nan that a run names on the terminal."""

advice: list[str] = []
"""What main says last, after what went wrong."""

NoSyncOption = Annotated[
    bool, typer.Option("--no-fsync", help="Do not wait until the data is on disk.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Inf or nan in the output is an error.")
]
RecheckOption = Annotated[
    bool,
    typer.Option("--recheck", help="Read what an earlier run has finished before believing it."),
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")]


def run_and_report(
    made: Plan,
    output: Path,
    *,
    overwrite: bool = False,
    no_fsync: bool,
    strict: bool,
    recheck: bool = False,
    hash_inputs: bool = False,
    quiet: bool,
    as_json: bool,
) -> None:
    """Runs a plan, shows how it proceeds and says what came of it."""
    if made.memory.libraries == "torch" and made.execution.device == "cpu":
        from ..engine.torch_loading import load_torch

        load_torch()
    from ..engine.run import prepare_inputs, run_plan
    from .console import messages
    from .download import download_display
    from .progress import progress_display

    console = messages()
    if not quiet:
        from rich.text import Text

        for notice in made.notices:
            console.print(Text.assemble(("notice", "yellow"), f" {notice}"), soft_wrap=True)
    with (
        says_how_to_resume(output, quiet=quiet),
        download_display(made, console, quiet=quiet or as_json) as moved,
    ):
        prepare_inputs(made, output, overwrite=overwrite, moved=moved)
    with (
        says_how_to_resume(output, quiet=quiet),
        progress_display(made, console, quiet=quiet or as_json) as observer,
    ):
        report = run_plan(
            made,
            output,
            overwrite=overwrite,
            fsync=not no_fsync,
            observer=observer,
            strict=strict,
            recheck=recheck,
            hash_inputs=hash_inputs,
        )
    if as_json:
        from dataclasses import asdict

        from .console import print_json

        memory = made.memory.as_dict()
        print_json({**asdict(report), "memory": memory, "notices": list(made.notices)})
    elif not quiet:
        _report(made, report)


def _report(made: Plan, report: RunReport) -> None:
    from rich.text import Text

    from .console import messages
    from .progress import done_line

    console = messages()
    if report.nonfinite:
        for tensor in report.nonfinite[:MOST_SHOWN]:
            console.print(Text.assemble(("warning", "yellow"), f" {tensor}"), soft_wrap=True)
        more = len(report.nonfinite) - MOST_SHOWN
        others = (
            f" {more} more tensors hold inf or nan (lazymerge.json lists them);" if more > 0 else ""
        )
        console.print(
            Text.assemble(("warning", "yellow"), f"{others} --strict makes that an error"),
            soft_wrap=True,
        )
    if report.seconds:  # else there was nothing to do, and it has been said
        console.print(done_line(made, report), soft_wrap=True)
    if report.measured_vram_bytes is not None and made.memory.vram is not None:
        from ..sizes import format_memory

        console.print(
            f"{report.device}: peak {format_memory(report.measured_vram_bytes)} of its memory "
            f"(projected {format_memory(made.memory.vram.projected_bytes)})",
            soft_wrap=True,
        )
    console.print(report.output, soft_wrap=True)


@contextmanager
def says_how_to_resume(output: Path, *, quiet: bool) -> Iterator[None]:
    """Whatever ends the block early: leaves advice on how to go on, if there is something to go on
    with."""
    try:
        yield
    except BaseException as error:
        from ..errors import InputError
        from ..output.folder import is_unfinished
        from ..output.journal import read_journal

        # what is wrong with an input, or with what is asked for, another run would find again
        if not quiet and not isinstance(error, InputError) and is_unfinished(output):
            with suppress(OSError):  # what went wrong first is what is to be said
                done = len(read_journal(output).finished)
                advice.append(
                    f"{done} finished {'tensor is' if done == 1 else 'tensors are'} kept; "
                    f"go on with: lazymerge resume {shlex.quote(str(output))}"
                )
        raise
