"""What a run has measured, from its manifest, for drawing beside what was predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = ("seconds", "bytes_read", "bytes_written", "resident_bytes")

MOST_ROWS = 10_000
"""Of a timeline; runs record some hundred. A manifest that somebody has edited may hold more."""


def measured_timeline(manifest: Mapping[str, Any] | None) -> dict[str, list[float]] | None:
    """A run's timeline as columns; None where the manifest holds none that makes sense.

    manifest: the contents of lazymerge.json; what a person may have altered is checked.
    """
    timeline = (manifest or {}).get("timeline")
    if not isinstance(timeline, Mapping):
        return None
    names, rows = timeline.get("columns"), timeline.get("rows")
    if not isinstance(names, list) or not isinstance(rows, list):
        return None
    if not set(COLUMNS) <= {name for name in names if isinstance(name, str)}:
        return None
    places = [names.index(name) for name in COLUMNS]
    kept = [
        [row[place] for place in places]
        for row in rows[:MOST_ROWS]
        if isinstance(row, list) and len(row) == len(names)
    ]
    if not kept or not all(_is_number(value) for row in kept for value in row):
        return None
    kept.sort(key=lambda row: row[0])
    return {name: [row[n] for row in kept] for n, name in enumerate(COLUMNS)}


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < 2**53  # nan and inf are not
