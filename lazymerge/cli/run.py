"""lazymerge run: merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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


def run(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Output folder.")],
    memory: MemoryOption = None,
    workers: WorkersOption = None,
    read_mode: ReadModeOption = ReadModeChoice.pread,
    device: DeviceOption = None,
    vram: VramOption = None,
    max_shard_size: ShardSizeOption = "5GB",
    unsafe_truncate_embeddings: TruncateOption = False,
    seed: SeedOption = None,
    plugin: PluginOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier merge in OUT.")
    ] = False,
    no_fsync: Annotated[
        bool, typer.Option("--no-fsync", help="Do not wait until the data is on disk.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Inf or nan in the output is an error.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but errors.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Merge models by a recipe or a saved plan into OUT."""
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

    if made.memory.libraries == "torch" and made.execution.device == "cpu":
        from ..engine.torch_loading import load_torch

        load_torch()
    from ..engine.run import run_plan
    from .console import messages, print_json
    from .progress import done_line, progress_display

    console = messages()
    if not quiet:
        from rich.text import Text

        for notice in made.notices:
            console.print(Text.assemble(("notice", "yellow"), f" {notice}"), soft_wrap=True)
    with progress_display(made, console, quiet=quiet or as_json) as observer:
        report = run_plan(
            made,
            output,
            overwrite=overwrite,
            fsync=not no_fsync,
            observer=observer,
            strict=strict,
        )
    if as_json:
        from dataclasses import asdict

        memory_plan = made.memory.as_dict()
        print_json({**asdict(report), "memory": memory_plan, "notices": list(made.notices)})
    elif not quiet:
        if report.nonfinite:
            named = ", ".join(report.nonfinite[:3])
            more = len(report.nonfinite) - 3
            console.print(
                f"[yellow]warning[/] inf or nan in {named}{f' and {more} more' if more > 0 else ''}"
                "; --strict makes it an error",
                soft_wrap=True,
            )
        moved = report.bytes_read + report.bytes_written
        done = done_line(made, report.seconds, moved, report.measured_bytes)
        console.print(done, soft_wrap=True)
        if report.measured_vram_bytes is not None and made.memory.vram is not None:
            from ..sizes import format_memory

            console.print(
                f"{report.device}: peak {format_memory(report.measured_vram_bytes)} of its memory "
                f"(projected {format_memory(made.memory.vram.projected_bytes)})",
                soft_wrap=True,
            )
        console.print(report.output, soft_wrap=True)
