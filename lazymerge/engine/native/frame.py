"""A stage bound to one worker's arena and computed by the native kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...checkpoint.tensor import DTYPES
from ...graph.graph import Graph
from ...graph.node import Apply, Read, Reduce, Write
from ...graph.operation import apply_operation, reduce_operation
from ...graph.vector import Counts, spread, sum_of_lanes
from ..arena import Arena
from ..execution import ReadMode
from ..inputs import InputFiles, MappedInput, Pieces, PreadInput, open_input
from ..stages import NativeLayout
from .library import COUNTERS, LANES, Kernel
from .program import Outcome, Program, decoding, record_apply, record_reduce

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray


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
    ) -> None:
        """prepared: what ApplyOperation.prepare returned, by node id."""
        self._stage = stage
        self._layout = layout
        self._arena = arena
        reads = [node for node in map(graph.block_node, layout.inputs) if isinstance(node, Read)]
        assert len(reads) == len(layout.inputs)
        self._dtypes = [read.dtype for read in reads]
        self._inputs: list[PreadInput | MappedInput] = []
        self._maps: list[int] = []
        self._slots: list[int] = []
        for number, read in enumerate(reads):
            slots = [arena.bytes(layout.raw[number])] if layout.raw else []
            source = open_input(read, files, read_mode, slots)
            self._inputs.append(source)
            self._maps.append(_address_of(source) if isinstance(source, MappedInput) else 0)
            self._slots.append(arena.address(layout.raw[number]) if layout.raw else 0)
        self._is_mapped = read_mode == "mmap"
        self._kernel: Kernel | None = None
        self._state: Any = None
        self._output = arena.bytes(layout.output) if layout.output else memoryview(b"")
        self._item_bytes = 0
        if isinstance(stage, Write):
            self._item_bytes = DTYPES[stage.dtype].item_bytes
            self._kernel = self._bind(self._write_program(graph, stage, prepared))

    def _write_program(self, graph: Graph, stage: Write, prepared: Mapping[str, Any]) -> Program:
        source = graph.block_node(stage.source)
        if not isinstance(source, Apply):
            return decoding()
        operation = apply_operation(source.operation)
        numbers = [self._layout.inputs.index(node) for node in source.inputs]
        scratch = self._layout.register_count - 1
        return record_apply(operation, numbers, scratch, prepared[source.id])

    def _bind(self, program: Program) -> Kernel:
        layout = self._layout
        assert layout.registers is not None
        output = layout.output
        return Kernel(
            program,
            self._dtypes,
            working_dtype=layout.registers.dtype,
            registers=self._arena.address(layout.registers),
            stores=[self._arena.address(slot) for slot in layout.stores],
            output=self._arena.address(output) if output else 0,
            output_dtype=output.dtype if output else None,
            rounds_once=layout.rounds_once,
        )

    def _run(self, kernel: Kernel, pieces: Pieces) -> None:
        first = pieces[0][0]
        is_in_place = self._is_mapped and len(pieces) == 1
        for number, source in enumerate(self._inputs):
            source.seek(pieces)
            if is_in_place:
                assert isinstance(source, MappedInput)
                kernel.inputs[number] = self._maps[number] + source.byte_offset(first)
            else:
                source.raw()
                kernel.inputs[number] = self._slots[number]
        kernel.run(first, sum(stop - start for start, stop in pieces))

    def reduce(self, pieces: Pieces, state: Any) -> Any:
        """The partial result of one block (Reduce stages)."""
        if self._kernel is None or state is not self._state:
            self._kernel = self._bind(self._reduce_program(state))
            self._state = state
        kernel = self._kernel
        kernel.reset()
        self._run(kernel, pieces)
        elements = sum(stop - start for start, stop in pieces)
        return self._look_up(kernel, kernel.program.outcome, elements)

    def _reduce_program(self, state: Any) -> Program:
        stage = self._stage
        assert isinstance(stage, Reduce)
        numbers = [self._layout.inputs.index(node) for node in stage.inputs]
        return record_reduce(
            reduce_operation(stage.operation),
            numbers,
            self._layout.register_count,
            dict(stage.parameters),
            state,
        )

    def _look_up(self, kernel: Kernel, outcome: Any, elements: int) -> Any:
        """What a reduction returned, its Outcomes replaced by what the kernels left there."""
        if isinstance(outcome, tuple | list):
            return type(outcome)(self._look_up(kernel, part, elements) for part in outcome)
        if not isinstance(outcome, Outcome):
            return outcome
        if outcome.kind == "sum":
            return sum_of_lanes(kernel.lanes[outcome.lane * LANES : (outcome.lane + 1) * LANES])
        if outcome.kind == "copy":
            return self._stored(outcome.store, elements).copy()
        above, inside, _ = kernel.counters[
            outcome.counter * COUNTERS : (outcome.counter + 1) * COUNTERS
        ]
        if outcome.kind == "index":
            return inside
        values = self._stored(outcome.store, inside if outcome.collects else 0)
        return Counts(above, inside, spread(values, outcome.quota))

    def _stored(self, store: int, elements: int) -> NDArray[numpy.floating[Any]]:
        import numpy

        slot = self._layout.stores[store]
        dtype = numpy.float64 if slot.dtype == "F64" else numpy.float32
        return numpy.frombuffer(self._arena.memory, dtype, elements, slot.offset)

    def encode(self, start: int, stop: int) -> memoryview:
        """The bytes of one output block (Write stages), valid until the next call."""
        assert self._kernel is not None
        self._run(self._kernel, ((start, stop),))
        return self._output[: (stop - start) * self._item_bytes]

    def release(self, start: int, stop: int) -> None:
        """Gives back what reading an element range has left in memory."""
        for source in self._inputs:
            source.release(start, stop)


def _address_of(source: MappedInput) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(source.map))
