"""The first screen of a plan: what goes in, what comes out, how long, how much, what looks wrong.

It fits 80 × 24 for a usual merge. What would not is cut, and says which option shows all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.models import adapter_text, dtype_shares, dtype_text
from ..engine.plan import Plan
from ..engine.remote_facts import CacheState
from ..inspection.estimate import Estimate
from ..inspection.findings import Finding, findings_of
from ..inspection.layers import ABSENT, common_values, models_of, per_model_parameters
from ..output.folder import free_disk_bytes
from ..output.store.address import StoreAddress
from ..sizes import format_bytes, format_count, format_memory
from .plan_time import time_lines
from .running import notices_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table
    from rich.text import Text

SCREEN_LINES = 24
"""A terminal's usual height. With the shell's prompt below it one line less is used."""

MOST_MODELS = 4
"""Lines of models on the first screen, adapters and merges of the recipe among them."""

MOST_VALUE_CHARACTERS = 200
"""Of the parameters on the first screen: three lines of 80 columns."""

LEAST_FINDINGS = 2
MOST_FINDING_LINES = 2
MOST_MISTAKE_LINES = 4
"""Of one finding on the first screen."""

MOST_MISTAKES = 6
"""Shown on the first screen even where they do not fit."""

LABEL_COLUMNS = 9
MORE = "--layers  --tensor REGEX  --ops  --why memory  --diff RECIPE"


def plan_view(
    plan: Plan,
    place: Path,
    *,
    is_given: bool,
    store: StoreAddress | None = None,
    before: Sequence[Output] = (),
    estimated: Estimate | None = None,
    shows_models: bool = False,
    shows_notices: bool = False,
) -> RenderableType:
    """The first screen.

    before: merges that are written too, before it.
    place: the output folder, or where it will be looked for disk space.
    is_given: whether the user has named an output folder.
    store: where the output goes, if not into a folder.
    estimated: how long it takes, if that was measured.
    shows_models, shows_notices: all of them, however many lines that takes.
    """
    facts = _grid()
    for label, shown in _facts(plan, before, place, is_given, estimated, shows_models):
        if store is not None and label in ("takes", "disk"):  # only a run can tell how long
            if label == "disk":
                facts.add_row("output", _stored(plan, store))
            continue
        facts.add_row(label, shown)
    findings = findings_of(plan, notices_of(plan, before))
    return _Screen(_title(plan), facts, findings, shows_all=shows_notices)


def _title(plan: Plan) -> Text:
    from rich.text import Text

    title = Text.assemble((plan.recipe.merge_method, "bold"), "  ", (plan.recipe.path, "dim"))
    if plan.recipe.part_of:
        title.append(f" ({plan.recipe.name})", "dim")
    title.truncate(200, overflow="ellipsis")
    return title


class _Screen:
    """Title, facts and as many findings as fit."""

    def __init__(
        self, title: Text, facts: Table, findings: Sequence[Finding], *, shows_all: bool
    ) -> None:
        self._title = title
        self._facts = facts
        self._findings = findings
        self._shows_all = shows_all

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        parts: list[RenderableType] = [self._title, Text(), self._facts]
        used = sum(len(console.render_lines(part, options, pad=False)) for part in parts)
        # the line with what to ask for more, an empty one before it and before the findings,
        # and the shell's prompt
        room = SCREEN_LINES - used - 4
        yield from parts
        if self._findings:
            yield Text()
            yield self._shown(console, options, room)
        yield Text()
        more = _grid()
        more.add_row("more", Text(MORE, style="dim"))
        yield more

    def _shown(self, console: Console, options: ConsoleOptions, room: int) -> Table:
        """The findings. The first mistakes are shown even if they have no room, and two others."""
        from rich.text import Text

        table = _grid("yellow")
        width = max(20, options.max_width - LABEL_COLUMNS - 2)
        for number, finding in enumerate(self._findings):
            text = Text(finding.message)
            is_mistake = finding.severity == "mistake"
            if not self._shows_all:
                most = MOST_MISTAKE_LINES if is_mistake else MOST_FINDING_LINES
                lines = [*text.wrap(console, width)]
                used = min(len(lines), most)
                is_last = number == len(self._findings) - 1
                is_shown = number < (MOST_MISTAKES if is_mistake else LEAST_FINDINGS)
                if used + (not is_last) > room and not is_shown:
                    table.add_row("", Text(_left(self._findings[number:]), style="dim"))
                    break
                if len(lines) > most:
                    text = _cut(lines[:most], width)
                room -= used
            style = "bold red" if is_mistake else "yellow"
            label = "notice" if finding.kind == "notice" else finding.severity
            table.add_row(Text(label, style=style), text)
        return table


def _left(findings: Sequence[Finding]) -> str:
    """How many there are beside those that are shown."""
    mistakes = sum(finding.severity == "mistake" for finding in findings)
    counts = ((mistakes, "mistake"), (len(findings) - mistakes, "note"))
    told = [f"{n} more {word}{'' if n == 1 else 's'}" for n, word in counts if n]
    return f"and {' and '.join(told)}: --notices"


def _cut(lines: Sequence[Text], width: int) -> Text:
    """The lines of a finding that are shown, and where the rest is."""
    from rich.text import Text

    rest = " … --notices"
    *whole, last = (line.plain.rstrip() for line in lines)
    return Text("\n".join([*whole, last[: width - len(rest)].rstrip() + rest]))


def _facts(
    plan: Plan,
    before: Sequence[Output],
    place: Path,
    is_given: bool,
    estimated: Estimate | None,
    shows_models: bool,
) -> Iterator[tuple[str, RenderableType]]:
    from rich.text import Text

    facts = dict(plan.facts())
    yield "goes in", _models(plan, shows_all=shows_models)
    yield "comes out", Text(facts["output"])
    yield "beside it", _one_line(facts["beside it"])
    yield from ((label, Text(line)) for label, line in _value_lines(plan))
    yield "work", _one_line(f"{facts['data']}; {_passes(plan)}")
    if "download" in facts:
        yield "download", Text(facts["download"])
        yield from (("", Text(line, style="dim")) for line in _downloads(plan, shows_models))
    if "network" in facts:
        yield "network", Text(facts["network"])
    for label in ("whole", "cache"):
        if label in facts:
            yield label, Text(facts[label])
    lines = time_lines(plan, estimated)
    if estimated is not None:
        lines[0] += ", after the download" if "download" in facts else ""
        lines[0] += ", without what is written before it" if before else ""
    for number, line in enumerate(lines):
        yield ("" if number else "takes"), Text(line, style="dim" if number else "")
    yield "memory", Text(facts["memory"])
    if "device" in facts:
        yield "device", Text(facts["device"])
    for each in before:
        of_part = dict(each.plan.facts())
        shown = (of_part["output"], of_part["data"].partition(",")[0], of_part["memory"])
        yield "before it", Text(f"{each.name} in {each.folder}: {'; '.join(shown)}")
    yield "disk", _disk(plan, before, place, is_given)
    if plan.cache_state is not None:
        yield "", _cache_disk(plan.cache_state)


def _disk(plan: Plan, before: Sequence[Output], place: Path, is_given: bool) -> Text:
    from rich.text import Text

    needed = sum(each.bytes_written for each in (plan, *(other.plan for other in before)))
    free = free_disk_bytes(place)
    where = place if is_given else "the current folder"
    return Text.assemble(
        f"needs {format_bytes(needed)}, {format_bytes(free)} free at {where}",
        ("" if free > needed else "  not enough", "bold red"),
    )


def _stored(plan: Plan, store: StoreAddress) -> Text:
    from rich.text import Text

    held = format_memory(plan.memory.store_bytes)
    return Text(f"goes to {store}, {held} of memory for it on its way; no disk needed")


def _cache_disk(state: CacheState) -> Text:
    from rich.text import Text

    free = free_disk_bytes(Path(state.folder))
    return Text.assemble(
        f"the cache grows by {format_bytes(state.grows_bytes)}, {format_bytes(free)} free at "
        f"{state.folder}",
        ("" if free > state.grows_bytes else "  not enough", "bold red"),
    )


def _downloads(plan: Plan, shows_all: bool) -> list[str]:
    """The files that are to be downloaded, if they are asked for."""
    return [
        f"{file.source.repository}/{file.name}, {format_bytes(file.size_bytes)}"
        for file in plan.missing_files
        if shows_all
    ]


def _passes(plan: Plan) -> str:
    """`2 passes`, or how many tensors have how many."""
    if len(plan.passes) == 1:
        (passes,) = plan.passes
        return f"{passes} pass{'' if passes == 1 else 'es'} over every tensor"
    return "passes: " + ", ".join(
        f"{passes} over {tensors} tensor{'' if tensors == 1 else 's'}"
        for passes, tensors in plan.passes.items()
    )


def _models(plan: Plan, *, shows_all: bool) -> Table:
    from rich.text import Text

    table = _grid(None)
    for justify in ("right", "right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    rows = _model_rows(plan)
    shown = rows if shows_all or len(rows) <= MOST_MODELS else rows[: MOST_MODELS - 1]
    overflow = "fold" if shows_all else "ellipsis"
    table.columns[1].overflow = overflow  # type: ignore[assignment]
    table.columns[1].no_wrap = not shows_all
    for label, name, *sizes in shown:
        table.add_row(label, name, *sizes)
    for place, column in enumerate(table.columns):
        if place != 1:  # the name alone gives way
            cells = [row[place] for row in shown if len(row) > place]
            column.min_width = max((len(str(cell)) for cell in cells), default=0)
    if len(shown) < len(rows):
        left = len(rows) - len(shown)
        table.add_row("", Text(f"and {left} more: --models", style="dim"))
    return table


def _model_rows(plan: Plan) -> list[list[RenderableType]]:
    """Label, name, parameters, size, dtype and files of each model; of adapters a line more."""
    from rich.text import Text

    labels = model_labels(plan)
    rows: list[list[RenderableType]] = []
    for label, (reference, checkpoint) in zip(labels, plan.checkpoints.items(), strict=False):
        is_base = reference == plan.recipe.base_model
        files = len(checkpoint.files)
        name = Text.assemble((reference, "bold"), (" (base)" if is_base else "", "dim"))
        rows.append(
            [
                label,
                name,
                format_count(checkpoint.parameter_count),
                format_bytes(checkpoint.size_bytes),
                f"{files} file{'' if files == 1 else 's'}",
                dtype_text(dtype_shares(checkpoint)),
            ]
        )
        if checkpoint.adapter is not None:
            rows.append(["", Text(adapter_text(checkpoint.adapter), style="dim")])
    for label, merge in zip(labels[len(plan.checkpoints) :], plan.recipe.merges, strict=True):
        inputs = [labels[models_of(plan).index(reference)] for reference in merge.references]
        how = f" = {merge.merge_method} of {', '.join(inputs)}"
        rows.append([label, Text.assemble((str(merge.name), "bold"), (how, "dim"))])
    return rows


def model_labels(plan: Plan) -> list[str]:
    """A, B, C …: what per-model values refer to, in the order of the models."""
    count = len(models_of(plan))
    return [chr(ord("A") + n) if count <= 26 else f"#{n + 1}" for n in range(count)]


def value_text(plan: Plan, name: str, text: str, per_model: frozenset[str]) -> str:
    """A parameter with its value, or its values by the models' labels: `weight B 1  C 0.3`."""
    if name not in per_model:
        return f"{name} {text}"
    values = zip(model_labels(plan), text.split(" "), strict=False)
    return "  ".join([name, *(f"{label} {value}" for label, value in values if value != ABSENT)])


def _value_lines(plan: Plan) -> list[tuple[str, str]]:
    """The parameters that are the same for all tensors, and the names of those that differ."""
    common, differing = common_values(plan)
    per_model = per_model_parameters(plan)
    shown = sorted(common, key=lambda name: name not in per_model)
    lines = [value_text(plan, name, common[name], per_model) for name in shown]
    if differing:
        lines.append(f"{', '.join(differing)} by tensor: --layers")
    text = " · ".join(lines)
    if len(text) > MOST_VALUE_CHARACTERS:
        text = f"{text[:MOST_VALUE_CHARACTERS].rstrip()} … all of it: --layers"
    return [("with", text)] if lines else []


def _one_line(text: str) -> Text:
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ellipsis")


def _grid(label_style: str | None = "dim") -> Table:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    if label_style is None:
        grid.add_column(no_wrap=True)
        grid.add_column()
        return grid
    grid.add_column(style=label_style, no_wrap=True, min_width=LABEL_COLUMNS)
    grid.add_column(overflow="fold")
    return grid


if TYPE_CHECKING:
    from ..engine.intermediates import Output
