"""Joining by pairs: the order of arrival never shows, and few results wait at a time."""

from __future__ import annotations

import random as random_module
from collections.abc import Iterable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lazymerge.engine.pairs import Pairs

Tree = Any
"""A number, or a pair of trees."""


def pair_up(results: list[Tree]) -> Tree:
    """What joins which, written down: neighbours by twos, a last one alone."""
    while len(results) > 1:
        results = [
            (results[place], results[place + 1]) if place + 1 < len(results) else results[place]
            for place in range(0, len(results), 2)
        ]
    return results[0]


def joined(order: Iterable[int], count: int) -> Pairs[Tree]:
    pairs: Pairs[Tree] = Pairs(lambda left, right: (left, right), count)
    for place in order:
        pairs.add(place, place)
    return pairs


def shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random_module.Random(seed).shuffle(order)
    return order


def test_by_hand() -> None:
    assert joined([0], 1).result == 0
    assert joined([1, 0], 2).result == (0, 1)
    assert joined([2, 0, 1], 3).result == ((0, 1), 2)
    assert joined([4, 3, 2, 1, 0], 5).result == (((0, 1), (2, 3)), 4)
    assert joined(range(6), 6).result == (((0, 1), (2, 3)), (4, 5))
    assert joined(range(7), 7).result == (((0, 1), (2, 3)), ((4, 5), 6))


@pytest.mark.parametrize("count", range(1, 8))
def test_every_order_of_a_few(count: int) -> None:
    expected = pair_up(list(range(count)))
    assert all(joined(order, count).result == expected for order in permutations(range(count)))


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_any_order_of_many(count: int, seed: int) -> None:
    assert joined(shuffled(count, seed), count).result == pair_up(list(range(count)))


@settings(max_examples=50)
@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_sums_of_floats_do_not_show_the_order(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_normal((count, 3)) * 10.0 ** random.uniform(-9, 9, (count, 3))
    results = []
    for order in (range(count), shuffled(count, seed), reversed(range(count))):
        pairs: Pairs[Any] = Pairs(lambda left, right: left + right, count)
        for place in order:
            pairs.add(place, values[place])
        results.append(pairs.result.tobytes())
    assert len(set(results)) == 1


def waiting(pairs: Pairs[Any]) -> int:
    return len(pairs._waiting)


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_no_more_wait_than_missing_ones_times_levels(count: int, seed: int) -> None:
    """A result waits for a neighbour, of which something is missing; each missing one is part of
    one neighbour per level."""
    levels = (count - 1).bit_length()
    pairs: Pairs[Tree] = Pairs(lambda left, right: (left, right), count)
    for added, place in enumerate(shuffled(count, seed), start=1):
        pairs.add(place, place)
        assert waiting(pairs) <= (count - added) * levels
        assert waiting(pairs) <= added
    assert waiting(pairs) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_as_workers_give_them_back_no_more_wait_than_levels_and_workers(
    count: int, workers: int, random: np.random.Generator
) -> None:
    """Taken in order and given back in almost that order, what is missing is what the others are
    at, and what nobody has begun: a row without gaps, which counts as one."""
    levels = (count - 1).bit_length()
    open_jobs: list[int] = []
    following = iter(range(count))
    pairs: Pairs[int] = Pairs(lambda left, right: left + right, count)
    finished, most = 0, 0
    while finished < count:
        while len(open_jobs) < workers and (place := next(following, None)) is not None:
            open_jobs.append(place)
        # whoever was first has one chance in two of being done first
        chosen = int(random.integers(len(open_jobs))) if random.random() < 0.5 else 0
        pairs.add(open_jobs.pop(chosen), 1)
        finished += 1
        most = max(most, waiting(pairs))
    assert pairs.result == count
    assert most <= levels * workers


def test_there_is_no_result_before_all_are_there() -> None:
    pairs = joined([0, 1, 3], 4)
    with pytest.raises(ValueError, match="not enough values"):
        _ = pairs.result
    pairs.add(2, 2)
    assert pairs.result == ((0, 1), (2, 3))
