"""The Gram matrix: every pair, in float64, summed exactly over the blocks; and those of every row
and every column."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from lazymerge.graph.operation import ReduceOperation
from lazymerge.graph.operations.gram import Gram, GramOfChanges, GramOfColumns, GramOfRows
from numpy.typing import NDArray
from reduction_driver import drive


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_pair(count: int, random: np.random.Generator) -> None:
    vectors = random.integers(-99, 100, (count, 1000)).astype(np.float64)
    reduced = drive(Gram(), list(torch.from_numpy(vectors)), {}, 64)
    np.testing.assert_array_equal(np.array(reduced.result), vectors @ vectors.T)
    assert reduced.full_passes == len(reduced.passes) == 1


def test_blocks_are_summed_exactly() -> None:
    """10³² and −10³² in different blocks do not swallow what is between them."""
    first = torch.tensor([1e16, 1.0, 1e16], dtype=torch.float64)
    second = torch.tensor([1e16, 3.0, -1e16], dtype=torch.float64)
    gram = drive(Gram(), [first, second], {}, 1).result
    assert gram[0][1] == gram[1][0] == 3.0


@pytest.mark.parametrize(
    ("bad", "expected"), [(math.inf, math.inf), (math.nan, math.nan), (1e200, math.inf)]
)
def test_what_is_not_finite_stays_so(bad: float, expected: float) -> None:
    vector = torch.tensor([1.0, bad, 1.0, bad], dtype=torch.float64)
    ((square,),) = drive(Gram(), [vector], {}, 1).result
    assert square == expected or (math.isnan(square) and math.isnan(expected))


@pytest.mark.parametrize("operation", [Gram(), GramOfChanges(), GramOfRows(), GramOfColumns()])
def test_working_dtype_is_float64(operation: ReduceOperation[Any, Any]) -> None:
    assert operation.working_dtype(["BF16", "F32"]) == "F64"


@pytest.mark.parametrize("count", [1, 2, 4])
def test_changes_are_formed_before_they_are_multiplied(
    count: int, random: np.random.Generator
) -> None:
    """Of inputs near 2⁵³ the products would swallow the changes."""
    base = random.integers(2**52, 2**53, 300).astype(np.float64)
    changes = random.integers(-9, 10, (count, 300)).astype(np.float64)
    tensors = [torch.from_numpy(vector) for vector in (base, *(base + changes))]
    reduced = drive(GramOfChanges(), tensors, {}, 64)
    np.testing.assert_array_equal(np.array(reduced.result), changes @ changes.T)


# --------------------------------------------------------------------------- rows and columns

ROWS, ROW = 30, 7


def by_vector(
    matrices: NDArray[np.float64],
    operation: ReduceOperation[Any, Any],
    block: int,
    *,
    is_of_changes: bool = False,
) -> NDArray[np.float64]:
    """The statistic as an array, shape (pairs, vectors). matrices: shape (n, rows, row)."""
    tensors = [torch.from_numpy(matrix.reshape(-1)) for matrix in matrices]
    parameters = {"row_elements": matrices.shape[2], "is_of_changes": is_of_changes}
    reduced = drive(operation, tensors, parameters, block)
    assert reduced.full_passes == len(reduced.passes) == 1
    return np.array(reduced.result)


def lower_triangle(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ over the last axis of the products of all pairs, in the order of Gram."""
    count = len(vectors)
    return np.array(
        [(vectors[i] * vectors[j]).sum(axis=-1) for i in range(count) for j in range(i + 1)]
    )


@pytest.mark.parametrize("is_of_changes", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_pair_of_every_row(
    count: int, is_of_changes: bool, random: np.random.Generator
) -> None:
    """Whole numbers, so that no order of sums shows."""
    matrices = random.integers(-99, 100, (count, ROWS, ROW)).astype(np.float64)
    vectors = matrices[1:] - matrices[0] if is_of_changes else matrices
    expected = lower_triangle(vectors)
    for rows in (1, 4, ROWS, 100):  # of a block
        actual = by_vector(matrices, GramOfRows(), rows * ROW, is_of_changes=is_of_changes)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("is_of_changes", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_pair_of_every_column(
    count: int, is_of_changes: bool, random: np.random.Generator
) -> None:
    """Blocks begin and end wherever they will, within a row too."""
    matrices = random.integers(-99, 100, (count, ROWS, ROW)).astype(np.float64)
    vectors = matrices[1:] - matrices[0] if is_of_changes else matrices
    expected = lower_triangle(vectors.swapaxes(1, 2))
    for block in (1, 3, ROW, 16, 17, ROWS * ROW - 1, ROWS * ROW):
        actual = by_vector(matrices, GramOfColumns(), block, is_of_changes=is_of_changes)
        np.testing.assert_array_equal(actual, expected)


def test_one_row_of_all_is_the_gram_matrix(random: np.random.Generator) -> None:
    vectors = random.standard_normal((3, 1, 200))
    tensors = [torch.from_numpy(vector.reshape(-1)) for vector in vectors]
    whole = drive(Gram(), tensors, {}, 200).result
    rows = by_vector(vectors, GramOfRows(), 200)
    assert rows[:, 0].tolist() == [whole[i][j] for i in range(3) for j in range(i + 1)]


@pytest.mark.parametrize("operation", [GramOfRows(), GramOfColumns()])
def test_pairs_are_counted(operation: Any) -> None:
    for inputs, is_of_changes, pairs in ((2, False, 3), (3, False, 6), (3, True, 3), (5, True, 10)):
        parameters = {"row_elements": ROW, "is_of_changes": is_of_changes}
        cost = operation.cost(inputs, parameters)
        assert cost.row_lists + cost.column_lists == pairs
        assert cost.scratch == inputs + 1
        assert operation.expected_passes(parameters) == 1
        # the result, and as much again while it is put together
        vectors = ROWS if operation.is_by_rows else ROW
        room = operation.statistics_bytes(inputs, parameters, ROWS * ROW, 5, 8)
        assert room >= 2 * 8 * pairs * vectors


def test_columns_need_no_room_for_every_block() -> None:
    parameters = {"row_elements": 4096, "is_of_changes": False}
    few, many = (
        GramOfColumns().statistics_bytes(2, parameters, blocks << 18, blocks, 8)
        for blocks in (16, 4096)
    )
    assert few < many < 3 * few
    assert many < 4096 * 3 * 8 * 4096 / 100


@pytest.mark.parametrize("operation", [GramOfRows(), GramOfColumns()])
@pytest.mark.parametrize("bad", [math.inf, math.nan, 1e200])
def test_what_is_not_finite_stays_in_its_row_or_column(operation: Any, bad: float) -> None:
    matrices = np.ones((2, 6, 5))
    matrices[0, 1, 2] = matrices[0, 4, 2] = bad
    found = by_vector(matrices, operation, 10)
    vectors = [1, 4] if operation.is_by_rows else [2]
    assert not np.isfinite(found[0, vectors]).any()
    assert np.isfinite(np.delete(found, vectors, axis=1)).all()
    assert np.isfinite(found[2]).all()


def test_columns_of_both_infinities_warn_of_nothing() -> None:
    """inf in one block and −inf in another give nan, and no more."""
    matrices = np.ones((2, 4, 3))
    matrices[0, 0, 1], matrices[0, 3, 1] = math.inf, -math.inf
    found = by_vector(matrices, GramOfColumns(), 3)
    assert np.isnan(found[1, 1])
    assert found[1, [0, 2]].tolist() == [4.0, 4.0]
