"""Tables of changes, for `report` and `diff`: by layer, by part of a layer, by model, by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..engine.statistics import Change
    from ..engine.statistics_groups import Group

MOST_LAYERS = 16
"""Rows of a layer stack; more layers are taken together."""

MOST_TENSORS = 5
"""Named as most and as least changed."""

NARROW = 100
"""Columns of a terminal below which bars are short, and models have a line of their own alone."""

BLOCKS = " ▏▎▍▌▋▊▉█"
SPARKS = "▁▂▃▄▅▆▇█"
NO_SPARK = "·"


def percent(value: float) -> str:
    """`3.52 %`, three digits where they say something; `–` for no number."""
    if not math.isfinite(value):
        return "–"
    share = value * 100
    if share == 0 or abs(share) >= 99.95:
        return f"{share:.0f} %"
    digits = 0 if abs(share) >= 100 else 1 if abs(share) >= 10 else 2
    return f"{share:.{digits}f} %" if abs(share) >= 0.005 else "<0.01 %"


def cosine(value: float) -> str:
    """Three decimals; more where it is all but 1."""
    if not math.isfinite(value):
        return "–"
    if abs(value) < 0.0005:
        return "0.000"
    return f"{value:.3f}" if abs(value) < 0.9995 else f"{value:.6f}"


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if math.isfinite(value) else "–"


def bar(value: float, largest: float, width: int) -> str:
    """A horizontal bar; `width` characters for the largest."""
    if not (math.isfinite(value) and largest > 0):
        return ""
    eighths = round(max(0.0, min(1.0, value / largest)) * width * 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (BLOCKS[rest] if rest else "")


def spark(values: Sequence[float], low: float, high: float) -> str:
    """One character for each value, from low to high."""
    if high <= low:
        return SPARKS[len(SPARKS) // 2] * len(values)
    return "".join(
        SPARKS[round(min(1.0, max(0.0, (value - low) / (high - low))) * (len(SPARKS) - 1))]
        if math.isfinite(value)
        else NO_SPARK
        for value in values
    )


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )


class Changes:
    """Tables of changes that share a scale, for one terminal.

    groups: all that are shown of, for the scale. models: those with columns of their own, where
        there is room. has_conflict: several models take part.
    """

    def __init__(self, groups: Sequence[Group], whole: Change, width: int) -> None:
        self._largest = max(
            (g.change.relative for g in groups if math.isfinite(g.change.relative)), default=0.0
        )
        self._has_conflict = len(whole.models) > 1
        self._bar_width = 8 if width < NARROW else 16
        room = (width - NARROW) // 20
        self._models = list(whole.models) if len(whole.models) <= room else []

    def table(self, title: str, first_column: str, groups: Sequence[Group]) -> RenderableType:
        """A row for each group: the relative change and a bar of it, the share of elements that
        changed, the share of them that models disagree on, the cosine to the reference; for every
        model the cosine of its change to the result's and how often signs agree."""
        from rich.text import Text

        table = _table(title)
        table.add_column(first_column, overflow="fold", min_width=12)
        table.add_column("change", no_wrap=True, justify="right")
        table.add_column("", no_wrap=True, style="cyan", width=self._bar_width)
        table.add_column("changed", no_wrap=True, justify="right")
        if self._has_conflict:
            table.add_column("conflict", no_wrap=True, justify="right")
        table.add_column("cosine", no_wrap=True, justify="right")
        for model in self._models:
            name = Text(model.rstrip("/").rsplit("/", 1)[-1][:12])
            table.add_column(Text.assemble(name, " cosine"), justify="right", max_width=12)
            table.add_column("agrees", no_wrap=True, justify="right")
        for group in groups:
            table.add_row(Text(short(group.label)), *self._row(group.change))
        return table

    def _row(self, change: Change) -> list[str]:
        to_reference = next(iter(change.cosines.values()), math.nan)
        cells = [
            percent(change.relative),
            bar(change.relative, self._largest, self._bar_width),
            percent(change.fraction),
            *([percent(change.conflict)] if self._has_conflict else []),
            cosine(to_reference),
        ]
        for name in self._models:
            model = change.models.get(name)
            cells += (
                ["–", "–"] if model is None else [cosine(model.cosine), percent(model.agreement)]
            )
        return cells

    def extremes(self, groups: Sequence[Group]) -> list[RenderableType]:
        """The most and the least changed tensors, of groups in that order."""
        if len(groups) <= 2 * MOST_TENSORS:
            return [self.table("tensors", "tensor", groups)]
        return [
            self.table("most changed", "tensor", groups[:MOST_TENSORS]),
            self.table("least changed", "tensor", groups[-MOST_TENSORS:]),
        ]


def short(label: str) -> str:
    """A name without what most names end with."""
    return label.removesuffix(".weight")


def models_table(whole: Change, layers: Sequence[Group], width: int) -> RenderableType:
    """A row for each model: how large its change is, how much of it is in the result, and how that
    goes over the layers."""
    from rich.text import Text

    table = _table("models: how much of each is in the result")
    table.add_column("model", overflow="fold", min_width=8)
    for name in ("change", "changed", "cosine", "kept", "agrees"):
        table.add_column(name, no_wrap=True, justify="right")
    is_wide = width >= NARROW
    shown = 40 if is_wide else 20
    table.add_column("cosine by layer", no_wrap=True, style="cyan")
    if is_wide:
        table.add_column("agrees by layer", no_wrap=True, style="cyan")
    for name, model in whole.models.items():
        found = [group.change.models.get(name) for group in layers]
        cosines = [math.nan if change is None else change.cosine for change in found]
        agreements = [math.nan if change is None else change.agreement for change in found]
        table.add_row(
            Text(name),
            percent(model.relative),
            percent(model.fraction),
            cosine(model.cosine),
            percent(model.kept),
            percent(model.agreement),
            spark(_thinned(cosines, shown), min(0.0, *_finite(cosines)), 1.0),
            *([spark(_thinned(agreements, shown), 0.0, 1.0)] if is_wide else []),
        )
    return table


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)] or [0.0]


def _thinned(values: Sequence[float], most: int) -> Sequence[float]:
    """At most so many values, means of even runs."""
    run = math.ceil(len(values) / most)
    parts = [_finite(values[first : first + run]) for first in range(0, len(values), run)]
    return values if run <= 1 else [sum(part) / len(part) for part in parts]


def between_lines(whole: Change) -> list[str]:
    """The cosines between the models' changes, in words."""
    return [
        f"the changes of {one} and {other} have a cosine of {cosine(value)}"
        for (one, other), value in whole.between.items()
    ]


LEGEND = (
    "change: ‖δ‖ / ‖reference‖ of the result's difference δ from the reference; changed: elements "
    "that differ; cosine: to the reference"
)
MERGE_LEGEND = (
    f"{LEGEND}, or of a model's δ to the result's; conflict: of the elements that models change, "
    "where two pull in opposite directions; kept: how much of a model's δ is in the result's; "
    "agrees: of the elements a model changes, where the result moves the same way"
)
