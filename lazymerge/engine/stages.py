"""What has to happen for one output tensor, in which order, in which buffers.

    ties:   stage 0  Reduce magnitude_thresholds   (a sample, then one pass or more)
            stage 1  Write  ◄ Apply sign_consensus  (one pass)

A stage streams blocks through one tree of block-valued nodes. Its buffers are laid out here, at
plan time and without torch; the worker that runs it only turns offsets into tensors. What the
plan says about memory and what the run uses are therefore the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Apply, Read, Reduce, Write
from ..graph.operation import apply_operation, reduce_operation
from .blocks import block_count, block_length

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


@dataclass(frozen=True, slots=True)
class StageLayout:
    """The buffers of one stage in one worker's arena.

    raw: undecoded input blocks, U8.
    result: the block in working dtype, before the output's rounding (Write of an Apply).
    encoded: the block in the output's dtype; None where `result` or `raw` already is.
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


def stage_layout(graph: Graph, stage: Reduce | Write) -> StageLayout:
    """Lays out the buffers of a stage."""
    return _Layout(graph, block_length(stage.element_count)).lay_out(stage)


def statistics_bytes(graph: Graph, task: TensorTask) -> int:
    """Upper bound of what a task's statistics occupy while it runs."""
    return sum(
        reduce_operation(reduce.operation).statistics_bytes(
            len(reduce.inputs), dict(reduce.parameters), block_count(reduce.element_count)
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
        self.nodes: dict[str, NodeSlots] = {}
        self.raw_count = 1
        self.raw_item_bytes = 1

    def lay_out(self, stage: Reduce | Write) -> StageLayout:
        result = encoded = None
        rounding: tuple[Slot, ...] = ()
        if isinstance(stage, Reduce):
            self.reduce(stage)
        else:
            source = self.graph.block_node(stage.source)
            is_computed = isinstance(source, Apply) and not apply_operation(source.operation).is_raw
            if isinstance(source, Read):
                self.read(source)
            else:
                self.apply(source)
            if source.dtype != stage.dtype:
                encoded = self.slot(stage.dtype)
                if self.rounds_from_float64(stage):
                    rounding = (self.slot("F64"), self.slot("F64"))
            if is_computed or rounding:
                result = self.slot(source.dtype)
        raw = tuple(
            self.slot("U8", self.elements * self.raw_item_bytes) for _ in range(self.raw_count)
        )
        return StageLayout(raw, result, encoded, rounding, self.nodes, self.size_bytes)

    def rounds_from_float64(self, write: Write) -> bool:
        """Whether float64 arithmetic ends in a dtype that torch reaches by way of float32."""
        if DTYPES[write.dtype].item_bytes > 2:
            return False
        return any(read.dtype == "F64" for read in self.graph.reads_of(write.id))

    def slot(self, dtype: str, elements: int | None = None) -> Slot:
        count = self.elements if elements is None else elements
        slot = Slot(self.size_bytes, dtype, count)
        size = count * DTYPES[dtype].item_bytes
        self.size_bytes += -(-size // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT
        return slot

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
