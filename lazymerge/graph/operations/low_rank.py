"""Folding low-rank adapters into weights, W + factor · B A, as the first step of a merge.

    Read A ─► Reduce matrix ─┐
    Read B ─► Reduce matrix ─┤ (held while the tensor is merged)
    Read W ──────────────────┴─► Apply low_rank ─► whatever the merge does with it

The products of some rows are formed block by block, in float64 and not rounded: adapters are small,
and what they add to a weight is smaller still.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ..graph import Graph
from ..node import Apply, Read, Reduce, as_parameters
from ..operation import (
    ApplyOperation,
    BlockInput,
    Cost,
    Done,
    Parameters,
    Pass,
    ReduceOperation,
    register,
)
from ..vector import copy_of

if TYPE_CHECKING:
    from ...checkpoint.tensor import LowRank, TensorInfo
    from ..vector import Numbers, Vector


def add_low_rank(graph: Graph, weight: str, low_rank: LowRank) -> str:
    """Adds what yields a weight with its adapter; returns its id.

    weight: id of the node that yields the weight, a matrix, or some of its rows.
    """
    shape = graph.block_node(weight).shape
    parts = [low_rank.a, low_rank.b, *([low_rank.magnitude] if low_rank.magnitude else [])]
    return graph.add(
        Apply(
            operation=WithLowRank.name,
            parameters=as_parameters(
                {
                    "factor": low_rank.factor,
                    "rank": low_rank.a.shape[0],
                    "columns": shape[1],
                    "is_turned": low_rank.is_turned,
                    "first_row": low_rank.first_row,
                }
            ),
            inputs=(weight,),
            statistics=tuple(_matrix(graph, low_rank.folder, part) for part in parts),
            shape=shape,
            working_dtype="F64",
        )
    )


def _matrix(graph: Graph, folder: str, tensor: TensorInfo) -> str:
    return graph.add(
        Reduce(
            operation=Matrix.name,
            parameters=(),
            inputs=(graph.add(Read(folder, tensor)),),
            statistics=(),
            shape=tensor.shape,
            working_dtype="F64",
        )
    )


@register
class Matrix(ReduceOperation["Numbers", "Numbers"]):
    """A small tensor's elements, held as they are.

    Result: float64, shape (n,).
    """

    name = "matrix"
    is_recordable = True
    is_for_host = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=1, stores=1)

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        return 8 * 2 * element_count  # as collected, and joined

    def expected_passes(self, parameters: Parameters) -> int:
        return 1

    def first_pass(
        self,
        parameters: Parameters,
        statistics: Sequence[Any],
        element_count: int,
        block_count: int,
    ) -> Pass:
        return Pass(None)

    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> Numbers:
        inputs[0].read_into(scratch[0])
        return copy_of(scratch[0])

    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: Any,
        partials: Sequence[Numbers],
    ) -> Done[Numbers]:
        import numpy

        return Done(partials[0] if len(partials) == 1 else numpy.concatenate(partials))


@register
class WithLowRank(ApplyOperation):
    """W + factor · B A; with a third statistic m (DoRA) every row of that, scaled to length mᵢ.

    Parameters:
        factor, rank; columns: of W.
        is_turned: W + factor · (B A)ᵀ instead.
        first_row: of the whole weight, that W begins with.

    Statistics: A, B, and m if there is one, as `matrix` gives them.

    Source: Hu et al., 2021, arXiv:2106.09685; DoRA: Liu et al., 2024, arXiv:2402.09353.
    """

    name = "low_rank"
    is_by_rows = True
    is_for_host = True
    is_positional = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=1)

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        import torch

        rank, is_turned = cast(int, parameters["rank"]), parameters["is_turned"]
        a, b = (torch.from_numpy(matrix) for matrix in statistics[:2])
        a, b = a.view(rank, -1), b.view(-1, rank)
        if is_turned:
            a, b = b.t(), a.t()
        magnitude = torch.from_numpy(statistics[2]) if len(statistics) > 2 else None
        return a, b, magnitude, parameters

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        import torch

        a, b, magnitude, parameters = prepared
        columns = parameters["columns"]
        inputs[0].read_into(out)
        weight: Any = cast("Any", out).view(-1, columns)
        product: Any = cast("Any", scratch[0]).view(-1, columns)
        first = parameters["first_row"] + start // columns
        torch.mm(b[first : first + len(weight)], a, out=product)
        weight.add_(product, alpha=parameters["factor"])
        if magnitude is not None:
            lengths = torch.linalg.vector_norm(weight, dim=1)
            weight.mul_((magnitude[first : first + len(weight)] / lengths)[:, None])
