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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from ...graph.graph import Graph
from ...graph.node import Apply
from ...graph.operation import ApplyOperation, ReduceOperation, apply_operation


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
    MIN_SCALAR = 24
    DROP = 25
    ZERO_UP_TO = 26
    ZERO_FROM_SCALAR = 27
    ZERO_FROM = 28
    DRAW = 29
    EXP = 30
    LOG = 31
    SCALE_ROWS = 32
    SCALE_COLUMNS = 33
    DOT_COLUMNS = 34
    DOT_ROWS = 35
    SUM_ROWS = 36
    MAX_ROWS = 37
    SUB_ROWS = 38
    DIV_ROWS = 39
    LOAD_STORED = 40
    LOAD_PRODUCT = 41
    LARGEST = 42
    SIGNS = 43
    WAIT = 44
    RANK_ROWS = 45


BARRIERS = frozenset({Code.WAIT, Code.RANK_ROWS})
"""What comes after them begins when what stands before them is done for the whole block. Registers
do not outlive them."""

READS_A = frozenset(Code) - {
    Code.LOAD,
    Code.LOAD_MUL,
    Code.LOAD_MUL_ADD,
    Code.DRAW,
    Code.LOAD_STORED,
    Code.LOAD_PRODUCT,
    *BARRIERS,
}
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
        Code.ZERO_UP_TO,
        Code.ZERO_FROM_SCALAR,
        Code.ZERO_FROM,
        Code.DOT_ROWS,
        Code.DOT_COLUMNS,
    }
)
WRITES = frozenset(Code) - {
    Code.STORE,
    Code.DOT,
    Code.SUM,
    Code.COUNT,
    Code.FIND,
    Code.DOT_COLUMNS,
    Code.DOT_ROWS,
    Code.SUM_ROWS,
    Code.MAX_ROWS,
    Code.LARGEST,
    Code.SIGNS,
    *BARRIERS,
}


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
    c: int = 0
    d: int = 0

    def reads(self, register: int) -> bool:
        return register in self.operands

    @property
    def operands(self) -> tuple[int, ...]:
        """The registers it reads."""
        if self.code is Code.SIGNS:
            return tuple(range(self.a, self.a + self.b))
        first = (self.a,) if self.code in READS_A else ()
        second = (self.b,) if self.code in READS_B else ()
        return (*first, *second, *((self.c,) if self.code is Code.ZERO_FROM else ()))

    def writes(self, register: int) -> bool:
        return self.code in WRITES and self.dst == register


@dataclass(frozen=True, slots=True)
class Outcome:
    """Where a program leaves something that a reduction returned.

    kind: "sum" or "largest" (a lane), "counts" (counter and store), "index" (counter), "copy"
        (store), "rows" or "columns" (list).
    lane, counter, store, list: which one.
    quota, collects: the most values to take of a store, and whether it holds any (counts).
    row_elements: how long rows are (rows, columns).
    """

    kind: str
    lane: int = 0
    counter: int = 0
    store: int = 0
    list: int = 0
    row_elements: int = 0
    quota: int = 0
    collects: bool = False


@dataclass(frozen=True, slots=True)
class Program:
    """What the kernels run for every block.

    registers: how many it uses. result: the register that holds an Apply's block.
    lanes, counters, stores: how many of each it fills.
    lists: how many vectors of float64 it fills, one number for each row or column of a block.
    tables: vectors of float64 that it reads, one number for each row or column of the tensor, and
        matrices of the working dtype (factors).
    outcome: what a reduction returned, with Outcomes for what is known only afterwards.
    """

    instructions: tuple[Instruction, ...]
    registers: int
    result: int
    lanes: int
    counters: int
    stores: int
    outcome: Any
    lists: int = 0
    tables: tuple[Any, ...] = ()


class UndefinedRegisterError(AssertionError):
    """An operation reads a vector that it has not filled, or filled before it waited for the whole
    block: a defect of the operation."""


@dataclass(slots=True)
class _Recorder:
    """defined: registers that hold something. stored: those of them whose contents lie in a store,
    by number: they are there again after a barrier."""

    instructions: list[Instruction] = field(default_factory=list)
    lanes: int = 0
    counters: int = 0
    stores: int = 0
    lists: int = 0
    tables: list[Any] = field(default_factory=list)
    products: dict[tuple[int, int], int] = field(default_factory=dict)
    defined: set[int] = field(default_factory=set)
    stored: dict[int, int] = field(default_factory=dict)

    def add(self, code: Code, **operands: Any) -> None:
        instruction = Instruction(code, **operands)
        for register in instruction.operands:
            if register not in self.defined:
                raise UndefinedRegisterError(f"{code.name} reads vector {register}")
        self.instructions.append(instruction)
        if code in WRITES:
            self.defined.add(instruction.dst)
            self.stored.pop(instruction.dst, None)

    def wait(self, code: Code = Code.WAIT, **operands: Any) -> None:
        """A barrier."""
        self.add(code, **operands)
        self.defined.clear()
        for register, store in list(self.stored.items()):
            self.add(Code.LOAD_STORED, dst=register, b=store)
            self.stored[register] = store

    def store(self, register: int) -> int:
        """Stores a register; returns where."""
        number = self.stores
        self.stores += 1
        self.add(Code.STORE, a=register, b=number)
        return number

    def product(self, factors: tuple[int, int]) -> int:
        """The store for a product of two tables."""
        if factors not in self.products:
            self.products[factors] = self.stores
            self.stores += 1
        return self.products[factors]

    def list(self) -> int:
        """A list to be filled."""
        self.lists += 1
        return self.lists - 1

    def lane(self) -> int:
        """A group of lanes to be filled."""
        self.lanes += 1
        return self.lanes - 1

    def table(self, values: Any) -> int:
        """A table of the whole tensor's rows or columns, or a factor."""
        for number, table in enumerate(self.tables):
            if table is values:
                return number
        self.tables.append(values)
        return len(self.tables) - 1


@dataclass(frozen=True, slots=True)
class RowList:
    """One number for each row of a block, while the block is being computed: a list's number, and
    after how many barriers it is there."""

    recorder: _Recorder
    outcome: Outcome
    made_at: int

    def number(self) -> int:
        """The list, which must be complete.

        Raises:
            UndefinedRegisterError: nothing has waited for it.
        """
        barriers = [i.code in BARRIERS for i in self.recorder.instructions[self.made_at :]]
        if not any(barriers):
            raise UndefinedRegisterError(f"list {self.outcome.list} is used before wait_for_rows")
        return self.outcome.list


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

    def clamp_max_(self, bound: float) -> Register:
        return self._unary(Code.MIN_SCALAR, bound)

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

    def record_largest(self) -> Any:
        lane = self._recorder.lane()
        self._recorder.add(Code.LARGEST, a=self.number, k=lane)
        return Outcome("largest", lane=lane)

    def record_signs(self, others: Sequence[Register], models: int) -> Any:
        numbers = [self.number, *(other.number for other in others)]
        assert models
        assert numbers == list(range(self.number, self.number + len(numbers)))
        count = len(numbers)
        lanes = [self._recorder.lane() for _ in range(count * (count + 1) // 2 + 2)]
        self._recorder.add(Code.SIGNS, a=self.number, b=count, c=models, k=lanes[0])
        return tuple(Outcome("sum", lane=lane) for lane in lanes)

    def record_total(self) -> Any:
        lane = self._recorder.lanes
        self._recorder.lanes += 1
        self._recorder.add(Code.SUM, a=self.number, k=lane)
        return Outcome("sum", lane=lane)

    def record_keep_largest(self, value: float, below: float, stop_index: int) -> None:
        self._recorder.add(
            Code.KEEP, dst=self.number, a=self.number, x=value, y=below, k=stop_index
        )

    def record_drop_largest(self, value: float, below: float, stop_index: int) -> None:
        self._recorder.add(
            Code.DROP, dst=self.number, a=self.number, x=value, y=below, k=stop_index
        )

    def record_zero_up_to(self, other: Register, limit: float) -> None:
        self._recorder.add(Code.ZERO_UP_TO, dst=self.number, a=self.number, b=other.number, x=limit)

    def record_zero_from(self, other: Register, bound: Register | float) -> None:
        if isinstance(bound, Register):
            self._recorder.add(
                Code.ZERO_FROM, dst=self.number, a=self.number, b=other.number, c=bound.number
            )
        else:
            self._recorder.add(
                Code.ZERO_FROM_SCALAR, dst=self.number, a=self.number, b=other.number, x=bound
            )

    def record_draw(self, key: int) -> None:
        self._recorder.add(Code.DRAW, dst=self.number, k=key)

    def record_exp(self) -> None:
        self._unary(Code.EXP)

    def record_log(self) -> None:
        self._unary(Code.LOG)

    def record_rank_rows(self, row_elements: int) -> None:
        store = self._recorder.store(self.number)
        self._recorder.stored[self.number] = store
        self._recorder.wait(Code.RANK_ROWS, b=store, k=row_elements)

    def _row_list(self, code: Code, row_elements: int, **operands: Any) -> RowList:
        recorder = self._recorder
        number = recorder.list()
        recorder.add(code, dst=number, a=self.number, c=recorder.lane(), k=row_elements, **operands)
        outcome = Outcome("rows", list=number, row_elements=row_elements)
        return RowList(recorder, outcome, len(recorder.instructions))

    def record_row_dot(self, other: Register, row_elements: int) -> Any:
        return self._row_list(Code.DOT_ROWS, row_elements, b=other.number)

    def record_row_total(self, row_elements: int) -> Any:
        return self._row_list(Code.SUM_ROWS, row_elements)

    def record_row_max(self, row_elements: int) -> Any:
        return self._row_list(Code.MAX_ROWS, row_elements)

    def record_sub_rows(self, rows: RowList, row_elements: int) -> None:
        self._recorder.add(
            Code.SUB_ROWS, dst=self.number, a=self.number, c=rows.number(), k=row_elements
        )

    def record_div_rows(self, rows: RowList, row_elements: int) -> None:
        self._recorder.add(
            Code.DIV_ROWS, dst=self.number, a=self.number, c=rows.number(), k=row_elements
        )

    def record_hold(self) -> None:
        self._recorder.stored[self.number] = self._recorder.store(self.number)

    def record_wait(self) -> None:
        self._recorder.wait()

    def record_scale_rows(self, table: Any, row_elements: int) -> None:
        number = self._recorder.table(table)
        self._recorder.add(
            Code.SCALE_ROWS, dst=self.number, a=self.number, c=number, k=row_elements
        )

    def record_scale_columns(self, table: Any) -> None:
        number = self._recorder.table(table)
        self._recorder.add(
            Code.SCALE_COLUMNS, dst=self.number, a=self.number, c=number, k=len(table)
        )

    def record_load_product(self, left: Any, right: Any) -> None:
        rank, columns = right.shape
        factors = self._recorder.table(left), self._recorder.table(right)
        self._recorder.add(
            Code.LOAD_PRODUCT,
            dst=self.number,
            a=self._recorder.product(factors),
            b=factors[1],
            c=factors[0],
            k=columns,
            d=rank,
        )

    def record_column_dot(self, other: Register, row_elements: int) -> Any:
        number = self._recorder.list()
        self._recorder.add(
            Code.DOT_COLUMNS, dst=number, a=self.number, b=other.number, k=row_elements
        )
        return Outcome("columns", list=number, row_elements=row_elements)

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


@dataclass(frozen=True, slots=True, eq=False)
class Nested:
    """An Apply node as the input of another: recorded wherever it is read.

    scratch: vectors of its own. prepared: what its `prepare` returned.
    is_ranking: it waits for the whole block, which nothing survives that is not held. It is
        recorded once, before all that reads it, and held.
    """

    operation: ApplyOperation
    inputs: Sequence[Operand]
    scratch: int
    prepared: Any
    is_ranking: bool = False


Operand = int | Nested
"""An input of a recorded operation: a number among the stage's inputs, or a computed block."""


def operands(
    graph: Graph, node_ids: Sequence[str], reads: Sequence[str], prepared: Mapping[str, Any]
) -> list[Operand]:
    """The inputs of a node. reads: ids of the stage's Read nodes, in the order of its inputs."""
    made: dict[str, Operand] = {node_id: number for number, node_id in enumerate(reads)}
    return [_operand(graph, node_id, made, prepared) for node_id in node_ids]


def _operand(
    graph: Graph, node_id: str, made: dict[str, Operand], prepared: Mapping[str, Any]
) -> Operand:
    # not within `operands`: a function that calls itself and holds what has been prepared, tables
    # of megabytes among it, is a cycle, and stays until the garbage collector comes
    if node_id not in made:
        node = graph.block_node(node_id)
        assert isinstance(node, Apply)
        operation = apply_operation(node.operation)
        cost = operation.cost(len(node.inputs), dict(node.parameters))
        inputs = [_operand(graph, source, made, prepared) for source in node.inputs]
        made[node_id] = Nested(operation, inputs, cost.scratch, prepared[node_id], cost.is_ranking)
    return made[node_id]


class _Computed:
    def __init__(self, node: Nested, inputs: Sequence[Any], scratch: Any) -> None:
        self._node = node
        self._inputs = inputs
        self._scratch = scratch

    def read_into(self, out: Any) -> None:
        self._node.operation.run(out, self._inputs, self._node.prepared, self._scratch, 0)

    def raw(self, slot: int = 0) -> memoryview:
        raise TypeError("a computed block has no stored bytes")


class _Held:
    """A computed block that lies in a vector of its own, and is there after every barrier."""

    def __init__(self, vector: Any) -> None:
        self._vector = vector

    def read_into(self, out: Any) -> None:
        out.copy_(self._vector)

    def raw(self, slot: int = 0) -> memoryview:
        raise TypeError("a computed block has no stored bytes")


class _Recording:
    """A row of registers that a stage's operations share."""

    def __init__(self) -> None:
        self.recorder = _Recorder()
        self._registers = 0
        self._computed: dict[Nested, _Computed | _Held] = {}

    def registers(self, count: int) -> list[Any]:
        """Registers that nobody else has."""
        self._registers += count
        numbers = range(self._registers - count, self._registers)
        return [Register(self.recorder, number) for number in numbers]

    def input(self, operand: Operand) -> Any:
        if isinstance(operand, int):
            return _Input(operand)
        if operand not in self._computed:
            inputs = [self.input(source) for source in operand.inputs]
            computed = _Computed(operand, inputs, self.registers(operand.scratch))
            self._computed[operand] = self._held(computed) if operand.is_ranking else computed
        return self._computed[operand]

    def _held(self, computed: _Computed) -> _Held:
        (vector,) = self.registers(1)
        computed.read_into(vector)
        vector.record_hold()
        return _Held(vector)

    def program(self, outcome: Any) -> Program:
        recorder = self.recorder
        return Program(
            instructions=tuple(fuse(recorder.instructions, 0 if outcome is None else None)),
            registers=self._registers,
            result=0,
            lanes=recorder.lanes,
            counters=recorder.counters,
            stores=recorder.stores,
            outcome=_outcome(outcome),
            lists=recorder.lists,
            tables=tuple(recorder.tables),
        )


def _outcome(value: Any) -> Any:
    """What a reduction returned, row lists as the Outcomes that they are."""
    if isinstance(value, tuple | list):
        return type(value)(map(_outcome, value))
    return value.outcome if isinstance(value, RowList) else value


def record_apply(
    operation: ApplyOperation, inputs: Sequence[Operand], scratch: int, prepared: Any
) -> Program:
    """Records a block function."""
    recording = _Recording()
    out, *vectors = recording.registers(1 + scratch)
    operation.run(out, [recording.input(source) for source in inputs], prepared, vectors, 0)
    return recording.program(None)


def record_reduce(
    operation: ReduceOperation[Any, Any],
    inputs: Sequence[Operand],
    scratch: int,
    parameters: Any,
    state: Any,
) -> Program:
    """Records one pass of a reduction."""
    recording = _Recording()
    vectors = recording.registers(scratch)
    sources = [recording.input(source) for source in inputs]
    return recording.program(operation.run(sources, parameters, state, vectors, 0))


def decoding() -> Program:
    """The program that hands an input on: from one dtype to another."""
    return Program((Instruction(Code.LOAD),), 1, 0, 0, 0, 0, None)


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
        if instruction.writes(register) or instruction.code in BARRIERS:
            return False
    return register == result
