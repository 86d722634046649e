"""Rows and columns, barriers and what is there after them: the kernels' bits are graph/vector.py's.

Rows begin and end anywhere in a chunk, and blocks end anywhere in one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_driver import (
    AWKWARD,
    WORKING,
    assert_same,
    awkward_numbers,
    by_kernels,
    by_torch,
    record,
)
from lazymerge.engine.native.program import (
    Code,
    Instruction,
    UndefinedRegisterError,
    fuse,
    record_apply,
    record_reduce,
)
from lazymerge.graph.operation import apply_operation, reduce_operation
from lazymerge.graph.vector import (
    Counts,
    column_dot,
    copy_of,
    count_inside,
    div_rows,
    dot,
    draw,
    exponential,
    hold,
    logarithm,
    rank_rows,
    row_dot,
    row_max,
    row_total,
    scale_columns,
    scale_rows,
    sub_rows,
    total,
    wait_for_rows,
    zero_from,
)
from processors import processor  # noqa: F401 (a fixture)

from conftest import needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("processor")]

working_dtypes = pytest.mark.parametrize("working", WORKING)
ROW_LENGTHS = [1, 2, 15, 16, 17, 47, 48, 49, 1023, 1024, 1025, 3000]
rows_of = pytest.mark.parametrize("row", ROW_LENGTHS)


def row_counts(row: int) -> list[int]:
    """One row, two, and as many as take several chunks and a part of one."""
    return [1, 2, max(3, 2600 // row)]


def check(
    run: Callable[[Any, Any], Any],
    vectors: int,
    inputs: list[torch.Tensor],
    working: str,
    *,
    start: int = 0,
    ignores_zero_signs: bool = False,
) -> None:
    """The result and what is returned, by kernels (fused or not) and by torch."""
    expected, returned = by_torch(run, vectors, inputs, working)
    for fused in (True, False):
        program = record(run, vectors, len(inputs), fused=fused)
        actual, found = by_kernels(program, inputs, working, start=start)
        if ignores_zero_signs:
            actual, expected = actual + 0.0, expected + 0.0
        assert_same(actual, expected, f"fused {fused}")
        for one, other in zip(found or (), returned or (), strict=True):
            assert_same_numbers(one, other)


def assert_same_numbers(actual: Any, expected: Any) -> None:
    if isinstance(expected, Counts):
        assert (actual.above, actual.inside) == (expected.above, expected.inside)
        actual, expected = actual.values, expected.values
    assert_same(torch.from_numpy(np.atleast_1d(actual)), torch.from_numpy(np.atleast_1d(expected)))


# ------------------------------------------------------------------------ numbers by row


@rows_of
def test_sums_and_products_of_rows(row: int, random: np.random.Generator) -> None:
    def run(vectors: Any, inputs: Any) -> Any:
        one, other, room = vectors
        inputs[0].read_into(one)
        inputs[1].read_into(other)
        return (
            row_dot(one, other, row, room),
            row_total(one, row),
            row_dot(other, other, row, room),
            row_total(other, row),
        )

    for rows in row_counts(row):
        scales = 10.0 ** random.uniform(-9, 9, (2, rows * row))
        plain = torch.from_numpy(random.standard_normal((2, rows * row)) * scales)
        check(run, 3, list(plain), "F64")
        check(run, 3, [awkward_numbers(random, rows * row, "F64") for _ in "ab"], "F64")


@working_dtypes
@rows_of
def test_totals_and_largest_of_rows(row: int, working: str, random: np.random.Generator) -> None:
    def run(vectors: Any, inputs: Any) -> Any:
        inputs[0].read_into(vectors[0])
        sums = row_total(vectors[0], row)
        largest = row_max(vectors[0], row)
        return sums, largest, row_total(vectors[0].abs_(), row), row_max(vectors[0], row)

    program = record(run, 1, 1)
    for rows in row_counts(row):
        block = awkward_numbers(random, rows * row, working)
        _, expected = by_torch(run, 1, [block], working)
        _, actual = by_kernels(program, [block], working)
        for place, (one, other) in enumerate(zip(actual, expected, strict=True)):
            assert one.shape == other.shape == (rows,)
            if place % 2:  # of −0 and 0 either is the largest
                one, other = one + 0.0, other + 0.0
            assert_same_numbers(one, other)


@working_dtypes
@rows_of
def test_the_largest_is_subtracted_and_divided_by(
    row: int, working: str, random: np.random.Generator
) -> None:
    """In float32 too: those numbers are float32, so that nothing is rounded twice."""
    for divide in (False, True):

        def run(vectors: Any, inputs: Any, divide: bool = divide) -> None:
            out, other = vectors
            inputs[0].read_into(out)
            inputs[1].read_into(other)
            largest, divisor = row_max(out, row), row_max(other, row)
            wait_for_rows(out)
            inputs[0].read_into(out)
            if divide:
                div_rows(out, divisor, row)
            else:
                sub_rows(out, largest, row)

        for rows in row_counts(row):
            blocks = [awkward_numbers(random, rows * row, working) for _ in "ab"]
            blocks[1] = torch.where(blocks[1] == 0, 1.5, blocks[1])  # whose sign would show
            check(run, 2, blocks, working, ignores_zero_signs=not divide)


@rows_of
def test_any_numbers_of_rows_are_subtracted_and_divided_by(
    row: int, random: np.random.Generator
) -> None:
    def run(vectors: Any, inputs: Any) -> Any:
        out, other, room = vectors
        inputs[0].read_into(out)
        inputs[1].read_into(other)
        sums, products = row_total(out, row), row_dot(out, other, row, room)
        wait_for_rows(out)
        inputs[1].read_into(out)
        sub_rows(out, sums, row)
        div_rows(out, products, row)
        return sums, products

    for rows in row_counts(row):
        check(run, 3, [awkward_numbers(random, rows * row, "F64") for _ in "ab"], "F64")


@rows_of
@pytest.mark.parametrize("holds", [False, True])
def test_the_softmax_of_rows(row: int, holds: bool, random: np.random.Generator) -> None:
    """Two barriers, after each of which everything begins anew, unless it is held."""

    def run(vectors: Any, inputs: Any) -> Any:
        out, room, more_room = vectors

        def powers(largest: Any) -> None:
            inputs[0].read_into(out)
            sub_rows(out, largest, row)
            exponential(out, room, more_room)

        inputs[0].read_into(out)
        largest = row_max(out, row)
        wait_for_rows(out)
        powers(largest)
        if holds:
            hold(out)
        sums = row_total(out, row)
        wait_for_rows(out)
        if not holds:
            powers(largest)
        div_rows(out, sums, row)
        return sums, row_total(out, row)

    for rows in row_counts(row):
        plain = torch.from_numpy(random.standard_normal(rows * row) * 30)
        check(run, 3, [plain], "F64")
        result, (_, ones) = by_kernels(record(run, 3, 1), [plain], "F64")
        np.testing.assert_allclose(ones, 1, rtol=1e-13)
        matrix = plain.reshape(rows, row)
        np.testing.assert_allclose(result.reshape(rows, row), matrix.softmax(1), rtol=1e-13)
        check(run, 3, [awkward_numbers(random, rows * row, "F64")], "F64")


# --------------------------------------------------------------------------------- ranks


def rankable(random: np.random.Generator, size: int, working: str) -> torch.Tensor:
    """Many equal magnitudes, of both signs, among others."""
    values = awkward_numbers(random, size, working)
    coarse = torch.from_numpy(np.round(random.standard_normal(size))).to(WORKING[working])
    return torch.where(torch.from_numpy(random.random(size) < 0.4), coarse, values)


@working_dtypes
@rows_of
def test_ranks(row: int, working: str, random: np.random.Generator) -> None:
    def run(vectors: Any, inputs: Any) -> None:
        inputs[0].read_into(vectors[0])
        rank_rows(vectors[0], row)

    for rows in row_counts(row):
        size = rows * row
        for block in (
            rankable(random, size, working),
            awkward_numbers(random, size, working),
            torch.from_numpy(random.standard_normal(size)).to(WORKING[working]),
            torch.zeros(size, dtype=WORKING[working]),
            torch.full((size,), torch.nan, dtype=WORKING[working]),
            torch.arange(size, dtype=WORKING[working]).flip(0),
        ):
            check(run, 1, [block], working)


@working_dtypes
def test_ranks_tell_every_digit_apart(working: str, random: np.random.Generator) -> None:
    """Numbers that differ in one bit each, whichever it is, and in the order of all bits."""
    kind, width = {"F32": (np.uint32, 31), "F64": (np.uint64, 63)}[working]
    base = int(random.integers(0, 2 ** (width - 1)))
    bits = [0, base, *(base ^ (1 << bit) for bit in range(width)), *(1 << b for b in range(width))]
    order = random.permutation(np.array(bits * 3, dtype=kind))
    row = len(order)

    def run(vectors: Any, inputs: Any) -> None:
        inputs[0].read_into(vectors[0])
        rank_rows(vectors[0], row)

    block = torch.from_numpy(order.view({"F32": np.float32, "F64": np.float64}[working]).copy())
    check(run, 1, [block], working)
    check(run, 1, [-block], working)


@working_dtypes
@pytest.mark.parametrize("row", [7, 48, 49, 500])
def test_ranks_of_nan_are_in_ascending_order_whatever_they_carry(
    row: int, working: str, random: np.random.Generator
) -> None:
    infinity, kind, number, mantissa = {
        "F32": (0x7F800000, np.uint32, np.float32, 23),
        "F64": (0x7FF0000000000000, np.uint64, np.float64, 52),
    }[working]
    size = 4 * row
    carried = random.integers(1, 2**mantissa, size, dtype=np.uint64).astype(kind)
    signs = random.integers(0, 2, size, dtype=np.uint64).astype(kind)
    nan = (carried | kind(infinity) | (signs << kind(8 * kind().itemsize - 1))).view(number)
    assert np.isnan(nan).all()
    numbers = awkward_numbers(random, size, working).numpy()
    block = torch.from_numpy(np.where(random.random(size) < 0.4, nan, numbers))

    def run(vectors: Any, inputs: Any) -> None:
        inputs[0].read_into(vectors[0])
        rank_rows(vectors[0], row)

    check(run, 1, [block], working)


@working_dtypes
@rows_of
def test_ranks_of_several_vectors_outlive_each_other(
    row: int, working: str, random: np.random.Generator
) -> None:
    """A vector of ranks is there again after the next barrier; all others are filled anew."""

    def run(vectors: Any, inputs: Any) -> Any:
        out, first, second, third = vectors
        inputs[0].read_into(third)
        inputs[0].read_into(first)
        rank_rows(first.sub_(third), row)  # of zeros: 0, 1, 2 …
        inputs[0].read_into(second)
        rank_rows(second, row)
        inputs[1].read_into(third)
        rank_rows(third.mul_(2), row)
        inputs[1].read_into(out)
        out.add_(first).mul_(0.5).add_(second).mul_(0.25).add_(third)
        return copy_of(first), copy_of(second), copy_of(third)

    for rows in row_counts(row):
        plain = torch.from_numpy(np.round(random.standard_normal((2, rows * row)) * 4))
        check(run, 4, list(plain.to(WORKING[working])), working)
        check(run, 4, [rankable(random, rows * row, working) for _ in "ab"], working)


@working_dtypes
@rows_of
def test_what_is_held_is_there_after_every_barrier(
    row: int, working: str, random: np.random.Generator
) -> None:
    """Of several vectors, and ranks among them; what is held is what it was then."""

    def run(vectors: Any, inputs: Any) -> Any:
        out, held, ranks, room = vectors
        inputs[0].read_into(held)
        hold(held.mul_(0.5))
        copied = copy_of(held)
        inputs[1].read_into(ranks)
        rank_rows(ranks, row)
        inputs[0].read_into(room)
        hold(room)
        wait_for_rows(out)
        out.copy_(held).add_(ranks).sub_(room)
        hold(held.mul_(3.0))
        wait_for_rows(out)
        inputs[1].read_into(out)
        out.add_(held).mul_(room).sub_(ranks)
        return copied, copy_of(held), copy_of(ranks), copy_of(room)

    for rows in row_counts(row):
        check(run, 4, [rankable(random, rows * row, working) for _ in "ab"], working)


@working_dtypes
def test_ranks_that_are_changed_or_ranked_again(working: str, random: np.random.Generator) -> None:
    """What is there again is what was ranked: a vector that has been changed since is not."""
    row = 100

    def again(vectors: Any, inputs: Any) -> Any:
        out, ranks = vectors
        inputs[0].read_into(ranks)
        rank_rows(ranks, row)
        rank_rows(ranks.sub_(50), row)  # by distance from the middle
        inputs[1].read_into(out)
        return copy_of(out.add_(ranks)), total(ranks)

    blocks = [rankable(random, 12 * row, working) for _ in "ab"]
    check(again, 2, blocks, working)

    def changed(vectors: Any, inputs: Any) -> None:
        out, ranks = vectors
        inputs[0].read_into(ranks)
        rank_rows(ranks, row)
        ranks.mul_(2)
        wait_for_rows(ranks)
        out.copy_(ranks)

    with pytest.raises(UndefinedRegisterError, match="COPY reads vector 1"):
        record(changed, 2, 1)


def test_ranks_and_random_numbers_as_della_uses_them(random: np.random.Generator) -> None:
    row, key = 333, 2**61 + 5

    def run(vectors: Any, inputs: Any) -> None:
        out, ranks, draws, room = vectors
        inputs[0].read_into(ranks)
        inputs[1].read_into(room)
        rank_rows(ranks.sub_(room), row)
        inputs[0].read_into(out)
        inputs[1].read_into(room)
        out.sub_(room)
        draw(draws, key, start, room)
        zero_from(out, draws, ranks.mul_(0.3 / row).add_(0.35), room)
        out.div_(ranks)

    for start in (0, 7 * row, 2**34 - row):
        check(run, 4, [awkward_numbers(random, 9 * row, "F32") for _ in "ab"], "F32", start=start)


# ---------------------------------------------------------- rows and columns of the tensor

STARTS = [0, 1, 999, 1024, 262_144, 2**33 + 5]


@rows_of
def test_scaling_rows(row: int, random: np.random.Generator) -> None:
    """Blocks begin and end within rows, whatever their length."""
    for start in STARTS[:-1]:
        for size in (1, 17, 1024, 1025, 2600):
            table = random.standard_normal((start + size - 1) // row + 1)
            table[:: max(1, len(table) // 9)] = random.choice(AWKWARD)

            def run(vectors: Any, inputs: Any, table: Any = table, start: int = start) -> None:
                inputs[0].read_into(vectors[0])
                scale_rows(vectors[0], table, row, start)

            check(run, 1, [awkward_numbers(random, size, "F64")], "F64", start=start)


@rows_of
def test_scaling_columns(row: int, random: np.random.Generator) -> None:
    for start in STARTS:
        for size in (1, 17, 1024, 1025, 2600):
            table = random.standard_normal(row)
            table[:: max(1, row // 5)] = random.choice(AWKWARD)

            def run(vectors: Any, inputs: Any, table: Any = table, start: int = start) -> None:
                inputs[0].read_into(vectors[0])
                scale_columns(vectors[0], table, start)

            check(run, 1, [awkward_numbers(random, size, "F64")], "F64", start=start)


def test_one_table_is_one_table_and_several_are_several(random: np.random.Generator) -> None:
    tables = [random.standard_normal(26) for _ in range(3)]

    def run(vectors: Any, inputs: Any) -> None:
        out, other = vectors
        inputs[0].read_into(out)
        inputs[1].read_into(other)
        scale_rows(out, tables[0], 100, 0)
        scale_columns(other, tables[1], 0)
        scale_rows(other, tables[0], 100, 0)
        scale_rows(out.add_(other), tables[2], 100, 0)

    program = record(run, 2, 2)
    assert len(program.tables) == 3
    assert all(one is other for one, other in zip(program.tables, tables, strict=True))
    check(run, 2, [awkward_numbers(random, 2600, "F64") for _ in "ab"], "F64")


@rows_of
def test_products_of_columns(row: int, random: np.random.Generator) -> None:
    """Of blocks shorter than a row too: columns that have no part in them are 0."""
    for start in STARTS:
        for size in (1, 17, 1024, 1025, 2600):

            def run(vectors: Any, inputs: Any, start: int = start) -> Any:
                one, other, room = vectors
                inputs[0].read_into(one)
                inputs[1].read_into(other)
                return (
                    column_dot(one, other, row, start, room),
                    column_dot(one, one, row, start, room),
                )

            scales = 10.0 ** random.uniform(-9, 9, (2, size))
            plain = torch.from_numpy(random.standard_normal((2, size)) * scales)
            check(run, 3, list(plain), "F64", start=start)
            awkward = [awkward_numbers(random, size, "F64") for _ in "ab"]
            check(run, 3, awkward, "F64", start=start)


# ------------------------------------------------------------------------------- barriers


@working_dtypes
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 1023, 1024, 1025, 2048, 3000])
def test_what_is_left_before_a_barrier_is_of_the_whole_block(
    size: int, working: str, random: np.random.Generator
) -> None:
    """Sums, counts and copies on both sides of it, and the result behind it, with ragged tails."""

    def run(vectors: Any, inputs: Any) -> Any:
        out, other = vectors
        inputs[0].read_into(out)
        before = (total(out), copy_of(out.mul_(0.5)), count_inside(out, -0.4, 0.4, 50, other))
        wait_for_rows(out)
        inputs[1].read_into(other)
        inputs[0].read_into(out)
        middle = (total(other), copy_of(out.add_(other)))
        wait_for_rows(out)
        inputs[0].read_into(out)
        out.mul_(3)
        return (*before, *middle, total(out), count_inside(out, 0.1, 9, 7, other))

    check(run, 2, [awkward_numbers(random, size, working) for _ in "ab"], working)


def test_a_barrier_at_the_very_end_or_twice_does_no_harm(random: np.random.Generator) -> None:
    def run(vectors: Any, inputs: Any) -> Any:
        inputs[0].read_into(vectors[0])
        sums = row_total(vectors[0], 100)
        wait_for_rows(vectors[0])
        wait_for_rows(vectors[0])
        inputs[0].read_into(vectors[0])
        sub_rows(vectors[0], sums, 100)
        products = dot(vectors[0], vectors[0], vectors[1])
        copied = copy_of(vectors[0])
        wait_for_rows(vectors[0])
        return sums, products, copied

    block = [awkward_numbers(random, 2600, "F64")]
    _, expected = by_torch(run, 2, block, "F64")
    _, actual = by_kernels(record(run, 2, 1), block, "F64")
    for one, other in zip(actual, expected, strict=True):
        assert_same_numbers(one, other)


def test_nothing_is_fused_across_a_barrier() -> None:
    def run(vectors: Any, inputs: Any) -> None:
        out, other = vectors
        inputs[0].read_into(out)
        inputs[1].read_into(other)
        other.mul_(0.5)
        wait_for_rows(out)
        inputs[0].read_into(out)
        inputs[1].read_into(other)
        out.add_(other.mul_(2.0))

    codes = [i.code for i in record(run, 2, 2).instructions]
    assert codes == [Code.LOAD, Code.LOAD_MUL, Code.WAIT, Code.LOAD, Code.LOAD_MUL_ADD]
    # what a barrier makes undefined is needed by nobody after it
    fused = fuse(
        [
            Instruction(Code.LOAD, dst=1),
            Instruction(Code.LOAD, dst=0),
            Instruction(Code.MUL_SCALAR, dst=0, a=0, x=2.0),
            Instruction(Code.ADD, dst=1, a=1, b=0),
            Instruction(Code.STORE, a=1),
            Instruction(Code.WAIT),
            Instruction(Code.LOAD, dst=0),
        ],
        result=0,
    )
    assert [i.code for i in fused] == [
        Code.LOAD,
        Code.LOAD_MUL_ADD,
        Code.STORE,
        Code.WAIT,
        Code.LOAD,
    ]


# --------------------------------------------------- any of it, one after the other

REGISTERS = 4  # the last two are room
STEPS = (
    *("totals", "largest", "products", "ranks", "rows", "columns", "by column"),
    *("draw", "exp", "log", "softmax", "sums", "copy", "hold", "hold"),
)
steps = st.lists(st.tuples(st.sampled_from(STEPS), st.booleans()), max_size=8)


def program_of(drawn: list[tuple[str, bool]], row: int, tables: Any, start: int) -> Any:
    """Steps on two vectors, each of which may be looked at or changed, with barriers between."""

    def run(v: Any, i: Any) -> Any:
        returned: list[Any] = []
        ranked: set[int] = set()  # or held

        def load(*numbers: int) -> None:
            for number in numbers:
                i[number].read_into(v[number])
                ranked.discard(number)

        load(0, 1)
        for name, is_first in drawn:
            mine, other = (0, 1) if is_first else (1, 0)
            one, room, more_room = v[mine], v[2], v[3]
            match name:
                case "totals":
                    returned.append(row_total(one, row))
                case "largest":
                    returned.append(row_max(one.add_(0.0).abs_(), row))
                    ranked.discard(mine)
                case "products":
                    returned.append(row_dot(one, v[other], row, room))
                case "by column":
                    returned.append(column_dot(one, v[other], row, start, room))
                case "sums":
                    returned.append(total(one))
                case "copy":
                    returned.append(copy_of(one))
                case "ranks":
                    rank_rows(one, row)
                    if other not in ranked:
                        load(other)
                    ranked.add(mine)
                case "rows":
                    scale_rows(one, tables[0], row, start)
                    ranked.discard(mine)
                case "columns":
                    scale_columns(one, tables[1], start)
                    ranked.discard(mine)
                case "draw":
                    draw(one, 77 + mine, start, room)
                    ranked.discard(mine)
                case "exp":
                    exponential(one.clamp_max_(700), room, more_room)
                    ranked.discard(mine)
                case "log":
                    logarithm(one.abs_().clamp_min_(1e-300), room, more_room)
                    ranked.discard(mine)
                case "hold":
                    hold(one)
                    ranked.add(mine)
                case "softmax":
                    sums = row_total(one.abs_(), row)
                    wait_for_rows(one)
                    load(mine)
                    if other not in ranked:
                        load(other)
                    div_rows(one, sums, row)
        return tuple(returned)

    return run


@settings(max_examples=150)
@given(
    drawn=steps,
    row=st.sampled_from([1, 3, 16, 49, 1000, 1024, 1500]),
    rows=st.integers(1, 4),
    first_row=st.integers(0, 3) | st.just(700),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_program_by_rows_gives_the_bits_of_torch(
    drawn: list[tuple[str, bool]], row: int, rows: int, first_row: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    tables = [random.standard_normal(first_row + rows), random.standard_normal(row)]
    inputs = [awkward_numbers(random, rows * row, "F64") for _ in "ab"]
    run = program_of(drawn, row, tables, first_row * row)
    check(run, REGISTERS, inputs, "F64", start=first_row * row)


# --------------------------------------------------------------- operations of real methods


class Whole:
    """A tensor as the input of an operation."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def read_into(self, out: torch.Tensor) -> None:
        out.copy_(self.tensor)


@rows_of
def test_the_divergence_of_rows(row: int, random: np.random.Generator) -> None:
    """arcee_fusion's: softmaxes, logarithms, three barriers."""
    operation, parameters = reduce_operation("row_divergence"), {"row_elements": row}
    scratch = operation.cost(2, parameters).scratch
    program = record_reduce(operation, [0, 1], scratch, parameters, None)
    for rows in row_counts(row):
        for make in (
            lambda size: torch.from_numpy(random.standard_normal(size)).to(torch.bfloat16),
            lambda size: awkward_numbers(random, size, "F32"),
        ):
            blocks = [make(rows * row) for _ in "ab"]
            buffers: Any = [torch.empty(rows * row, dtype=torch.float64) for _ in range(scratch)]
            inputs: Any = [Whole(block) for block in blocks]
            expected = operation.run(inputs, parameters, None, buffers, 0)
            _, actual = by_kernels(program, blocks, "F64")
            assert_same_numbers(actual, expected)


@pytest.mark.parametrize("name", ["ranked_sign_consensus", "ranked_sum"])
@working_dtypes
def test_ranked_mixes(name: str, working: str, random: np.random.Generator) -> None:
    """della's: a vector of ranks per model, some models without."""
    operation, row = apply_operation(name), 77
    parameters = {
        "weights": (0.5, 0.25, -1.0),
        "kinds": ("ranked", "keep", "ranked"),
        "keys": (11, 12, -13),
        "probabilities": (0.3, 1.0, 0.2),
        "slopes": (0.4 / row, 0.0, 0.1 / row),
        "is_divided": True,
        "is_rescaled": False,
        "row_elements": row,
        "normalize": True,
        "lambda": 0.75,
    }
    prepared = operation.prepare(parameters, [])
    scratch = operation.cost(4, parameters).scratch
    program = record_apply(operation, list(range(4)), scratch, prepared)
    assert program.stores == 2
    for start in (0, 40 * row):
        blocks = [awkward_numbers(random, 40 * row, working) for _ in range(4)]
        out = torch.full((40 * row,), torch.nan, dtype=WORKING[working])
        buffers: Any = [torch.full_like(out, torch.nan) for _ in range(scratch)]
        inputs: Any = [Whole(block) for block in blocks]
        operation.run(out, inputs, prepared, buffers, start)
        assert_same(by_kernels(program, blocks, working, start=start)[0], out)
