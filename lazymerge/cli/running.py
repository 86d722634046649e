"""What `run` and `resume` share: display, report, and what is said when a run ends early."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..cluster.workforce import DaskWorkforce
    from ..engine.intermediates import Output
    from ..engine.plan import Plan
    from ..engine.report import RunReport
    from ..inspection.suspicions import Suspicion
    from ..output.store.address import StoreAddress
    from .log_json import JsonLog

MOST_SHOWN = 3
"""Tensors with inf or nan that a run names on the terminal, and notes that it shows."""

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
StatsOption = Annotated[
    bool,
    typer.Option(
        "--stats", help="Gather statistics of every tensor on the way, for lazymerge report."
    ),
]
ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="ADDRESS",
        help="Merge on a Dask cluster: local:4, tls://host:8786. --memory is each worker's.",
    ),
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")]


def workforce_of(
    cluster: str | None, memory: str | None, threads: int | None, plugins: list[Path] | None
) -> DaskWorkforce | None:
    """Who makes the tensors, as --cluster says; None: this process."""
    if cluster is None:
        return None
    import logging
    import warnings

    from ..cluster.connection import parse_address
    from ..cluster.workforce import DaskWorkforce
    from ..sizes import parse_size
    from .console import messages

    address = parse_address(cluster)
    with suppress(ImportError):  # which is said later
        import distributed  # noqa: F401  (sets the levels of its loggers)
    # what matters of it is told; asyncio's logger is for what Dask's own tasks come to
    for name in ("distributed", "distributed.client", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="distributed")
    if address.is_open:
        from rich.text import Text

        text = (
            f" {address.text} is not encrypted, and whoever reaches that port can run anything as "
            "the workers' user: give it certificates and use tls://"
        )
        messages().print(Text.assemble(("notice", "yellow"), text), soft_wrap=True)
    return DaskWorkforce(
        address,
        limit_bytes=None if memory is None else parse_size(memory),
        threads=threads,
        plugins=plugins or (),
    )


def run_and_report(
    made: Plan,
    output: Path | StoreAddress,
    *,
    intermediates: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    no_fsync: bool,
    strict: bool,
    recheck: bool = False,
    hash_inputs: bool = False,
    quiet: bool,
    as_json: bool,
    log_json: str | None = None,
    workforce: DaskWorkforce | None = None,
) -> None:
    """Runs a plan, shows how it proceeds and says what came of it.

    intermediates: folders of merges that are written before it, by name.
    log_json: file that a log for machines is appended to.
    workforce: who makes the tensors; None: this process.
    """
    from ..output.store.address import StoreAddress
    from .log_json import STDERR, json_log

    with json_log(log_json) as log:
        if isinstance(output, StoreAddress):
            from .running_store import run_into_store_and_report

            run_into_store_and_report(
                made,
                output,
                log,
                overwrite=overwrite,
                strict=strict,
                recheck=recheck,
                hash_inputs=hash_inputs,
                quiet=quiet or log_json == STDERR,
                as_json=as_json,
                workforce=workforce,
            )
            return
        _run_and_report(
            made,
            output,
            intermediates or {},
            log,
            overwrite=overwrite,
            no_fsync=no_fsync,
            strict=strict,
            recheck=recheck,
            hash_inputs=hash_inputs,
            quiet=quiet or log_json == STDERR,
            as_json=as_json,
            workforce=workforce,
        )


def _run_and_report(
    made: Plan,
    output: Path,
    intermediates: Mapping[str, Path],
    log: JsonLog | None,
    *,
    overwrite: bool,
    no_fsync: bool,
    strict: bool,
    recheck: bool,
    hash_inputs: bool,
    quiet: bool,
    as_json: bool,
    workforce: DaskWorkforce | None,
) -> None:
    from ..engine.intermediates import check_outputs, clear_earlier, outputs_of

    outputs = outputs_of(made, output, intermediates)
    is_one = len(outputs) == 1
    if workforce is None and any(
        each.plan.memory.libraries == "torch" and each.plan.execution.device == "cpu"
        for each in outputs
    ):
        from ..engine.torch_loading import load_torch

        load_torch()
    from ..engine.run import prepare_inputs, run_plan
    from .console import messages
    from .download import download_display
    from .progress import progress_display

    console = messages()
    is_heard = not quiet or as_json or log is not None
    found = [suspicions_of(each.plan) if is_heard else [] for each in outputs]
    if not quiet:
        from rich.text import Text

        for notice in notices_of(outputs[-1].plan, outputs[:-1]):
            console.print(Text.assemble(("notice", "yellow"), f" {notice}"), soft_wrap=True)
        show_suspicions(dict.fromkeys(each for of_one in found for each in of_one), console)
    if not is_one:
        check_outputs(outputs, overwrite=overwrite)
    same = "the same command, without --overwrite" if overwrite else "the same command"
    again = [None if each is outputs[-1] else same for each in outputs]
    for each, command in zip(outputs, again, strict=True):
        with (
            says_how_to_resume(each.folder, command, quiet=quiet),
            download_display(each.plan, console, quiet=quiet or as_json) as moved,
        ):
            prepare_inputs(each.plan, each.folder, overwrite=overwrite, moved=moved)
    if not is_one and overwrite:
        clear_earlier(outputs, fsync=not no_fsync)
    reports: list[RunReport] = []
    for each, command, its in zip(outputs, again, found, strict=True):
        if not is_one and not quiet and not as_json:
            which = "what they lead to" if each.name is None else f"the merge {each.name}"
            console.print(f"writing {which} into {each.folder}", soft_wrap=True)
        if log is not None:
            log.planned(each, [asdict(one) for one in its])
        complete = [report.output for report in reports]
        with (
            says_how_to_resume(each.folder, command, quiet=quiet),
            says_what_is_complete(complete, each.folder, same, quiet=quiet),
            progress_display(
                each.plan,
                console,
                quiet=quiet or as_json,
                log=log,
                is_elsewhere=workforce is not None,
            ) as observer,
        ):
            report = run_plan(
                each.plan,
                each.folder,
                overwrite=overwrite and is_one,  # of several all is replaced by now
                fsync=not no_fsync,
                observer=observer,
                strict=strict,
                recheck=recheck,
                hash_inputs=hash_inputs,
                workforce=workforce,
            )
        reports.append(report)
        if log is not None:
            log.done(report)
        if not as_json and not quiet:
            tell_report(each.plan, report)
    if as_json:
        from .console import print_json

        *others, last = map(_document, outputs, reports, found)
        named = [{"name": o.name, **d} for o, d in zip(outputs, others, strict=False)]
        print_json({**last, **({} if is_one else {"intermediates": named})})


def _document(output: Output, report: RunReport, found: Sequence[Suspicion]) -> dict[str, object]:
    return document_of(output.plan, report, found)


def document_of(plan: Plan, report: RunReport, found: Sequence[Suspicion]) -> dict[str, object]:
    """What came of one output, for JSON."""
    return {
        **asdict(report),
        "memory": plan.memory.as_dict(),
        "notices": list(plan.notices),
        "suspicions": [asdict(each) for each in found],
    }


def suspicions_of(plan: Plan) -> list[Suspicion]:
    """What looks wrong about a merge, mistakes first."""
    from ..inspection.suspicions import suspicions

    return list(suspicions(plan))


def show_suspicions(found: Iterable[Suspicion], console: Console) -> None:
    """Every mistake, and so many of the notes that they do not hide them."""
    from rich.text import Text

    notes = 0
    for each in sorted(found, key=lambda each: each.severity != "mistake"):
        is_mistake = each.severity == "mistake"
        notes += not is_mistake
        if is_mistake or notes <= MOST_SHOWN:
            label = ("warning", "bold red") if is_mistake else ("note", "cyan")
            console.print(Text.assemble(label, f" {each.message}"), soft_wrap=True)
    if notes > MOST_SHOWN:
        more = notes - MOST_SHOWN
        console.print(
            Text.assemble(("note", "cyan"), f" and {more} more: lazymerge plan shows them"),
            soft_wrap=True,
        )


def notices_of(plan: Plan, before: Sequence[Output]) -> list[str]:
    """The notices of a plan, and of what is written before it those that do not say the same."""
    said = {*plan.notices}
    more = [
        f"{each.name}: {notice}"
        for each in before
        for notice in each.plan.notices
        if not said & {notice, f"{each.name}: {notice}"}
    ]
    return [*plan.notices, *more]


def tell_report(made: Plan, report: RunReport) -> None:
    """Says what came of a run."""
    from rich.text import Text

    from .console import messages
    from .progress import done_line

    console = messages()
    if report.nonfinite:
        for tensor in report.nonfinite[:MOST_SHOWN]:
            console.print(Text.assemble(("warning", "yellow"), f" {tensor}"), soft_wrap=True)
        more = len(report.nonfinite) - MOST_SHOWN
        others = f" {more} more (lazymerge.json lists them);" if more > 0 else ""
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
    if made.execution.gathers and report.seconds:
        command = f"lazymerge report {shlex.quote(report.output)}"
        console.print(f"what it did to the models: {command}", soft_wrap=True)
    console.print(report.output, soft_wrap=True)


@contextmanager
def says_how_to_resume(output: Path, command: str | None = None, *, quiet: bool) -> Iterator[None]:
    """Whatever ends the block early: leaves advice on how to go on, if there is something to go on
    with.

    command: what goes on with it; None: lazymerge resume OUT.
    """
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
                command = command or f"lazymerge resume {shlex.quote(str(output))}"
                advice.append(
                    f"{done} finished {'tensor is' if done == 1 else 'tensors are'} kept; "
                    f"go on with: {command}"
                )
        raise


@contextmanager
def says_what_is_complete(
    folders: Sequence[str], output: Path, command: str, *, quiet: bool
) -> Iterator[None]:
    """Whatever ends the block early, with nothing in the output to go on with: leaves advice on
    how to go on after the outputs that are complete.

    command: what does so.
    """
    try:
        yield
    except BaseException as error:
        from ..errors import InputError
        from ..output.folder import is_unfinished

        is_mistake = isinstance(error, InputError)
        if folders and not quiet and not is_mistake and not is_unfinished(output):
            are = "is" if len(folders) == 1 else "are"
            advice.append(f"{', '.join(folders)} {are} complete; go on with: {command}")
        raise
