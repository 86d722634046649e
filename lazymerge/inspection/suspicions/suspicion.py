"""What a suspicion is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["mistake", "note"]

MOST_NAME = 120
"""Characters of a name that a sentence shows; models may have names of megabytes."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Something about a merge that its author may not have meant.

    kind: a short slug, the same for all of its kind ("weights-sum").
    message: one sentence that names models, tensors and numbers, and the remedy.
    severity: "mistake": very likely wrong. "note": worth knowing.
    """

    kind: str
    message: str
    severity: Severity


def short(name: str) -> str:
    """A name as a sentence shows it."""
    return name if len(name) <= MOST_NAME else f"{name[: MOST_NAME - 1]}…"


def number(value: float) -> str:
    """A parameter's value as a sentence shows it."""
    return f"{value:.4g}"


def spread(values: list[float]) -> str:
    """`1.3`, or `0.8 to 1.2` where values differ."""
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


MOST_LISTED = 4
"""Names that a sentence lists before it says how many more there are."""


def listed(names: list[str]) -> str:
    """`A`, `A and B`, `A, B and C`, `A, B, C and 5 more`."""
    shown = [short(name) for name in names]
    if len(shown) == 1:
        return shown[0]
    if len(shown) > MOST_LISTED:
        shown = [*shown[: MOST_LISTED - 1], f"{len(shown) - MOST_LISTED + 1} more"]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"
