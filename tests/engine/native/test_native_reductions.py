"""Sums, counts and searches: the kernels' and those of graph/vector.py, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_driver import WORKING, assert_same, awkward_numbers, by_kernels, by_torch, record
from lazymerge.engine.native import library
from lazymerge.graph.vector import (
    LANES,
    Counts,
    copy_of,
    count_inside,
    dot,
    find_equal,
    keep_largest,
    spread,
    sum_of_lanes,
    total,
)
from processors import processor  # noqa: F401 (a fixture)

from conftest import needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("processor")]

working_dtypes = pytest.mark.parametrize("working", WORKING)
CHUNK = library.chunk_elements() or 1024


def by_definition(terms: Sequence[float]) -> float:
    """The order that graph/vector.py promises, spelled out."""
    lanes = [0.0] * LANES
    for place, term in enumerate(terms):
        lanes[place % LANES] += term
    return sum_of_lanes(lanes)


def same(one: float, other: float) -> bool:
    return np.float64(one).tobytes() == np.float64(other).tobytes() or (one != one != other)


def dots(vectors: Any, inputs: Any) -> tuple[float, float, float]:
    one, other, room = vectors
    inputs[0].read_into(one)
    inputs[1].read_into(other)
    return dot(one, other, room), dot(other, other, room), total(one)


def test_dot_and_total_of_any_length(random: np.random.Generator) -> None:
    """The bits of every length up to three chunks and a bit."""
    count = 3 * CHUNK + 3
    scales = 10.0 ** random.uniform(-9, 9, (2, count))
    vectors = torch.from_numpy(random.standard_normal((2, count)) * scales)
    program = record(dots, 3, 2)
    plainly = 0
    for length in range(1, count):
        inputs = [vectors[0, :length], vectors[1, :length]]
        _, expected = by_torch(dots, 3, inputs, "F64")
        _, actual = by_kernels(program, inputs, "F64")
        assert all(map(same, actual, expected)), length
        if length % 97 < 2:
            one, other = (vector.tolist() for vector in inputs)
            products = [a * b for a, b in zip(one, other, strict=True)]
            assert same(actual[0], by_definition(products))
            assert same(actual[2], by_definition(one))
        plainly += same(actual[2], float(np.sum(inputs[0].numpy())))
    assert plainly < count // 2  # the numbers are such that the order shows


def test_nothing_sums_to_zero() -> None:
    empty = [torch.empty(0, dtype=torch.float64)] * 2
    assert by_kernels(record(dots, 3, 2), empty, "F64")[1] == (0.0, 0.0, 0.0)
    assert by_torch(dots, 3, empty, "F64")[1] == (0.0, 0.0, 0.0)


def test_sums_of_what_is_not_finite(random: np.random.Generator) -> None:
    program = record(dots, 3, 2)
    for size in (3, 16, 40, CHUNK + 5):
        for _ in range(30):
            inputs = [awkward_numbers(random, size, "F64") for _ in "ab"]
            expected, actual = (
                by_torch(dots, 3, inputs, "F64")[1],
                by_kernels(program, inputs, "F64")[1],
            )
            assert all(map(same, actual, expected))


def test_totals_of_float32_run_in_float64(random: np.random.Generator) -> None:
    def run(vectors: Any, inputs: Any) -> Any:
        inputs[0].read_into(vectors[0])
        return total(vectors[0])

    program = record(run, 1, 1)
    for size in [*range(1, 70), CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7, 50_000, 262_144]:
        values = torch.from_numpy(random.standard_normal(size, dtype=np.float32) * 1e10)
        expected = by_torch(run, 1, [values], "F32")[1]
        actual = by_kernels(program, [values], "F32")[1]
        assert same(actual, expected), size
        if size < 4 * CHUNK:
            assert same(actual, by_definition(values.double().tolist()))
    awkward = awkward_numbers(random, 999, "F32")
    expected = by_torch(run, 1, [awkward], "F32")[1]
    assert same(by_kernels(program, [awkward], "F32")[1], expected)


def test_a_minus_zero_is_no_different(random: np.random.Generator) -> None:
    """Lanes begin at +0, in both."""
    zeros = torch.full((5,), -0.0, dtype=torch.float64)
    for returned in (
        by_kernels(record(dots, 3, 2), [zeros, zeros], "F64")[1],
        by_torch(dots, 3, [zeros, zeros], "F64")[1],
    ):
        assert all(same(value, 0.0) for value in returned)


# ------------------------------------------------------------------------------- counts

EDGES = [0.0, 0.25, 0.5, 0.5, 1.0, 3.0, float("inf")]


@working_dtypes
def test_counts(working: str, random: np.random.Generator) -> None:
    values = np.abs(np.round(random.standard_normal(2 * CHUNK + 77) * 8) / 8)
    values[::40] = np.inf
    values[3::40] = np.nan
    values[5::40] = -0.0
    for size in (1, 16, 17, CHUNK, CHUNK + 1, len(values)):
        block = torch.from_numpy(values[:size]).to(WORKING[working])
        for low in EDGES:
            for high in (edge for edge in EDGES if edge >= low):
                for quota in (1, 4, 64, 10_000):
                    check_counts(block, low, high, quota, working)


def check_counts(block: torch.Tensor, low: float, high: float, quota: int, working: str) -> None:
    def run(vectors: Any, inputs: Any) -> Counts:
        inputs[0].read_into(vectors[0])
        return count_inside(vectors[0], low, high, quota, vectors[1])

    expected: Counts = by_torch(run, 2, [block], working)[1]
    actual: Counts = by_kernels(record(run, 2, 1), [block], working)[1]
    values = block.numpy()
    inside = values[(values >= low) & (values <= high)]
    for found in (actual, expected):
        assert (found.above, found.inside) == (int((values > high).sum()), len(inside))
        assert type(found.above) is type(found.inside) is int
        assert found.values.dtype == values.dtype
        assert len(found.values) == (0 if low == high else min(quota, len(inside)))
    assert_same(torch.from_numpy(actual.values), torch.from_numpy(expected.values))
    if low < high and quota >= len(inside):
        np.testing.assert_array_equal(actual.values, inside)


@given(st.lists(st.floats(0, 10), max_size=60), st.integers(1, 70))
def test_a_share_of_values_is_evenly_spread_and_in_order(values: list[float], quota: int) -> None:
    array = np.array(values)
    kept = spread(array, quota)
    assert len(kept) == min(len(values), quota)
    places = [place * len(values) // quota for place in range(quota)]
    expected = [values[place] for place in places] if len(values) > quota else values
    assert kept.tolist() == expected
    if len(values) > quota:
        gaps = np.diff([*places, len(values)])
        assert gaps.max() - gaps.min() <= 1
    if len(values):
        assert not np.shares_memory(kept, array)  # the buffer is used again


def test_counts_hold_nothing_of_the_buffer_they_were_made_of() -> None:
    """Partial results outlive the block."""
    block = torch.arange(100.0)
    for low, high, quota in ((10, 90, 1000), (10, 90, 5), (10, 10, 5), (200, 300, 5)):
        counted = count_inside(block, low, high, quota, torch.empty(100))
        before = counted.values.copy()
        assert counted.values.base is None or counted.values.base.nbytes <= before.nbytes
        block.mul_(-1)
        np.testing.assert_array_equal(counted.values, before)
        block.mul_(-1)
    copied = copy_of(block)
    block.zero_()
    assert copied.sum() == 4950


# ------------------------------------------------------------------------ the place of a tie


@working_dtypes
def test_find_equal(working: str, random: np.random.Generator) -> None:
    values = np.round(random.standard_normal(2 * CHUNK + 9) * 2) / 2
    values[7] = np.nan
    block = torch.from_numpy(values).to(WORKING[working])
    for value in (0.0, 0.5, -1.0):
        places = np.flatnonzero(values == value)
        for rank in {1, 2, len(places) // 2, len(places) - 1, len(places)}:
            for start in (0, 262_144, 2**33):

                def run(
                    vectors: Any,
                    inputs: Any,
                    value: float = value,
                    rank: int = int(rank),
                    start: int = start,
                ) -> int:
                    inputs[0].read_into(vectors[0])
                    return find_equal(vectors[0], value, rank, start)

                expected = by_torch(run, 1, [block], working)[1]
                actual = by_kernels(record(run, 1, 1), [block], working, start=start)[1]
                assert actual == expected == start + int(places[rank - 1])


# ----------------------------------------------------------------------- several in one go


def test_reductions_between_changes_see_the_vector_as_it_is_then(
    random: np.random.Generator,
) -> None:
    def run(vectors: Any, inputs: Any) -> Any:
        base, change, room = vectors
        inputs[0].read_into(base)
        inputs[1].read_into(change)
        change.sub_(base).abs_()
        before, copied = total(change), copy_of(change)
        keep_largest(change, 0.5, float(np.nextafter(0.5, 0)), 300, 0)
        counted = count_inside(change, 0.1, 0.9, 9, room)
        return before, copied, total(change), (counted, copy_of(change))

    inputs = [torch.from_numpy(random.standard_normal(2500)) for _ in "ab"]
    expected = by_torch(run, 3, inputs, "F64")[1]
    actual = by_kernels(record(run, 3, 2), inputs, "F64")[1]
    assert same(actual[0], expected[0])
    assert same(actual[2], expected[2])
    np.testing.assert_array_equal(actual[1], expected[1])
    np.testing.assert_array_equal(actual[3][1], expected[3][1])
    np.testing.assert_array_equal(actual[3][0].values, expected[3][0].values)


def test_a_copy_is_of_the_whole_block(random: np.random.Generator) -> None:
    def run(vectors: Any, inputs: Any) -> Any:
        inputs[0].read_into(vectors[0])
        return copy_of(vectors[0].abs_()), copy_of(vectors[0].add_(1))

    for size in (1, CHUNK, 5000):
        values = random.standard_normal(size, dtype=np.float32)
        block = torch.from_numpy(values).to(torch.bfloat16)
        _, (copied, again) = by_kernels(record(run, 1, 1), [block], "F32")
        np.testing.assert_array_equal(copied, block.float().abs().numpy())
        np.testing.assert_array_equal(again, block.float().abs().add(1).numpy())
