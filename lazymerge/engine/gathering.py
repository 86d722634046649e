"""What the statistics of an output tensor are gathered from, and where there can be none.

    Read base ─┐                                   the inputs of the statistics are what the models
    Read a ────┼─► Apply (the merge) ─► Write      hold: stored tensors, and those that an adapter,
    Read b ──► Apply adapted ─┘           │        scales or padding make of them; and the
       └──────────────┴── x₀, x₁ …, out ◄─┘        block that is written, as it is written

Merges of merges are looked through: the inputs are the models that all of it is made of.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from ..checkpoint.tensor import DTYPES
from ..graph.graph import Graph
from ..graph.node import Apply, Read, Reduce, Write, as_parameters
from ..graph.operation import apply_operation
from ..graph.operations.adapters import Adapted
from ..graph.operations.block_scales import Dequantised
from ..graph.operations.padding import PaddedRows
from ..graph.operations.statistics import MergeStatistics

PREPARING = frozenset({Adapted.name, Dequantised.name, PaddedRows.name})
"""Operations that make of what is stored what a model holds."""

MOST_MODELS = 24
"""Beyond that nothing is gathered: work grows with the square of their number, and the numbers of a
tensor no longer fit the journal's line (journal.py)."""


@dataclass(frozen=True, slots=True)
class Gathering:
    """What statistics of an output tensor are gathered from.

    inputs: ids of the block nodes, each once: first that which the others are compared with, then
        in the order of the merge's inputs.
    working_dtype: "F32" or "F64".
    """

    inputs: tuple[str, ...]
    working_dtype: str

    def reduction(self, write: Write) -> Reduce:
        """The reduction, its inputs without the output."""
        return Reduce(
            operation=MergeStatistics.name,
            parameters=as_parameters({"is_merge": True}),
            inputs=self.inputs,
            statistics=(),
            shape=write.shape,
            working_dtype=self.working_dtype,
        )


@dataclass(frozen=True, slots=True)
class NotGathered:
    """reason: why nothing can be said of a tensor, for people.

    source: id of the block node that it is a copy of, where it is one.
    """

    reason: str
    source: str | None = None


def gathering_of(graph: Graph, write: Write, reference_files: Set[str]) -> Gathering | NotGathered:
    """What statistics of an output tensor are gathered from.

    reference_files: paths of the files of the model that the others are compared with; where the
        tensor is not made of it, they are compared with the first.
    """
    inputs = _inputs(graph, write.source)
    if not DTYPES[write.dtype].is_float:
        return NotGathered("no floating point numbers, equal in all models", inputs[0])
    if len(inputs) == 1:
        return NotGathered("copied", inputs[0])
    if write.element_count == 0:
        return NotGathered("empty")
    if len(inputs) > MOST_MODELS:
        return NotGathered(f"made of more than {MOST_MODELS} models")
    nodes = [graph.block_node(node_id) for node_id in inputs]
    if any(node.shape != write.shape for node in nodes):
        return NotGathered("its elements are not those of the models in the same places")
    if any(isinstance(node, Read) and _lacks_rows(node) for node in nodes):
        return NotGathered("rows are matched by token, and not every model has all of them")
    computed = {node.working_dtype for node in nodes if isinstance(node, Apply)}
    stored = {node.dtype for node in nodes if isinstance(node, Read)}
    is_wide = bool({"F64"} & {*computed, *stored, write.dtype})
    inputs = _reference_first(graph, inputs, reference_files)
    return Gathering(inputs, next(iter(computed), "F64" if is_wide else "F32"))


def _inputs(graph: Graph, node_id: str) -> tuple[str, ...]:
    """What of a tree of nodes models hold, each once, in order."""
    found: dict[str, None] = {}
    waiting = [node_id]
    while waiting:
        node = graph.block_node(waiting.pop())
        if isinstance(node, Apply) and not _is_prepared(graph, node):
            waiting += reversed(node.inputs)
        else:
            found.setdefault(node.id)
    return tuple(found)


def _is_prepared(graph: Graph, node: Apply) -> bool:
    """Whether a node is what a model holds: made of one stored tensor."""
    if node.operation not in PREPARING:
        return False
    return all(
        isinstance(source, Read) or (isinstance(source, Apply) and _is_prepared(graph, source))
        for source in map(graph.block_node, node.inputs)
    )


def _reference_first(graph: Graph, inputs: tuple[str, ...], files: Set[str]) -> tuple[str, ...]:
    """A tensor of the reference as it is stored goes before one that is made of it."""
    of_reference = [
        node_id
        for node_id in inputs
        if all(f"{read.folder}/{read.tensor.file}" in files for read in graph.reads_of(node_id))
    ]
    stored = [node_id for node_id in of_reference if isinstance(graph[node_id], Read)]
    first = next(iter([*stored, *of_reference]), inputs[0])
    return (first, *(node_id for node_id in inputs if node_id != first))


def _lacks_rows(read: Read) -> bool:
    return read.rows is not None and read.rows.present < len(read.rows)


def is_recordable(graph: Graph, gathering: Gathering) -> bool:
    """Whether the native kernels can gather it: all that is computed for it is of one dtype."""
    nodes = [graph.block_node(node_id) for node_id in gathering.inputs]
    applies = [node for node in nodes if isinstance(node, Apply)]
    return all(
        node.working_dtype == gathering.working_dtype
        and apply_operation(node.operation).is_recordable
        for node in applies
    )
