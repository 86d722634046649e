"""Few rows that cover every pair."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, product
from math import prod
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covering import covering_rows

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def factors_of(sizes: list[int]) -> dict[str, list[int]]:
    return {f"factor {number}": list(range(size)) for number, size in enumerate(sizes)}


@given(SIZES, st.integers(0, 99))
def test_every_pair_is_in_some_row(sizes: list[int], seed: int) -> None:
    factors = factors_of(sizes)
    rows = covering_rows(factors, Random(seed))
    assert rows == covering_rows(factors, Random(seed))
    assert len(rows) <= prod(sizes)
    for row in rows:
        assert list(row) == list(factors)
    for one, other in combinations(factors, 2):
        pairs = {(row[one], row[other]) for row in rows}
        assert pairs == set(product(factors[one], factors[other]))


def test_far_fewer_than_all_combinations() -> None:
    rows = covering_rows(factors_of([4] * 6), Random(0))
    assert 16 <= len(rows) <= 32  # of 4096


def test_what_does_not_go_together_is_in_no_row() -> None:
    factors = {"method": ["two", "any"], "models": [1, 2, 3], "workers": [1, 2, 3, 4]}

    def is_allowed(row: Mapping[str, Any]) -> bool:
        return row.get("method") != "two" or row.get("models", 2) == 2

    rows = covering_rows(factors, Random(3), is_allowed=is_allowed)
    assert {(row["method"], row["models"]) for row in rows} == {
        ("two", 2),
        *(("any", models) for models in (1, 2, 3)),
    }
    assert {(row["method"], row["workers"]) for row in rows} == set(
        product(factors["method"], factors["workers"])
    )


def test_pairs_that_no_row_can_have_are_an_error() -> None:
    with pytest.raises(ValueError, match="no row can have"):
        covering_rows(
            {"a": [1], "b": [1], "c": [1]}, Random(0), is_allowed=lambda row: len(row) < 3
        )
