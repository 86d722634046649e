"""Recording an operation as a program for the native kernels.

The operation's `run` is called once with registers in place of tensors. What it asks of them is
written down, instruction by instruction:

    base, change = scratch                 r1, r2
    inputs[0].read_into(base)              load      r1 ← input 0
    inputs[1].read_into(out)               load      r0 ← input 1
    out.sub_(base).mul_(f).add_(base)      load_sub  r0 ← input 1 − r1     (two instructions in one)
                                           mul       r0 ← r0 · f
                                           add       r0 ← r0 + r1

A register is one chunk of the working dtype in a worker's arena. What a reduction returns comes out
as places to look at once the program has run (`Outcome`).

Neighbouring instructions are fused where that leaves out a trip through a register and no rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from ...graph.operation import ApplyOperation, ReduceOperation


class Code(IntEnum):
    """Numbers of the instructions, as in kernels.c."""

    LOAD = 0
    COPY = 1
    ADD = 2
    SUB = 3
    MUL = 4
    DIV = 5
    ADD_SCALAR = 6
    MUL_SCALAR = 7
    ABS = 8
    MAX_SCALAR = 9
    GE_SCALAR = 10
    GT_SCALAR = 11
    EQ_SCALAR = 12
    KEEP = 13
    STORE = 14
    DOT = 15
    SUM = 16
    COUNT = 17
    FIND = 18
    LOAD_SUB = 19
    LOAD_MUL = 20
    MUL_ADD = 21
    LOAD_MUL_ADD = 22
    LOAD_SUB_MUL_ADD = 23


READS_A = frozenset(Code) - {Code.LOAD, Code.LOAD_MUL, Code.LOAD_MUL_ADD}
READS_B = frozenset(
    {
        Code.ADD,
        Code.SUB,
        Code.MUL,
        Code.DIV,
        Code.DOT,
        Code.MUL_ADD,
        Code.LOAD_MUL_ADD,
        Code.LOAD_SUB_MUL_ADD,
    }
)
WRITES = frozenset(Code) - {Code.STORE, Code.DOT, Code.SUM, Code.COUNT, Code.FIND}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One loop over a chunk; what the operands mean, kernels.c says."""

    code: Code
    dst: int = 0
    a: int = 0
    b: int = 0
    x: float = 0.0
    y: float = 0.0
    k: int = 0

    def reads(self, register: int) -> bool:
        return (self.code in READS_A and self.a == register) or (
            self.code in READS_B and self.b == register
        )

    def writes(self, register: int) -> bool:
        return self.code in WRITES and self.dst == register


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a program leaves something that a reduction returned.

    kind: "sum" (a lane), "counts" (counter and store), "index" (counter) or "copy" (store).
    lane, counter, store: which one.
    quota, collects: the most values to take of a store, and whether it holds any (counts).
    """

    kind: str
    lane: int = 0
    counter: int = 0
    store: int = 0
    quota: int = 0
    collects: bool = False


@dataclass(frozen=True, slots=True)
class Program:
    """What the kernels run for every block.

    registers: how many it uses. result: the register that holds an Apply's block.
    lanes, counters, stores: how many of each it fills.
    outcome: what a reduction returned, with Outcomes for what is known only afterwards.
    """

    instructions: tuple[Instruction, ...]
    registers: int
    result: int
    lanes: int
    counters: int
    stores: int
    outcome: Any


@dataclass(slots=True)
class _Recorder:
    instructions: list[Instruction] = field(default_factory=list)
    lanes: int = 0
    counters: int = 0
    stores: int = 0

    def add(self, code: Code, **operands: Any) -> None:
        self.instructions.append(Instruction(code, **operands))


class Register:
    """A vector that writes down what it is asked (graph/vector.py: Recording)."""

    def __init__(self, recorder: _Recorder, number: int) -> None:
        self._recorder = recorder
        self.number = number

    def load(self, number: int) -> None:
        """Takes the block of an input."""
        self._recorder.add(Code.LOAD, dst=self.number, k=number)

    def _unary(self, code: Code, x: float = 0.0) -> Register:
        self._recorder.add(code, dst=self.number, a=self.number, x=float(x))
        return self

    def _binary(self, code: Code, other: Register) -> Register:
        self._recorder.add(code, dst=self.number, a=self.number, b=other.number)
        return self

    def copy_(self, other: Register) -> Register:
        self._recorder.add(Code.COPY, dst=self.number, a=other.number)
        return self

    def add_(self, other: Register | float) -> Register:
        if isinstance(other, Register):
            return self._binary(Code.ADD, other)
        return self._unary(Code.ADD_SCALAR, other)

    def sub_(self, other: Register | float) -> Register:
        if isinstance(other, Register):
            return self._binary(Code.SUB, other)
        return self._unary(Code.ADD_SCALAR, -other)

    def mul_(self, other: Register | float) -> Register:
        if isinstance(other, Register):
            return self._binary(Code.MUL, other)
        return self._unary(Code.MUL_SCALAR, other)

    def div_(self, other: Register) -> Register:
        return self._binary(Code.DIV, other)

    def abs_(self) -> Register:
        return self._unary(Code.ABS)

    def clamp_min_(self, bound: float) -> Register:
        return self._unary(Code.MAX_SCALAR, bound)

    def ge_(self, bound: float) -> Register:
        return self._unary(Code.GE_SCALAR, bound)

    def gt_(self, bound: float) -> Register:
        return self._unary(Code.GT_SCALAR, bound)

    def eq_(self, value: float) -> Register:
        return self._unary(Code.EQ_SCALAR, value)

    def record_dot(self, other: Register) -> Any:
        lane = self._recorder.lanes
        self._recorder.lanes += 1
        self._recorder.add(Code.DOT, a=self.number, b=other.number, k=lane)
        return Outcome("sum", lane=lane)

    def record_total(self) -> Any:
        lane = self._recorder.lanes
        self._recorder.lanes += 1
        self._recorder.add(Code.SUM, a=self.number, k=lane)
        return Outcome("sum", lane=lane)

    def record_keep_largest(self, value: float, below: float, stop_index: int) -> None:
        self._recorder.add(
            Code.KEEP, dst=self.number, a=self.number, x=value, y=below, k=stop_index
        )

    def record_count_inside(self, low: float, high: float, quota: int) -> Any:
        outcome = Outcome(
            kind="counts",
            counter=self._recorder.counters,
            store=self._recorder.stores,
            quota=quota,
            collects=low != high,
        )
        self._recorder.counters += 1
        self._recorder.stores += 1
        self._recorder.add(
            Code.COUNT, a=self.number, b=outcome.store, x=low, y=high, k=outcome.counter
        )
        return outcome

    def record_find_equal(self, value: float, rank: int) -> Any:
        counter = self._recorder.counters
        self._recorder.counters += 1
        self._recorder.add(Code.FIND, a=self.number, b=rank, x=value, k=counter)
        return Outcome("index", counter=counter)

    def record_copy(self) -> Any:
        store = self._recorder.stores
        self._recorder.stores += 1
        self._recorder.add(Code.STORE, a=self.number, b=store)
        return Outcome("copy", store=store)


class _Input:
    """One input, as a recorded operation sees it."""

    def __init__(self, number: int) -> None:
        self._number = number

    def read_into(self, out: Any) -> None:
        out.load(self._number)

    def raw(self, slot: int = 0) -> memoryview:
        raise TypeError("a recorded operation works on decoded blocks")


def record_apply(
    operation: ApplyOperation, inputs: Sequence[int], scratch: int, prepared: Any
) -> Program:
    """Records a block function. inputs: numbers of its inputs among the stage's."""
    recorder = _Recorder()
    out, *registers = [Register(recorder, number) for number in range(scratch + 1)]
    vectors: Any = registers
    target: Any = out
    operation.run(target, [_Input(number) for number in inputs], prepared, vectors, 0)
    return _finish(recorder, scratch + 1, None)


def record_reduce(
    operation: ReduceOperation[Any, Any],
    inputs: Sequence[int],
    scratch: int,
    parameters: Any,
    state: Any,
) -> Program:
    """Records one pass of a reduction. inputs: numbers of its inputs among the stage's."""
    recorder = _Recorder()
    vectors: Any = [Register(recorder, number) for number in range(scratch)]
    outcome = operation.run([_Input(number) for number in inputs], parameters, state, vectors, 0)
    return _finish(recorder, scratch, outcome)


def decoding() -> Program:
    """The program that hands an input on: from one dtype to another."""
    return Program((Instruction(Code.LOAD),), 1, 0, 0, 0, 0, None)


def _finish(recorder: _Recorder, registers: int, outcome: Any) -> Program:
    return Program(
        instructions=tuple(fuse(recorder.instructions, result=0 if outcome is None else None)),
        registers=registers,
        result=0,
        lanes=recorder.lanes,
        counters=recorder.counters,
        stores=recorder.stores,
        outcome=outcome,
    )


def fuse(instructions: Sequence[Instruction], result: int | None) -> list[Instruction]:
    """The same computation in fewer instructions; every rounding stays.

    result: a register that is read afterwards.

        load r; r − a             →  load_sub r
        load r; r · x             →  load_mul r
        r · x; d = b + r          →  mul_add d            if nobody needs r (unless it is d)
        load r; mul_add d         →  load_mul_add d       likewise
        load_sub r; mul_add d     →  load_sub_mul_add d   likewise
    """
    fused: list[Instruction] = []
    for place, now in enumerate(instructions):
        fused.append(now)
        rest = instructions[place + 1 :]
        while len(fused) >= 2:
            joined = _join(fused[-2], fused[-1], rest, result)
            if joined is None:
                break
            fused[-2:] = [joined]
    return fused


def _join(
    first: Instruction, second: Instruction, rest: Sequence[Instruction], result: int | None
) -> Instruction | None:
    """One instruction for two neighbours, None where there is none."""
    register = first.dst
    codes = (first.code, second.code)
    in_place = second.dst == second.a == register
    if codes == (Code.LOAD, Code.SUB) and in_place and second.b != register:
        return replace(first, code=Code.LOAD_SUB, a=second.b)
    if codes == (Code.LOAD, Code.MUL_SCALAR) and in_place:
        return replace(first, code=Code.LOAD_MUL, x=second.x)
    if second.dst != register and _is_needed(register, rest, result):
        return None
    if codes == (Code.LOAD_MUL, Code.ADD) and (other := _addend(second, register)) is not None:
        return Instruction(Code.LOAD_MUL_ADD, dst=second.dst, b=other, x=first.x, k=first.k)
    if codes == (Code.MUL_SCALAR, Code.ADD) and (other := _addend(second, register)) is not None:
        return Instruction(Code.MUL_ADD, dst=second.dst, a=first.a, b=other, x=first.x)
    if codes == (Code.LOAD_SUB, Code.MUL_ADD) and second.a == register != second.b:
        return replace(first, code=Code.LOAD_SUB_MUL_ADD, dst=second.dst, b=second.b, x=second.x)
    return None


def _addend(addition: Instruction, register: int) -> int | None:
    """What is added to a register, None where it is not one of two different addends."""
    if (addition.a == register) == (addition.b == register):
        return None
    return addition.b if addition.a == register else addition.a


def _is_needed(register: int, rest: Sequence[Instruction], result: int | None) -> bool:
    """Whether a register's contents are read before they are overwritten."""
    for instruction in rest:
        if instruction.reads(register):
            return True
        if instruction.writes(register):
            return False
    return register == result
