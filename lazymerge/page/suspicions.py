"""What looks wrong with a plan, for its page."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from ..engine.plan import Plan

MODULE = "lazymerge.inspection.suspicions"


def suspicions_of(plan: Plan) -> tuple[tuple[str, str], ...]:
    """(severity, message) pairs, mistakes first."""
    if find_spec(MODULE) is None:
        return ()
    found = [(each.severity, each.message) for each in import_module(MODULE).suspicions(plan)]
    return tuple(sorted(found, key=lambda pair: pair[0] != "mistake"))
