"""Products of factors: any stretch of them, the same bits by the kernels and by numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_driver import assert_same, by_kernels, by_torch, record
from lazymerge.graph.vector import PRODUCT_ELEMENTS, load_product
from processors import processor  # noqa: F401 (a fixture)

from conftest import needs_kernels

NUMBERS = {"F32": np.float32, "F64": np.float64}


def factors(seed: int, rows: int, rank: int, columns: int, working: str) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    shapes = ((rows, rank), (rank, columns))
    left, right = (random.standard_normal(shape).astype(NUMBERS[working]) for shape in shapes)
    return left, right


def in_order(left: Any, right: Any) -> Any:
    """The product, flat: every element a sum from 0 on, term by term, in the factors' dtype."""
    sums = np.zeros((left.shape[0], right.shape[1]), left.dtype)
    for k in range(left.shape[1]):
        sums = sums + left[:, k, None] * right[k]
    return sums.reshape(-1)


@given(
    st.integers(1, 40),
    st.integers(1, 11),
    st.one_of(st.integers(1, 40), st.integers(120, 140), st.integers(1020, 1100)),
    st.sampled_from(["F32", "F64"]),
    st.integers(0, 2**32 - 1),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_stretch_from_anywhere(
    rows: int, rank: int, columns: int, working: str, seed: int, data: st.DataObject
) -> None:
    left, right = factors(seed, rows, rank, columns, working)
    start = data.draw(st.integers(0, rows * columns - 1))
    length = data.draw(st.integers(1, rows * columns - start))
    vector = torch.full((length,), torch.nan, dtype=getattr(torch, NUMBERS[working].__name__))
    load_product(vector, left, right, start)
    assert_same(vector, torch.from_numpy(in_order(left, right)[start : start + length]))
    exact = (left.astype(np.float64) @ right.astype(np.float64)).reshape(-1)[start:][:length]
    size = (np.abs(left).astype(np.float64) @ np.abs(right).astype(np.float64)).max()
    bound = rank * np.finfo(NUMBERS[working]).eps * size
    assert np.abs(vector.numpy() - exact).max() <= bound


@needs_kernels
@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("working", ["F32", "F64"])
@pytest.mark.parametrize(
    ("rows", "rank", "columns"),
    [
        (3, 1, 5),
        (700, 3, 1),
        (1, 16, 3000),
        (90, 4, 129),
        (70, 6, 1024),
        (33, 9, 4097),  # more than is formed at a time, 2^16
        (2, 5, PRODUCT_ELEMENTS + 70),
    ],
)
def test_kernels_give_the_same_bits(rows: int, rank: int, columns: int, working: str) -> None:
    left, right = factors(rows, rows, rank, columns, working)

    def run(start: int) -> Any:
        def of_vectors(vectors: Any, inputs: Any) -> None:
            out, change = vectors
            inputs[0].read_into(out)
            load_product(change, left, right, start)
            out.add_(change.mul_(0.3))

        return of_vectors

    random = np.random.default_rng(7)
    elements = rows * columns
    weight = torch.from_numpy(random.standard_normal(elements).astype(np.float32)).bfloat16()
    program = record(run(0), 2, 1)
    assert program.stores == 1
    for start, stop in ((0, elements), (elements // 3, elements - elements // 5)):
        if start == stop:
            continue
        part = weight[start:stop]
        expected, _ = by_torch(run(start), 2, [part], working)
        actual, _ = by_kernels(program, [part], working, start=start)
        assert_same(actual, expected)


def test_a_product_that_is_used_twice_has_one_place() -> None:
    left, right = factors(1, 4, 2, 3, "F64")
    other = factors(2, 4, 2, 3, "F64")

    def run(vectors: Any, inputs: Any) -> None:
        out, one, two = vectors
        load_product(out, left, right, 0)
        load_product(one, left, right, 0)
        load_product(two, *other, 0)
        out.add_(one).add_(two)

    assert record(run, 3, 0).stores == 2
