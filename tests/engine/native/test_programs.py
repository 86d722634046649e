"""Recording and fusing: the same bits in fewer instructions, and nothing recorded by mistake."""

from __future__ import annotations

import random as random_module
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_driver import AWKWARD, CODES, assert_same, awkward_numbers, by_kernels, by_torch, record
from lazymerge.engine.execution import Execution
from lazymerge.engine.native import library
from lazymerge.engine.native import program as programs
from lazymerge.engine.native.program import (
    BARRIERS,
    WRITES,
    Code,
    Instruction,
    Nested,
    Outcome,
    Program,
    Register,
    UndefinedRegisterError,
    _Input,
    _Recorder,
    _Recording,
    decoding,
    fuse,
    operands,
    record_apply,
    record_reduce,
)
from lazymerge.engine.plan import Plan
from lazymerge.engine.reference import _Evaluation
from lazymerge.engine.stages import NativeLayout, stage_layout, stage_operations
from lazymerge.graph.graph import Graph
from lazymerge.graph.node import Apply, Read, Reduce, Write, as_parameters
from lazymerge.graph.operation import (
    ApplyOperation,
    Cost,
    Done,
    Parameters,
    apply_operation,
    reduce_operation,
)
from lazymerge.graph.operations import selection
from lazymerge.graph.vector import (
    Counts,
    Vector,
    column_dot,
    copy_of,
    count_inside,
    div_rows,
    dot,
    draw,
    drop_largest,
    exponential,
    find_equal,
    hold,
    keep_largest,
    largest,
    load_product,
    logarithm,
    rank_rows,
    row_dot,
    row_max,
    row_total,
    scale_columns,
    scale_rows,
    signs,
    sub_rows,
    total,
    wait_for_rows,
    zero_from,
    zero_up_to,
)
from lazymerge.methods import METHODS
from processors import processor  # noqa: F401 (a fixture)

from conftest import needs_kernels, write_adapter
from merging import plan_of
from method_recipes import SETTINGS, model_counts, recipe_for


def instructions(run: Callable[[Any, Any], Any], vectors: int = 4, inputs: int = 3) -> list[str]:
    return [i.code.name for i in record(run, vectors, inputs).instructions]


# ------------------------------------------------------------------------------ by hand


def test_what_the_module_promises() -> None:
    def run(vectors: Any, inputs: Any) -> None:
        out, base, _, _ = vectors
        inputs[0].read_into(base)
        inputs[1].read_into(out)
        out.sub_(base).mul_(0.5).add_(base)

    recorded = record(run, 4, 2, fused=False).instructions
    assert [i.code.name for i in recorded] == ["LOAD", "LOAD", "SUB", "MUL_SCALAR", "ADD"]
    first, second, *_ = record(run, 4, 2).instructions
    assert first == Instruction(Code.LOAD, dst=1, k=0)
    assert second == Instruction(Code.LOAD_SUB_MUL_ADD, dst=0, a=1, b=1, x=0.5, k=1)


def test_load_sub() -> None:
    def run(v: Any, i: Any) -> None:
        i[1].read_into(v[1])
        i[0].read_into(v[0])
        v[0].sub_(v[1])

    assert instructions(run) == ["LOAD", "LOAD_SUB"]


def test_what_is_needed_afterwards_is_not_fused_away() -> None:
    def run(v: Any, i: Any) -> None:
        i[0].read_into(v[0])
        i[1].read_into(v[1])
        v[0].add_(v[1].mul_(2.0))
        v[0].mul_(v[1])  # the product, once more

    assert instructions(run) == ["LOAD", "LOAD_MUL", "ADD", "MUL"]


def test_what_is_overwritten_before_it_is_read_is_not_needed() -> None:
    def run(v: Any, i: Any) -> None:
        i[0].read_into(v[0])
        i[1].read_into(v[1])
        v[0].add_(v[1].mul_(2.0))
        i[2].read_into(v[1])
        v[0].mul_(v[1])

    assert instructions(run) == ["LOAD", "LOAD_MUL_ADD", "LOAD", "MUL"]


def test_the_result_is_needed() -> None:
    def run(v: Any, i: Any) -> None:
        i[1].read_into(v[1])
        i[0].read_into(v[0])
        v[1].add_(v[0].mul_(2.0))  # into a register that nobody reads; v[0] is the output

    assert instructions(run) == ["LOAD", "LOAD_MUL", "ADD"]


def test_doubling_is_no_addition_of_two_things() -> None:
    def run(v: Any, i: Any) -> None:
        i[0].read_into(v[0])
        v[0].mul_(3.0)
        v[0].add_(v[0])

    assert instructions(run) == ["LOAD_MUL", "ADD"]


def registers_of(count: int) -> tuple[_Recorder, list[Register]]:
    """Registers that hold something."""
    recorder = _Recorder()
    made = [Register(recorder, number) for number in range(count)]
    for register in made:
        register.load(0)
    return recorder, made


@pytest.mark.parametrize("result", [0, None])
def test_a_reduction_has_no_result(result: int | None) -> None:
    """Its registers are read by what it returns and by nobody else."""
    recorder = _Recorder()
    first, second = Register(recorder, 0), Register(recorder, 1)
    second.load(1)
    first.load(0)
    second.add_(first.mul_(2.0))
    copy_of(second)
    codes = [i.code for i in fuse(recorder.instructions, result)]
    if result is None:
        assert codes == [Code.LOAD, Code.LOAD_MUL_ADD, Code.STORE]
    else:
        assert codes == [Code.LOAD, Code.LOAD_MUL, Code.ADD, Code.STORE]


def test_reads_and_writes() -> None:
    add = Instruction(Code.ADD, dst=0, a=1, b=2)
    assert [add.reads(r) for r in range(4)] == [False, True, True, False]
    assert [add.writes(r) for r in range(4)] == [True, False, False, False]
    load = Instruction(Code.LOAD, dst=2)  # a and b are no operands of it
    assert not any(load.reads(r) for r in range(3))
    fused = Instruction(Code.LOAD_SUB_MUL_ADD, dst=0, a=1, b=2)
    assert [fused.reads(r) for r in range(4)] == [False, True, True, False]
    fused = Instruction(Code.LOAD_MUL_ADD, dst=0, a=1, b=2)
    assert [fused.reads(r) for r in range(4)] == [False, False, True, False]
    dot_product = Instruction(Code.DOT, a=1, b=2)
    assert not any(dot_product.writes(r) for r in range(3))
    zeroed = Instruction(Code.ZERO_FROM, dst=0, a=0, b=1, c=2)
    assert [zeroed.reads(r) for r in range(4)] == [True, True, True, False]
    by_row = Instruction(Code.SUB_ROWS, dst=0, a=0, c=1)  # c is a list
    assert [by_row.reads(r) for r in range(3)] == [True, False, False]
    summed = Instruction(Code.DOT_ROWS, dst=0, a=1, b=2, c=3)  # dst is a list, c a lane
    assert [summed.reads(r) for r in range(4)] == [False, True, True, False]
    assert not any(summed.writes(r) for r in range(4))
    for code in (Code.WAIT, Code.RANK_ROWS, Code.DRAW, Code.LOAD_STORED, Code.LOAD_PRODUCT):
        assert not any(Instruction(code).reads(r) for r in range(3))
    assert Instruction(Code.DRAW, dst=1).writes(1)
    assert Instruction(Code.LOAD_STORED, dst=1).writes(1)
    assert not Instruction(Code.RANK_ROWS).writes(0)


def test_operands_are_those_of_the_list_in_the_kernels() -> None:
    """`a` and `b` where kernels.c says that there is an a or a b that is a register."""
    for code, formula in instructions_of_the_kernels().items():
        right = formula.split(" = ", 1)[-1].replace("+=", "")
        names = set(re.findall(r"\b[abc]\b", right))
        if code in (Code.STORE, Code.COUNT, Code.FIND, Code.LOAD_STORED, *BARRIERS):
            names -= {"b"}  # a place in memory, or a rank
        if "table c" in right or "list c" in right:
            names -= {"c"}
        if "table b" in right:
            names -= {"b"}
        if code is Code.COUNT or code is Code.FIND:
            names |= {"a"}
        values = {"a": 1, "b": 2, "c": 3}
        expected = sorted(values[name] for name in names)
        if code is not Code.ZERO_FROM:
            assert 3 not in expected, code
        assert sorted(Instruction(code, dst=0, **values).operands) == expected, code
        writes = formula.startswith("dst = ")
        assert (code in WRITES) == writes, code


def instructions_of_the_kernels() -> dict[Code, str]:
    """What the enum in kernels.c says of each instruction, in its order."""
    source = Path(programs.__file__).with_name("kernels.c").read_text()
    block = source[source.index("enum operation {") :]
    block = block[block.index("{") + 1 : block.index("};")]
    found = re.findall(r"^\s+([A-Z][A-Z_]*),?\s*(?:/\*\s*(.*?)\s*\*/)?\s*$", block, re.M)
    names = [name for name, _ in found]
    in_c = {Code.ZERO_UP_TO: "ZERO_UP_TO_S"}
    assert names == [in_c.get(code, code.name.replace("_SCALAR", "_S")) for code in Code]
    return dict(zip(Code, (formula for _, formula in found), strict=True))


def test_every_instruction_is_reached_by_some_program() -> None:
    """Those of the list in program.py, by the programs of this folder's tests."""
    table = np.ones(9)

    def all_of_them(v: Any, i: Any) -> Any:
        a, b, room, more_room = v
        i[0].read_into(a)
        i[1].read_into(b)
        a.copy_(b).add_(b).sub_(b).mul_(b).div_(b).add_(1).mul_(2).abs_().clamp_min_(0)
        a.ge_(0).gt_(0).eq_(0).clamp_max_(3)
        keep_largest(a, 1, 0.5, 3, 0)
        drop_largest(a, 1, 0.5, 3, 0, room)
        zero_up_to(a, b, 0.5, room)
        zero_from(a, b, 0.5, room)
        zero_from(a, b, b, room)
        exponential(a, room, more_room)
        logarithm(a, room, more_room)
        scale_rows(a, table, 3, 0)
        scale_columns(a, table, 0)
        load_product(room, table.reshape(3, 3), table.reshape(3, 3), 0)
        i[0].read_into(a)
        a.sub_(b)
        i[0].read_into(a)
        a.mul_(0.5)
        i[0].read_into(room)
        a.add_(room.mul_(0.5))
        i[0].read_into(room)
        a.add_(room.sub_(b).mul_(0.5))
        room.copy_(b)
        a.add_(room.mul_(0.5))
        returned = (
            dot(a, b, room),
            total(a),
            copy_of(a),
            count_inside(a, 0, 1, 9, room),
            find_equal(a, 1.0, 1, 0),
            column_dot(a, b, 3, 0, room),
            row_dot(a, b, 3, room),
            largest(a),
            signs([a], 1),
        )
        sums, highest = row_total(a, 3), row_max(a, 3)
        wait_for_rows(a)
        draw(a, 1, 0, room)
        sub_rows(a, highest, 3)
        div_rows(a, sums, 3)
        rank_rows(a, 3)
        return returned

    assert {i.code for i in record(all_of_them, 4, 2).instructions} == set(Code)


# ------------------------------------------------------------- what cannot be recorded


@pytest.mark.parametrize("name", ["sqrt_", "add", "exp_", "numpy", "clamp_", "view", "sum", "cpu"])
def test_what_vectors_do_not_offer_is_an_error(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(Register(_Recorder(), 0), name)


def test_values_of_registers_cannot_be_looked_at() -> None:
    register: Any = Register(_Recorder(), 0)
    for look in (
        lambda: register[0],
        lambda: register[:3],
        lambda: float(register),
        lambda: register < 0,
        lambda: register + register,
        lambda: len(register),
        lambda: list(register),
    ):
        with pytest.raises(TypeError):
            look()
    with pytest.raises(TypeError, match="decoded blocks"):
        _Input(0).raw()
    with pytest.raises((TypeError, ValueError)):
        register.add_(torch.ones(3))


def test_what_a_reduction_returns_cannot_be_computed_with() -> None:
    vector: Any = registers_of(1)[1][0]
    for outcome in (total(vector), row_total(vector, 3), row_max(vector, 3), copy_of(vector)):
        number: Any = outcome
        for use in (
            lambda number=number: number > 0,
            lambda number=number: number + 1,
            lambda number=number: float(number),
            lambda number=number: number[0],
        ):
            with pytest.raises(TypeError):
                use()


# ------------------------------------------------------------------- what holds nothing yet


READING: dict[str, Callable[[Any, Any], Any]] = {
    "copy": lambda filled, empty: filled.copy_(empty),
    "add": lambda filled, empty: filled.add_(empty),
    "add to": lambda filled, empty: empty.add_(filled),
    "multiply": lambda filled, empty: empty.mul_(2.0),
    "compare": lambda filled, empty: zero_up_to(filled, empty, 0.5, filled),
    "bound": lambda filled, empty: zero_from(filled, filled, empty, filled),
    "cut": lambda filled, empty: keep_largest(empty, 1, 0.5, 3, 0),
    "dot": lambda filled, empty: dot(filled, empty, filled),
    "total": lambda filled, empty: total(empty),
    "count": lambda filled, empty: count_inside(empty, 0, 1, 9, filled),
    "find": lambda filled, empty: find_equal(empty, 1.0, 1, 0),
    "keep a copy": lambda filled, empty: copy_of(empty),
    "hold": lambda filled, empty: hold(empty),
    "exponential": lambda filled, empty: exponential(empty, filled, filled),
    "rank": lambda filled, empty: rank_rows(empty, 3),
    "total of rows": lambda filled, empty: row_total(empty, 3),
    "dot of rows": lambda filled, empty: row_dot(filled, empty, 3, filled),
    "dot of columns": lambda filled, empty: column_dot(filled, empty, 3, 0, filled),
    "scale": lambda filled, empty: scale_rows(empty, np.ones(9), 3, 0),
}


@pytest.mark.parametrize("name", READING)
def test_a_vector_that_holds_nothing_cannot_be_read(name: str) -> None:
    """Neither one that was never filled nor one that was filled before a barrier; what was recorded
    before stays as it is."""
    for waits in (False, True):
        recorder, (filled, empty) = registers_of(2)
        if waits:
            wait_for_rows(filled)
            filled.load(0)
        else:
            recorder.defined.discard(1)
        before = list(recorder.instructions)
        with pytest.raises(UndefinedRegisterError, match=r"reads vector 1$"):
            READING[name](filled, empty)
        assert recorder.instructions == before
        empty.load(1)
        READING[name](filled, empty)


@pytest.mark.parametrize(
    "fill",
    [
        lambda vector, other: vector.load(0),
        lambda vector, other: vector.copy_(other),
        lambda vector, other: draw(vector, 1, 0, other),
        lambda vector, other: load_product(vector, np.ones((3, 2)), np.ones((2, 4)), 0),
    ],
)
def test_what_fills_a_vector(fill: Callable[[Any, Any], Any]) -> None:
    recorder, (vector, other) = registers_of(2)
    recorder.defined.discard(0)
    fill(vector, other)
    total(vector)


def test_room_may_hold_anything_and_is_not_filled_by_being_room() -> None:
    """Functions that want room take it where vectors compute at once; where they are recorded, it
    is not touched, and does not count as filled."""
    recorder, (vector, other, room) = registers_of(3)
    recorder.defined.discard(2)
    dot(vector, other, room)
    draw(vector, 1, 0, room)
    zero_from(vector, other, 0.5, room)
    with pytest.raises(UndefinedRegisterError):
        total(room)


def test_numbers_of_rows_are_there_after_a_barrier() -> None:
    _, (vector, other) = registers_of(2)
    sums: Any = row_total(vector, 3)
    for use in (sub_rows, div_rows):
        with pytest.raises(UndefinedRegisterError, match="before wait_for_rows"):
            use(vector, sums, 3)
    wait_for_rows(vector)
    vector.load(0)
    sub_rows(vector, sums, 3)
    later: Any = row_max(vector, 3)
    with pytest.raises(UndefinedRegisterError, match="before wait_for_rows"):
        sub_rows(vector, later, 3)
    rank_rows(vector, 3)  # is a barrier too
    other.load(0)
    div_rows(other, later, 3)
    div_rows(vector, sums, 3)  # the ranks, which are there again


def test_ranks_are_there_again_after_each_barrier() -> None:
    """And nothing else; one that has been changed since is not either."""
    recorder, (one, other, third) = registers_of(3)
    rank_rows(one, 3)
    total(one)
    with pytest.raises(UndefinedRegisterError):
        total(other)
    other.load(0)
    rank_rows(other, 3)
    for _ in range(2):
        total(one)
        total(other)
        wait_for_rows(third)
    stored = [i for i in recorder.instructions if i.code is Code.LOAD_STORED]
    assert [(i.dst, i.b) for i in stored] == [(0, 0), (0, 0), (1, 1), *[(0, 0), (1, 1)] * 2]
    one.mul_(2.0)
    wait_for_rows(third)
    total(other)
    with pytest.raises(UndefinedRegisterError):
        total(one)


def test_what_is_held_is_there_again_and_what_has_changed_since_is_not() -> None:
    recorder, (one, other, third) = registers_of(3)
    hold(one)
    assert recorder.stores == 1
    total(one)  # it is not gone meanwhile
    for _ in range(2):
        wait_for_rows(third)
        total(one)
        with pytest.raises(UndefinedRegisterError):
            total(other)
    other.load(1)
    hold(other)
    one.mul_(2.0)  # what was held is not what it is now
    rank_rows(other, 3)
    total(other)
    with pytest.raises(UndefinedRegisterError):
        total(one)
    with pytest.raises(UndefinedRegisterError):
        hold(third)


# ------------------------------------------------------------------------ random programs

REGISTERS = 4  # the last is room for the functions that want some, and there is more of it
BELOW_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))
NUMBERS = st.sampled_from([*AWKWARD[:8], 0.5, -2.0, 0.1, 1 / 3, 1e-30])
registers = st.integers(0, REGISTERS - 2)

steps = st.one_of(
    # neighbours of this kind are what is fused, so they come often
    st.tuples(st.just("load"), registers, st.integers(0, 2)),
    st.tuples(st.just("load"), registers, st.integers(0, 2)),
    st.tuples(st.just("load sub"), registers, registers, st.integers(0, 2)),
    st.tuples(st.just("load mul add"), registers, registers, st.integers(0, 2), NUMBERS),
    st.tuples(
        st.just("load sub mul add"), registers, registers, registers, st.integers(0, 2), NUMBERS
    ),
    st.tuples(st.just("mul add"), registers, registers, NUMBERS),
    st.tuples(st.sampled_from(["add_", "sub_", "mul_", "div_", "copy_"]), registers, registers),
    st.tuples(st.sampled_from(["add_", "sub_", "mul_", "ge_", "gt_", "eq_"]), registers, NUMBERS),
    st.tuples(st.just("abs_"), registers),
    st.tuples(
        st.sampled_from(["clamp_min_", "clamp_max_"]), registers, st.sampled_from([0.0, -1.0, 0.3])
    ),
    st.tuples(st.sampled_from(["keep", "drop"]), registers, st.integers(0, 3000)),
    st.tuples(st.sampled_from(["zero up to", "zero from"]), registers, registers, NUMBERS),
    st.tuples(st.just("zero from others"), registers, registers, registers),
    st.tuples(st.just("draw"), registers, st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.sampled_from(["exponential", "logarithm"]), registers),
    st.tuples(st.sampled_from(["total", "copy_of", "count"]), registers),
    st.tuples(st.just("dot"), registers, registers),
)
OF_FLOAT64 = ("dot", "exponential", "logarithm")


def perform(step: tuple[Any, ...], v: Any, i: Any, start: int) -> Iterator[Any]:
    """One step on vectors or registers; yields what it returns."""
    name, first, *rest = step
    one, room = v[first], v[REGISTERS - 1]
    match name:
        case "load":
            i[rest[0]].read_into(one)
        case "load sub":
            i[rest[1]].read_into(one)
            one.sub_(v[rest[0]])
        case "load mul add":
            i[rest[1]].read_into(one)
            v[rest[0]].add_(one.mul_(rest[2]))
        case "load sub mul add":
            i[rest[2]].read_into(one)
            v[rest[1]].add_(one.sub_(v[rest[0]]).mul_(rest[3]))
        case "mul add":
            v[rest[0]].add_(one.mul_(rest[1]))
        case "abs_":
            one.abs_()
        case "keep":
            keep_largest(one, 0.5, BELOW_HALF, *rest, start)
        case "drop":
            drop_largest(one, 0.5, BELOW_HALF, *rest, start, room)
        case "zero up to":
            zero_up_to(one, v[rest[0]], rest[1], room)
        case "zero from":
            zero_from(one, v[rest[0]], rest[1], room)
        case "zero from others":
            zero_from(one, v[rest[0]], v[rest[1]], room)
        case "draw":
            draw(one, rest[0], start, room)
        case "exponential":
            exponential(one.clamp_max_(700.0), room, v[REGISTERS])
        case "logarithm":
            logarithm(one.abs_().clamp_min_(1e-300), room, v[REGISTERS])
        case "total":
            yield total(one)
        case "copy_of":
            yield copy_of(one)
        case "count":
            yield count_inside(one, -0.5, 1.5, 40, room)
        case "dot":
            yield dot(one, v[rest[0]], room)
        case _:
            (other,) = rest
            getattr(one, name)(v[other] if isinstance(other, int) else other)


def program_of(drawn: list[tuple[Any, ...]], start: int) -> Callable[[Any, Any], Any]:
    def run(v: Any, i: Any) -> tuple[Any, ...]:
        for number in range(REGISTERS - 1):
            i[number].read_into(v[number])
        return tuple(outcome for step in drawn for outcome in perform(step, v, i, start))

    return run


@needs_kernels
@pytest.mark.usefixtures("processor")
@settings(max_examples=150)
@given(
    drawn=st.lists(steps, max_size=14),
    working=st.sampled_from(["F32", "F64"]),
    dtypes=st.tuples(*[st.sampled_from(list(CODES))] * 3),
    output=st.sampled_from([None, "BF16", "F16", "F32"]),
    size=st.sampled_from([1, 5, 16, 1024, 1025, 2500]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_program_fused_or_not_gives_the_bits_of_torch(
    drawn: list[tuple[Any, ...]],
    working: str,
    dtypes: tuple[str, ...],
    output: str | None,
    size: int,
    seed: int,
) -> None:
    if working == "F32":
        drawn = [step for step in drawn if step[0] not in OF_FLOAT64]
    random = np.random.default_rng(seed)
    inputs = [awkward_numbers(random, size, "F64").to(CODES[dtype]) for dtype in dtypes]
    run = program_of(drawn, start=1000)
    expected, returned = by_torch(run, REGISTERS + 1, inputs, working)
    if output is not None:
        expected = expected.to(torch.float32).to(CODES[output])
    counts = []
    for fused in (False, True):
        program = record(run, REGISTERS + 1, 3, fused=fused)
        counts.append(len(program.instructions))
        actual, found = by_kernels(program, inputs, working, output, start=1000)
        assert_same(actual, expected, f"fused {fused}")
        assert len(found) == len(returned)
        for one, other in zip(found, returned, strict=True):
            assert_same_outcome(one, other)
    assert counts[1] <= counts[0]


def assert_same_outcome(actual: Any, expected: Any) -> None:
    if isinstance(expected, Counts):
        assert (actual.above, actual.inside) == (expected.above, expected.inside)
        actual, expected = actual.values, expected.values
    if isinstance(expected, float):
        actual, expected = np.float64([actual]), np.float64([expected])
    assert_same(torch.from_numpy(actual), torch.from_numpy(expected))


# ------------------------------------------------------------ the operations that there are


class Nowhere:
    """A start that may be passed on, and neither looked at nor computed with."""

    def _refuse(self, *_: Any) -> Any:
        raise AssertionError("a recordable operation looked at `start`")

    __add__ = __radd__ = __sub__ = __rsub__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse
    __eq__ = __bool__ = __index__ = __int__ = __float__ = __mod__ = __mul__ = _refuse  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[Plan]:
    """Every method, with parameters as its recipes give them."""
    folder = tmp_path_factory.mktemp("programs")
    folders = [folder / f"m{number}" for number in range(5)]
    generator = torch.Generator().manual_seed(3)
    tensors = {
        f"m{number}": {
            "w": torch.randn(30, 7, generator=generator),
            "b": torch.randn(9, generator=generator),
            "coarse": torch.randn(20, 6, generator=generator).round(),
        }
        for number in range(5)
    }
    made: list[Plan] = []
    for method, setting in product(METHODS.values(), SETTINGS):
        for count in model_counts(method.signature, 4):
            document = recipe_for(
                method.signature,
                folders,
                count,
                setting=setting,
                random=random_module.Random(count),
            )
            made.append(plan_of(folder, document, tensors))
            tensors = {}  # written once
    return [*made, plan_with_adapter(folder)]


def plan_with_adapter(folder: Path) -> Plan:
    """A model's matrices with DoRA, as they are."""
    generator = torch.Generator().manual_seed(4)
    factors, tensors = {}, {}
    for name, (rows, columns) in {"w": (30, 7), "coarse": (20, 6)}.items():
        tensors[f"{name}.weight"] = torch.randn(rows, columns, generator=generator)
        factors[f"{name}.lora_A.weight"] = torch.randn(5, columns, generator=generator)
        factors[f"{name}.lora_B.weight"] = torch.randn(rows, 5, generator=generator)
        factors[f"{name}.lora_magnitude_vector"] = torch.rand(rows, generator=generator)
    adapter = write_adapter(folder / "adapter", factors, r=5, lora_alpha=7, use_dora=True)
    recipe = {"merge_method": "passthrough", "models": [{"model": f"plain+{adapter}"}]}
    return plan_of(folder, recipe, {"plain": tensors})


@pytest.fixture
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CANDIDATES", 64)
    monkeypatch.setattr(selection, "SAMPLE_RUNS", 4)
    monkeypatch.setattr(selection, "SAMPLE_RUN_ELEMENTS", 8)


def states(evaluation: _Evaluation, node: Reduce) -> list[Any]:
    """States of the passes that a search of these tensors goes through."""
    operation, parameters = reduce_operation(node.operation), dict(node.parameters)
    results = evaluation._results(node.statistics)
    seen: list[Any] = []
    real = type(operation).finish

    def spy(self: Any, parameters: Any, element_count: int, state: Any, partials: Any) -> Any:
        seen.append(state)
        return real(self, parameters, element_count, state, partials)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(operation), "finish", spy)
        evaluation._reduce(node)
    if not seen:  # there was nothing to do
        assert isinstance(operation.first_pass(parameters, results, 9, 1), Done)
    return seen


def prepared_of(evaluation: _Evaluation, node: Apply) -> Any:
    """What the operation makes of the statistics of these tensors."""
    results = evaluation._results(node.statistics)
    return apply_operation(node.operation).prepare(dict(node.parameters), results)


def recorded_stage(plan: Plan, stage: Reduce | Write) -> list[Program]:
    """The programs of all passes of a stage, as the frame records them (native/frame.py)."""
    graph, evaluation = plan.graph, _Evaluation(plan.graph)
    prepared = {
        node.id: prepared_of(evaluation, node)
        for node, _ in stage_operations(graph, stage)
        if isinstance(node, Apply)
    }
    node = graph.block_node(stage.source) if isinstance(stage, Write) else stage
    if isinstance(node, Read):
        return [decoding()]
    reads = [read.id for read in graph.reads_of(stage.id)]
    inputs = operands(graph, node.inputs, reads, prepared)
    parameters = dict(node.parameters)
    if isinstance(node, Apply):
        operation = apply_operation(node.operation)
        scratch = operation.cost(len(node.inputs), parameters).scratch
        return [record_apply(operation, inputs, scratch, prepared[node.id])]
    reduction = reduce_operation(node.operation)
    scratch = reduction.cost(len(node.inputs), parameters).scratch
    return [
        record_reduce(reduction, inputs, scratch, parameters, state)
        for state in states(evaluation, node)
    ]


def check_registers(program: Program, is_write: bool) -> None:
    """No register is read that was not written, after the last barrier; none that there is not."""
    written: set[int] = set()
    for instruction in program.instructions:
        for register in range(program.registers):
            if instruction.reads(register):
                assert register in written, instruction
        if instruction.code in BARRIERS:
            written.clear()
        if instruction.code in WRITES:
            assert instruction.dst < program.registers
            written.add(instruction.dst)
    assert not is_write or program.result in written


def check_room(program: Program, layout: NativeLayout, elements: int) -> None:
    """Whatever the program leaves or works in has its place in the worker's arena."""
    assert program.registers == layout.register_count
    assert program.stores <= len(layout.stores)
    assert program.lists <= len(layout.lists)
    block = min(layout.block_elements, elements)
    filled: set[int] = set()
    for i in program.instructions:
        match i.code:
            case Code.LOAD | Code.LOAD_SUB | Code.LOAD_MUL | Code.LOAD_MUL_ADD:
                assert i.k < len(layout.raw)
            case Code.STORE | Code.COUNT | Code.LOAD_STORED:
                assert layout.stores[i.b].elements >= block
            case Code.DOT_ROWS | Code.SUM_ROWS | Code.MAX_ROWS:
                assert block % i.k == 0
                assert layout.lists[i.dst].elements >= block // i.k
                filled.add(i.dst)
            case Code.DOT_COLUMNS:
                assert layout.lists[i.dst].elements >= i.k
                filled.add(i.dst)
            case Code.SUB_ROWS | Code.DIV_ROWS:
                assert i.c in filled
            case Code.SCALE_ROWS:
                assert len(program.tables[i.c]) * i.k >= elements
            case Code.SCALE_COLUMNS:
                assert len(program.tables[i.c]) == i.k
            case Code.LOAD_PRODUCT:
                left, right = program.tables[i.c], program.tables[i.b]
                assert right.shape == (i.d, i.k)
                assert left.shape[1] == i.d
                assert len(left) * i.k >= elements
                assert layout.stores[i.a].elements >= block
            case Code.RANK_ROWS:
                assert layout.spare is not None
                assert layout.spare.elements >= library.RANKED_BYTES * i.k
                assert block % i.k == 0
            case _:
                pass
    assert filled == set(range(program.lists))
    for table in program.tables:
        # factors are of the working dtype, which is float64 for the reference that makes them here
        assert table.dtype == np.float64
        assert table.flags.c_contiguous


@pytest.mark.usefixtures("small_samples")
def test_every_stage_records(plans: list[Plan]) -> None:
    """Without looking at values, with no register read that was not written, and into no more room
    than the layout has; for every pass of every stage of every method."""
    recorded: set[str] = set()
    seen: set[Code] = set()
    for plan, stage in ((p, s) for p in plans for task in p.tasks for s in task.stages):
        layout = stage_layout(plan.graph, stage, Execution("pread", "native"))
        if not isinstance(layout, NativeLayout):
            continue
        made = recorded_stage(plan, stage)
        for program in made:
            is_write = isinstance(stage, Write)
            assert (program.outcome is None) == is_write
            assert is_write or list(outcomes(program.outcome))
            check_registers(program, is_write)
            check_room(program, layout, stage.element_count)
            seen.update(i.code for i in program.instructions)
        if made:
            recorded |= {node.operation for node, _ in stage_operations(plan.graph, stage)}
    claimed = {
        node.operation
        for plan in plans
        for node in plan.graph
        if (isinstance(node, Apply) and apply_operation(node.operation).is_recordable)
        or (isinstance(node, Reduce) and reduce_operation(node.operation).is_recordable)
    }
    assert recorded == claimed
    assert {
        *("linear_combination", "task_vectors", "sign_consensus", "gram", "random_sum"),
        *("ranked_sign_consensus", "row_divergence", "gram_of_rows", "largest_values", "variance"),
    } <= recorded
    of_statistics = {Code.LARGEST, Code.SIGNS}
    assert seen == set(Code) - of_statistics  # methods need every other one


def test_no_recordable_operation_looks_at_start(plans: list[Plan]) -> None:
    nowhere: Any = Nowhere()
    for plan in plans:
        evaluation = _Evaluation(plan.graph)
        for node in plan.graph:
            if not isinstance(node, Apply | Reduce):
                continue
            recording = _Recording()
            parameters = dict(node.parameters)
            inputs: Any = [_Input(number) for number in range(len(node.inputs))]
            if isinstance(node, Apply) and apply_operation(node.operation).is_recordable:
                operation: ApplyOperation = apply_operation(node.operation)
                cost: Cost = operation.cost(len(inputs), parameters)
                out, *vectors = recording.registers(cost.scratch + 1)
                prepared = prepared_of(evaluation, node)
                operation.run(out, inputs, prepared, vectors, nowhere)
            elif isinstance(node, Reduce) and reduce_operation(node.operation).is_recordable:
                reduction = reduce_operation(node.operation)
                cost = reduction.cost(len(inputs), parameters)
                vectors = recording.registers(cost.scratch)
                for state in states(evaluation, node):
                    reduction.run(inputs, parameters, state, vectors, nowhere)


def outcomes(value: Any) -> Iterator[Outcome]:
    if isinstance(value, Outcome):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from outcomes(part)


def test_decoding_is_one_load() -> None:
    program = decoding()
    assert [i.code for i in program.instructions] == [Code.LOAD]
    assert (program.registers, program.result, program.stores) == (1, 0, 0)


def test_the_numbers_of_instructions_are_those_of_the_kernels() -> None:
    """Names and order of the enum in kernels.c; an editor who adds one must do it in both."""
    assert list(instructions_of_the_kernels()) == list(Code) == list(range(len(Code)))
    # the kernels take whatever comes after WAIT for a barrier
    assert sorted(BARRIERS) == list(range(Code.WAIT, len(Code)))


# ------------------------------------------------------------------------ computed inputs


class Mixed(ApplyOperation):
    """(a · ½) + b of two inputs, with two vectors of scratch of which it needs one."""

    name = "test_mixed"
    is_recordable = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=2)

    def run(
        self,
        out: Vector,
        inputs: Any,
        prepared: Any,
        scratch: Any,
        start: int,
    ) -> None:
        inputs[0].read_into(scratch[1])
        inputs[1].read_into(out)
        out.add_(scratch[1].mul_(prepared))


def evaluated(operand: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
    """An operand by torch, in float64."""

    class Value:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def read_into(self, out: torch.Tensor) -> None:
            out.copy_(self.tensor)

    if isinstance(operand, int):
        return inputs[operand].double()
    sources: Any = [Value(evaluated(source, inputs)) for source in operand.inputs]
    size = len(inputs[0])
    out, *scratch = (torch.empty(size, dtype=torch.float64) for _ in range(1 + operand.scratch))
    operand.operation.run(out, sources, operand.prepared, scratch, 0)
    return out


@needs_kernels
@pytest.mark.usefixtures("processor")
def test_computed_inputs_are_computed_wherever_they_are_read(random: np.random.Generator) -> None:
    """Nested twice, one of them used twice; each has scratch of its own."""
    inner = Nested(Mixed(), [0, 1], 2, 0.5)
    outer = Nested(Mixed(), [inner, 2], 2, -0.25)
    top: list[Any] = [outer, inner]
    program = record_apply(Mixed(), top, 2, 3.0)
    assert program.registers == 1 + 2 + 2 + 2
    loads = [i.k for i in program.instructions if i.code.name.startswith("LOAD")]
    assert sorted(loads) == [0, 0, 1, 1, 2]  # the inner one twice, the outer one once
    check_registers(program, is_write=True)
    inputs = [awkward_numbers(random, 2500, "F64") for _ in range(3)]
    actual, _ = by_kernels(program, inputs, "F64")
    assert_same(actual, evaluated(Nested(Mixed(), top, 2, 3.0), inputs))


def test_computed_inputs_have_no_stored_bytes() -> None:
    computed = _Recording().input(Nested(Mixed(), [0, 1], 2, 0.5))
    with pytest.raises(TypeError, match="no stored bytes"):
        computed.raw()


def test_operands_of_a_graph(tmp_path: Path) -> None:
    """Numbers for what is read, one and the same Nested for what is computed, however often."""
    tensors = {name: {"w": torch.ones(6)} for name in ("a", "b")}
    recipe = {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1}} for m in ("a", "b")],
    }
    plan = plan_of(tmp_path, recipe, tensors)
    graph = Graph()
    a, b = (graph.add(node) for node in plan.graph if isinstance(node, Read))

    def combined(*inputs: str) -> str:
        parameters = as_parameters({"coefficients": (0.5,) * len(inputs)})
        return graph.add(Apply("linear_combination", parameters, inputs, (), (6,), "F64"))

    inner = combined(a, b)
    outer = combined(inner, b)
    prepared = {inner: (0.5, 0.5), outer: (0.25, 0.75)}
    found: Any = operands(graph, [outer, inner, a, inner], [b, a], prepared)
    assert found[2] == 1
    assert found[1] is found[3] is found[0].inputs[0]
    assert found[0].inputs[1] == 0
    assert found[1].inputs == [1, 0]
    assert (found[0].prepared, found[1].prepared) == ((0.25, 0.75), (0.5, 0.5))
    scratch = apply_operation("linear_combination").cost(2, {}).scratch
    assert found[0].scratch == found[1].scratch == scratch
    # two of the same content are still two: what is shared is said by the graph
    assert replace(found[1]) != found[1]
