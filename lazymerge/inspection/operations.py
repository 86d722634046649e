"""The operations of a plan: of one tensor as a tree, of all of them by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..checkpoint.tensor import DTYPES
from ..engine.blocks import block_count
from ..engine.plan import Plan
from ..engine.stages import TensorTask, expected_passes, row_elements
from ..graph.graph import Graph, node_inputs
from ..graph.node import Apply, Node, ParameterValue, Read, Reduce, Write
from ..graph.operation import reduce_operation


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of a tensor, and those whose results it uses.

    operation: of a Reduce or Apply; of a Read "model: tensor in file"; of a Write the tensor.
    role: how the result is used, as a stream of blocks or as a finished statistic.
    blocks: of one pass. passes: full trips over the inputs, of a Reduce and a Write.
    bytes_read: over all of them, in this stage. statistics_bytes: bound of what a Reduce holds.
    outputs: output tensors that need it.
    is_repeated: it stands higher up in the same tree, with its inputs.
    """

    node_id: str
    kind: Literal["Write", "Apply", "Reduce", "Read"]
    operation: str
    role: Literal["blocks", "statistic"]
    dtype: str
    shape: tuple[int, ...]
    blocks: int
    passes: int
    bytes_read: int
    statistics_bytes: int
    outputs: int
    is_repeated: bool
    parameters: tuple[tuple[str, ParameterValue], ...] = ()
    inputs: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorSteps:
    """An output tensor's work as a tree, the Write at its root.

    passes, bytes_read: of all its stages.
    """

    root: Step
    passes: int
    bytes_read: int


def steps_of(plan: Plan, names: Sequence[str]) -> list[TensorSteps]:
    """The work of some output tensors, in the order of the output."""
    wanted = set(names)
    models = models_by_folder(plan)
    outputs = outputs_by_node(plan, wanted)
    found = []
    for task in plan.tasks:
        if task.write.name in wanted:
            root = _Tree(plan, models, outputs).step(task.write, "blocks")
            read = sum(stage_bytes(plan.graph, stage) for stage in task.stages)
            found.append(TensorSteps(root, expected_passes(task), read))
    return found


def models_by_folder(plan: Plan) -> dict[str, str]:
    """References of the models, by the folders that their tensors (and adapters') are read from; of
    several in one folder the first."""
    return {
        folder: reference
        for reference, checkpoint in reversed(list(plan.checkpoints.items()))
        for folder, _ in checkpoint.files_by_folder
    }


def outputs_by_node(plan: Plan, names: set[str]) -> Counter[str]:
    """How many output tensors need each node that some of them need.

    names: of those output tensors.
    """
    graph = plan.graph
    needed = {
        node_id
        for write in graph.writes
        if write.name in names
        for node_id in ancestors(graph, write.id)
    }
    counts: Counter[str] = Counter()
    for write in graph.writes:
        counts.update(needed & ancestors(graph, write.id))
    return counts


def ancestors(graph: Graph, node_id: str) -> set[str]:
    """A node and all that it needs, by id."""
    found: set[str] = set()
    waiting = [node_id]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += node_inputs(graph[current])
    return found


def stage_bytes(graph: Graph, stage: Reduce | Write) -> int:
    """Input bytes that a stage reads in all its expected passes."""
    once = sum(read.size_bytes for read in graph.reads_of(stage.id))
    return once * _passes(stage)


def _passes(stage: Reduce | Write) -> int:
    if isinstance(stage, Write):
        return 1
    return reduce_operation(stage.operation).expected_passes(dict(stage.parameters))


class _Tree:
    def __init__(self, plan: Plan, models: Mapping[str, str], outputs: Mapping[str, int]) -> None:
        self._plan = plan
        self._graph = plan.graph
        self._models = models
        self._outputs = outputs
        self._seen: set[str] = set()

    def step(self, node: Node, role: Literal["blocks", "statistic"]) -> Step:
        is_repeated = node.id in self._seen
        self._seen.add(node.id)
        inputs: list[Step] = []
        if not is_repeated:
            blocks = node.inputs if isinstance(node, Apply | Reduce) else ()
            blocks = (node.source,) if isinstance(node, Write) else blocks
            inputs += [self.step(self._graph[source], "blocks") for source in blocks]
        if not is_repeated and isinstance(node, Apply | Reduce):
            inputs += [self.step(self._graph[s], "statistic") for s in node.statistics]
        statistics = self._statistics_bytes(node) if isinstance(node, Reduce) else 0
        parameters = node.parameters if isinstance(node, Apply | Reduce) else ()
        return Step(
            node_id=node.id,
            kind=_kind(node),
            operation=self._operation(node),
            role=role,
            dtype=node.working_dtype if isinstance(node, Reduce) else node.dtype,
            shape=node.shape,
            blocks=self._blocks(node),
            passes=_passes(node) if isinstance(node, Reduce | Write) else 1,
            bytes_read=self._bytes_read(node),
            statistics_bytes=statistics,
            outputs=self._outputs.get(node.id, 1),
            is_repeated=is_repeated,
            parameters=parameters,
            inputs=tuple(inputs),
        )

    def _bytes_read(self, node: Node) -> int:
        if isinstance(node, Reduce | Write):
            return stage_bytes(self._graph, node)
        return node.size_bytes if isinstance(node, Read) else 0

    def _operation(self, node: Node) -> str:
        if isinstance(node, Read):
            return f"{self._models.get(node.folder, node.folder)}: {node.tensor.name}"
        return node.name if isinstance(node, Write) else node.operation

    def _blocks(self, node: Node) -> int:
        device = self._plan.execution.device
        if isinstance(node, Reduce | Write):
            return block_count(node.element_count, device, row_elements(self._graph, node))
        return block_count(node.element_count, device)

    def _statistics_bytes(self, reduce: Reduce) -> int:
        return reduce_operation(reduce.operation).statistics_bytes(
            len(reduce.inputs),
            dict(reduce.parameters),
            reduce.element_count,
            self._blocks(reduce),
            DTYPES[reduce.working_dtype].item_bytes,
        )


def _kind(node: Node) -> Literal["Write", "Apply", "Reduce", "Read"]:
    match node:
        case Read():
            return "Read"
        case Write():
            return "Write"
        case Reduce():
            return "Reduce"
        case Apply():
            return "Apply"


@dataclass(slots=True)
class OperationKind:
    """Operations of one kind, all together.

    bytes_read: what the stages that they make read in all passes: of Reduce operations their own,
        of an Apply those of the Write that it feeds. Of Read: each byte once.
    passes: the largest number of full passes. elements: of all results.
    """

    kind: str
    operation: str
    count: int = 0
    elements: int = 0
    passes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    share_of_reads: float = field(default=0.0)


def operation_kinds(plan: Plan) -> list[OperationKind]:
    """The plan's operations by kind, in the order of the work."""
    graph = plan.graph
    kinds: dict[tuple[str, str], OperationKind] = {}

    def kind_of(node: Node) -> OperationKind:
        operation = node.operation if isinstance(node, Apply | Reduce) else ""
        key = (_kind(node), operation)
        return kinds.setdefault(key, OperationKind(*key))

    for node in graph:
        kind = kind_of(node)
        kind.count += 1
        kind.elements += node.element_count
        if isinstance(node, Read):
            kind.passes = 1
            kind.bytes_read += node.size_bytes
    for task in plan.tasks:
        _add_stages(graph, task, kind_of)
    total = plan.bytes_read
    for kind in kinds.values():
        if kind.kind != "Read" and total:
            kind.share_of_reads = kind.bytes_read / total
    order = ("Read", "Reduce", "Apply", "Write")
    return sorted(kinds.values(), key=lambda kind: order.index(kind.kind))


def _add_stages(graph: Graph, task: TensorTask, kind_of: Callable[[Node], OperationKind]) -> None:
    for stage in task.stages:
        if isinstance(stage, Reduce):
            own = kind_of(stage)
        else:
            source = graph[stage.source]
            write = kind_of(stage)
            write.bytes_written += stage.element_count * DTYPES[stage.dtype].item_bytes
            own = kind_of(source) if isinstance(source, Apply) else write
        own.bytes_read += stage_bytes(graph, stage)
        own.passes = max(own.passes, _passes(stage))
