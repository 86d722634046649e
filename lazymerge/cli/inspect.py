"""lazymerge inspect: what is in a checkpoint, from its headers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonOption

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..checkpoint import Checkpoint


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Model folder, .safetensors or torch file, or id on the Hub."
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a model's tensors, layers, dtypes and files without reading tensor data."""
    from ..adapters import open_model
    from .console import print_json, results

    checkpoint = open_model(model)
    if as_json:
        print_json(checkpoint_document(checkpoint))
    else:
        results().print(_view(checkpoint, with_tensors=tensors))


def checkpoint_document(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint for JSON."""
    from dataclasses import asdict

    from ..architecture import find_layer_stacks

    return {
        "reference": checkpoint.reference,
        "folder": checkpoint.folder,
        "parameters": checkpoint.parameter_count,
        "size_bytes": checkpoint.size_bytes,
        "header_bytes_read": checkpoint.header_bytes_read,
        "layer_stacks": [
            {"prefix": stack.prefix, "layers": stack.layer_count}
            for stack in find_layer_stacks(checkpoint.tensors)
        ],
        "files": [asdict(file) for file in checkpoint.files],
        "tensors": {
            t.name: {
                "dtype": t.dtype,
                "shape": list(t.shape),
                "file": t.file,
                "bytes": [t.start, t.stop_exclusive],
            }
            for t in checkpoint.tensors.values()
        },
        "config": checkpoint.config,
        **({"adapter": checkpoint.adapter.as_dict()} if checkpoint.adapter else {}),
        "notices": list(checkpoint.notices),
    }


def _view(checkpoint: Checkpoint, *, with_tensors: bool) -> RenderableType:
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from ..architecture import find_layer_stacks
    from ..engine.plan import adapter_text, dtype_shares
    from ..graph.targets import natural_order
    from ..sizes import format_bytes, format_count

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("folder", checkpoint.folder)
    config = checkpoint.config or {}
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        facts.add_row("architecture", Text(", ".join(map(str, architectures))))
    facts.add_row(
        "size",
        f"{len(checkpoint.tensors)} tensors, {format_count(checkpoint.parameter_count)} "
        f"parameters, {format_bytes(checkpoint.size_bytes)} in "
        f"{len(checkpoint.files)} {'file' if len(checkpoint.files) == 1 else 'files'}",
    )
    shares = dtype_shares(checkpoint)
    facts.add_row(
        "dtypes", ", ".join(f"{dtype} {format_bytes(size)}" for dtype, size in shares.items())
    )
    stacks = find_layer_stacks(checkpoint.tensors)
    layers = ", ".join(f"{stack.layer_count} in {stack.prefix}" for stack in stacks)
    facts.add_row("layers", layers or "none found")
    if checkpoint.adapter is not None:
        facts.add_row("adapter", Text(adapter_text(checkpoint.adapter)))
    for notice in checkpoint.notices:
        facts.add_row("notice", Text(notice))
    parts: list[RenderableType] = [Text(checkpoint.reference, style="bold"), Text(), facts]

    # per row: tensors of one stack with one suffix, dtype and shape; or one tensor
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for name in sorted(checkpoint.tensors, key=natural_order):
        info = checkpoint.tensors[name]
        place = None if with_tensors else stacks.locate(name)
        stack = "" if place is None else f"{place.stack.prefix}.*"
        label = name if place is None else place.suffix
        groups.setdefault((stack, label, info.dtype, str(list(info.shape))), []).append(name)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
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
        size = sum(checkpoint.tensors[name].size_bytes for name in names)
        shown = Text(f"  {label}" if stack else label)
        table.add_row(shown, str(len(names)), dtype, Text(shape), format_bytes(size))
    return Group(*parts, table)
