"""What an operation is: three small rules, and the buffers it may use.

An operation says how big its blocks' working buffers are (cost), and fills a buffer that the
caller owns from input blocks that it pulls one at a time (run). It holds no state of its own,
opens no file, starts no thread and allocates nothing per block; which blocks run where, in what
order and with how many of them in flight is the scheduler's business.

Operations are pure Python at import; torch is touched only inside `run`, so that planning a
merge never loads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, cast

from .node import ParameterValue

if TYPE_CHECKING:
    from .vector import Vector

Parameters = Mapping[str, ParameterValue]

WORKING_DTYPES = ("F32", "F64")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one worker needs to run an operation, in buffers of one block each.

    scratch: number of scratch buffers of the working dtype, besides the output's.
    raw: number of undecoded input blocks that are held at once (1 for operations that pull
        and decode their inputs one after another).
    stores: number of vectors that leave the native kernels whole (`copy_of`, `count_inside`,
        `rank_rows`).
    row_lists, column_lists: number of vectors of float64 with an element for each row of a block,
        or each column of the tensor.
    is_ranking: whether it calls `rank_rows`.
    temporaries: blocks of the working dtype that it allocates and lets go (users' own methods).
    """

    scratch: int
    raw: int = 1
    stores: int = 0
    row_lists: int = 0
    column_lists: int = 0
    is_ranking: bool = False
    temporaries: int = 0


class BlockInput(Protocol):
    """One input of an operation, positioned at the current block."""

    def read_into(self, out: Vector) -> None:
        """Fills `out` (shape (n,), working dtype) with the block's elements."""

    def raw(self, slot: int = 0) -> memoryview:
        """The block's bytes as stored, valid until the next call with the same slot (below
        Cost.raw)."""


class ApplyOperation(ABC):
    """A block function: one output block from the same block of every input."""

    name: ClassVar[str]
    is_raw: ClassVar[bool] = False
    """Works on undecoded bytes (implements run_raw instead of run)."""
    is_recordable: ClassVar[bool] = False
    """`run` does nothing with its vectors but what graph/vector.py offers, whatever their values,
    and does not look at `start`: then the native kernels can run it."""
    is_by_rows: ClassVar[bool] = False
    """Its blocks must be whole rows (vectors along the tensor's last dimension)."""
    is_whole: ClassVar[bool] = False
    """Its only block must be the whole tensor."""
    is_for_host: ClassVar[bool] = False
    """Accelerators leave it to the processor."""
    is_positional: ClassVar[bool] = False
    """What it does with an element depends on `start`, so that it cannot be computed for a sample.
    Reductions over it that would take one (`is_sampling`) do not."""

    keeps_rows: ClassVar[bool] = False
    """An element of the result depends on the same elements of the inputs, parameters and
    statistics alone, wherever it is, and is zero where all of them are: with the rows of its inputs
    in another order, it yields its own in that order."""

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        """The dtype blocks are computed in: float64 where an input is float64, else float32."""
        return "F64" if "F64" in input_dtypes else "F32"

    @abstractmethod
    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        """Buffers needed per worker."""

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        """Scalars for one tensor, from its parameters and finished statistics; called once."""
        return parameters

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        """Fills one block.

        out: shape (n,), working dtype; what it holds before is undefined.
        scratch: Cost.scratch tensors like `out`.
        start: index of the block's first element in the flattened tensor.
        """
        raise NotImplementedError(self.name)

    def run_raw(self, inputs: Sequence[BlockInput], prepared: Any, start: int) -> memoryview:
        """The output block's bytes (raw operations only)."""
        raise NotImplementedError(self.name)


Partial = TypeVar("Partial")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Sample:
    """Short runs of neighbouring elements at evenly spaced places, as one block.

    runs: how many; run_elements: the length of each. Together at most the element count.
    """

    runs: int
    run_elements: int

    def starts(self, element_count: int) -> list[int]:
        """The first element of every run, in a tensor of so many elements."""
        spacing = (element_count - self.run_elements) / max(1, self.runs - 1)
        return [round(run * spacing) for run in range(self.runs)]


@dataclass(frozen=True, slots=True)
class Pass:
    """One trip of a reduction over its inputs: over all blocks, one block, or a sample.

    state: what `run` needs to know, decided by the pass before.
    sample: if given, `run` is called once, with the sample's elements as its block.
    only_block: if given, `run` is called once, with this block.
    """

    state: Any
    sample: Sample | None = None
    only_block: int | None = None


@dataclass(frozen=True, slots=True)
class Done(Generic[Result]):
    """A finished reduction."""

    result: Result


class ReduceOperation(ABC, Generic[Partial, Result]):
    """A statistic of whole tensors.

    first_pass → run on every block (any order, any worker) → finish, given the blocks' partial
    results in block order → another Pass or Done. Since partial results are always combined in
    block order, the result does not depend on who computed what when.
    """

    name: ClassVar[str]
    is_recordable: ClassVar[bool] = False
    """As of ApplyOperation; what the functions of graph/vector.py return is not looked at either,
    only returned, in tuples."""
    is_by_rows: ClassVar[bool] = False
    is_whole: ClassVar[bool] = False
    is_for_host: ClassVar[bool] = False
    is_sampling: ClassVar[bool] = False
    """It may begin with a sample, unless its parameter `is_sampled` is False."""

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        """The dtype blocks are computed in: float64 where an input is float64, else float32."""
        return "F64" if "F64" in input_dtypes else "F32"

    @abstractmethod
    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        """Buffers needed per worker; a reduction has no output buffer."""

    @abstractmethod
    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        """Upper bound of the memory held by partial results and the result.

        item_bytes: of the working dtype.
        """

    @abstractmethod
    def expected_passes(self, parameters: Parameters) -> int:
        """Full passes over the inputs in the usual case."""

    def sample(self, parameters: Parameters, element_count: int) -> Sample | None:
        """What passes over a tensor begin by looking at, if not at all of it."""
        return None

    @abstractmethod
    def first_pass(
        self,
        parameters: Parameters,
        statistics: Sequence[Any],
        element_count: int,
        block_count: int,
    ) -> Pass | Done[Result]:
        """How to begin, given the results of the reductions this one depends on."""

    @abstractmethod
    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> Partial:
        """The partial result of one block; scratch tensors have the block's length."""

    def summary(self, partial: Any, parameters: Parameters) -> Partial:
        """What is kept of what `run` returned for a block: a smaller thing, where `run` is recorded
        and can only return what the kernels leave."""
        return cast("Partial", partial)

    def joined(self, left: Partial, right: Partial) -> Partial:
        """The partial result of two neighbouring stretches of blocks, of which the first ends where
        the second begins. Only for reductions whose partial results would not fit beside each
        other (`is_joined`); they are joined by pairs, pairs of pairs and so on, whatever the order
        in which they are made."""
        raise NotImplementedError(self.name)

    is_joined: ClassVar[bool] = False

    @abstractmethod
    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: Any,
        partials: Sequence[Partial],
    ) -> Pass | Done[Result]:
        """Combines the partial results, given in block order."""


_apply_operations: dict[str, ApplyOperation] = {}
_reduce_operations: dict[str, ReduceOperation[Any, Any]] = {}

Registered = TypeVar("Registered", bound="type[ApplyOperation] | type[ReduceOperation[Any, Any]]")


def register(operation: Registered) -> Registered:
    """Class decorator: makes an operation known under its name.

    Raises:
        ValueError: the name is taken by another class.
    """
    instance = operation()
    taken = _apply_operations.get(operation.name) or _reduce_operations.get(operation.name)
    if taken is not None and type(taken).__qualname__ != operation.__qualname__:
        raise ValueError(f"operation {operation.name!r} is defined twice")
    if isinstance(instance, ApplyOperation):
        _apply_operations[operation.name] = instance
    else:
        _reduce_operations[operation.name] = instance
    return operation


def apply_operation(name: str) -> ApplyOperation:
    """The registered block function of that name.

    Raises:
        KeyError: there is none.
    """
    return _apply_operations[name]


def reduce_operation(name: str) -> ReduceOperation[Any, Any]:
    """The registered reduction of that name.

    Raises:
        KeyError: there is none.
    """
    return _reduce_operations[name]
