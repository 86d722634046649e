"""Samples of tensors that lie elsewhere and are too large to be held: by which requests they come.

A sample is hundreds of short runs, spread over a tensor. Where they lie close together, what is
between them is fetched with them and thrown away as it comes: a request for each would take longer.

    tensor     ▓░░░░░▓░░░░░▓░░░░░▓░░░░░▓         gaps are small: a few requests, the runs are kept
               ├────────────┼──────────┤
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.tensor import DTYPES
from ..graph.node import Read
from . import needed_ranges
from .needed_ranges import FileChunks, path_of, united

MOST_REQUEST_BYTES = 32 << 20
"""Of one request: at 100 MB/s a third of a second, so that 50 ms of waiting cost an eighth."""

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One request, and what of it is kept. In bytes of the file.

    wanted: ascending. keeps: it is of whole chunks, so that a cache may have them.
    """

    path: str
    start: int
    stop: int
    wanted: tuple[Range, ...]
    keeps: bool

    def sifting(self, store: Callable[[Any, int], object]) -> Callable[[Any], None]:
        """What takes the answer, piece by piece, and stores of it what is wanted.

        store: is given bytes and their place in the file.
        """
        offset, left = self.start, list(reversed(self.wanted))

        def take(piece: Any) -> None:
            nonlocal offset
            data = memoryview(piece).cast("B")
            stop = offset + len(data)
            while left and left[-1][0] < stop:
                first, last = max(offset, left[-1][0]), min(stop, left[-1][1])
                store(data[first - offset : last - offset], first)
                if last < left[-1][1]:
                    break
                left.pop()
            offset = stop

        return take


def sample_requests(
    reads: Sequence[Read],
    pieces: Sequence[Range],
    layouts: Mapping[str, FileChunks],
    max_gap_bytes: int,
    connections: int,
    is_here: Callable[[str, int], bool],
) -> list[SampleRequest]:
    """The requests for a sample of some inputs.

    pieces: their elements, ascending. is_here: whether a chunk, by path and number, need not be
    asked for.
    """
    found: list[tuple[str, Range, list[Range]]] = []
    for read in reads:
        size = DTYPES[read.dtype].item_bytes
        start = read.tensor.start
        wanted = [(start + first * size, start + last * size) for first, last in pieces]
        for place in united(wanted, max_gap_bytes):
            inside = [each for each in wanted if place[0] <= each[0] < place[1]]
            found.append((path_of(read), place, inside))
    total = sum(place[1] - place[0] for _, place, _ in found)
    most = min(MOST_REQUEST_BYTES, max(2 * needed_ranges.CHUNK_BYTES, total // connections))
    return [
        request
        for path, place, wanted in found
        for request in _cut(path, layouts[path], place, wanted, most, is_here)
    ]


def _cut(
    path: str,
    layout: FileChunks,
    place: Range,
    wanted: Sequence[Range],
    most_bytes: int,
    is_here: Callable[[str, int], bool],
) -> Iterator[SampleRequest]:
    """One united range: by itself where it is short, else in whole chunks."""
    missing = [number for number in layout.overlapping(*place) if not is_here(path, number)]
    if place[1] - place[0] <= needed_ranges.CHUNK_BYTES:
        if missing:
            yield SampleRequest(path, *place, tuple(wanted), keeps=False)
        return
    while missing:
        start, stop = layout.starts[missing[0]], layout.stops[missing.pop(0)]
        while missing and layout.starts[missing[0]] == stop and stop - start < most_bytes:
            stop = layout.stops[missing.pop(0)]
        inside = [
            (max(first, start), min(last, stop))
            for first, last in wanted
            if first < stop and last > start
        ]
        if inside:
            yield SampleRequest(path, start, stop, tuple(inside), keeps=True)
