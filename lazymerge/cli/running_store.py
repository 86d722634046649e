"""What `run` and `resume` say of an output that goes into a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from .running import advice, document_of, notices_of, show_suspicions, suspicions_of, tell_report

if TYPE_CHECKING:
    from ..cluster.workforce import DaskWorkforce
    from ..engine.plan import Plan
    from ..output.store.address import StoreAddress
    from .log_json import JsonLog


def run_into_store_and_report(
    made: Plan,
    address: StoreAddress,
    log: JsonLog | None,
    *,
    overwrite: bool,
    strict: bool,
    recheck: bool,
    hash_inputs: bool,
    quiet: bool,
    as_json: bool,
    workforce: DaskWorkforce | None,
) -> None:
    """Runs a plan, shows how it proceeds and says what came of it."""
    made = made.into_store()
    if workforce is None and made.memory.libraries == "torch":
        from ..engine.torch_loading import load_torch

        load_torch()
    from ..engine.store.run import prepare_store_inputs, run_into_store
    from .console import messages, print_json
    from .download import download_display
    from .progress import progress_display

    console = messages()
    found = suspicions_of(made) if not quiet or as_json or log is not None else []
    if not quiet:
        from rich.text import Text

        for notice in notices_of(made, ()):
            console.print(Text.assemble(("notice", "yellow"), f" {notice}"), soft_wrap=True)
        show_suspicions(found, console)
    if log is not None:
        log.plan_made(made, str(address), None, [asdict(one) for one in found])
    with _says_how_to_go_on(overwrite=overwrite, quiet=quiet):
        with download_display(made, console, quiet=quiet or as_json) as moved:
            prepare_store_inputs(made, address, overwrite=overwrite, moved=moved)
        with progress_display(
            made,
            console,
            quiet=quiet or as_json,
            log=log,
            is_elsewhere=workforce is not None,
        ) as observer:
            report = run_into_store(
                made,
                address,
                overwrite=overwrite,
                observer=observer,
                strict=strict,
                recheck=recheck,
                hash_inputs=hash_inputs,
                workforce=workforce,
            )
    if log is not None:
        log.done(report)
    if as_json:
        print_json(document_of(made, report, found))
    elif not quiet:
        tell_report(made, report)


@contextmanager
def _says_how_to_go_on(*, overwrite: bool, quiet: bool) -> Iterator[None]:
    """Whatever ends the block early: leaves advice on how to go on. The store is not asked whether
    there is something to go on with: it may be what has failed."""
    try:
        yield
    except BaseException as error:
        from ..errors import InputError

        if not quiet and not isinstance(error, InputError):
            same = "the same command, without --overwrite" if overwrite else "the same command"
            advice.append(f"shards that are complete are kept; go on with: {same}")
        raise
