"""Options that several commands share."""

from __future__ import annotations

import gc
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..engine.plan import Plan


class ReadModeChoice(str, Enum):
    """How inputs are read."""

    pread = "pread"
    mmap = "mmap"


class DeviceChoice(str, Enum):
    """Who computes."""

    cpu = "cpu"
    cuda = "cuda"


RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="Recipe (YAML) or saved plan (JSON).")
]
OutputArgument = Annotated[
    str, typer.Argument(metavar="OUT", help="Output folder, or s3://bucket/prefix.")
]
FolderArgument = Annotated[str, typer.Argument(metavar="OUT", help="Output folder.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Bound of the process's memory, e.g. 512MiB.",
        show_default="2GiB, or half of what is free",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Threads that compute.", show_default="one per core"),
]
ReadModeOption = Annotated[
    ReadModeChoice, typer.Option("--read-mode", help="How inputs are read; same output.")
]
DeviceOption = Annotated[
    DeviceChoice | None,
    typer.Option("--device", help="Who computes.", show_default="cpu, or that of a saved plan"),
]
VramOption = Annotated[
    str | None,
    typer.Option(
        "--vram",
        metavar="SIZE",
        help="Bound of the GPU's memory, e.g. 4GiB.",
        show_default="80% of what is free at the run",
    ),
]
ShardSizeOption = Annotated[
    str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest output file.")
]
TruncateOption = Annotated[
    bool,
    typer.Option(
        "--unsafe-truncate-embeddings",
        help="Merge the common leading rows where vocabularies differ in size.",
    ),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        "--seed", help="Of methods that draw random numbers.", show_default="the recipe's, or 0"
    ),
]
PluginOption = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE.py", help="Python file with methods of your own."),
]
StreamOption = Annotated[
    bool,
    typer.Option("--stream", help="Read models of the Hub over the network; download nothing."),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="DIR", help="Keep what is fetched of models that lie elsewhere here."
    ),
]
CacheLimitOption = Annotated[
    str | None,
    typer.Option(
        "--cache-limit",
        metavar="SIZE",
        help="Bound of the cache, e.g. 100GB.",
        show_default="half of what is free there",
    ),
]
WholeFilesOption = Annotated[
    bool,
    typer.Option(
        "--whole-files",
        help="Servers that send no ranges: read their files whole, into the cache or memory.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def plan_of(
    source: Path,
    memory: str | None,
    workers: int | None,
    read_mode: ReadModeChoice,
    device: DeviceChoice | None,
    vram: str | None,
    max_shard_size: str,
    truncate_embeddings: bool,
    seed: int | None,
    plugins: list[Path] | None,
    *,
    statistics: bool = False,
    stream: bool = False,
    cache: Path | None = None,
    cache_limit: str | None = None,
    whole_files: bool = False,
) -> Plan:
    """The plan of a recipe, or a saved plan, under the options that plan and run share."""
    from .. import api

    load_plugins(plugins)
    plan = api.plan(
        source,
        memory=memory,
        workers=workers,
        read_mode=read_mode.value,
        device=None if device is None else device.value,
        vram=vram,
        max_shard_size=max_shard_size,
        truncate_embeddings=truncate_embeddings,
        seed=seed,
        statistics=statistics,
        stream=stream,
        cache=cache,
        cache_limit=cache_limit,
        whole_files=whole_files,
    )
    gc.freeze()  # a plan of 90,000 tensors has half a million nodes, and stays to the end
    return plan


def load_plugins(plugins: list[Path] | None) -> None:
    """Runs the files that --plugin names."""
    if plugins:
        from ..methods.plugins import load_plugin

        for plugin in plugins:
            load_plugin(plugin)
