"""What `lazymerge plan` shows below its first screen, if asked: layers, operations, memory, and
what another recipe would change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..engine.plan import Plan
from ..inspection.differences import Differences, ValueChange
from ..inspection.estimate import Estimate
from ..inspection.layers import common_values, layer_rows, per_model_parameters
from ..inspection.memory_parts import MemoryParts
from ..inspection.operations import OperationKind, Step, TensorSteps
from ..sizes import format_bytes, format_count, format_memory
from .plan_time import time_lines
from .plan_view import model_labels, value_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text
    from rich.tree import Tree

MOST_VALUE_CHARACTERS = 60
"""Of one parameter of an operation in a tree."""

BAR_COLUMNS = 20


def section(title: str, *parts: RenderableType) -> RenderableType:
    """A part of the answer under its title."""
    from rich.console import Group
    from rich.text import Text

    return Group(Text(), Text(title, style="bold underline"), *parts)


# layers


def layers_view(plan: Plan) -> RenderableType:
    """What is the same for all merged tensors as lines, what differs as columns of the layers."""
    from rich.text import Text

    rows = layer_rows(plan)
    common, differing = common_values(plan)
    per_model = per_model_parameters(plan)
    lines = [Text(value_text(plan, name, text, per_model)) for name, text in common.items()]
    table = _table()
    table.add_column("tensors", style="bold", overflow="fold", ratio=1, min_width=26)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("elements", justify="right", no_wrap=True)
    for name in differing:
        labels = "\n" + " ".join(model_labels(plan)) if name in per_model else ""
        table.add_column(Text.assemble(name, (labels, "dim")), overflow="fold")
    for row in rows:
        table.add_row(
            Text.assemble(row.where, ("  copied" if row.method == "copy" else "", "dim")),
            str(row.tensors),
            format_count(row.elements),
            *(Text(row.values.get(name, "")) for name in differing),
        )
    return section("layers", *lines, table)


# operations


def operations_view(kinds: Sequence[OperationKind]) -> RenderableType:
    """Operations by kind, and how much of the reading each asks for."""
    from rich.text import Text

    table = _table()
    table.add_column("operation", style="bold", overflow="fold", ratio=1, min_width=20)
    for name in ("count", "elements", "passes", "reads", "share", "writes"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind in kinds:
        is_stage = kind.kind != "Read"
        table.add_row(
            Text(f"{kind.kind} {kind.operation}".strip()),
            str(kind.count),
            format_count(kind.elements),
            str(kind.passes or ""),
            format_bytes(kind.bytes_read) if kind.bytes_read else "",
            f"{kind.share_of_reads:.0%}" if is_stage and kind.bytes_read else "",
            format_bytes(kind.bytes_written) if kind.bytes_written else "",
        )
    note = Text(
        "Read: every byte once. Others: in all passes of the stage that they make; an Apply's are "
        "those of the Write that it feeds.",
        style="dim",
    )
    return section("operations", table, note)


def tensors_view(trees: Sequence[TensorSteps], pattern: str, matched: int) -> RenderableType:
    """The operations of matching tensors as trees. matched: how many there are, shown or not."""
    from rich.text import Text

    parts: list[RenderableType] = []
    for tensor in trees:
        parts += [Text(), _tree(tensor)]
    if matched > len(trees):
        left = matched - len(trees)
        remedy = f"and {left} more that match: give a longer --tensor, or --most {matched}"
        parts += [Text(), Text(remedy, style="dim")]
    what = "tensor matches" if matched == 1 else "tensors match"
    return section(f"{matched} {what} {pattern}", *parts)


def _tree(tensor: TensorSteps) -> Tree:
    from rich.tree import Tree

    root = tensor.root
    passes = f"{tensor.passes} pass{'' if tensor.passes == 1 else 'es'}"
    label = _step_text(root, "")
    label.append(f"  {passes} in all, reads {format_bytes(tensor.bytes_read)}", "dim")
    tree = Tree(label, guide_style="dim")
    _grow(tree, root, root.operation)
    return tree


def _grow(tree: Tree, step: Step, tensor: str) -> None:
    for source in step.inputs:
        _grow(tree.add(_step_text(source, tensor)), source, tensor)


def _step_text(step: Step, tensor: str) -> Text:
    """`Reduce magnitude_thresholds  F32 5120 × 5120, 100 blocks, 1 pass reads 157 MB`.

    tensor: the output's name; inputs that have it too are called by their model alone.
    """
    from rich.text import Text

    shape = " × ".join(map(str, step.shape)) or "scalar"
    style = {"Write": "magenta", "Apply": "green", "Reduce": "yellow", "Read": "cyan"}[step.kind]
    operation = step.operation.removesuffix(f": {tensor}")
    facts = [f"{step.dtype} {shape}", f"{step.blocks} block{'' if step.blocks == 1 else 's'}"]
    if step.kind == "Reduce":
        passes = f"{step.passes} pass{'' if step.passes == 1 else 'es'}"
        facts.append(f"{passes}, reads {format_bytes(step.bytes_read)}")
        facts.append(f"statistics up to {format_memory(step.statistics_bytes)}")
    elif step.kind == "Read":
        facts.append(format_bytes(step.bytes_read))
    elif step.kind == "Write":
        facts.append(f"its pass reads {format_bytes(step.bytes_read)}")
    text = Text.assemble((step.kind, style), f" {operation}  ", (", ".join(facts), "dim"))
    if step.role == "statistic":
        text.append("  statistic", "yellow")
    if step.outputs > 1:
        text.append(f"  shared by {step.outputs} outputs", "blue")
    if step.is_repeated:
        text.append("  as above", "blue")
        return text
    for name, value in step.parameters:
        text.append(f"\n  {name} {_short(value)}", "dim")
    return text


def _short(value: object) -> str:
    text = " ".join(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
    if len(text) <= MOST_VALUE_CHARACTERS:
        return text
    return f"{text[:MOST_VALUE_CHARACTERS]}…"


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return f"({' '.join(map(_plain, value))})"
    return "–" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


# memory


def memory_view(parts: MemoryParts) -> RenderableType:
    """What the projected peak consists of, with bars."""
    from rich.text import Text

    memory = parts.memory
    peak = memory.projected_bytes
    table = _table()
    table.add_column("part of the peak", style="bold", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, style="cyan", min_width=BAR_COLUMNS)
    table.add_column("", style="dim", overflow="fold", ratio=1)
    for part in parts.parts:
        size = format_memory(part.size_bytes)
        detail = part.detail
        if part.name == "buffers":
            workers = f"{memory.workers} worker{'' if memory.workers == 1 else 's'}"
            detail = f"{workers} × {format_memory(memory.arena_bytes)}"
        table.add_row(part.name, size, _bar(part.size_bytes, peak), Text(detail))
    table.add_row(
        "in all", format_memory(peak), "", Text(f"of {format_memory(memory.limit_bytes)}")
    )
    return section("memory", table, *_arena_view(parts), *_needs_view(parts))


def _bar(size: int, whole: int) -> str:
    return "█" * max(1, round(BAR_COLUMNS * size / max(1, whole)))


def _arena_view(parts: MemoryParts) -> list[RenderableType]:
    from rich.text import Text

    if not parts.arena:
        return []
    memory = parts.memory
    title = Text("The buffers of one worker are laid out for the stage that needs most: ")
    title.append(f"{parts.stage} of {memory.hungriest}")
    table = _table()
    table.add_column("buffers of a worker", style="bold", overflow="fold", ratio=1)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, style="cyan", min_width=BAR_COLUMNS)
    for part in parts.arena:
        bar = _bar(part.size_bytes, memory.arena_bytes)
        table.add_row(part.name, str(part.buffers), format_memory(part.size_bytes), bar)
    return [title, table]


def _needs_view(parts: MemoryParts) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    needs = []
    for need in parts.needs:
        mark = " (chosen)" if need.is_chosen else "" if need.fits else " (over the limit)"
        needs.append(f"{need.workers}: {format_memory(need.projected_bytes)}{mark}")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    smallest = f"{format_memory(parts.memory.smallest_limit_bytes)}, with one worker"
    grid.add_row("smallest limit that works", Text(smallest))
    grid.add_row("by number of workers", Text(", ".join(needs)))
    for number, remedy in enumerate(parts.remedies):
        grid.add_row("" if number else "lower with", Text(remedy))
    return [grid]


# differences


def differences_view(
    found: Differences,
    other: str,
    plans: tuple[Plan, Plan],
    estimates: tuple[Estimate | None, Estimate | None],
) -> RenderableType:
    """What would change if the other recipe were merged in place of this one."""
    from rich.table import Table
    from rich.text import Text

    title = f"what would change with {other}"
    if found.is_equal:
        return section(title, Text("nothing: both give the same bytes"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for fact in found.facts:
        grid.add_row(fact.what, Text(f"{fact.before} → {fact.after}"))
    for sign, models in (("+", found.models_added), ("-", found.models_removed)):
        for model in models:
            grid.add_row("model", Text(f"{sign} {model}", style="green" if sign == "+" else "red"))
    for label, (count, names) in (
        ("added", found.added),
        ("removed", found.removed),
        ("changed", found.changed),
    ):
        if count:
            grid.add_row(label, Text(f"{count} tensor{'' if count == 1 else 's'}: {names}"))
    grid.add_row("same bytes", f"{found.unchanged} tensors")
    for label, before, after in _totals(found):
        grid.add_row(label, before if before == after else f"{before} → {after}")
    if all(estimates):
        spans = [time_lines(p, e)[0] for p, e in zip(plans, estimates, strict=True)]
        grid.add_row("takes", f"{spans[0]} → {spans[1]}")
    parts: list[RenderableType] = [grid]
    changes = [*found.reshaped, *found.values]
    if changes:
        parts.append(_changes_table(changes))
    return section(title, *parts)


def _totals(found: Differences) -> list[tuple[str, str, str]]:
    shown = [("reads", "bytes_read", format_bytes), ("writes", "bytes_written", format_bytes)]
    shown.append(("memory", "projected_bytes", format_memory))
    return [(label, form(found.before[key]), form(found.after[key])) for label, key, form in shown]


def _changes_table(changes: Sequence[ValueChange]) -> Table:
    from rich.text import Text

    table = _table()
    table.add_column("tensors", style="bold", overflow="fold", ratio=2, min_width=24)
    table.add_column("what", no_wrap=True)
    table.add_column("before", overflow="fold", ratio=1)
    table.add_column("after", overflow="fold", ratio=1)
    for change in changes:
        table.add_row(
            Text(change.where), Text(change.parameter), Text(change.before), Text(change.after)
        )
    return table


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), expand=True)
