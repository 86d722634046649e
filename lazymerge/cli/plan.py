"""lazymerge plan: what a merge will do, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .options import (
    DeviceOption,
    JsonOption,
    MemoryOption,
    PluginOption,
    ReadModeChoice,
    ReadModeOption,
    RecipeArgument,
    SeedOption,
    ShardSizeOption,
    TruncateOption,
    VramOption,
    WorkersOption,
    plan_of,
)


def plan(
    recipe: RecipeArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="Output folder.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and write nothing.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Save the plan here.")
    ] = None,
    as_json: JsonOption = False,
    memory: MemoryOption = None,
    workers: WorkersOption = None,
    read_mode: ReadModeOption = ReadModeChoice.pread,
    device: DeviceOption = None,
    vram: VramOption = None,
    max_shard_size: ShardSizeOption = "5GB",
    unsafe_truncate_embeddings: TruncateOption = False,
    seed: SeedOption = None,
    plugin: PluginOption = None,
) -> None:
    """Say what a merge will do: operations, bytes, passes, memory, disk, files.

    Reads headers and no tensor data. Without --dry-run the plan is saved, in OUT or with --save,
    and `lazymerge run` can run it later.
    """
    if not dry_run and save is None and output is None:
        raise InputError(
            "say where to save the plan (-o OUT or --save FILE), or give --dry-run to only see it"
        )
    made = plan_of(
        recipe,
        memory,
        workers,
        read_mode,
        device,
        vram,
        max_shard_size,
        unsafe_truncate_embeddings,
        seed,
        plugin,
    )

    from ..engine.plan import read_folders
    from ..output.folder import check_disk, check_output_folder, free_disk_bytes

    place = output or Path()
    if output is not None:
        # a dry run may look at what would replace an earlier output; a plan is not saved into one
        check_output_folder(output, read_folders(made), overwrite=dry_run)
        check_disk(output, made.bytes_written, overwrite=True)
    if as_json:
        from .console import print_json

        disk = {"needed_bytes": made.bytes_written, "free_bytes": free_disk_bytes(place)}
        print_json({**made.as_dict(), "disk": disk})
    else:
        from .console import results
        from .plan_view import plan_view

        results().print(plan_view(made, place, is_given=output is not None))
    if dry_run:
        return
    from .console import messages

    if save is None:
        assert output is not None
        from ..output.folder import PLAN_PATH

        save = output / PLAN_PATH
        save.parent.mkdir(parents=True, exist_ok=True)
    made.save(save)
    messages().print(f"plan saved; run it with: lazymerge run {save} -o {output or 'OUT'}")
