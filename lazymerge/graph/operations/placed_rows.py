"""Rows of what a merge computes, in another order: where a model whose vocabulary is matched is
itself what another merge gives.

    combinations   the same Apply, of the rows of its inputs; its statistics stay as they are
    anything else  … ─► Apply (the merge) ─► Reduce held_rows ──┐
                   Read, no rows ──────────────► Apply placed_rows ─► whatever is done with it

A block of the result may need any row, and a file's rows can be read in any order, but what is
computed has one: where a random method drops an element, and which of equal magnitudes survive,
depends on its place. So the embedding is then computed once as it is, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, cast

from ..graph import Graph
from ..node import Apply, Read, Reduce, as_parameters
from ..operation import (
    ApplyOperation,
    BlockInput,
    Cost,
    Parameters,
    apply_operation,
    register,
)
from ..rows import ABSENT, RowTable
from .adapters import Factor
from .combination import LinearCombination

if TYPE_CHECKING:
    from ..vector import Vector


def add_placed_rows(graph: Graph, source: str, table: RowTable) -> str:
    """Adds what yields these rows of a node's tensor; returns its id."""
    node = graph.block_node(source)
    if table.is_leading and len(table) == node.shape[0]:
        return source
    if not _keeps_rows(graph, source):
        return _add_held_rows(graph, source, table)
    placed = _add_rows_of_inputs(graph, source, table)
    if isinstance(node, Read) or table.present == len(table):
        return placed
    # -1 · 0 is -0, and rows that are not there are 0
    inputs = (placed, graph.add(_nothing(graph, source, len(table))))
    return graph.add(
        Apply(
            operation=LinearCombination.name,
            parameters=as_parameters({"coefficients": (1.0, 1.0)}),
            inputs=inputs,
            statistics=(),
            shape=graph.block_node(placed).shape,
            working_dtype="F64",
        )
    )


def _keeps_rows(graph: Graph, node_id: str) -> bool:
    node = graph.block_node(node_id)
    return isinstance(node, Read) or (
        apply_operation(node.operation).keeps_rows
        and all(_keeps_rows(graph, source) for source in node.inputs)
    )


def _add_rows_of_inputs(graph: Graph, source: str, table: RowTable) -> str:
    node = graph.block_node(source)
    if isinstance(node, Read):
        return graph.add(Read(node.folder, node.tensor, _composed(node.rows, table)))
    inputs = tuple(_add_rows_of_inputs(graph, each, table) for each in node.inputs)
    return graph.add(replace(node, inputs=inputs, shape=(len(table), *node.shape[1:])))


def _composed(before: RowTable | None, table: RowTable) -> RowTable:
    """The rows of a tensor, for those of rows of it."""
    if before is None:
        return table
    rows = [*before]
    return RowTable.of([ABSENT if row == ABSENT else rows[row] for row in table])


def _add_held_rows(graph: Graph, source: str, table: RowTable) -> str:
    node = graph.block_node(source)
    row_elements = prod(node.shape[1:])
    working_dtype = "F64" if node.dtype == "F64" else "F32"
    held = Reduce(
        operation=HeldRows.name,
        parameters=as_parameters(
            {"shape": (node.shape[0], row_elements), "is_transposed": False},
        ),
        inputs=(source,),
        statistics=(),
        shape=node.shape,
        working_dtype=working_dtype,
    )
    shape = (len(table), *node.shape[1:])
    return graph.add(
        Apply(
            operation=PlacedRows.name,
            parameters=as_parameters(
                {"row_elements": row_elements, "rows": len(table), "table": table.to_text()}
            ),
            inputs=(graph.add(_nothing(graph, source, len(table))),),
            statistics=(graph.add(held),),
            shape=shape,
            working_dtype=working_dtype,
        )
    )


def _nothing(graph: Graph, source: str, rows: int) -> Read:
    """Rows of zeros: of a file's tensor, none."""
    read = graph.reads_of(source)[0]
    return Read(read.folder, read.tensor, RowTable.of([ABSENT] * rows))


@register
class HeldRows(Factor):
    """A tensor that is computed, whole.

    Parameters: shape, as a matrix; is_transposed: False. Result: the working dtype.
    """

    name = "held_rows"

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        # blocks, and joined
        return 2 * item_bytes * element_count + 200 * block_count


@register
class PlacedRows(ApplyOperation):
    """Rows of a statistic, and zeros where there is none.

    Parameters: row_elements; rows, of the result; table, RowTable.to_text of them. The input is not
    looked at.
    Statistics: held_rows.
    """

    name = "placed_rows"
    is_for_host = True
    is_positional = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=0, temporaries=1)

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        import numpy

        (matrix,) = statistics
        text = cast("str", parameters["table"])
        table = numpy.frombuffer(
            RowTable.from_text(text, cast("int", parameters["rows"])).data, "<i4"
        )
        return {"matrix": matrix, "table": table, "row_elements": parameters["row_elements"]}

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        import numpy

        values = cast("Any", out).numpy()
        width: int = prepared["row_elements"]
        first, inside = divmod(start, width)
        last = -(-(start + len(values)) // width)
        rows = prepared["table"][first:last]
        found = numpy.take(prepared["matrix"], rows, axis=0, mode="clip")
        found[rows == ABSENT] = 0.0
        values[:] = found.reshape(-1)[inside : inside + len(values)]
