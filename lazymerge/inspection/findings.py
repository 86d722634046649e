"""What looks wrong with a plan: suspicions, and the notices that planning itself has left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

from ..engine.plan import Plan

SUSPICIONS = "lazymerge.inspection.suspicions"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a person should know before a run.

    kind: a slug; "notice" for what planning noticed. message: one sentence.
    """

    kind: str
    message: str
    severity: Literal["mistake", "note"]

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {"kind": self.kind, "message": self.message, "severity": self.severity}


def suspicions_of(plan: Plan) -> tuple[Finding, ...]:
    """What the module of suspicions says of a plan, mistakes first."""
    if find_spec(SUSPICIONS) is None:
        return ()
    found: Sequence[Any] = import_module(SUSPICIONS).suspicions(plan)
    findings = [Finding(each.kind, each.message, each.severity) for each in found]
    return tuple(sorted(findings, key=lambda finding: finding.severity != "mistake"))


def findings_of(plan: Plan, notices: Sequence[str]) -> tuple[Finding, ...]:
    """Everything to be said: mistakes, notices, then notes; nothing twice.

    notices: the plan's, and those of what is written before it.
    """
    suspicions = suspicions_of(plan)
    noticed = [Finding("notice", notice, "note") for notice in notices]
    mistakes = [finding for finding in suspicions if finding.severity == "mistake"]
    notes = [finding for finding in suspicions if finding.severity != "mistake"]
    ordered = {finding.message: finding for finding in [*mistakes, *noticed, *notes]}
    return tuple(ordered.values())
