"""The page of a plan: what a merge will do, to be looked at before it is started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..engine.plan import Plan
from ..inspection.findings import suspicions_of
from ..output.target import write_target
from .html import D3, PAGE_BEGINS, assemble
from .plan_document import plan_documents

LIBRARIES = ("uPlot", "dagre", *(f"d3-{part}" for part in D3))
SCRIPTS = (
    "base.js",
    "decoding.js",
    "charts.js",
    "heatmap.js",
    "tensor.js",
    "folding.js",
    "picture.js",
    "plan.js",
)


def plan_page(
    plan: Plan,
    *,
    facts: Iterable[tuple[str, str]] = (),
    manifest: Mapping[str, Any] | None = None,
) -> str:
    """A plan as one self-contained HTML page.

    facts: (label, sentence) pairs that are shown after the plan's own.
    manifest: contents of the output's lazymerge.json, if it is complete: what its run measured is
        drawn beside what the plan predicts.
    """
    document, packed = plan_documents(
        plan,
        suspicions=[(each.severity, each.message) for each in suspicions_of(plan)],
        facts=facts,
        manifest=manifest,
    )
    title = f"{plan.recipe.merge_method} {Path(plan.recipe.path).name}: lazymerge plan"
    return assemble(title, document, packed, libraries=LIBRARIES, scripts=SCRIPTS)


def write_plan_page(
    plan: Plan,
    path: Path,
    manifest: Mapping[str, Any] | None = None,
    facts: Iterable[tuple[str, str]] = (),
) -> None:
    """Writes the page of a plan, in one step.

    Raises:
        InputError: it cannot be written there, or something else is there.
    """
    write_target(path, plan_page(plan, facts=facts, manifest=manifest), *PAGE_BEGINS)
