"""Dequantising float8 tensors, w = weight × scale of its block, as the first step of a merge.

    Read scale  ─► Reduce block_scales: a number for each run of elements that have one scale
                                                      │
    Read weight ──────────────────────────► Apply dequantised ─► whatever the merge does with it

A block of the quantised matrix is a square, one of the engine any stretch of elements. So the
scales are laid out for runs: for blocks of r × c elements and a matrix of shape (R, C), element i
of the flattened matrix belongs to run i // g, where g divides both C and c, and takes the run's
number. With c = 128 the table has a float64 for 128 elements of a byte: a sixteenth of the weight.

The product of a float8 and a float32 number is exact in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING, Any, cast

from ..graph import Graph
from ..node import Apply, Read, Reduce, as_parameters
from ..operation import (
    ApplyOperation,
    BlockInput,
    Cost,
    Done,
    Parameters,
    register,
)
from ..vector import scale_rows
from .collected import Collected

if TYPE_CHECKING:
    from ...checkpoint.tensor import BlockScale
    from ..vector import Numbers, Vector


def add_dequantised(graph: Graph, weight: Read, scale: BlockScale) -> str:
    """Adds what yields a float8 tensor's values; returns its id.

    weight: a matrix, or some of its rows.
    """
    rows, columns = weight.shape
    block_rows, block_columns = scale.block
    run = columns if columns <= block_columns else gcd(columns, block_columns)
    table = Reduce(
        operation=BlockScales.name,
        parameters=as_parameters(
            {
                "first_row": scale.first_row,
                "rows": rows,
                "columns": columns,
                "block": (block_rows, block_columns),
                "run": run,
            }
        ),
        inputs=(graph.add(Read(weight.folder, scale.tensor)),),
        statistics=(),
        shape=scale.tensor.shape,
        working_dtype="F64",
    )
    return graph.add(
        Apply(
            operation=Dequantised.name,
            parameters=as_parameters({"run": run}),
            inputs=(graph.add(weight),),
            statistics=(graph.add(table),),
            shape=weight.shape,
            working_dtype="F64",
        )
    )


@register
class BlockScales(Collected):
    """The scales of a matrix's runs, from those of its blocks.

    Parameters:
        first_row, rows: which rows of the matrix are read.
        columns: C of the matrix.
        block: r, c.
        run: g, elements of a run; divides C, and divides c or is C.

    Result: float64, shape (rows C / g,).
    """

    name = "block_scales"

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        rows, columns, run = (cast(int, parameters[name]) for name in ("rows", "columns", "run"))
        block_rows, _ = cast("tuple[int, int]", parameters["block"])
        # the scales as collected and joined; spread over runs; and over rows
        of_row = columns // run
        return 8 * (2 * element_count + (rows // block_rows + 2) * of_row + rows * of_row)

    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: Any,
        partials: Sequence[Numbers],
    ) -> Done[Numbers]:
        import numpy

        rows, columns, run = (cast(int, parameters[name]) for name in ("rows", "columns", "run"))
        block_rows, block_columns = cast("tuple[int, int]", parameters["block"])
        first_row = cast(int, parameters["first_row"])
        scales = numpy.concatenate(partials).reshape(-1, -(-columns // block_columns))
        first, last = first_row // block_rows, (first_row + rows - 1) // block_rows
        by_run = scales[first : last + 1, numpy.arange(0, columns, run) // block_columns]
        table = numpy.empty((rows, columns // run))
        for number, of_block in enumerate(by_run, start=first):
            begin = max(0, number * block_rows - first_row)
            table[begin : (number + 1) * block_rows - first_row] = of_block
        return Done(table.reshape(-1))


@register
class Dequantised(ApplyOperation):
    """Every element times its run's scale.

    Parameters:
        run: elements of a run.

    Statistic: block_scales.
    """

    name = "dequantised"
    is_recordable = True
    is_for_host = True
    is_positional = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=0)

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        return statistics[0], parameters["run"]

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        table, run = prepared
        inputs[0].read_into(out)
        scale_rows(out, table, run, start)
