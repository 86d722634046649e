"""The Gram matrix: every pair, in float64, summed exactly over the blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lazymerge.graph.operations.gram import Gram
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


def test_working_dtype_is_float64() -> None:
    assert Gram().working_dtype(["BF16", "F32"]) == "F64"
