"""Recording and fusing: the same bits in fewer instructions, and nothing recorded by mistake."""

from __future__ import annotations

import random as random_module
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_driver import AWKWARD, CODES, assert_same, awkward_numbers, by_kernels, by_torch, record
from lazymerge.engine.native import program as programs
from lazymerge.engine.native.program import (
    WRITES,
    Code,
    Instruction,
    Outcome,
    Register,
    _Input,
    _Recorder,
    decoding,
    fuse,
    record_apply,
    record_reduce,
)
from lazymerge.graph.graph import Graph
from lazymerge.graph.node import Apply, Reduce
from lazymerge.graph.operation import (
    ApplyOperation,
    Cost,
    Done,
    ReduceOperation,
    apply_operation,
    reduce_operation,
)
from lazymerge.graph.operations import selection
from lazymerge.graph.vector import Counts, copy_of, count_inside, dot, keep_largest, total
from lazymerge.methods import METHODS
from processors import processor  # noqa: F401 (a fixture)

from conftest import needs_kernels
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


def test_every_instruction_is_reached_by_some_program() -> None:
    """Those of the list in program.py, by the programs of this folder's tests."""
    seen = set()

    def all_of_them(v: Any, i: Any) -> Any:
        a, b, room, _ = v
        i[0].read_into(a)
        a.copy_(b).add_(b).sub_(b).mul_(b).div_(b).add_(1).mul_(2).abs_().clamp_min_(0)
        a.ge_(0).gt_(0).eq_(0)
        keep_largest(a, 1, 0.5, 3, 0)
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
        from lazymerge.graph.vector import find_equal

        return (
            dot(a, b, room),
            total(a),
            copy_of(a),
            count_inside(a, 0, 1, 9, room),
            find_equal(a, 1.0, 1, 0),
        )

    seen = {i.code for i in record(all_of_them, 4, 1).instructions}
    assert seen == set(Code)


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
    outcome: Any = Register(_Recorder(), 0).record_total()
    for use in (lambda: outcome > 0, lambda: outcome + 1, lambda: float(outcome)):
        with pytest.raises(TypeError):
            use()


# ------------------------------------------------------------------------ random programs

REGISTERS = 4  # the last is room for the functions that want some
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
    st.tuples(st.just("clamp_min_"), registers, st.sampled_from([0.0, -1.0, 0.3])),
    st.tuples(st.just("keep"), registers, st.integers(0, 3000)),
    st.tuples(st.sampled_from(["total", "copy_of", "count"]), registers),
    st.tuples(st.just("dot"), registers, registers),
)


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
            keep_largest(
                one, 0.5, float(np.nextafter(np.float32(0.5), np.float32(0))), *rest, start
            )
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
        drawn = [step for step in drawn if step[0] != "dot"]  # of float64 vectors only
    random = np.random.default_rng(seed)
    inputs = [awkward_numbers(random, size, "F64").to(CODES[dtype]) for dtype in dtypes]
    run = program_of(drawn, start=1000)
    expected, returned = by_torch(run, REGISTERS, inputs, working)
    if output is not None:
        expected = expected.to(torch.float32).to(CODES[output])
    counts = []
    for fused in (False, True):
        program = record(run, REGISTERS, 3, fused=fused)
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
def nodes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Graph, Apply | Reduce]]:
    """Every operation of every method, with parameters as its recipes give them."""
    folder = tmp_path_factory.mktemp("programs")
    folders = [folder / f"m{number}" for number in range(5)]
    tensors = {f"m{n}": {"w": torch.randn(30, 7), "b": torch.randn(9)} for n in range(5)}
    found: list[tuple[Graph, Apply | Reduce]] = []
    for method, setting in product(METHODS.values(), SETTINGS):
        for count in model_counts(method.signature, 4):
            document = recipe_for(
                method.signature,
                folders,
                count,
                setting=setting,
                random=random_module.Random(count),
            )
            plan = plan_of(folder, document, tensors)
            tensors = {}  # written once
            found += [(plan.graph, n) for n in plan.graph if isinstance(n, Apply | Reduce)]
    return found


def states(operation: ReduceOperation[Any, Any], node: Reduce) -> list[Any]:
    """States of the passes that a search of real tensors goes through."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(210, generator=generator, dtype=torch.float64) for _ in node.inputs]
    results = [None] * len(node.statistics)
    parameters = dict(node.parameters)
    if node.operation == "surviving_norms":
        keep = parameters_of_thresholds(node)
        thresholds = selection.MagnitudeThresholds()
        results = [finished(thresholds, tensors, {"keep": keep}, [], [])]
    seen: list[Any] = []
    finished(operation, tensors, parameters, results, seen)
    return seen


def parameters_of_thresholds(node: Reduce) -> tuple[int | None, ...]:
    return (None, *[7] * (len(node.inputs) - 2))[: len(node.inputs) - 1]


def finished(
    operation: ReduceOperation[Any, Any],
    tensors: list[torch.Tensor],
    parameters: Any,
    results: Any,
    seen: list[Any],
) -> Any:
    class Input:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def read_into(self, out: torch.Tensor) -> None:
            out.copy_(self.tensor[: len(out)])

    elements = len(tensors[0])
    step = operation.first_pass(parameters, results, elements, 1)
    while not isinstance(step, Done):
        seen.append(step.state)
        length = elements if step.sample is None else step.sample.runs * step.sample.run_elements
        count = operation.cost(len(tensors), parameters).scratch
        scratch = [torch.empty(length, dtype=torch.float64) for _ in range(count)]
        inputs: Any = [Input(tensor) for tensor in tensors]
        partial = operation.run(inputs, parameters, step.state, scratch, 0)
        step = operation.finish(parameters, elements, step.state, [partial])
    return step.result


def prepared_of(graph: Graph, node: Apply) -> Any:
    operation = apply_operation(node.operation)
    results: list[Any] = []
    for statistic in node.statistics:
        reduce = graph.reduce(statistic)
        match reduce.operation:
            case "gram":
                results.append(np.eye(len(reduce.inputs)).tolist())
            case "magnitude_thresholds":
                keep: Any = dict(reduce.parameters)["keep"]
                results.append(tuple(k and selection.Threshold(0.5, 0.4999, 99) for k in keep))
            case "surviving_norms":
                results.append((1.5,) * (len(reduce.inputs) - 1))
            case other:
                raise AssertionError(f"say here what {other} may give")
    return operation.prepare(dict(node.parameters), results)


def test_every_recordable_operation_records(
    nodes: list[tuple[Graph, Apply | Reduce]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without looking at values or at `start`, and with no register read that was not written."""
    monkeypatch.setattr(selection, "CANDIDATES", 64)
    monkeypatch.setattr(selection, "SAMPLE_RUNS", 4)
    monkeypatch.setattr(selection, "SAMPLE_RUN_ELEMENTS", 8)
    recorded: set[str] = set()
    for graph, node in nodes:
        numbers = list(range(len(node.inputs)))
        parameters = dict(node.parameters)
        if isinstance(node, Apply):
            operation = apply_operation(node.operation)
            if not operation.is_recordable:
                continue
            cost = operation.cost(len(numbers), parameters)
            made = [record_apply(operation, numbers, cost.scratch, prepared_of(graph, node))]
            assert made[0].outcome is None
        else:
            reduction = reduce_operation(node.operation)
            if not reduction.is_recordable:
                continue
            cost = reduction.cost(len(numbers), parameters)
            made = [
                record_reduce(reduction, numbers, cost.scratch, parameters, state)
                for state in states(reduction, node)
            ]
            assert all(list(outcomes(program.outcome)) for program in made)
        for program in made:
            recorded.add(node.operation)
            assert program.stores <= cost.stores
            written: set[int] = set()
            for instruction in program.instructions:
                for register in range(program.registers):
                    if instruction.reads(register):
                        assert register in written, (node.operation, instruction)
                if instruction.code in WRITES:
                    assert instruction.dst < program.registers
                    written.add(instruction.dst)
            assert isinstance(node, Reduce) or program.result in written
    claimed = {
        node.operation
        for _, node in nodes
        if (
            apply_operation(node.operation)
            if isinstance(node, Apply)
            else reduce_operation(node.operation)
        ).is_recordable
    }
    assert recorded == claimed
    assert {"linear_combination", "task_vectors", "sign_consensus", "gram"} <= recorded


def test_no_recordable_operation_looks_at_start(
    nodes: list[tuple[Graph, Apply | Reduce]], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere: Any = Nowhere()
    for graph, node in nodes:
        recorder = _Recorder()
        parameters = dict(node.parameters)
        inputs: Any = [_Input(number) for number in range(len(node.inputs))]
        if isinstance(node, Apply) and apply_operation(node.operation).is_recordable:
            operation: ApplyOperation = apply_operation(node.operation)
            cost: Cost = operation.cost(len(inputs), parameters)
            vectors: Any = [Register(recorder, n) for n in range(cost.scratch + 1)]
            operation.run(vectors[0], inputs, prepared_of(graph, node), vectors[1:], nowhere)
        elif isinstance(node, Reduce) and reduce_operation(node.operation).is_recordable:
            reduction = reduce_operation(node.operation)
            cost = reduction.cost(len(inputs), parameters)
            vectors = [Register(recorder, n) for n in range(cost.scratch)]
            for state in states(reduction, node):
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
    source = Path(programs.__file__).with_name("kernels.c").read_text()
    block = source[source.index("enum operation {") :]
    block = block[: block.index("};")]
    names = [
        line.strip().split("/*")[0].strip(" ,\n")
        for line in block.splitlines()[1:]
        if line.strip() and not line.strip().startswith("/*")
    ]
    longer = {"_SCALAR": "_S"}
    expected = [code.name.replace("_SCALAR", longer["_SCALAR"]) for code in Code]
    assert names == expected
