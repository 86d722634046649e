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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Apply, Read, Reduce, Write
from ..graph.operation import Cost, apply_operation, reduce_operation
from .blocks import DeviceClass, block_count, block_length
from .execution import Execution
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


RUN_BLOCKS = 4
"""Blocks that a worker runs in one call of the native kernels."""


@dataclass(frozen=True, slots=True)
class RawLayout:
    """The buffers of a stage that decodes nothing: undecoded input blocks, U8."""

    raw: tuple[Slot, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class NativeLayout:
    """The buffers of a stage that the native kernels compute.

    inputs: ids of the Read nodes, in the order of the program's inputs.
    raw: an undecoded block of each, U8 (where files are mapped, for samples only).
    registers: all registers of the program, one chunk of the working dtype each.
    stores: blocks that leave the kernels whole.
    output: a run of blocks in the output's dtype (Write stages).
    blocks_at_once: the length of such a run, and of one that is reduced.
    rounds_once: float64 goes to 16 bits without rounding to float32 on the way.
    """

    inputs: tuple[str, ...]
    raw: tuple[Slot, ...]
    registers: Slot | None
    register_count: int
    stores: tuple[Slot, ...]
    output: Slot | None
    blocks_at_once: int
    rounds_once: bool
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TorchLayout:
    """The buffers of one stage that torch computes.

    raw: undecoded input blocks, U8.
    result: the block in working dtype, before the output's rounding (Write of an Apply).
    encoded: the block in the output's dtype; None where `result` already is.
    rounding: scratch for rounding float64 once; empty where that is not needed.
    nodes: buffers of the Apply and Reduce nodes of the stage, by id.
    size_bytes: of all of them.
    """

    raw: tuple[Slot, ...]
    result: Slot | None
    encoded: Slot | None
    rounding: tuple[Slot, ...]
    nodes: Mapping[str, NodeSlots]
    size_bytes: int


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
    elements = block_length(stage.element_count, execution.device)
    if isinstance(stage, Write):
        source = graph.block_node(stage.source)
        if isinstance(source, Read) and source.dtype == stage.dtype:
            return _Raw(graph, elements).lay_out([source], 1)
        if isinstance(source, Apply) and apply_operation(source.operation).is_raw:
            cost = apply_operation(source.operation).cost(
                len(source.inputs), dict(source.parameters)
            )
            return _Raw(graph, elements).lay_out(graph.reads_of(source.id), cost.raw)
    if execution.device != "cpu":
        return _Device(graph, elements).lay_out_both(stage)
    if execution.kernels == "native" and is_native(graph, stage):
        return _Native(graph, elements).lay_out(stage, is_mapped=execution.read_mode == "mmap")
    return _Torch(graph, elements).lay_out(stage)


def is_native(graph: Graph, stage: Reduce | Write) -> bool:
    """Whether the native kernels know all that a stage asks for: one recordable operation straight
    over its inputs, whose dtypes they read and write."""
    if isinstance(stage, Write):
        source = graph.block_node(stage.source)
        if not library.writes(stage.dtype):
            return False
        if isinstance(source, Apply):
            if not apply_operation(source.operation).is_recordable:
                return False
            inputs = [graph.block_node(node) for node in source.inputs]
        else:
            inputs = [source]
    else:
        if not reduce_operation(stage.operation).is_recordable:
            return False
        inputs = [graph.block_node(node) for node in stage.inputs]
    return all(isinstance(node, Read) and library.reads(node.dtype) for node in inputs)


def rounds_from_float64(graph: Graph, write: Write) -> bool:
    """Whether float64 arithmetic ends in a dtype that torch reaches by way of float32."""
    if DTYPES[write.dtype].item_bytes > 2:
        return False
    return any(read.dtype == "F64" for read in graph.reads_of(write.id))


def statistics_bytes(graph: Graph, task: TensorTask, device: DeviceClass = "cpu") -> int:
    """Upper bound of what a task's statistics occupy while it runs."""
    return sum(
        reduce_operation(reduce.operation).statistics_bytes(
            len(reduce.inputs),
            dict(reduce.parameters),
            reduce.element_count,
            block_count(reduce.element_count, device),
            DTYPES[reduce.working_dtype].item_bytes,
        )
        for reduce in task.reductions
    )


def expected_passes(task: TensorTask) -> int:
    """Trips over the tensor's blocks in the usual case."""
    return 1 + sum(
        reduce_operation(reduce.operation).expected_passes(dict(reduce.parameters))
        for reduce in task.reductions
    )


def bytes_read(graph: Graph, task: TensorTask) -> int:
    """Input bytes read over all expected passes."""
    total = sum(read.tensor.size_bytes for read in graph.reads_of(task.write.id))
    for reduce in task.reductions:
        passes = reduce_operation(reduce.operation).expected_passes(dict(reduce.parameters))
        total += passes * sum(read.tensor.size_bytes for read in graph.reads_of(reduce.id))
    return total


class _Layout:
    def __init__(self, graph: Graph, elements: int) -> None:
        self.graph = graph
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


class _Native(_Layout):
    def lay_out(self, stage: Reduce | Write, *, is_mapped: bool) -> NativeLayout:
        reads: Sequence[Read]
        output = None
        working_dtype, cost = "F32", Cost(scratch=0)
        if isinstance(stage, Reduce):
            working_dtype = stage.working_dtype
            cost = reduce_operation(stage.operation).cost(len(stage.inputs), dict(stage.parameters))
            reads, register_count = self.graph.reads_of(stage.id), cost.scratch
        else:
            source = self.graph.block_node(stage.source)
            if isinstance(source, Apply):
                working_dtype = source.working_dtype
                cost = apply_operation(source.operation).cost(
                    len(source.inputs), dict(source.parameters)
                )
            elif source.dtype == "F64":
                working_dtype = "F64"
            reads, register_count = self.graph.reads_of(source.id), 1 + cost.scratch
            output = self.slot(stage.dtype, min(stage.element_count, RUN_BLOCKS * self.elements))
        registers = self.slot(working_dtype, library.chunk_elements() * register_count)
        return NativeLayout(
            inputs=tuple(read.id for read in reads),
            raw=()
            if is_mapped and isinstance(stage, Write)
            else tuple(
                self.slot("U8", self.elements * DTYPES[read.dtype].item_bytes) for read in reads
            ),
            registers=registers,
            register_count=register_count,
            stores=tuple(self.slot(working_dtype) for _ in range(cost.stores)),
            output=output,
            blocks_at_once=1 if cost.stores else RUN_BLOCKS,
            rounds_once=isinstance(stage, Write) and rounds_from_float64(self.graph, stage),
            size_bytes=self.size_bytes,
        )


class _Torch(_Layout):
    def __init__(self, graph: Graph, elements: int) -> None:
        super().__init__(graph, elements)
        self.nodes: dict[str, NodeSlots] = {}
        self.raw_count = 1
        self.raw_item_bytes = 1

    def lay_out(self, stage: Reduce | Write) -> TorchLayout:
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
        raw = tuple(
            self.slot("U8", self.elements * self.raw_item_bytes) for _ in range(self.raw_count)
        )
        return TorchLayout(raw, result, encoded, rounding, self.nodes, self.size_bytes)

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
        self.host = _Layout(graph, elements)

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
