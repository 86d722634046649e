"""lazymerge inspect: what is in a checkpoint, and what looks wrong about it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from .options import JsonOption, MemoryOption, StreamOption, WorkersOption

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..inspection.checkpoint import Inspection, Shard
    from ..inspection.facts import Facts
    from ..inspection.suspicions import Suspicion

_EXPERT = re.compile(r"\.experts\.[0-9]+\.")

MOST_FILES_SHOWN = 3
"""Files of a tokenizer that are named before they are only counted."""

MOST_NAME_SHOWN = 40
"""Characters of the name of the tensor that was scanned last."""


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Model folder, .safetensors or torch file, id on the Hub, or address.",
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    scan: Annotated[
        bool,
        typer.Option(
            "--scan", help="Read all data once: nan, inf, zeros, outliers, layers that are equal."
        ),
    ] = False,
    memory: MemoryOption = None,
    workers: WorkersOption = None,
    stream: StreamOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show a model's layers, parts, dtypes and files, and what looks wrong about it.

    Reads headers and small files, and with --scan all tensors.
    """
    from .console import print_json, results

    seconds = None
    if scan:
        found, seconds = _scanned(model, memory, workers, stream=stream, is_silent=as_json)
    else:
        found = _opened(model)
    if as_json:
        print_json(found.as_dict())
    else:
        results().print(inspection_view(found, with_tensors=tensors, seconds=seconds))


def _opened(model: str) -> Inspection:
    from .. import api

    return api.inspect(model)


def _scanned(
    model: str, memory: str | None, workers: int | None, *, stream: bool, is_silent: bool
) -> tuple[Inspection, float]:
    """What is in a model, and how many seconds reading it took."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from .. import api
    from ..adapters import open_model
    from .console import escaped, messages

    console = messages()
    checkpoint = open_model(model)
    with Progress(
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
        disable=is_silent or not console.is_terminal,
    ) as progress:
        task = progress.add_task("", total=checkpoint.size_bytes)
        began = time.perf_counter()
        found = api.inspect(
            checkpoint,
            scan=True,
            memory=memory,
            workers=workers,
            stream=stream,
            scanned=lambda size, name: progress.update(
                task, advance=size, description=escaped(name[:MOST_NAME_SHOWN])
            ),
        )
        return found, time.perf_counter() - began


def inspection_view(
    found: Inspection, *, with_tensors: bool, seconds: float | None = None
) -> RenderableType:
    """What people see of a model.

    seconds: that a scan took.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for label, fact in _facts(found, seconds):
        facts.add_row(label, Text(fact))
    shown: list[RenderableType] = [
        Text(found.checkpoint.reference, style="bold", overflow="fold"),
        Text(),
        facts,
    ]
    if found.suspicions:
        shown += [Text(), _suspicions(found.suspicions)]
    return Group(*shown, Text(), _parts(found), _tensors(found, with_tensors=with_tensors))


def _facts(found: Inspection, seconds: float | None) -> Iterator[tuple[str, str]]:
    """Label and sentence of everything there is one of."""
    from ..engine.models import adapter_text
    from ..sizes import counted, format_bytes, format_count

    checkpoint, facts = found.checkpoint, found.facts
    yield "folder", checkpoint.folder
    if facts.architectures or facts.model_type:
        names = ", ".join(facts.architectures)
        yield "architecture", names or str(facts.model_type)
    active = "" if found.active is None else f" ({format_count(found.active)} for each token)"
    yield (
        "size",
        f"{counted(len(checkpoint.tensors), 'tensor')}, {format_count(checkpoint.parameter_count)} "
        f"parameters{active}, {format_bytes(checkpoint.size_bytes)} in "
        f"{counted(len(checkpoint.files), 'file')}"
        f"{_spread(found.shards)}",
    )
    yield "dtypes", ", ".join(f"{dtype} {format_bytes(n)}" for dtype, n in found.dtypes.items())
    layers = ", ".join(f"{stack.layer_count} in {stack.prefix}" for stack in found.stacks)
    yield "layers", layers or "none found"
    if facts.context_length is not None or facts.rope is not None:
        context = [] if facts.context_length is None else [f"{facts.context_length:,} tokens"]
        rope = [] if facts.rope is None else [f"rope {facts.rope}"]
        yield "context", ", ".join(context + rope)
    if facts.embedding_rows is not None:
        yield "vocabulary", _vocabulary(facts)
        yield "output head", facts.head
    if checkpoint.adapter is not None:
        yield "adapter", adapter_text(checkpoint.adapter)
    for notice in checkpoint.notices:
        yield "notice", notice
    if found.scans is not None:
        yield "scan", _scan_text(found, seconds)


def _scan_text(found: Inspection, seconds: float | None) -> str:
    from ..sizes import counted, format_bytes, format_seconds

    assert found.scans is not None
    took = ""
    if seconds is not None:
        rate = format_bytes(found.checkpoint.size_bytes / max(seconds, 1e-3))
        took = f" in {format_seconds(seconds)} ({rate}/s)"
    nonfinite = sum(bool(scan.nan or scan.inf) for scan in found.scans)
    finite = "no inf or nan" if not nonfinite else f"inf or nan in {nonfinite} of them"
    return f"{counted(len(found.scans), 'tensor')} read{took}: {finite}"


def _spread(shards: tuple[Shard, ...]) -> str:
    """Sizes of the files, where there are several."""
    from ..sizes import format_bytes

    if len(shards) < 2:
        return ""
    sizes = sorted(shard.size_bytes for shard in shards)
    return f" of {format_bytes(sizes[0])} to {format_bytes(sizes[-1])}"


def _vocabulary(facts: Facts) -> str:
    words = [f"{facts.embedding_rows:,} rows"]
    if facts.tokens is not None:
        words.append(f"{facts.tokens:,} tokens")
    files = list(facts.tokenizer_files[:MOST_FILES_SHOWN])
    more = len(facts.tokenizer_files) - len(files)
    words += [*files, *([f"{more} more"] if more > 0 else [])]
    words.append("chat template" if facts.has_chat_template else "no chat template")
    return ", ".join(words)


def _suspicions(suspicions: tuple[Suspicion, ...]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in suspicions:
        is_mistake = each.severity == "mistake"
        label = Text("wrong", style="bold red") if is_mistake else Text("note", style="cyan")
        table.add_row(label, Text(each.message))
    return table


def _parts(found: Inspection) -> Table:
    """What the parameters are for."""
    from rich.text import Text

    from ..sizes import format_bytes, format_count

    table = _table()
    table.add_column("part", style="bold", ratio=1)
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    with_active = found.active is not None
    if with_active:
        table.add_column("per token", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    total = max(1, found.checkpoint.parameter_count)
    for part in found.parts:
        active = [format_count(part.active or 0)] if with_active else []
        table.add_row(
            Text(part.name),
            str(part.tensors),
            format_count(part.parameters),
            *active,
            f"{part.parameters / total:.1%}",
            format_bytes(part.size_bytes),
        )
    return table


def _tensors(found: Inspection, *, with_tensors: bool) -> Table:
    """A row for the tensors of one stack with one suffix, dtype and shape, all experts' among them;
    or for one tensor."""
    from rich.text import Text

    from ..graph.targets import natural_order
    from ..sizes import format_bytes

    tensors = found.checkpoint.tensors
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for name in sorted(tensors, key=natural_order):
        info = tensors[name]
        place = None if with_tensors else found.stacks.locate(name)
        stack = "" if place is None else f"{place.stack.prefix}.*"
        label = name if place is None else _EXPERT.sub(".experts.*.", place.suffix)
        groups.setdefault((stack, label, info.dtype, str(list(info.shape))), []).append(name)
    table = _table()
    table.add_column("tensor", style="bold", overflow="fold", ratio=1)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    current = ""
    for (stack, label, dtype, shape), names in groups.items():
        if stack and stack != current:
            table.add_row(Text(stack))
        current = stack
        size = sum(tensors[name].size_bytes for name in names)
        shown = Text(f"  {label}" if stack else label)
        table.add_row(shown, str(len(names)), dtype, Text(shape), format_bytes(size))
    return table


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
