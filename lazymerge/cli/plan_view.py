"""The plan as a person reads it: one screen of answers, then a table of the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.plan import Plan, adapter_text, dtype_shares, dtype_text
from ..graph.compile import ResolvedTensor
from ..output.folder import free_disk_bytes
from ..recipe.signature import Scalar
from ..sizes import format_bytes, format_count
from .running import notices_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..engine.intermediates import Output

ABSENT = "–"
"""Shown where a parameter has no value, and for models that it does not concern."""

MOST_NAMES_OF_A_PART = 3
"""Tensor names by which a part of a layer is called before the rest is only counted."""


def plan_view(
    plan: Plan, place: Path, *, is_given: bool, before: Sequence[Output] = ()
) -> RenderableType:
    """Everything that `lazymerge plan` prints.

    before: merges that are written too, before it.
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
        _facts(plan, before, place, is_given=is_given),
        *_notices(notices_of(plan, before)),
        Text(),
        *_parameters(plan),
    )


def _models(plan: Plan) -> RenderableType:
    from rich.text import Text

    table = _table()
    table.add_column("model", style="bold", overflow="fold", ratio=1)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("dtype", no_wrap=True)
    table.add_column("files", justify="right", no_wrap=True)
    labels = _labels(plan)
    for label, (reference, checkpoint) in zip(labels, plan.checkpoints.items(), strict=False):
        is_base = reference == plan.recipe.base_model
        table.add_row(
            Text.assemble(f"{label} {reference}", (" (base)" if is_base else "", "dim")),
            format_count(checkpoint.parameter_count),
            format_bytes(checkpoint.size_bytes),
            dtype_text(dtype_shares(checkpoint)),
            str(len(checkpoint.files)),
        )
        if checkpoint.adapter is not None:
            table.add_row(Text(f"  {adapter_text(checkpoint.adapter)}", style="dim"))
    for label, merge in zip(labels[len(plan.checkpoints) :], plan.recipe.merges, strict=True):
        inputs = [labels[_models_of(plan).index(reference)] for reference in merge.references]
        how = f" = {merge.merge_method} of {', '.join(inputs)}"
        table.add_row(Text.assemble(f"{label} {merge.name}", (how, "dim")))
    return table


def _models_of(plan: Plan) -> list[str]:
    """All that parameters are given for: the models, and the merges of the recipe that it uses."""
    return [*plan.checkpoints, *(str(merge.name) for merge in plan.recipe.merges)]


def _facts(plan: Plan, before: Sequence[Output], place: Path, *, is_given: bool) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for label, fact in plan.facts():
        facts.add_row(label, Text(fact))
    for each in before:
        of_part = dict(each.plan.facts())
        shown = (of_part["output"], of_part["data"].partition(",")[0], of_part["memory"])
        facts.add_row("before it", Text(f"{each.name} in {each.folder}: {'; '.join(shown)}"))
    needed = sum(each.bytes_written for each in (plan, *(other.plan for other in before)))
    free = free_disk_bytes(place)
    where = place if is_given else "the current folder"
    facts.add_row(
        "disk",
        Text.assemble(
            f"needs {format_bytes(needed)}, {format_bytes(free)} free at {where}",
            ("" if free > needed else "  not enough", "red"),
        ),
    )
    return facts


def _notices(notices: Sequence[str]) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    if not notices:
        return []
    table = Table.grid(padding=(0, 2))
    table.add_column(style="yellow", no_wrap=True)
    table.add_column(overflow="fold")
    for notice in notices:
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

    A layer whose tensors differ in their parameters (filters) is broken into parts, and each
    part is folded over the layers by itself. Rows stand in the order of their first tensor.
    """
    sizes = {write.name: write.element_count for write in plan.graph.writes}
    stacks: dict[str, dict[int, list[ResolvedTensor]]] = {}
    order: list[str | ResolvedTensor] = []
    for tensor in plan.tensors:
        place = plan.stacks.locate(tensor.name)
        if place is None:
            order.append(tensor)
            continue
        prefix = place.stack.prefix
        if prefix not in stacks:
            stacks[prefix] = {}
            order.append(prefix)
        stacks[prefix].setdefault(place.index, []).append(tensor)
    rows: list[LayerRow] = []
    for entry in order:
        if isinstance(entry, ResolvedTensor):
            values = _values(plan, entry)
            rows.append(LayerRow(entry.name, 1, sizes[entry.name], entry.method, values))
        else:
            rows += _rows_of_stack(plan, entry, stacks[entry], sizes)
    return rows


def _rows_of_stack(
    plan: Plan,
    prefix: str,
    layers: Mapping[int, Sequence[ResolvedTensor]],
    sizes: Mapping[str, int],
) -> list[LayerRow]:
    """A stack's rows: part by part, each folded over consecutive layers that are alike."""
    parts: dict[str, list[tuple[int, LayerRow]]] = {}
    for index in sorted(layers):
        for part, tensors in _parts_of_layer(plan, layers[index]):
            elements = sum(sizes[tensor.name] for tensor in tensors)
            values = _values(plan, tensors[0])
            row = LayerRow(part, len(tensors), elements, tensors[0].method, values)
            parts.setdefault(part, []).append((index, row))
    rows = []
    for part, members in parts.items():
        # consecutive indices with equal rows have one key: index minus place in the list
        numbered = enumerate(members)
        for _, run in groupby(numbered, lambda item: (item[1][0] - item[0], item[1][1])):
            alike = [member for _, member in run]
            first, last, row = alike[0][0], alike[-1][0], alike[0][1]
            numbers = str(first) if first == last else f"{first}–{last}"
            rows.append(
                LayerRow(
                    f"{prefix}.{numbers} {part}".rstrip(),
                    len(alike) * row.tensors,
                    len(alike) * row.elements,
                    row.method,
                    row.values,
                )
            )
    return rows


def _parts_of_layer(
    plan: Plan, tensors: Sequence[ResolvedTensor]
) -> list[tuple[str, list[ResolvedTensor]]]:
    """A layer's tensors grouped by equal method and values, each group with a name."""
    groups: dict[object, list[ResolvedTensor]] = {}
    for tensor in tensors:
        values = _values(plan, tensor)
        groups.setdefault((tensor.method, tuple(values.items())), []).append(tensor)
    if len(groups) == 1:
        return [("", list(tensors))]
    return [(_part_name(plan, members, tensors), members) for members in groups.values()]


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
    shown = ", ".join(names[:MOST_NAMES_OF_A_PART])
    more = len(names) - MOST_NAMES_OF_A_PART
    return shown if more <= 0 else f"{shown}, {more} more"


def _values(plan: Plan, tensor: ResolvedTensor) -> dict[str, str]:
    """Every parameter's value as text; per-model values in the order of the models table."""
    values = {
        name: _text(value) for name, value in tensor.parameters.items() if not _is_silent(name)
    }
    names = dict.fromkeys(name for model in tensor.by_model.values() for name in model)
    for name in names:
        values[name] = " ".join(
            _text(tensor.by_model.get(model, {}).get(name)) for model in _models_of(plan)
        )
    return values


def _is_silent(name: str) -> bool:
    """Parameters that are accepted and do nothing."""
    return name == "int8_mask"


def _parameters(plan: Plan) -> list[RenderableType]:
    """What is the same for all merged tensors as lines, what differs as columns of the layers."""
    from rich.table import Table
    from rich.text import Text

    rows = layer_rows(plan)
    names = dict.fromkeys(name for row in rows for name in row.values)
    merged = [row for row in rows if row.method != "copy"]
    common = {
        name: merged[0].values[name]
        for name in names
        if len({row.values.get(name) for row in merged}) == 1
    }
    per_model = {name for t in plan.tensors for model in t.by_model.values() for name in model}
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column(overflow="fold")
    for name, text in common.items():
        shown = text
        if name in per_model:
            values = zip(_labels(plan), text.split(" "), strict=True)
            shown = "   ".join(f"{label} {value}" for label, value in values if value != ABSENT)
        lines.add_row(name, Text(shown))
    table = _table()
    table.add_column("tensors", style="bold", overflow="fold", ratio=1, min_width=26)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("elements", justify="right", no_wrap=True)
    differing = [name for name in names if name not in common]
    for name in differing:
        labels = "\n" + " ".join(_labels(plan)) if name in per_model else ""
        table.add_column(Text.assemble(name, (labels, "dim")), overflow="fold")
    for row in rows:
        table.add_row(
            Text.assemble(row.where, ("  copied" if row.method == "copy" else "", "dim")),
            str(row.tensors),
            format_count(row.elements),
            *(row.values.get(name, "") for name in differing),
        )
    return [lines, table] if common else [table]


def _labels(plan: Plan) -> list[str]:
    """A, B, C …: what per-model values refer to, in the order of the models table."""
    count = len(_models_of(plan))
    return [chr(ord("A") + n) if count <= 26 else f"#{n + 1}" for n in range(count)]


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), expand=True)


def _text(value: Scalar | None) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
