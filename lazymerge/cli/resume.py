"""lazymerge resume: go on with an unfinished output."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .log_json import LogJsonOption
from .options import (
    CacheLimitOption,
    CacheOption,
    JsonOption,
    MemoryOption,
    OutputArgument,
    PluginOption,
    ReadModeChoice,
    ReadModeOption,
    VramOption,
    WorkersOption,
    load_plugins,
)
from .running import (
    ClusterOption,
    NoSyncOption,
    QuietOption,
    RecheckOption,
    StrictOption,
    run_and_report,
    workforce_of,
)
from .status import status

if TYPE_CHECKING:
    from ..cluster.workforce import DaskWorkforce
    from ..engine.plan import Plan


def resume(
    output: OutputArgument,
    memory: MemoryOption = None,
    workers: WorkersOption = None,
    read_mode: ReadModeOption = ReadModeChoice.pread,
    vram: VramOption = None,
    cache: CacheOption = None,
    cache_limit: CacheLimitOption = None,
    plugin: PluginOption = None,
    no_fsync: NoSyncOption = False,
    strict: StrictOption = False,
    recheck: RecheckOption = False,
    cluster: ClusterOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    log_json: LogJsonOption = None,
) -> None:
    """Go on with a merge that was interrupted; recipe and options are those it was begun with.

    Memory, workers and the like may be others: the bytes do not depend on them.
    """
    from rich.text import Text

    from .. import api
    from ..output.store.address import StoreAddress, place_of
    from .console import messages

    def run_again(made: Plan, workforce: DaskWorkforce | None = None) -> None:
        run_and_report(
            made,
            place,
            no_fsync=no_fsync,
            strict=strict,
            recheck=recheck,
            quiet=quiet,
            as_json=as_json,
            log_json=log_json,
            workforce=workforce,
        )

    place = place_of(output)
    if isinstance(place, StoreAddress):
        is_complete = api.status(output).state == "complete"
    else:
        is_complete = _is_complete(place)
        stale = _stale_plan(place, plugin) if is_complete else None
        if stale is not None:
            run_again(stale)
            return
    if is_complete:
        if as_json:
            status(output, as_json=True)
        elif not quiet:
            messages().print(f"{output} is complete; lazymerge verify reads it again")
        return
    workforce = workforce_of(cluster, memory, workers, plugin)
    load_plugins(plugin)
    made = api.plan_of_unfinished(
        output,
        memory=memory,
        workers=workers,
        read_mode=read_mode.value,
        vram=vram,
        cache=cache,
        cache_limit=cache_limit,
    )
    if not quiet:  # the folder says which, and it may come from somebody else
        folders = ", ".join(checkpoint.folder for checkpoint in made.checkpoints.values())
        messages().print(Text(f"reads {folders}"), soft_wrap=True)
    run_again(made, workforce)


def _is_complete(folder: Path) -> bool:
    from ..output.folder import is_unfinished
    from ..output.manifest import MANIFEST_NAME

    return (folder / MANIFEST_NAME).is_file() and not is_unfinished(folder)


def _stale_plan(folder: Path, plugin: list[Path] | None) -> Plan | None:
    """The plan of a complete output that lacks small files, which are to be written again; None
    where nothing is to be done, and it has been tidied up.

    Raises:
        LazymergeError: it lacks more than that.
    """
    from ..engine.complete import tidy_up
    from ..engine.finishing import faults
    from ..engine.resources import Resources
    from ..engine.unfinished import plan_again, run_again
    from ..errors import LazymergeError
    from ..output.manifest import MANIFEST_NAME, read_document

    document = read_document(folder / MANIFEST_NAME)
    wrong = faults(document, folder, small_files=False)
    if wrong:
        again = f"make it again: {run_again(document, folder)} --overwrite"
        raise LazymergeError("\n".join([*wrong, again]))
    if faults(document, folder):
        load_plugins(plugin)
        return plan_again(document, folder / MANIFEST_NAME, Resources())
    tidy_up(folder)
    return None
