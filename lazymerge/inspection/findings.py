"""What looks wrong with a plan: suspicions, and the notices that planning itself has left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..engine.plan import Plan
from .suspicions import suspicions


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
    """The suspicions of a plan, mistakes first."""
    findings = [Finding(each.kind, each.message, each.severity) for each in suspicions(plan)]
    return tuple(sorted(findings, key=lambda finding: finding.severity != "mistake"))


def findings_of(plan: Plan, notices: Sequence[str]) -> tuple[Finding, ...]:
    """Everything to be said: mistakes, notices, then notes; nothing twice.

    notices: the plan's, and those of what is written before it.
    """
    found = suspicions_of(plan)
    noticed = [Finding("notice", notice, "note") for notice in notices]
    mistakes = [finding for finding in found if finding.severity == "mistake"]
    notes = [finding for finding in found if finding.severity != "mistake"]
    ordered = {finding.message: finding for finding in [*mistakes, *noticed, *notes]}
    return tuple(ordered.values())
