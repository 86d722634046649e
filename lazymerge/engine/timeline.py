"""What a run has moved and occupied, as time went by; a few hundred moments of it are kept."""

from __future__ import annotations

import time
from collections.abc import Callable

from .baseline import resident_bytes

MOST_MOMENTS = 400
"""More than a chart shows apart; when there are so many, every other one is dropped."""

FIRST_INTERVAL_SECONDS = 0.02
"""Between moments, until some are dropped. Looking takes 0.06 ms."""

COLUMNS = ("seconds", "bytes_read", "bytes_written", "resident_bytes")


class Timeline:
    """Moments of a run. Not safe to use from several threads at once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """clock: seconds, from any beginning."""
        self._clock = clock
        self._began = clock()
        self._interval = FIRST_INTERVAL_SECONDS
        self._next = 0.0
        self._moments: list[tuple[float, int, int, int]] = []

    def note(self, bytes_read: int, bytes_written: int, *, is_last: bool = False) -> None:
        """Keeps what has been moved by now, if the last time is long enough ago."""
        now = self._clock() - self._began
        if now < self._next and not is_last:
            return
        self._moments.append((now, bytes_read, bytes_written, resident_bytes()))
        if len(self._moments) >= MOST_MOMENTS:
            del self._moments[1::2]
            self._interval = 2 * now / MOST_MOMENTS
        self._next = now + self._interval

    def as_dict(self) -> dict[str, object]:
        """For the manifest. Seconds since the run began; bytes moved since then, and the process's
        resident set at that moment."""
        rows = [[round(seconds, 3), *rest] for seconds, *rest in self._moments]
        return {"columns": list(COLUMNS), "rows": rows}
