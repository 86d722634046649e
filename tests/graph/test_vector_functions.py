"""What operations may ask of vectors, against plain definitions, element by element.

The native kernels and accelerators are held against these functions elsewhere (engine/native,
engine/device); here it is said what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lazymerge.graph.vector import (
    LANES,
    SLICE_ELEMENTS,
    SLICE_ROWS,
    column_dot,
    div_rows,
    dot,
    drop_largest,
    exponential,
    keep_largest,
    logarithm,
    rank_rows,
    row_dot,
    row_max,
    row_total,
    scale_columns,
    scale_rows,
    sub_rows,
    total,
    zero_from,
    zero_up_to,
)
from numpy.typing import NDArray

FLOATS = [np.float32, np.float64]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1.5, 2.0**-149, 3e38, math.inf, -math.inf, math.nan]
ROW_LENGTHS = [1, 2, 15, 16, 17, 47, 48, 49, 1023, 1024, 1025, 3000]


def tensor(values: Any) -> torch.Tensor:
    """A copy that functions may change."""
    return torch.from_numpy(np.array(values))


def empty(values: Any, count: int = 1) -> Any:
    made = [torch.full((len(values),), torch.nan, dtype=values.dtype) for _ in range(count)]
    return made[0] if count == 1 else made


def some_numbers(random: np.random.Generator, size: int, kind: type[Any]) -> NDArray[Any]:
    """Of all scales, some of them special, some of them repeated."""
    values = np.round(random.standard_normal(size) * 8) * 2.0 ** random.integers(-20, 20, size)
    places = random.random(size) < 0.2
    values[places] = random.choice(SPECIAL, int(places.sum()))
    return values.astype(kind)


def in_lanes(terms: list[float]) -> float:
    """The order of sums, spelled out."""
    lanes = [0.0] * LANES
    for place, term in enumerate(terms):
        lanes[place % LANES] += term
    so_far = 0.0
    for lane in lanes:
        so_far += lane
    return so_far


# ---------------------------------------------------------------------------- zeroing


@given(
    values=arrays(np.float32, 40, elements=st.sampled_from(SPECIAL) | st.floats(width=32)),
    value=st.sampled_from([0.0, 2.0**-149, 1.0, 1.5, 3e38, math.inf]),
    stop=st.integers(-5, 60),
    start=st.sampled_from([0, 10, 5_000_000_000]),
)
def test_what_is_dropped_is_what_would_be_kept(
    values: NDArray[np.float32], value: float, stop: int, start: int
) -> None:
    below = float(np.nextafter(np.float32(value), np.float32(0)))
    threshold = (float(np.float32(value)), below, start + stop, start)
    kept, dropped = tensor(values), tensor(values)
    keep_largest(kept, *threshold)
    drop_largest(dropped, *threshold, empty(dropped))
    numbers = ~np.isnan(values)
    survives = (kept.numpy() != 0) & numbers
    np.testing.assert_array_equal(dropped.numpy(), np.where(survives, 0, values))
    assert np.isnan(kept.numpy()[~numbers]).all()
    assert np.isnan(dropped.numpy()[~numbers]).all()
    limit = np.where(np.arange(40) < stop, below, threshold[0])
    np.testing.assert_array_equal(survives, np.abs(values) > limit)


@pytest.mark.parametrize("kind", FLOATS)
def test_zeroing_up_to_and_from(kind: type[Any], random: np.random.Generator) -> None:
    values, others, bounds = (some_numbers(random, 500, kind) for _ in range(3))
    bounds[::3] = others[::3]  # equal ones are zeroed, unless they are nan
    for limit in (0.0, -0.0, 1.0, -1.5, 0.1, math.inf, -math.inf, math.nan):
        rounded = kind(limit)  # 0.1 is no float32
        for function, is_zeroed in (
            (zero_up_to, [o <= rounded for o in others]),
            (zero_from, [o >= rounded for o in others]),
        ):
            vector, other = tensor(values), tensor(others)
            function(vector, other, limit, empty(vector))
            np.testing.assert_array_equal(vector.numpy(), np.where(is_zeroed, kind(0), values))
            np.testing.assert_array_equal(other.numpy(), others)
    vector, bound = tensor(values), tensor(bounds)
    zero_from(vector, tensor(others), bound, empty(vector))
    is_zeroed = [o >= b for o, b in zip(others, bounds, strict=True)]
    np.testing.assert_array_equal(vector.numpy(), np.where(is_zeroed, kind(0), values))
    np.testing.assert_array_equal(bound.numpy(), bounds)


def test_a_vector_may_be_compared_with_itself() -> None:
    vector = tensor([1.0, -1.0, math.nan, 3.0])
    zero_up_to(vector, vector, 1.0, empty(vector))
    np.testing.assert_array_equal(vector.numpy(), [0, 0, math.nan, 3])
    zero_from(vector, vector, vector, empty(vector))
    np.testing.assert_array_equal(vector.numpy(), [0, 0, math.nan, 0])


# ------------------------------------------------------------------------------ by row


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("row", ROW_LENGTHS)
def test_ranks(row: int, kind: type[Any], random: np.random.Generator) -> None:
    """0 for the smallest magnitude, equal ones in ascending order, nan last."""
    rows = max(2, 2000 // row)
    values = some_numbers(random, rows * row, kind)
    vector = tensor(values)
    rank_rows(vector, row)
    for numbers, ranks in zip(values.reshape(rows, row), vector.reshape(rows, row), strict=True):
        keys = [(math.isnan(n), 0.0 if math.isnan(n) else abs(n)) for n in numbers]
        order = sorted(range(row), key=keys.__getitem__)
        assert ranks[order].tolist() == list(range(row))


def test_ranks_by_hand() -> None:
    vector = tensor([-3.0, 1.0, math.nan, 0.5, 0.0, -0.0, math.nan, -math.inf])
    rank_rows(vector, 4)
    assert vector.tolist() == [2, 1, 3, 0, 0, 1, 3, 2]


@pytest.mark.parametrize("row", ROW_LENGTHS)
def test_sums_of_rows_are_those_of_each_by_itself(row: int, random: np.random.Generator) -> None:
    """More rows than are added at a time, or enough of them."""
    rows = 2 * SLICE_ROWS + 3 if row < 50 else 4
    one, other = random.standard_normal((2, rows * row)) * 10.0 ** random.uniform(
        -9, 9, (2, rows * row)
    )
    room = empty(tensor(one))
    products = row_dot(tensor(one), tensor(other), row, room)
    sums = row_total(tensor(one), row)
    assert products.dtype == sums.dtype == np.float64
    for place in range(rows):
        part = slice(place * row, (place + 1) * row)
        mine, theirs = tensor(one[part]), tensor(other[part])
        assert products[place] == dot(mine, theirs, empty(mine))
        assert sums[place] == total(mine) == in_lanes(one[part].tolist())


def test_sums_of_rows_of_float32_run_in_float64() -> None:
    ones = tensor(np.array([1.0, 2.0**-30, 2.0**25, 1.0], np.float32))
    assert row_total(ones, 2).tolist() == [1 + 2.0**-30, 2.0**25 + 1]


@pytest.mark.parametrize("kind", FLOATS)
def test_the_largest_of_every_row(kind: type[Any], random: np.random.Generator) -> None:
    for row in ROW_LENGTHS:
        values = some_numbers(random, 3 * row, kind).reshape(3, row)
        values[0] = np.where(np.isnan(values[0]), -1, values[0])
        found = row_max(tensor(values.reshape(-1)), row)
        assert found.dtype == np.float64
        for numbers, most in zip(values.tolist(), found, strict=True):
            if any(map(math.isnan, numbers)):
                assert math.isnan(most)
            else:
                assert most == max(numbers)


@pytest.mark.parametrize("row", ROW_LENGTHS)
def test_numbers_of_rows_are_subtracted_and_divided_by(
    row: int, random: np.random.Generator
) -> None:
    values = random.standard_normal(3 * row)
    numbers = random.standard_normal(3)
    vector = tensor(values)
    sub_rows(vector, numbers, row)
    assert vector.tolist() == [v - numbers[i // row] for i, v in enumerate(values)]
    vector = tensor(values)
    div_rows(vector, numbers, row)
    assert vector.tolist() == [v / numbers[i // row] for i, v in enumerate(values)]


# --------------------------------------------------- by row and column of the whole tensor

starts = st.integers(0, 60) | st.integers(2**40, 2**40 + 60)


@given(st.integers(1, 20), starts, st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_scaling_from_anywhere(row: int, start: int, length: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.standard_normal(length)
    first_row = start // row
    rows = random.standard_normal((start + length - 1) // row - first_row + 1)

    class Table:
        """Of the tensor's rows, those that the block has part in."""

        def __getitem__(self, index: Any) -> Any:
            if isinstance(index, tuple):
                part, nothing = index
                assert nothing is None
                return rows[part.start - first_row : part.stop - first_row, None]
            return rows[index - first_row]

    vector = tensor(values)
    table: Any = Table()
    scale_rows(vector, table, row, start)
    expected = [v * rows[(start + i) // row - first_row] for i, v in enumerate(values)]
    assert vector.tolist() == expected

    columns = random.standard_normal(row)
    vector = tensor(values)
    scale_columns(vector, columns, start)
    assert vector.tolist() == [v * columns[(start + i) % row] for i, v in enumerate(values)]


@given(st.integers(1, 20), starts, st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_products_of_columns_from_anywhere(row: int, start: int, length: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    one, other = random.standard_normal((2, length)) * 10.0 ** random.uniform(-9, 9, (2, length))
    expected = [0.0] * row
    for i in range(length):
        expected[(start + i) % row] += one[i] * other[i]
    found = column_dot(tensor(one), tensor(other), row, start, empty(tensor(one)))
    assert found.dtype == np.float64
    assert found.tolist() == expected


# ------------------------------------------------------------- exponentials and logarithms


def ulps(actual: NDArray[np.float64], exact: NDArray[Any]) -> float:
    """The largest error in units of the last place. exact: with more digits, where there are."""
    distance = np.abs(actual.astype(np.longdouble) - exact)
    return float((distance / np.spacing(np.abs(exact.astype(np.float64)))).max())


def exp_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    vector = tensor(values)
    exponential(vector, *empty(vector, 2))
    return vector.numpy()


def log_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    vector = tensor(values)
    logarithm(vector, *empty(vector, 2))
    return vector.numpy()


HALVES_OF_LN_2 = np.arange(-2042, 2046) * (math.log(2) / 2)
"""Where the exponential goes over to another power of two, and where it is that power."""


def test_exponentials_are_within_two_ulps(random: np.random.Generator) -> None:
    near = [np.nextafter(HALVES_OF_LN_2, infinity) for infinity in (-np.inf, np.inf)]
    values = np.concatenate(
        [
            random.uniform(-708, 709, 200_000),
            random.uniform(-1, 1, 100_000),
            random.standard_normal(50_000) * 10.0 ** random.uniform(-300, 0, 50_000),
            *near,
            HALVES_OF_LN_2,
            [709.0, -708.0, 5e-324, -5e-324],
        ]
    )
    assert ulps(exp_of(values), np.exp(values.astype(np.longdouble))) <= 2


def test_logarithms_are_within_three_ulps(random: np.random.Generator) -> None:
    powers = 2.0 ** np.arange(-1022, 1024)
    ones = 1 + np.concatenate([random.uniform(-0.3, 0.42, 50_000), 2.0 ** -np.arange(1.0, 53)])
    values = np.concatenate(
        [
            10.0 ** random.uniform(-307.6, 308.2, 200_000),
            random.uniform(0.5, 2, 100_000),
            ones,
            powers,
            powers * math.sqrt(2),
            powers * np.nextafter(math.sqrt(2), 0),
            np.nextafter(powers[1:], 0),
            [np.finfo(np.float64).max, np.finfo(np.float64).tiny],
        ]
    )
    assert ulps(log_of(values[values != 1]), np.log(values[values != 1].astype(np.longdouble))) <= 3


def test_what_is_exact_is_exact() -> None:
    assert exp_of(np.array([0.0, -0.0])).tolist() == [1.0, 1.0]
    assert log_of(np.array([1.0])).tolist() == [0.0]


def test_the_ends_of_exponentials_and_logarithms() -> None:
    lowest = exp_of(np.array([-708.0]))[0]
    assert lowest >= np.finfo(np.float64).tiny  # normal
    assert exp_of(np.array([-708.5, -1e300, -math.inf])).tolist() == [lowest] * 3
    assert math.isnan(exp_of(np.array([math.nan]))[0])
    inf, nan = log_of(np.array([math.inf, math.nan]))
    assert inf == math.inf
    assert math.isnan(nan)


def test_they_rise(random: np.random.Generator) -> None:
    """Neighbours that are farther apart than the errors never change places."""
    values = np.sort(random.uniform(-700, 700, 20_000))
    assert (np.diff(exp_of(values)) > 0).all()
    values = np.sort(np.exp(values))
    assert (np.diff(log_of(np.unique(values))) >= 0).all()


def test_logarithms_of_exponentials(random: np.random.Generator) -> None:
    values = random.uniform(1, 700, 10_000)
    np.testing.assert_allclose(log_of(exp_of(values)), values, rtol=1e-15)


@pytest.mark.parametrize("function", [exp_of, log_of])
def test_the_length_of_a_vector_does_not_show(
    function: Callable[[Any], Any], random: np.random.Generator
) -> None:
    values = random.uniform(0.1, 9, 2 * SLICE_ELEMENTS + 5)
    whole = function(values)
    for first, last in ((0, 1), (SLICE_ELEMENTS - 1, SLICE_ELEMENTS + 2), (17, len(values))):
        np.testing.assert_array_equal(function(values[first:last]), whole[first:last])


# ------------------------------------------------------------------ what warns of nothing

UNGUARDED: dict[str, Callable[..., Any]] = {
    "drop_largest": lambda v, w, r, s: drop_largest(v, 1.5, 1.0, 7, 0, r),
    "zero_up_to": lambda v, w, r, s: zero_up_to(v, w, 1.0, r),
    "zero_from": lambda v, w, r, s: zero_from(v, w, v, r),
    "rank_rows": lambda v, w, r, s: rank_rows(v, 10),
    "row_dot": lambda v, w, r, s: row_dot(v, w, 10, r),
    "row_total": lambda v, w, r, s: row_total(v, 10),
    "row_max": lambda v, w, r, s: row_max(v, 10),
    "column_dot": lambda v, w, r, s: column_dot(v, w, 10, 3, r),
    "sub_rows": lambda v, w, r, s: sub_rows(v, w.numpy()[:20], 10),
    "div_rows": lambda v, w, r, s: div_rows(v, w.numpy()[:20], 10),
    "scale_rows": lambda v, w, r, s: scale_rows(v, w.numpy()[:21], 10, 3),
    "scale_columns": lambda v, w, r, s: scale_columns(v, w.numpy()[:10], 3),
    "exponential": lambda v, w, r, s: exponential(v.clamp_max_(709.0), r, s),
    "logarithm": lambda v, w, r, s: logarithm(v.abs_().clamp_min_(1e-300), r, s),
}


@pytest.mark.parametrize("name", UNGUARDED)
def test_what_is_not_finite_warns_of_nothing(name: str, random: np.random.Generator) -> None:
    """inf, nan and what goes beyond float64 are numbers like any other: merges of them warn of
    nothing, whoever computes."""
    awkward = [*SPECIAL, 1.7e308, -1.7e308, 5e-324, 1e-300]
    for _ in range(20):
        values, others = (tensor(random.choice(awkward, 200)) for _ in range(2))
        UNGUARDED[name](values, others, *empty(values, 2))
