"""The plan as a person reads it: one screen of answers, then a table of the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.plan import Plan, dtype_shares
from ..graph.compile import ResolvedTensor
from ..output.folder import free_disk_bytes
from ..recipe.signature import Scalar
from ..sizes import format_bytes, format_count, format_memory

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

MOST_ROWS_OF_A_LAYER = 3
"""Rows with different parameters that one layer is broken into before it is summed up."""


def plan_view(plan: Plan, place: Path, *, is_given: bool) -> RenderableType:
    """Everything that `lazymerge plan` prints.

    place: the output folder, or where it will be looked for disk space.
    is_given: whether the user has named an output folder.
    """
    from rich.console import Group
    from rich.text import Text

    title = Text.assemble(
        (plan.recipe.merge_method, "bold"), "  ", (plan.recipe.path, "dim"), overflow="fold"
    )
    return Group(
        title,
        Text(),
        _models(plan),
        _facts(plan, place, is_given=is_given),
        *_notices(plan),
        Text(),
        _layers(plan),
    )


def _models(plan: Plan) -> RenderableType:
    table = _table()
    table.add_column("model", style="bold", overflow="fold", ratio=1)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("files", justify="right", no_wrap=True)
    for number, reference in enumerate(plan.checkpoints):
        checkpoint = plan.checkpoints[reference]
        is_base = reference == plan.recipe.base_model
        table.add_row(
            f"{_model_label(plan, number)} {reference}" + (" [dim](base)[/]" if is_base else ""),
            format_count(checkpoint.parameter_count),
            format_bytes(checkpoint.size_bytes),
            _dtypes(dtype_shares(checkpoint)),
            str(len(checkpoint.files)),
        )
    return table


def _facts(plan: Plan, place: Path, *, is_given: bool) -> RenderableType:
    from rich.table import Table

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    shares: dict[str, int] = {}
    for shard in plan.shards:
        for tensor in shard.tensors:
            shares[tensor.dtype] = shares.get(tensor.dtype, 0) + tensor.size_bytes
    shards = f"{len(plan.shards)} shard" + ("s" if len(plan.shards) != 1 else "")
    elements = sum(write.element_count for write in plan.graph.writes)
    facts.add_row(
        "output",
        f"{len(plan.tensors)} tensors, {format_count(elements)} parameters, "
        f"{_dtypes(shares)}, {format_bytes(plan.bytes_written)} in {shards}",
    )
    beside = [*(["config.json"] if plan.config is not None else []), *plan.sidecars]
    beside += ["README.md", "lazymerge.json"]
    facts.add_row("beside it", ", ".join(beside))
    facts.add_row(
        "operations",
        ", ".join(f"{count} {kind}" for kind, count in plan.graph.count_by_kind().items()),
    )
    facts.add_row("passes", _passes(plan.passes))
    facts.add_row(
        "data",
        f"reads {format_bytes(plan.bytes_read)}, writes {format_bytes(plan.bytes_written)}",
    )
    memory = plan.memory
    workers = f"{memory.workers} worker" + ("s" if memory.workers != 1 else "")
    facts.add_row(
        "memory",
        f"{format_memory(memory.projected_bytes)} peak with {workers}, "
        f"limit {format_memory(memory.limit_bytes)}",
    )
    free = free_disk_bytes(place)
    where = place if is_given else "the current folder"
    enough = "" if free > plan.bytes_written else "  [red]not enough[/]"
    facts.add_row(
        "disk",
        f"needs {format_bytes(plan.bytes_written)}, {format_bytes(free)} free at {where}{enough}",
    )
    return facts


def _notices(plan: Plan) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    if not plan.notices:
        return []
    table = Table.grid(padding=(0, 2))
    table.add_column(style="yellow", no_wrap=True)
    table.add_column(overflow="fold")
    for notice in plan.notices:
        table.add_row("notice", Text(notice))
    return [Text(), table]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """Tensors that are merged alike.

    where: which they are. tensors: how many. elements: of all of them.
    values: parameter name → its value, or its values for the models in recipe order.
    """

    where: str
    tensors: int
    elements: int
    method: str
    values: Mapping[str, str]


def layer_rows(plan: Plan) -> list[LayerRow]:
    """The plan's tensors, folded: one row per run of layers that are merged alike.

    A layer whose tensors differ in their parameters (filters) is broken into rows.
    """
    sizes = {write.name: write.element_count for write in plan.graph.writes}
    outside: list[ResolvedTensor] = []
    layers: dict[tuple[str, int], list[ResolvedTensor]] = {}
    order: list[tuple[str, int] | ResolvedTensor] = []
    for tensor in plan.tensors:
        place = plan.stacks.locate(tensor.name)
        if place is None:
            outside.append(tensor)
            order.append(tensor)
            continue
        key = (place.stack.prefix, place.index)
        if key not in layers:
            layers[key] = []
            order.append(key)
        layers[key].append(tensor)

    rows: list[LayerRow] = []
    run: list[int] = []
    run_rows: list[tuple[str, list[ResolvedTensor], str, Mapping[str, str]]] = []
    run_prefix = ""
    run_key: object = None

    def close() -> None:
        if not run:
            return
        label = str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}"
        for part, tensors, method, values in run_rows:
            elements = len(run) * sum(sizes[t.name] for t in tensors)
            where = f"{run_prefix}.{label}" + (f" {part}" if part else "")
            rows.append(LayerRow(where, len(run) * len(tensors), elements, method, values))
        run.clear()

    for entry in order:
        if isinstance(entry, ResolvedTensor):
            close()
            run_key = None
            rows.append(
                LayerRow(entry.name, 1, sizes[entry.name], entry.method, _values(plan, entry))
            )
            continue
        prefix, index = entry
        parts = _parts_of_layer(plan, layers[entry])
        content = [(part, len(tensors), method, v) for part, tensors, method, v in parts]
        alike = (prefix, content, sum(sizes[tensor.name] for tensor in layers[entry]))
        if alike != run_key or not run or index != run[-1] + 1:
            close()
            run_key, run_prefix, run_rows = alike, prefix, parts
        run.append(index)
    close()
    return rows


def _parts_of_layer(
    plan: Plan, tensors: Sequence[ResolvedTensor]
) -> list[tuple[str, list[ResolvedTensor], str, Mapping[str, str]]]:
    """A layer's tensors grouped by equal values: (name of the part, tensors, method, values)."""
    groups: dict[object, list[ResolvedTensor]] = {}
    for tensor in tensors:
        values = _values(plan, tensor)
        groups.setdefault((tensor.method, tuple(values.items())), []).append(tensor)
    if len(groups) == 1:
        return [("", list(tensors), tensors[0].method, _values(plan, tensors[0]))]
    return [
        (_part_name(plan, members, tensors), members, members[0].method, _values(plan, members[0]))
        for members in groups.values()
    ]


def _part_name(
    plan: Plan, members: Sequence[ResolvedTensor], layer: Sequence[ResolvedTensor]
) -> str:
    """What the members have in common that the rest of the layer has not."""

    def suffix(tensor: ResolvedTensor) -> str:
        place = plan.stacks.locate(tensor.name)
        return tensor.name if place is None else place.suffix

    heads = sorted({suffix(tensor).split(".")[0] for tensor in members})
    others = {suffix(t).split(".")[0] for t in layer if t not in members}
    if not others.intersection(heads):
        return ", ".join(heads)
    names = [suffix(tensor).removesuffix(".weight") for tensor in members]
    shown = ", ".join(names[:MOST_ROWS_OF_A_LAYER])
    more = len(names) - MOST_ROWS_OF_A_LAYER
    return shown if more <= 0 else f"{shown}, {more} more"


def _values(plan: Plan, tensor: ResolvedTensor) -> dict[str, str]:
    """Every parameter's value as text; per-model values in the order of the models table."""
    values = {
        name: _text(value) for name, value in tensor.parameters.items() if not _is_silent(name)
    }
    names = dict.fromkeys(name for model in tensor.by_model.values() for name in model)
    for name in names:
        values[name] = " ".join(
            _text(tensor.by_model.get(model, {}).get(name)) for model in plan.checkpoints
        )
    return values


def _is_silent(name: str) -> bool:
    """Parameters that are accepted and do nothing."""
    return name == "int8_mask"


def _layers(plan: Plan) -> RenderableType:
    rows = layer_rows(plan)
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    per_model = {name for t in plan.tensors for model in t.by_model.values() for name in model}
    labels = " ".join(_model_label(plan, number) for number in range(len(plan.checkpoints)))
    table = _table()
    table.add_column("tensors", style="bold", overflow="fold", ratio=1)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    for name in names:
        heading = f"{name}\n[dim]{labels}[/]" if name in per_model else name
        table.add_column(heading, no_wrap=name not in per_model)
    for row in rows:
        where = row.where + ("  [dim]copied[/]" if row.method == "copy" else "")
        table.add_row(
            where,
            str(row.tensors),
            format_count(row.elements),
            *(row.values.get(name, "") for name in names),
        )
    return table


def _model_label(plan: Plan, number: int) -> str:
    """A, B, C …: what the columns of per-model values refer to."""
    return chr(ord("A") + number) if len(plan.checkpoints) <= 26 else f"#{number + 1}"


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), expand=True)


def _dtypes(shares: Mapping[str, int]) -> str:
    names = list(shares)
    return names[0] if len(names) == 1 else f"{names[0]} + {', '.join(names[1:])}"


def _passes(passes: Mapping[int, int]) -> str:
    return ", ".join(
        f"{count} over {tensors} tensor" + ("s" if tensors != 1 else "")
        for count, tensors in passes.items()
    )


def _text(value: Scalar | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
