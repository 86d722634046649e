"""Tensors that come about alike, to be explained once for all of them.

A form is the operations of an output tensor with everything but where its data lie: operations,
parameters, shapes, dtypes, and which models are read. A mixture of experts with 90,000 tensors has
a few dozen; a merge with a gradient has some for every layer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ..engine.likeness import NAMES_A_TENSOR
from ..engine.plan import Plan
from ..engine.stages import TensorTask
from ..graph.graph import Graph, node_inputs
from ..graph.node import Apply, Node, Read, Reduce, Write


@dataclass(frozen=True, slots=True)
class Form:
    """Output tensors of one form.

    first: the work of the first of them, in the order of the output.
    nodes: its operations, inputs before users, the Write last.
    count: how many tensors are of this form.
    """

    first: TensorTask
    nodes: tuple[Node, ...]
    count: int


@dataclass(frozen=True, slots=True)
class Forms:
    """All output tensors by form.

    forms: in the order of their first tensors.
    numbers: of the form of each output tensor, in the order of the output.
    reads: what each output tensor reads, in the order in which its form's nodes do.
    """

    forms: tuple[Form, ...]
    numbers: Sequence[int]
    reads: Sequence[tuple[Read, ...]]


def forms_of(plan: Plan) -> Forms:
    """The plan's tensors by form."""
    known: dict[Hashable, int] = {}
    firsts: list[tuple[TensorTask, tuple[Node, ...]]] = []
    counts: list[int] = []
    numbers: list[int] = []
    reads: list[tuple[Read, ...]] = []
    descriptions: dict[Hashable, int] = {}
    for task in plan.tasks:
        nodes = _nodes(plan.graph, task.write)
        places = {node.id: place for place, node in enumerate(nodes)}
        key = tuple(
            descriptions.setdefault(_description(node, places), len(descriptions)) for node in nodes
        )
        number = known.setdefault(key, len(known))
        if number == len(counts):
            firsts.append((task, nodes))
            counts.append(0)
        counts[number] += 1
        numbers.append(number)
        reads.append(tuple(node for node in nodes if isinstance(node, Read)))
    forms = tuple(Form(*first, count) for first, count in zip(firsts, counts, strict=True))
    return Forms(forms, numbers, reads)


def _nodes(graph: Graph, write: Write) -> tuple[Node, ...]:
    """All that a tensor comes from, each node once, inputs before users."""
    found: dict[str, Node] = {}

    def visit(node: Node) -> None:
        for source in node_inputs(node):
            if source not in found:
                visit(graph[source])
        found[node.id] = node

    visit(write)
    return tuple(found.values())


def _description(node: Node, places: dict[str, int]) -> Hashable:
    """All that is to be said of a node, but for names and places of data."""
    match node:
        case Read():
            rows = None if node.rows is None else node.rows.digest
            return (node.folder, node.dtype, node.tensor.shape, node.size_bytes, rows)
        case Write():
            return (node.dtype, node.shape, places[node.source])
        case Apply() | Reduce():
            return (
                type(node),
                node.operation,
                tuple(pair for pair in node.parameters if pair[0] != NAMES_A_TENSOR),
                tuple(places[source] for source in node.inputs),
                tuple(places[source] for source in node.statistics),
                node.shape,
                node.working_dtype,
            )
