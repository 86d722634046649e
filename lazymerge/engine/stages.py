"""What has to happen for one output tensor, in which order, in which buffers.

    ties:   stage 0  Reduce magnitude_thresholds   (a sample, then one pass or more)
            stage 1  Write  ◄ Apply sign_consensus  (one pass)

A stage streams blocks through one tree of block-valued nodes. Its buffers are laid out here, at
plan time and without torch; the worker that runs it only turns offsets into addresses. What the
plan says about memory and what the run uses are therefore the same numbers.

Stages have one of four kinds of layout, the first that fits:

    RawLayout     bytes are passed on as they are: copies, and tensors that must be equal
    DeviceLayout  whatever is computed, where an accelerator computes
    NativeLayout  a recorded program, run by the native kernels chunk by chunk
    TorchLayout   anything else: one torch call after the other over whole blocks
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from math import prod
from typing import Any

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Apply, Node, Read, Reduce, Write
from ..graph.operation import (
    ApplyOperation,
    Cost,
    ReduceOperation,
    apply_operation,
    reduce_operation,
)
from ..graph.operations.statistics import number_count
from .blocks import (
    WINDOW_BLOCKS,
    DeviceClass,
    block_count,
    block_length,
    elements_per_block,
    window_elements,
)
from .execution import Execution
from .gathering import Gathering, NotGathered, gathering_of, is_recordable
from .native import library

BUFFER_ALIGNMENT = 64
"""Cache line, and the widest vector register: results must not depend on how a buffer lies."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A buffer within a worker's arena. offset: bytes from its start."""

    offset: int
    dtype: str
    elements: int


@dataclass(frozen=True, slots=True)
class NodeSlots:
    """The buffers of one Apply or Reduce node.

    out: where an Apply computes when its user's buffer has another dtype; else None.
    """

    out: Slot | None
    scratch: tuple[Slot, ...]


RUN_BLOCKS = 16
"""Most blocks that a worker runs in one call of the native kernels: a span (scheduler.py). With 4,
the loop of 16 simulated workers took 68 ms in place of 60 (docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class GatheringSlots:
    """The buffers of the statistics that are gathered of a Write stage's blocks.

    gathering: what they are gathered from.
    vectors: for the kernels one slot, registers of a chunk each; for torch, blocks of the working
        dtype, one for each input and the output.
    stores: blocks that leave the kernels whole.
    lanes: running sums of all blocks that are run at once, F64 (kernels).
    """

    gathering: Gathering
    vectors: tuple[Slot, ...]
    stores: tuple[Slot, ...] = ()
    lanes: Slot | None = None


@dataclass(frozen=True, slots=True)
class RawLayout:
    """The buffers of a stage that decodes nothing: undecoded input blocks, U8."""

    raw: tuple[Slot, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class NativeLayout:
    """The buffers of a stage that the native kernels compute.

    Tensors of one kind share it: nothing in it says whose it is.

    raw: an undecoded block of each input, U8, in the order of graph.reads_of (where files are
        mapped, for samples only).
    registers: all registers of the program, one chunk of the working dtype each.
    stores: blocks that leave the kernels whole. lists: numbers by row of a block, or by column.
    spare: what ranking works in.
    block_elements: length of a block; the tensor's last may be shorter.
    output: a block in the output's dtype (Write stages).
    blocks_at_once: how many are run in one call, those of a Write stage if it also writes them.
    rounds_once: float64 goes to 16 bits without rounding to float32 on the way.
    statistics: buffers for what is gathered of the output; None: nothing is.
    """

    raw: tuple[Slot, ...]
    registers: Slot | None
    register_count: int
    stores: tuple[Slot, ...]
    lists: tuple[Slot, ...]
    spare: Slot | None
    block_elements: int
    output: Slot | None
    blocks_at_once: int
    rounds_once: bool
    size_bytes: int
    statistics: GatheringSlots | None = None


@dataclass(frozen=True, slots=True)
class TorchLayout:
    """The buffers of one stage that torch computes.

    raw: undecoded input blocks, U8.
    result: the block in working dtype, before the output's rounding (Write of an Apply).
    encoded: the block in the output's dtype; None where `result` already is.
    rounding: scratch for rounding float64 once; empty where that is not needed.
    nodes: buffers of the Apply and Reduce nodes of the stage, by id.
    size_bytes: of all of them.
    statistics: buffers for what is gathered of the output; None: nothing is.
    """

    raw: tuple[Slot, ...]
    result: Slot | None
    encoded: Slot | None
    rounding: tuple[Slot, ...]
    nodes: Mapping[str, NodeSlots]
    size_bytes: int
    statistics: GatheringSlots | None = None


SIDES = 2
"""Buffers that an accelerator copies from or to come in twos: one is filled, one is emptied."""

EXCHANGED_ELEMENTS = 1 << 18
"""Most elements that a reduction brings from or to an accelerator at a time."""


@dataclass(frozen=True, slots=True)
class WorkspaceSlots:
    """What reductions on an accelerator work in (engine/device/vector.py).

    spare: a block of the working dtype, and an element.
    ranks, found: EXCHANGED_ELEMENTS of the working dtype; places: as many indices, I32.
    """

    spare: Slot
    ranks: Slot
    places: Slot
    found: Slot


@dataclass(frozen=True, slots=True)
class DeviceLayout:
    """The buffers of one stage that an accelerator computes, in the worker's arena (host) and in
    its share of the accelerator's memory (device).

    inputs: ids of the stage's Read nodes.
    staged: host; for each side, an undecoded block of each input, U8.
    raw: device; the same.
    result: device; the block in working dtype, where the output's is another.
    encoded: device; for each side, the block in the output's dtype (Write stages).
    received: host; the same.
    rounding: device; scratch for rounding float64 once; empty where that is not needed.
    nodes: device; buffers of the Apply and Reduce nodes of the stage, by id.
    workspace: device; what reductions work in (Reduce stages).
    exchange: host; EXCHANGED_ELEMENTS of at most 8 bytes, which they bring over (Reduce stages).
    size_bytes: of all host buffers; device_bytes: of all device buffers.
    """

    inputs: tuple[str, ...]
    staged: tuple[tuple[Slot, ...], ...]
    raw: tuple[tuple[Slot, ...], ...]
    result: Slot | None
    encoded: tuple[Slot, ...]
    received: tuple[Slot, ...]
    rounding: tuple[Slot, ...]
    nodes: Mapping[str, NodeSlots]
    workspace: WorkspaceSlots | None
    exchange: Slot | None
    size_bytes: int
    device_bytes: int

    @property
    def host_slots(self) -> tuple[Slot, ...]:
        """All buffers in the worker's arena."""
        exchange = () if self.exchange is None else (self.exchange,)
        return (*chain.from_iterable(self.staged), *self.received, *exchange)

    @property
    def device_slots(self) -> tuple[Slot, ...]:
        """All buffers on the accelerator."""
        raw = chain.from_iterable(self.raw)
        workspace = self.workspace
        if workspace is None:
            return (*raw, *self._device_blocks)
        return (*raw, *self._device_blocks, workspace.ranks, workspace.places, workspace.found)

    @property
    def block_slots(self) -> tuple[Slot, ...]:
        """The buffers, on both, that hold a whole block in their dtype."""
        return (*self.received, *self._device_blocks)

    @property
    def _device_blocks(self) -> tuple[Slot, ...]:
        slots = [self.result, *self.encoded, *self.rounding]
        for node in self.nodes.values():
            slots += [node.out, *node.scratch]
        if self.workspace is not None:
            slots.append(self.workspace.spare)
        return tuple(slot for slot in slots if slot is not None)


@dataclass(frozen=True, slots=True)
class TensorTask:
    """One output tensor's work: its reductions in order, then the pass that writes it."""

    write: Write
    reductions: tuple[Reduce, ...]

    @property
    def stages(self) -> tuple[Reduce | Write, ...]:
        return (*self.reductions, self.write)


def tensor_tasks(graph: Graph) -> tuple[TensorTask, ...]:
    """The work of every output tensor, in the order of the graph's writes."""
    return tuple(TensorTask(write, graph.reductions_of(write.id)) for write in graph.writes)


StageLayout = RawLayout | DeviceLayout | NativeLayout | TorchLayout


def stage_layout(graph: Graph, stage: Reduce | Write, execution: Execution) -> StageLayout:
    """Lays out the buffers of a stage."""
    operations = stage_operations(graph, stage)
    row = _row_elements(stage, operations)
    elements = block_length(stage.element_count, execution.device, row)
    if isinstance(stage, Write):
        source = graph.block_node(stage.source)
        if isinstance(source, Read) and source.dtype == stage.dtype:
            return _Raw(elements).lay_out([source], 1)
        if isinstance(source, Apply) and apply_operation(source.operation).is_raw:
            cost = apply_operation(source.operation).cost(
                len(source.inputs), dict(source.parameters)
            )
            return _Raw(elements).lay_out(graph.reads_of(source.id), cost.raw)
    if execution.device != "cpu" and not is_for_host(graph, stage):
        return _Device(graph, elements).lay_out_both(stage)
    if execution.kernels == "native":
        dtypes = tuple(read.dtype for read in graph.reads_of(stage.id))
        if _is_native(stage, operations, dtypes):
            is_gathered = any(read.rows is not None for read in graph.reads_of(stage.id))
            layout = _lay_out_native(stage, operations, dtypes, row, execution, is_gathered)
            if isinstance(stage, Write) and execution.reference_files is not None:
                gathering = gathering_of(graph, stage, execution.reference_files)
                return _with_statistics(graph, gathering, stage, layout)
            return layout
    torch = _Torch(graph, elements)
    is_whole = any(operation.is_whole for _, operation in operations)
    if isinstance(stage, Write) and execution.reference_files is not None and not is_whole:
        return torch.lay_out(stage, gathering_of(graph, stage, execution.reference_files))
    return torch.lay_out(stage)


_Operations = Sequence[tuple[Apply | Reduce, ApplyOperation | ReduceOperation[Any, Any]]]


def stage_operations(
    graph: Graph, stage: Reduce | Write
) -> list[tuple[Apply | Reduce, ApplyOperation | ReduceOperation[Any, Any]]]:
    """The Apply and Reduce nodes that a stage evaluates, each once, and their operations."""
    found: dict[str, tuple[Apply | Reduce, ApplyOperation | ReduceOperation[Any, Any]]] = {}

    def visit(node: Node) -> None:
        if isinstance(node, Read) or node.id in found:
            return
        if isinstance(node, Write):
            visit(graph[node.source])
            return
        table = reduce_operation if isinstance(node, Reduce) else apply_operation
        found[node.id] = (node, table(node.operation))
        for source in node.inputs:
            visit(graph[source])

    visit(stage)
    return list(found.values())


def row_elements(graph: Graph, stage: Reduce | Write) -> int:
    """Length of the rows that a stage's blocks are made of: of the whole tensor, where an operation
    wants it whole, 1 where any block will do."""
    return _row_elements(stage, stage_operations(graph, stage))


def _row_elements(stage: Reduce | Write, operations: _Operations) -> int:
    if any(operation.is_whole for _, operation in operations):
        return max(1, stage.element_count)
    if any(operation.is_by_rows for _, operation in operations):
        return max(1, stage.shape[-1]) if stage.shape else 1
    return 1


def stage_window(graph: Graph, stage: Reduce | Write, device: DeviceClass) -> int:
    """The most elements of each of a stage's inputs that are mapped at a time."""
    return window_elements(stage.element_count, device, row_elements(graph, stage))


def mapped_bytes(graph: Graph, stage: Reduce | Write, device: DeviceClass = "cpu") -> int:
    """What the windows of a stage's inputs occupy in one worker, to the page."""
    elements = stage_window(graph, stage, device)
    return sum(
        elements * DTYPES[read.dtype].item_bytes + 2 * mmap.ALLOCATIONGRANULARITY
        for read in graph.reads_of(stage.id)
    )


def temporary_bytes(graph: Graph, stage: Reduce | Write, device: DeviceClass = "cpu") -> int:
    """What the functions of users allocate in a stage's block, and let go, as far as they say."""
    elements = block_length(stage.element_count, device, row_elements(graph, stage))
    return sum(
        operation.cost(len(node.inputs), dict(node.parameters)).temporaries
        * elements
        * DTYPES[node.working_dtype].item_bytes
        for node, operation in stage_operations(graph, stage)
        if node.working_dtype in ("F32", "F64")
    )


def is_for_host(graph: Graph, stage: Reduce | Write) -> bool:
    """Whether accelerators leave a stage to the processor."""
    return any(operation.is_for_host for _, operation in stage_operations(graph, stage))


def is_native(graph: Graph, stage: Reduce | Write) -> bool:
    """Whether the native kernels know all that a stage asks for: recordable operations of one
    working dtype, over inputs whose dtypes they read, and a dtype that they write."""
    dtypes = tuple(read.dtype for read in graph.reads_of(stage.id))
    return _is_native(stage, stage_operations(graph, stage), dtypes)


def _is_native(stage: Reduce | Write, operations: _Operations, dtypes: Sequence[str]) -> bool:
    """dtypes: of the stage's inputs."""
    if isinstance(stage, Write) and not library.writes(stage.dtype):
        return False
    return (
        all(operation.is_recordable for _, operation in operations)
        and len({node.working_dtype for node, _ in operations}) <= 1
        and all(map(library.reads, dtypes))
    )


def rounds_from_float64(graph: Graph, write: Write) -> bool:
    """Whether float64 arithmetic ends in a dtype that torch reaches by way of float32."""
    dtypes = [read.dtype for read in graph.reads_of(write.id)]
    return _rounds_from_float64(write.dtype, dtypes)


def _rounds_from_float64(dtype: str, dtypes: Sequence[str]) -> bool:
    """dtype: of the output; dtypes: of the inputs."""
    return DTYPES[dtype].item_bytes <= 2 and "F64" in dtypes


def statistics_bytes(graph: Graph, task: TensorTask, device: DeviceClass = "cpu") -> int:
    """Upper bound of what a task's statistics occupy while it runs, except for joined ones."""
    return sum(
        _reduction_bytes(graph, reduce, device)
        for reduce in task.reductions
        if not reduce_operation(reduce.operation).is_joined
    )


def gathered_bytes(graph: Graph, task: TensorTask) -> tuple[int, int]:
    """Upper bounds of what gathering statistics of an output tensor holds: while it is written, and
    from then on until all are."""
    gathering = gathering_of(graph, task.write, frozenset())
    if not isinstance(gathering, Gathering):
        return 0, 0
    reduction = gathering.reduction(task.write)
    blocks = block_count(task.write.element_count, "cpu", row_elements(graph, task.write))
    operation = reduce_operation(reduction.operation)
    inputs = len(gathering.inputs) + 1
    during = operation.statistics_bytes(
        inputs, dict(reduction.parameters), task.write.element_count, blocks, 8
    )
    # while they are added, as rows and as columns; then an array, and its place in a dictionary
    return 2 * during, 8 * number_count(len(gathering.inputs)) + 200


def joined_statistics_bytes(
    graph: Graph, stage: Reduce | Write, device: DeviceClass = "cpu"
) -> int:
    """Upper bound of what one worker adds to the partial results that wait to be joined."""
    if isinstance(stage, Write) or not reduce_operation(stage.operation).is_joined:
        return 0
    return _reduction_bytes(graph, stage, device)


def _reduction_bytes(graph: Graph, reduce: Reduce, device: DeviceClass) -> int:
    return reduce_operation(reduce.operation).statistics_bytes(
        len(reduce.inputs),
        dict(reduce.parameters),
        reduce.element_count,
        block_count(reduce.element_count, device, row_elements(graph, reduce)),
        DTYPES[reduce.working_dtype].item_bytes,
    )


def expected_passes(task: TensorTask) -> int:
    """Trips over the tensor's blocks in the usual case; those over small ones beside it, scales and
    factors, are not among them."""
    return 1 + sum(
        reduce_operation(reduce.operation).expected_passes(dict(reduce.parameters))
        for reduce in task.reductions
        if reduce.shape == task.write.shape
    )


def bytes_read(graph: Graph, task: TensorTask) -> int:
    """Input bytes read over all expected passes."""
    total = sum(read.size_bytes for read in graph.reads_of(task.write.id))
    for reduce in task.reductions:
        passes = reduce_operation(reduce.operation).expected_passes(dict(reduce.parameters))
        total += passes * sum(read.size_bytes for read in graph.reads_of(reduce.id))
    return total


def bytes_per_element(graph: Graph, stage: Reduce | Write) -> float:
    """Input bytes of one pass over a stage, by element; rows that are not there are not read."""
    size = sum(read.size_bytes for read in graph.reads_of(stage.id))
    return size / max(1, stage.element_count)


def bytes_between(rate: float, start: int, stop: int) -> int:
    """Whole bytes of an element range; those of neighbouring ranges add up to those of both."""
    return round(stop * rate) - round(start * rate)


class _Layout:
    def __init__(self, elements: int) -> None:
        self.elements = elements
        self.size_bytes = 0

    def slot(self, dtype: str, elements: int | None = None) -> Slot:
        count = self.elements if elements is None else elements
        slot = Slot(self.size_bytes, dtype, count)
        size = count * DTYPES[dtype].item_bytes
        self.size_bytes += -(-size // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT
        return slot


class _Raw(_Layout):
    def lay_out(self, reads: Sequence[Read], count: int) -> RawLayout:
        size = self.elements * max(DTYPES[read.dtype].item_bytes for read in reads)
        raw = tuple(self.slot("U8", size) for _ in range(count))
        return RawLayout(raw, self.size_bytes)


def _lay_out_native(
    stage: Reduce | Write,
    operations: _Operations,
    dtypes: tuple[str, ...],
    row: int,
    execution: Execution,
    is_gathered: bool,
) -> NativeLayout:
    """dtypes: of the stage's inputs. row: what row_elements says.

    is_gathered: rows of an input are brought together in the arena, a block at a time.
    """
    elements = block_length(stage.element_count, execution.device, row)
    is_mapped = execution.read_mode == "mmap"
    working_dtype = "F64" if "F64" in dtypes else "F32"
    for node, _ in operations:
        working_dtype = node.working_dtype
    return _native_layout(
        tuple(
            operation.cost(len(node.inputs), dict(node.parameters))
            for node, operation in operations
        ),
        dtypes,
        working_dtype=working_dtype,
        output_dtype=stage.dtype if isinstance(stage, Write) else None,
        elements=elements,
        block_elements=elements_per_block(execution.device, row),
        row=max(1, stage.shape[-1]) if stage.shape else 1,
        columns=prod(stage.shape[1:]),  # columns run along the first dimension
        read_elements=(
            min(elements, _sample_elements(stage)) if is_mapped and not is_gathered else elements
        ),
        blocks_at_once=1 if is_gathered else WINDOW_BLOCKS if is_mapped else RUN_BLOCKS,
    )


def _with_statistics(
    graph: Graph, gathering: Gathering | NotGathered, write: Write, layout: NativeLayout
) -> NativeLayout:
    """The layout with room for the statistics that the kernels gather, if they can."""
    if not isinstance(gathering, Gathering) or not is_recordable(graph, gathering):
        return layout
    costs = [
        operation.cost(len(node.inputs), dict(node.parameters))
        for node, operation in gathering_operations(graph, gathering)
    ]
    elements = block_length(write.element_count, "cpu")
    room = _Layout(max(elements, layout.output.elements if layout.output else 0))
    room.size_bytes = layout.size_bytes
    count = len(gathering.inputs) + 1 + sum(cost.scratch for cost in costs)
    dtype = gathering.working_dtype
    registers = room.slot(dtype, library.chunk_elements() * count)
    numbers = number_count(len(gathering.inputs)) * library.LANES
    slots = GatheringSlots(
        gathering,
        (registers,),
        tuple(room.slot(dtype) for cost in costs for _ in range(cost.stores)),
        room.slot("F64", numbers * layout.blocks_at_once),
    )
    return replace(layout, statistics=slots, size_bytes=room.size_bytes)


def gathering_operations(graph: Graph, gathering: Gathering) -> list[tuple[Apply, ApplyOperation]]:
    """The Apply nodes among what is gathered from, each once, and their operations."""
    found: dict[str, tuple[Apply, ApplyOperation]] = {}
    waiting = list(gathering.inputs)
    while waiting:
        node = graph.block_node(waiting.pop())
        if isinstance(node, Apply) and node.id not in found:
            found[node.id] = (node, apply_operation(node.operation))
            waiting += node.inputs
    return list(found.values())


@lru_cache(maxsize=64)
def _native_layout(
    costs: tuple[Cost, ...],
    dtypes: tuple[str, ...],
    *,
    working_dtype: str,
    output_dtype: str | None,
    elements: int,
    block_elements: int,
    row: int,
    columns: int,
    read_elements: int,
    blocks_at_once: int,
) -> NativeLayout:
    """The layout that follows from these, made once for all tensors that agree in them.

    costs: of the stage's operations, that whose result it is about first.
    elements: of a block of this tensor; block_elements: of a block of a long tensor.
    row, columns: elements of a row, and of a column's list. read_elements: to make room for.
    """
    layout = _Layout(elements)
    output = None if output_dtype is None else layout.slot(output_dtype)
    held = sum(cost.is_ranking for cost in costs[1:])  # engine/native/program.py: Nested
    register_count = sum(cost.scratch for cost in costs) + held + (output is not None)
    registers = layout.slot(working_dtype, library.chunk_elements() * register_count)
    rows = elements // row
    lists = [layout.slot("F64", rows) for cost in costs for _ in range(cost.row_lists)]
    lists += [layout.slot("F64", columns) for cost in costs for _ in range(cost.column_lists)]
    raw: tuple[Slot, ...] = ()
    if read_elements:
        raw = tuple(layout.slot("U8", read_elements * DTYPES[d].item_bytes) for d in dtypes)
    store_count = sum(cost.stores for cost in costs) + held
    stores = tuple(layout.slot(working_dtype) for _ in range(store_count))
    spare = None
    if any(cost.is_ranking for cost in costs):
        spare = layout.slot("U8", library.RANKED_BYTES * row)
    return NativeLayout(
        raw=raw,
        registers=registers,
        register_count=register_count,
        stores=stores,
        lists=tuple(lists),
        spare=spare,
        block_elements=block_elements,
        output=output,
        blocks_at_once=1 if output is None and (stores or lists) else blocks_at_once,
        rounds_once=output_dtype is not None and _rounds_from_float64(output_dtype, dtypes),
        size_bytes=layout.size_bytes,
    )


def _sample_elements(stage: Reduce | Write) -> int:
    if isinstance(stage, Write):
        return 0
    operation = reduce_operation(stage.operation)
    sample = operation.sample(dict(stage.parameters), stage.element_count)
    return 0 if sample is None else sample.runs * sample.run_elements


class _Torch(_Layout):
    def __init__(self, graph: Graph, elements: int) -> None:
        super().__init__(elements)
        self.graph = graph
        self.nodes: dict[str, NodeSlots] = {}
        self.raw_count = 1
        self.raw_item_bytes = 1

    def lay_out(
        self, stage: Reduce | Write, gathering: Gathering | NotGathered | None = None
    ) -> TorchLayout:
        result = encoded = None
        rounding: tuple[Slot, ...] = ()
        if isinstance(stage, Reduce):
            self.reduce(stage)
        else:
            source = self.graph.block_node(stage.source)
            is_computed = isinstance(source, Apply)
            if isinstance(source, Read):
                self.read(source)
            else:
                self.apply(source)
            if source.dtype != stage.dtype:
                encoded = self.slot(stage.dtype)
                if rounds_from_float64(self.graph, stage):
                    rounding = (self.slot("F64"), self.slot("F64"))
            if is_computed or rounding:
                result = self.slot(source.dtype)
        statistics = None
        if isinstance(gathering, Gathering):
            statistics = self.statistics(gathering)
        raw = tuple(
            self.slot("U8", self.elements * self.raw_item_bytes) for _ in range(self.raw_count)
        )
        return TorchLayout(raw, result, encoded, rounding, self.nodes, self.size_bytes, statistics)

    def statistics(self, gathering: Gathering) -> GatheringSlots:
        for node in map(self.graph.block_node, gathering.inputs):
            if isinstance(node, Apply) and node.dtype != gathering.working_dtype:
                slots = self.nodes[node.id]
                if slots.out is None:
                    self.nodes[node.id] = NodeSlots(self.slot(node.dtype), slots.scratch)
        count = len(gathering.inputs) + 1
        vectors = tuple(self.slot(gathering.working_dtype) for _ in range(count))
        return GatheringSlots(gathering, vectors)

    def read(self, node: Read) -> None:
        self.raw_item_bytes = max(self.raw_item_bytes, DTYPES[node.dtype].item_bytes)

    def reduce(self, node: Reduce) -> None:
        cost = reduce_operation(node.operation).cost(len(node.inputs), dict(node.parameters))
        self.raw_count = max(self.raw_count, cost.raw)
        scratch = tuple(self.slot(node.working_dtype) for _ in range(cost.scratch))
        self.nodes[node.id] = NodeSlots(None, scratch)
        self.inputs(node)

    def apply(self, node: Apply) -> None:
        cost = apply_operation(node.operation).cost(len(node.inputs), dict(node.parameters))
        self.raw_count = max(self.raw_count, cost.raw)
        scratch = tuple(self.slot(node.working_dtype) for _ in range(cost.scratch))
        self.nodes[node.id] = NodeSlots(None, scratch)
        self.inputs(node)

    def inputs(self, user: Reduce | Apply) -> None:
        for source_id in user.inputs:
            source = self.graph.block_node(source_id)
            if isinstance(source, Read):
                self.read(source)
                continue
            if source.id not in self.nodes:
                self.apply(source)
            slots = self.nodes[source.id]
            if source.dtype != user.working_dtype and slots.out is None:
                self.nodes[source.id] = NodeSlots(self.slot(source.dtype), slots.scratch)


class _Device(_Torch):
    """Lays out two memories: its own is the accelerator's, `host` the worker's arena."""

    def __init__(self, graph: Graph, elements: int) -> None:
        super().__init__(graph, elements)
        self.host = _Layout(elements)

    def lay_out_both(self, stage: Reduce | Write) -> DeviceLayout:
        reads = self.graph.reads_of(stage.id)
        sizes = [self.elements * DTYPES[read.dtype].item_bytes for read in reads]
        staged = tuple(tuple(self.host.slot("U8", n) for n in sizes) for _ in range(SIDES))
        raw = tuple(tuple(self.slot("U8", n) for n in sizes) for _ in range(SIDES))
        result = exchange = workspace = None
        encoded: tuple[Slot, ...] = ()
        received: tuple[Slot, ...] = ()
        rounding: tuple[Slot, ...] = ()
        if isinstance(stage, Reduce):
            self.reduce(stage)
            workspace = self.workspace(stage.working_dtype)
            exchange = self.host.slot("F64", workspace.found.elements)
        else:
            source = self.graph.block_node(stage.source)
            if isinstance(source, Apply):
                self.apply(source)
            encoded = tuple(self.slot(stage.dtype) for _ in range(SIDES))
            received = tuple(self.host.slot(stage.dtype) for _ in range(SIDES))
            if rounds_from_float64(self.graph, stage):
                rounding = (self.slot("F64"), self.slot("F64"))
            if rounding or (isinstance(source, Apply) and source.dtype != stage.dtype):
                result = self.slot(source.dtype)
        return DeviceLayout(
            inputs=tuple(read.id for read in reads),
            staged=staged,
            raw=raw,
            result=result,
            encoded=encoded,
            received=received,
            rounding=rounding,
            nodes=self.nodes,
            workspace=workspace,
            exchange=exchange,
            size_bytes=self.host.size_bytes,
            device_bytes=self.size_bytes,
        )

    def workspace(self, dtype: str) -> WorkspaceSlots:
        most = min(EXCHANGED_ELEMENTS, self.elements)
        # the element more: half a block of float64, rounded up
        return WorkspaceSlots(
            spare=self.slot(dtype, self.elements + 1),
            ranks=self.slot(dtype, most),
            places=self.slot("I32", most),
            found=self.slot(dtype, most),
        )
