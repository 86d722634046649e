"""Tensors whose work is alike: the same operations over the same shapes and dtypes.

A mixture of experts has tens of thousands of tensors and a dozen kinds of them. What a plan says
of memory, passes and bytes follows from the kind, so it is worked out once for each.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..graph.graph import Graph
from ..graph.node import Read, Write
from .stages import TensorTask

NAMES_A_TENSOR = "keys"
"""The parameter that says which random numbers are drawn, and not how much work that is."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Output tensors that are made alike.

    first: the first of them, in the order of the output.
    count: how many they are.
    """

    first: TensorTask
    count: int


def kinds_of(graph: Graph, tasks: Sequence[TensorTask]) -> tuple[Kind, ...]:
    """The tasks by kind, in the order of their first tensors."""
    found: dict[Hashable, list[TensorTask]] = {}
    numbers: dict[Hashable, int] = {}
    for task in tasks:
        found.setdefault(_form(graph, task, numbers), []).append(task)
    return tuple(Kind(alike[0], len(alike)) for alike in found.values())


def _form(graph: Graph, task: TensorTask, numbers: dict[Hashable, int]) -> tuple[int, ...]:
    """What a task's work is made of, with its nodes called by the order in which they are met.

    numbers: of descriptions of nodes, which are long.
    """
    order: dict[str, int] = {}
    form: list[int] = []

    def visit(node_id: str) -> int:
        place = order.get(node_id)
        if place is not None:
            return place
        node = graph[node_id]
        description: tuple[Any, ...]
        if isinstance(node, Read):
            rows = None if node.rows is None else (len(node.rows), node.rows.present)
            description = (node.tensor.dtype, node.tensor.shape, rows)
        elif isinstance(node, Write):
            description = (node.dtype, node.shape, visit(node.source))
        else:
            description = (
                type(node),
                node.operation,
                tuple(pair for pair in node.parameters if pair[0] != NAMES_A_TENSOR),
                tuple(map(visit, node.inputs)),
                tuple(map(visit, node.statistics)),
                node.shape,
                node.working_dtype,
            )
        form.append(numbers.setdefault(description, len(numbers)))
        order[node_id] = len(order)
        return order[node_id]

    visit(task.write.id)
    return tuple(form)
