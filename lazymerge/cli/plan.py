"""lazymerge plan: what a merge will do, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .intermediates import IntermediateOption, as_options, folders_asked
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

if TYPE_CHECKING:
    from ..engine.intermediates import Output


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
    write_intermediate: IntermediateOption = None,
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

    from ..engine.intermediates import check_outputs, outputs_of
    from ..engine.plan import read_folders
    from ..output.folder import check_output_folder, free_disk_bytes

    folders = folders_asked(write_intermediate, made.recipe, output)
    outputs = outputs_of(made, output or Path("OUT"), folders)
    place = output or Path()
    if output is not None:
        # a dry run may look at what would replace an earlier output; a plan is not saved into one
        check_output_folder(output, read_folders(made), overwrite=dry_run)
        check_outputs(outputs, overwrite=True)
    if as_json:
        from .console import print_json

        needed = sum(each.plan.bytes_written for each in outputs)
        disk = {"needed_bytes": needed, "free_bytes": free_disk_bytes(place)}
        others = [_document(each) for each in outputs[:-1]]
        document = outputs[-1].plan.as_dict()
        print_json({**document, "disk": disk, **({"intermediates": others} if others else {})})
    else:
        from .console import results
        from .plan_view import plan_view

        results().print(
            plan_view(outputs[-1].plan, place, is_given=output is not None, before=outputs[:-1])
        )
    if dry_run:
        return
    from .console import messages

    if save is None:
        assert output is not None
        from ..output.folder import PLAN_PATH

        save = output / PLAN_PATH
        save.parent.mkdir(parents=True, exist_ok=True)
    made.save(save)
    messages().print(
        f"plan saved; run it with: lazymerge run {save} -o {output or 'OUT'}{as_options(folders)}",
        soft_wrap=True,
    )


def _document(output: Output) -> dict[str, object]:
    """What is to be known of a merge that is written too."""
    document = output.plan.as_dict()
    told = ("fingerprint", "totals", "memory", "notices", "output")
    folder = str(output.folder)
    return {"name": output.name, "folder": folder, **{key: document[key] for key in told}}
