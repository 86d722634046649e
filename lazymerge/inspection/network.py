"""How fast what a plan fetches over the network comes: a sample of it, fetched as a run does."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from ..checkpoint.at_once import requesting
from ..engine.network import CONNECTIONS
from ..engine.plan import Plan
from ..engine.remote_inputs import Distant
from ..engine.sample_requests import MOST_REQUEST_BYTES
from ..errors import LazymergeError

SAMPLE_SECONDS = 1.5
"""After which nothing more is asked for."""

FIRST_REQUEST_BYTES = 1 << 18
"""Of a connection; twice as much by the next, while that takes less than QUICK_SECONDS."""

QUICK_SECONDS = 0.3

Range = tuple[Distant, int, int]
"""A file, and a byte range of it."""


def network_rate(plan: Plan, seconds: float = SAMPLE_SECONDS) -> float | None:
    """Bytes per second that come over as many connections as a run has; None where nothing is to be
    fetched, or it cannot be.

    Fetches some of the inputs, and keeps nothing.
    """
    ranges = _ranges(plan)
    if not ranges:
        return None
    deadline = time.perf_counter() + seconds
    share = len(ranges) / CONNECTIONS
    with requesting(CONNECTIONS) as pool:
        rates = pool.map(
            lambda number: _rate(ranges[int(number * share) :], deadline), range(CONNECTIONS)
        )
        return sum(rates) or None


def _ranges(plan: Plan) -> list[Range]:
    """What is fetched, in pieces of at most a request."""
    found: list[Range] = []
    for path, chunks in plan.chunks_to_fetch.items():
        for start, stop in zip(chunks.starts, chunks.stops, strict=True):
            found.append((plan.remote_inputs[path], start, stop))
    return found


def _rate(ranges: Sequence[Range], deadline: float) -> float:
    """Bytes per second of one connection, by the last of its requests; 0 where none was answered.

    ranges: that may be fetched, in this order.
    """
    rate, size = 0.0, FIRST_REQUEST_BYTES
    for file, start, stop in _joined(ranges):
        while start < stop:
            began = time.perf_counter()
            if began >= deadline and rate:
                return rate
            end = min(stop, start + size)
            try:
                file.read(start, end, lambda _: None)
            except LazymergeError:
                return rate  # a run will say what is wrong
            took = max(1e-6, time.perf_counter() - began)
            rate, start = (end - start) / took, end
            if took < QUICK_SECONDS:
                size = min(2 * size, MOST_REQUEST_BYTES)
    return rate


def _joined(ranges: Sequence[Range]) -> Iterator[Range]:
    """Ranges that follow one another as one."""
    file, start, stop = ranges[0]
    for other, first, last in ranges[1:]:
        if other is file and first == stop:
            stop = last
        else:
            yield file, start, stop
            file, start, stop = other, first, last
    yield file, start, stop
