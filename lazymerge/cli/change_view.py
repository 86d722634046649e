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

BAR_WIDTH = 12
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
    return f"{value:.3f}" if abs(value) < 0.9995 else f"{value:.6f}"


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}" if math.isfinite(value) else "–"


def bar(value: float, largest: float, width: int = BAR_WIDTH) -> str:
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


def changes_table(
    title: str, first_column: str, groups: Sequence[Group], *, with_conflict: bool
) -> RenderableType:
    """A row for each group: a bar of the relative change, the share of elements that changed, the
    share of them that the models disagree on, the cosine to the reference."""
    from rich.text import Text

    table = _table(title)
    table.add_column(first_column, overflow="fold", min_width=12)
    table.add_column("change", no_wrap=True, justify="right")
    table.add_column("", no_wrap=True, style="cyan", width=BAR_WIDTH)
    table.add_column("changed", no_wrap=True, justify="right")
    if with_conflict:
        table.add_column("conflict", no_wrap=True, justify="right")
    table.add_column("cosine", no_wrap=True, justify="right")
    finite = [g.change.relative for g in groups if math.isfinite(g.change.relative)]
    largest = max(finite, default=0.0)
    for group in groups:
        change = group.change
        to_reference = next(iter(change.cosines.values()), math.nan)
        table.add_row(
            Text(group.label),
            percent(change.relative),
            bar(change.relative, largest),
            percent(change.fraction),
            *([percent(change.conflict)] if with_conflict else []),
            cosine(to_reference),
        )
    return table


def models_table(whole: Change, layers: Sequence[Group], width: int) -> RenderableType:
    """A row for each model: how large its change is, how much of it is in the result, and how that
    goes over the layers."""
    from rich.text import Text

    table = _table("models: how much of each is in the result")
    table.add_column("model", overflow="fold", min_width=8)
    for name in ("change", "changed", "cosine", "kept", "agrees"):
        table.add_column(name, no_wrap=True, justify="right")
    shown = max(8, min(len(layers), (width - 60)))
    table.add_column("cosine by layer", no_wrap=True, style="cyan")
    for name, model in whole.models.items():
        found = [
            group.change.models[name].cosine if name in group.change.models else math.nan
            for group in layers
        ]
        table.add_row(
            Text(name),
            percent(model.relative),
            percent(model.fraction),
            cosine(model.cosine),
            percent(model.kept),
            percent(model.agreement),
            spark(_thinned(found, shown), min(0.0, *_finite(found)), 1.0),
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


def extremes(groups: Sequence[Group], *, with_conflict: bool) -> list[RenderableType]:
    """The most and the least changed tensors, of groups in that order."""
    if len(groups) <= 2 * MOST_TENSORS:
        return [changes_table("tensors", "tensor", groups, with_conflict=with_conflict)]
    return [
        changes_table(title, "tensor", part, with_conflict=with_conflict)
        for title, part in (
            ("most changed", groups[:MOST_TENSORS]),
            ("least changed", groups[-MOST_TENSORS:]),
        )
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
