"""Few rows that cover every pair: a check of many settings without all their combinations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from random import Random
from typing import Any

Row = Mapping[str, Any]


def covering_rows(
    factors: Mapping[str, Sequence[Any]],
    random: Random,
    *,
    is_allowed: Callable[[Row], bool] = lambda row: True,
    candidates: int = 12,
) -> list[dict[str, Any]]:
    """Rows, one value for each factor, such that every allowed pair of values is in some row.

    is_allowed: tells of a row, or the part of one, whether its values go together. What it allows
        must be possible to complete.
    candidates: rows tried for each row that is kept.

    Greedy: every row begins with a pair that is missing, and each further factor takes the value
    that makes most missing pairs (after D. M. Cohen et al., The AETG System, IEEE Transactions on
    Software Engineering 23(7), 1997).

    Raises:
        ValueError: a pair that is allowed can be in no row.
    """
    names = list(factors)
    if len(names) == 1:
        return [{names[0]: value} for value in factors[names[0]]]
    missing: dict[tuple[tuple[str, Any], ...], None] = {}  # a set that keeps its order
    for one, other in combinations(names, 2):
        for left in factors[one]:
            for right in factors[other]:
                if is_allowed({one: left, other: right}):
                    missing[(one, left), (other, right)] = None

    def new_pairs(row: Row) -> list[tuple[tuple[str, Any], ...]]:
        chosen = [(name, row[name]) for name in names if name in row]
        return [pair for pair in combinations(chosen, 2) if pair in missing]

    def complete(row: dict[str, Any]) -> bool:
        for name in random.sample(names, len(names)):
            if name in row:
                continue
            shuffled = random.sample(list(factors[name]), len(factors[name]))
            values = [value for value in shuffled if is_allowed({**row, name: value})]
            if not values:
                return False
            counts = [len(new_pairs({**row, name: value})) for value in values]
            row[name] = values[counts.index(max(counts))]
        return True

    rows = []
    while missing:
        starts = list(missing)
        tried = [dict(random.choice(starts)) for _ in range(candidates)]
        possible = [row for row in tried if complete(row)]
        if not possible:
            raise ValueError(f"no row can have {starts[0]}, though it is allowed")
        best = max(possible, key=lambda row: len(new_pairs(row)))
        for pair in new_pairs(best):
            del missing[pair]
        rows.append({name: best[name] for name in names})
    return rows
