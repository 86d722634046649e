"""lazymerge resume: go on with an unfinished output."""

from __future__ import annotations

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
from .running import NoSyncOption, QuietOption, RecheckOption, StrictOption, run_and_report


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
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    log_json: LogJsonOption = None,
) -> None:
    """Go on with a merge that was interrupted; recipe and options are those it was begun with.

    Memory, workers and the like may be others: the bytes do not depend on them.
    """
    from rich.text import Text

    from .. import api
    from ..engine.complete import tidy_up
    from ..engine.finishing import faults
    from ..engine.plan import Resources
    from ..engine.unfinished import plan_again, run_again
    from ..errors import LazymergeError
    from ..output.folder import is_unfinished
    from ..output.manifest import MANIFEST_NAME, read_document
    from .console import messages
    from .status import status

    if (output / MANIFEST_NAME).is_file() and not is_unfinished(output):
        document = read_document(output / MANIFEST_NAME)
        wrong = faults(document, output, small_files=False)
        if wrong:
            again = f"make it again: {run_again(document, output)} --overwrite"
            raise LazymergeError("\n".join([*wrong, again]))
        if faults(document, output):  # small files are missing: they are written again
            load_plugins(plugin)
            made = plan_again(document, output / MANIFEST_NAME, Resources())
            run_and_report(
                made,
                output,
                no_fsync=no_fsync,
                strict=strict,
                quiet=quiet,
                as_json=as_json,
                log_json=log_json,
            )
            return
        tidy_up(output)
        if as_json:
            status(output, as_json=True)
        elif not quiet:
            messages().print(f"{output} is complete; lazymerge verify reads it again")
        return
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
    run_and_report(
        made,
        output,
        no_fsync=no_fsync,
        strict=strict,
        recheck=recheck,
        quiet=quiet,
        as_json=as_json,
        log_json=log_json,
    )
