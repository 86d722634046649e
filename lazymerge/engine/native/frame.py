"""A stage bound to one worker's arena and computed by the native kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...checkpoint.tensor import DTYPES
from ...errors import LazymergeError
from ...graph.graph import Graph
from ...graph.node import Apply, Reduce, Write
from ...graph.operation import apply_operation, reduce_operation
from ...graph.vector import Counts, spread, sum_of_lanes
from ..arena import Arena
from ..execution import ReadMode
from ..inputs import GatheredInput, Input, InputFiles, MappedInput, Pieces, open_input
from ..recent import Recent
from ..stages import GatheringSlots, NativeLayout, Slot, stage_window
from .library import (
    COUNTERS,
    LANES,
    UNWRITTEN,
    Kernel,
    Sink,
    StreamedInput,
    encode_program,
)
from .program import Outcome, Program, decoding, operands, record_apply, record_reduce

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray


class Kernels:
    """The kernels that one worker has made for tensors of which many are alike."""

    MOST = 8
    """More than a recipe usually has kinds of tensors, by dtypes, factors and, where it is below a
    block, length: the three models of docs/performance.md have two."""

    def __init__(self) -> None:
        self._kernels: dict[Hashable, Kernel] = {}

    def get(
        self, key: Hashable, inputs: Sequence[StreamedInput], make: Callable[[], Kernel]
    ) -> Kernel:
        """The one for a key, bound to some inputs."""
        kernel = self._kernels.get(key)
        if kernel is None:
            if len(self._kernels) == self.MOST:
                self._kernels.clear()
            kernel = self._kernels[key] = make()
        else:
            kernel.bind(inputs)
        return kernel


class NativeFrame:
    """One stage of one tensor, ready to run any of its blocks."""

    def __init__(
        self,
        graph: Graph,
        stage: Reduce | Write,
        layout: NativeLayout,
        arena: Arena,
        files: InputFiles,
        prepared: Mapping[str, Any],
        read_mode: ReadMode,
        recent: Recent,
        kernels: Kernels,
    ) -> None:
        """prepared: what ApplyOperation.prepare returned, by node id. recent: keeps programs.

        kernels: the worker's.
        """
        self._stage = stage
        self._recent = recent
        self._layout = layout
        self._arena = arena
        reads = graph.reads_of(stage.id)
        self._input_ids = tuple(read.id for read in reads)
        self._graph = graph
        self._prepared = prepared
        self._block_elements = layout.block_elements
        window = stage_window(graph, stage, "cpu") if read_mode == "mmap" else 0
        self._inputs: list[Input] = []
        self._streamed: list[StreamedInput] = []
        for number, read in enumerate(reads):
            slots = [arena.bytes(layout.raw[number])] if layout.raw else []
            source = open_input(read, files, read_mode, slots, window)
            self._inputs.append(source)
            first_byte = 0 if isinstance(source, GatheredInput) else read.tensor.start
            if isinstance(source, MappedInput | GatheredInput):
                descriptor, address = -1, 0  # where its elements lie is said before each call
            else:
                descriptor, address = source.descriptor, arena.address(layout.raw[number])
            self._streamed.append(StreamedInput(read.dtype, descriptor, first_byte, address))
        self._kernel: Kernel | None = None
        self._state: Any = None
        self._after: Kernel | None = None
        self._gathered: list[tuple[float, ...]] = []
        self._output = arena.bytes(layout.output) if layout.output else memoryview(b"")
        self._item_bytes = 0
        if isinstance(stage, Write):
            self._item_bytes = DTYPES[stage.dtype].item_bytes
            content = self._content(graph, stage, prepared)
            if content is None:
                self._kernel = self._bind(
                    ("program", stage.id),
                    prepared,
                    lambda: self._write_program(graph, stage, prepared),
                )
            else:  # other tensors have the same
                own = (layout.raw, layout.registers, layout.stores, layout.lists, layout.spare)
                dtypes = tuple(read.dtype for read in reads)
                self._kernel = kernels.get(
                    (content, dtypes, layout.output, layout.rounds_once, own),
                    self._streamed,
                    lambda: self._bind(
                        content, "content", lambda: self._write_program(graph, stage, prepared)
                    ),
                )

            if layout.statistics is not None:
                self._after = self._gathering_kernel(stage, layout.statistics, kernels)

    def _gathering_kernel(self, write: Write, slots: GatheringSlots, kernels: Kernels) -> Kernel:
        """What gathers statistics of every block that is written."""
        gathering = slots.gathering
        lanes = slots.lanes
        assert lanes is not None
        streamed = [*self._streamed, StreamedInput(write.dtype, -1, 0, 0)]

        def record() -> Program:
            reduction = gathering.reduction(write)
            inputs = operands(self._graph, gathering.inputs, self._input_ids, self._prepared)
            operation = reduce_operation(reduction.operation)
            scratch = operation.cost(len(inputs) + 1, dict(reduction.parameters)).scratch
            inputs.append(len(self._input_ids))
            return record_reduce(operation, inputs, scratch, dict(reduction.parameters), None)

        def bind(key: Hashable, token: object) -> Kernel:
            encoded = self._recent.get(
                key,
                token,
                lambda: encode_program(record()),
                is_kept=lambda made: not made.program.tables,
            )
            return Kernel(
                encoded,
                streamed,
                working_dtype=gathering.working_dtype,
                registers=self._arena.address(slots.vectors[0]),
                stores=[self._arena.address(slot) for slot in slots.stores],
                lanes=self._arena.doubles(lanes),
            )

        if not all(node_id in self._input_ids for node_id in gathering.inputs):
            return bind(("statistics", write.id), self._prepared)
        inputs = tuple(self._input_ids.index(node_id) for node_id in gathering.inputs)
        dtypes = tuple(source.dtype for source in streamed)
        content = ("statistics", inputs, len(self._input_ids), gathering.working_dtype)
        key = (content, dtypes, slots.vectors, lanes)
        return kernels.get(key, streamed, lambda: bind(content, "content"))

    def _content(
        self, graph: Graph, stage: Write, prepared: Mapping[str, Any]
    ) -> tuple[object, ...] | None:
        """What a Write stage's program follows from, if that is a few numbers; None if it is more,
        thresholds or rows of a tensor."""
        source = graph.block_node(stage.source)
        if not isinstance(source, Apply):
            return ("decode",)
        numbers = {node_id: number for number, node_id in enumerate(self._input_ids)}
        if not all(node_id in numbers for node_id in source.inputs):
            return None  # an Apply of Applies
        scalars = frozen(prepared[source.id])
        if scalars is None:
            return None
        inputs = tuple(numbers[node_id] for node_id in source.inputs)
        return (source.operation, source.parameters, inputs, scalars)

    def _write_program(self, graph: Graph, stage: Write, prepared: Mapping[str, Any]) -> Program:
        source = graph.block_node(stage.source)
        if not isinstance(source, Apply):
            return decoding()
        operation = apply_operation(source.operation)
        cost = operation.cost(len(source.inputs), dict(source.parameters))
        inputs = operands(graph, source.inputs, self._input_ids, prepared)
        return record_apply(operation, inputs, cost.scratch, prepared[source.id])

    def _bind(self, key: Hashable, token: object, record: Callable[[], Program]) -> Kernel:
        """A kernel for a program. key, token: of what it was recorded for (Recent)."""
        layout = self._layout
        encoded = self._recent.get(
            key,
            token,
            lambda: encode_program(record()),
            is_kept=lambda made: not made.program.tables,  # megabytes, where rows are short
        )
        assert layout.registers is not None
        output = layout.output
        return Kernel(
            encoded,
            self._streamed,
            working_dtype=layout.registers.dtype,
            registers=self._arena.address(layout.registers),
            stores=[self._arena.address(slot) for slot in layout.stores],
            lists=[self._arena.address(slot) for slot in layout.lists],
            spare=self._arena.address(layout.spare) if layout.spare else 0,
            output=self._arena.address(output) if output else 0,
            output_dtype=output.dtype if output else None,
            rounds_once=layout.rounds_once,
            blocks_at_once=layout.blocks_at_once,
        )

    def run(self, blocks: Sequence[Pieces], state: Any) -> Iterator[Any]:
        """Runs as many blocks at once as there is room for."""
        if isinstance(self._stage, Write):
            for ((start, stop),) in blocks:
                yield self.encode(start, stop)
            return
        at_once = self._layout.blocks_at_once
        for first in range(0, len(blocks), at_once):
            several = blocks[first : first + at_once]
            if len(several[0]) > 1:
                yield self._reduce_sample(several[0], state)
            else:
                yield from self._reduce(several, state)

    def encode(self, start: int, stop: int) -> memoryview:
        """The bytes of an output block (Write stages), valid until the next call."""
        assert self._kernel is not None
        self._stream(self._kernel, start, stop)
        return self._output[: (stop - start) * self._item_bytes]

    def write(self, start: int, stop: int, sink: Sink) -> bool:
        """Has output blocks written as they are done; what is found out stays in the sink.

        Returns whether they could be written.
        """
        assert self._kernel is not None
        step = self._layout.blocks_at_once * self._block_elements
        return all(
            self._stream(self._kernel, first, min(first + step, stop), sink)
            for first in range(start, stop, step)
        )

    def take_statistics(self) -> list[tuple[float, ...]]:
        """What has been gathered of the blocks written since the last call, one after the other."""
        taken, self._gathered = self._gathered, []
        return taken

    def reduce(self, pieces: Pieces, state: Any) -> Any:
        """The partial result of one block (Reduce stages)."""
        (partial,) = self.run([pieces], state)
        return partial

    def _stream(self, kernel: Kernel, start: int, stop: int, sink: Sink | None = None) -> bool:
        """Whether what was to be written could be."""
        for number, source in enumerate(self._inputs):
            if isinstance(source, MappedInput):
                source.cover(start, stop)
                kernel.room[number] = source.address
            elif isinstance(source, GatheredInput):
                source.cover(start, stop)
                kernel.room[number] = source.room(self._arena.address(self._layout.raw[number]))
        after = self._after
        if after is not None:
            after.reset()
        failed = kernel.stream(start, stop - start, self._block_elements, sink, after)
        if failed is None:
            if after is not None:
                self._gathered += gathered_numbers(
                    after, -(-(stop - start) // self._block_elements)
                )
            return True
        if failed == UNWRITTEN:
            return False
        source = self._inputs[failed]  # read again, for the message
        for first in range(start, stop, self._block_elements):
            source.seek(((first, min(first + self._block_elements, stop)),))
            source.raw()
        raise LazymergeError(f"reading {source.path} failed once and then did not; run it again")

    def _reduce(self, blocks: Sequence[Pieces], state: Any) -> list[Any]:
        kernel = self._kernel_for(state)
        kernel.reset()
        self._stream(kernel, blocks[0][0][0], blocks[-1][-1][1])
        return [
            self._summary(kernel, block, stop - start)
            for block, ((start, stop),) in enumerate(blocks)
        ]

    def _summary(self, kernel: Kernel, block: int, elements: int) -> Any:
        """What is kept of a block's partial result."""
        assert isinstance(self._stage, Reduce)
        operation = reduce_operation(self._stage.operation)
        partial = self._look_up(kernel, kernel.program.outcome, block, elements)
        return operation.summary(partial, dict(self._stage.parameters))

    def _reduce_sample(self, pieces: Pieces, state: Any) -> Any:
        kernel = self._kernel_for(state)
        kernel.reset()
        for number, source in enumerate(self._inputs):
            source.seek(pieces)
            source.raw()
            kernel.inputs[number] = self._arena.address(self._layout.raw[number])
        elements = sum(stop - start for start, stop in pieces)
        kernel.run(pieces[0][0], elements)
        return self._summary(kernel, 0, elements)

    def _kernel_for(self, state: Any) -> Kernel:
        if self._kernel is None or state is not self._state:
            key = ("program", self._stage.id)
            self._kernel = self._bind(key, state, lambda: self._reduce_program(state))
            self._state = state
        return self._kernel

    def _reduce_program(self, state: Any) -> Program:
        stage = self._stage
        assert isinstance(stage, Reduce)
        operation, parameters = reduce_operation(stage.operation), dict(stage.parameters)
        scratch = operation.cost(len(stage.inputs), parameters).scratch
        inputs = operands(self._graph, stage.inputs, self._input_ids, self._prepared)
        return record_reduce(operation, inputs, scratch, parameters, state)

    def _look_up(self, kernel: Kernel, outcome: Any, block: int, elements: int = 0) -> Any:
        """What a reduction returned, its Outcomes replaced by what the kernels left there.

        block: among those run at once. elements: of the block.
        """
        if isinstance(outcome, tuple | list):
            return type(outcome)(self._look_up(kernel, part, block, elements) for part in outcome)
        if not isinstance(outcome, Outcome):
            return outcome
        if outcome.kind == "sum":
            first = (block * kernel.program.lanes + outcome.lane) * LANES
            return sum_of_lanes(kernel.lanes[first : first + LANES])
        if outcome.kind == "largest":
            first = (block * kernel.program.lanes + outcome.lane) * LANES
            return max(kernel.lanes[first : first + LANES])
        if outcome.kind in ("rows", "columns"):
            rows = elements // outcome.row_elements
            count = rows if outcome.kind == "rows" else outcome.row_elements
            return self._array(self._layout.lists[outcome.list], count).copy()
        if outcome.kind == "copy":
            return self._stored(outcome.store, elements).copy()
        first = (block * kernel.program.counters + outcome.counter) * COUNTERS
        above, inside, _ = kernel.counters[first : first + COUNTERS]
        if outcome.kind == "index":
            return inside
        values = self._stored(outcome.store, inside if outcome.collects else 0)
        return Counts(above, inside, spread(values, outcome.quota))

    def _stored(self, store: int, elements: int) -> NDArray[numpy.floating[Any]]:
        return self._array(self._layout.stores[store], elements)

    def _array(self, slot: Slot, elements: int) -> NDArray[numpy.floating[Any]]:
        import numpy

        dtype = numpy.float64 if slot.dtype == "F64" else numpy.float32
        return numpy.frombuffer(self._arena.memory, dtype, elements, slot.offset)

    def release(self) -> None:
        """Gives back what reading has left in memory."""
        for source in self._inputs:
            source.release()

    def forget(self, start: int, stop: int) -> None:
        for source in self._inputs:
            source.forget(start, stop)


def gathered_numbers(kernel: Kernel, blocks: int) -> list[tuple[float, ...]]:
    """What a program of sums alone has left of each of so many blocks, in the order in which its
    operation returned it; lanes are added as `sum_of_lanes` adds them, for all at once."""
    import numpy

    count = kernel.program.lanes
    lanes = numpy.frombuffer(memoryview(kernel.lanes), numpy.float64, blocks * count * LANES)
    lanes = lanes.reshape(blocks, count, LANES)
    sums = numpy.zeros((blocks, count))
    with numpy.errstate(over="ignore", invalid="ignore"):
        for lane in range(LANES):
            sums += lanes[:, :, lane]
    outcomes = kernel.program.outcome
    for place, outcome in enumerate(outcomes):
        if outcome.kind == "largest":
            sums[:, outcome.lane] = lanes[:, outcome.lane].max(axis=1)
        assert outcome.lane == place
    return [tuple(row) for row in sums.tolist()]


def frozen(value: object) -> tuple[object, ...] | None:
    """Numbers, and lists and mappings of them, as something that can be a key, equal only for equal
    values of equal types; None for anything else."""
    if isinstance(value, bool | int | float | str | None):
        return (type(value), repr(value))  # -0.0 is not 0.0, and nan is nan
    if isinstance(value, Mapping):
        parts = [(key, frozen(part)) for key, part in value.items()]
        return None if any(part is None for _, part in parts) else (dict, *parts)
    if isinstance(value, list | tuple):
        items = [frozen(part) for part in value]
        return None if any(item is None for item in items) else (type(value), *items)
    return None
