"""Joining the partial results of many blocks by pairs, in whatever order they arrive.

Sums in floating point depend on their order. Kept until all are there, partial results could be
added in block order; but those by column are as long as a row, and a large tensor has thousands of
blocks. So neighbours are joined as soon as both are there, then pairs of pairs:

    blocks    0   1   2   3   4        which joins which depends on the number of blocks alone,
              └─┬─┘   └─┬─┘   │        so the result does not depend on the order of arrival;
                └───┬───┘     │        for every block still missing, no more than one result
                    └────┬────┘        per level is waiting
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Pairs(Generic[Value]):
    """The results of `count` neighbours, numbered from 0."""

    def __init__(self, join: Callable[[Value, Value], Value], count: int) -> None:
        self._join = join
        self._count = count
        self._waiting: dict[tuple[int, int], Value] = {}
        self._results: list[Value] = []

    def add(self, place: int, value: Value) -> None:
        """Takes the result of one of them."""
        count, level = self._count, 0
        while count > 1:
            neighbour = place ^ 1
            if neighbour < count:
                other = self._waiting.pop((level, neighbour), None)
                if other is None:
                    self._waiting[level, place] = value
                    return
                value = self._join(other, value) if place % 2 else self._join(value, other)
            place, count, level = place // 2, (count + 1) // 2, level + 1
        self._results.append(value)

    @property
    def result(self) -> Value:
        """What all of them together give, once all are there."""
        (value,) = self._results
        return value
