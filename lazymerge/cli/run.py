"""lazymerge run: merge."""

from __future__ import annotations

from typing import Annotated

import typer

from ..output.store.address import place_of
from .intermediates import IntermediateOption, folders_asked
from .log_json import LogJsonOption
from .options import (
    CacheLimitOption,
    CacheOption,
    DeviceOption,
    JsonOption,
    MemoryOption,
    PluginOption,
    ReadModeChoice,
    ReadModeOption,
    RecipeArgument,
    SeedOption,
    ShardSizeOption,
    StreamOption,
    TruncateOption,
    VramOption,
    WholeFilesOption,
    WorkersOption,
    plan_of,
)
from .running import (
    ClusterOption,
    NoSyncOption,
    QuietOption,
    RecheckOption,
    StatsOption,
    StrictOption,
    run_and_report,
    workforce_of,
)


def run(
    recipe: RecipeArgument,
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="OUT", help="Output folder, or s3://bucket/prefix."),
    ],
    memory: MemoryOption = None,
    workers: WorkersOption = None,
    read_mode: ReadModeOption = ReadModeChoice.pread,
    device: DeviceOption = None,
    vram: VramOption = None,
    max_shard_size: ShardSizeOption = "5GB",
    unsafe_truncate_embeddings: TruncateOption = False,
    seed: SeedOption = None,
    plugin: PluginOption = None,
    stream: StreamOption = False,
    cache: CacheOption = None,
    cache_limit: CacheLimitOption = None,
    whole_files: WholeFilesOption = False,
    write_intermediate: IntermediateOption = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an earlier merge in OUT, and in other folders."),
    ] = False,
    no_fsync: NoSyncOption = False,
    strict: StrictOption = False,
    recheck: RecheckOption = False,
    hash_inputs: Annotated[
        bool,
        typer.Option(
            "--hash-inputs", help="Read all inputs once before, so that any change is noticed."
        ),
    ] = False,
    stats: StatsOption = False,
    cluster: ClusterOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
    log_json: LogJsonOption = None,
) -> None:
    """Merge models by a recipe or a saved plan into OUT; go on where an earlier run has ended."""
    workforce = workforce_of(cluster, memory, workers, plugin)
    place = place_of(output)
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
        statistics=stats,
        stream=stream,
        cache=cache,
        cache_limit=cache_limit,
        whole_files=whole_files,
    )
    run_and_report(
        made,
        place,
        intermediates=folders_asked(write_intermediate, made.recipe, place),
        overwrite=overwrite,
        no_fsync=no_fsync,
        strict=strict,
        recheck=recheck,
        hash_inputs=hash_inputs,
        quiet=quiet,
        as_json=as_json,
        log_json=log_json,
        workforce=workforce,
    )
