"""Requests for samples: every run comes, whole chunks where many do, and nothing that is here."""

from __future__ import annotations

import random
from typing import Any

import pytest
from lazymerge.checkpoint.tensor import TensorInfo
from lazymerge.engine import needed_ranges, sample_requests
from lazymerge.graph.node import Read

CHUNK = 1 << 16
COUNT = 400_000


def read(start: int) -> Read:
    place = ("a.safetensors", start, start + 2 * COUNT)
    tensor = TensorInfo("w", "BF16", (COUNT,), *place)
    return Read("/m", tensor)


@pytest.mark.parametrize("gap", [0, 5_000, 1 << 20])
def test_every_run_comes(gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    number = random.Random(seed)
    monkeypatch.setattr(needed_ranges, "CHUNK_BYTES", CHUNK)
    for start in (8, 8 + number.randrange(10 * CHUNK)):
        node = read(start)
        path = needed_ranges.path_of(node)
        layouts = needed_ranges.chunks_of([node])
        layout = layouts[path]
        starts = sorted(number.sample(range(0, COUNT - 64, 64), 50))
        pieces = [(first, first + number.randrange(1, 64)) for first in starts]
        here = {n for n in range(len(layout.starts)) if number.random() < 0.3}
        made = sample_requests.sample_requests(
            [node], pieces, layouts, gap, 4, lambda _, n, here=here: n in here
        )
        data = number.randbytes(start + 2 * COUNT)
        room: dict[int, int] = {}

        def store(piece: Any, offset: int, room: dict[int, int] = room) -> None:
            room.update(enumerate(bytes(piece), offset))

        for request in made:
            take = request.sifting(store)
            for place in range(request.start, request.stop, 777):
                take(data[place : min(request.stop, place + 777)])
            if request.keeps:
                assert request.start in layout.starts
                assert request.stop in layout.stops
        wanted = {
            place for first, last in pieces for place in range(start + 2 * first, start + 2 * last)
        }
        for place in wanted:
            (chunk,) = layout.overlapping(place, place + 1)
            assert chunk in here or room[place] == data[place]
        assert room.keys() <= wanted
        if gap >= 1 << 20:
            assert len(made) <= len(here) + 6
