"""What looks wrong with a plan, for its page."""

from __future__ import annotations

from ..engine.plan import Plan


def suspicions_of(plan: Plan) -> tuple[tuple[str, str], ...]:
    """(severity, message) pairs, mistakes first."""
    try:
        from ..inspection.suspicions import suspicions
    except ModuleNotFoundError:
        return ()
    found = [(each.severity, each.message) for each in suspicions(plan)]
    return tuple(sorted(found, key=lambda pair: pair[0] != "mistake"))
