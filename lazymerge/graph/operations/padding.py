"""Rows of embeddings that belong to no token: they get the mean of all that do.

Source: Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021,
nlp.stanford.edu/~johnhew/vocab-expansion.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Any, cast

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
from ..vector import column_dot, scale_columns, scale_rows, zero_up_to

if TYPE_CHECKING:
    from ..vector import Vector


def _integer(parameters: Parameters, name: str) -> int:
    return cast("int", parameters[name])


def _become_ones(vector: Vector) -> None:
    """1 everywhere, whatever there was: nothing is greater than inf."""
    vector.gt_(inf).add_(1.0)


@register
class ColumnMean(ReduceOperation[Any, Any]):
    """The mean of every column over the first rows; the others must be zero.

    Parameters: row_elements; rows, by which the sums are divided. Result: float64, shape
    (row_elements,).
    """

    name = "column_mean"
    is_recordable = True
    is_joined = True
    is_for_host = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=3, column_lists=1)

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        # one for every level of pairs, and those that are being made and joined
        levels = max(1, block_count).bit_length() + 5
        return levels * (8 * _integer(parameters, "row_elements") + 200)

    def expected_passes(self, parameters: Parameters) -> int:
        return 1

    def first_pass(
        self,
        parameters: Parameters,
        statistics: Sequence[Any],
        element_count: int,
        block_count: int,
    ) -> Pass:
        return Pass(state=None)

    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> Any:
        values, ones, room = scratch
        inputs[0].read_into(values)
        ones.copy_(values)
        _become_ones(ones)
        return column_dot(values, ones, _integer(parameters, "row_elements"), start, room)

    def joined(self, left: Any, right: Any) -> Any:
        import numpy

        with numpy.errstate(over="ignore", invalid="ignore"):
            return left + right

    def finish(
        self, parameters: Parameters, element_count: int, state: Any, partials: Sequence[Any]
    ) -> Done[Any]:
        (sums,) = partials
        return Done(sums / _integer(parameters, "rows"))


@register
class PaddedRows(ApplyOperation):
    """The rows that belong to tokens as they are, and the statistic in all rows behind them, which
    must be zero in the input.

    Parameters: row_elements; rows, that belong to tokens; padded_rows, of the tensor.
    """

    name = "padded_rows"
    is_recordable = True
    is_for_host = True
    is_positional = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=3)

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        import numpy

        is_padding = numpy.zeros(_integer(parameters, "padded_rows"))
        is_padding[_integer(parameters, "rows") :] = 1.0
        return {"mean": statistics[0], "is_padding": is_padding, **parameters}

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        padding, mask, room = scratch
        inputs[0].read_into(out)
        padding.copy_(out)
        _become_ones(padding)
        mask.copy_(padding)
        scale_columns(padding, prepared["mean"], start)
        scale_rows(mask, prepared["is_padding"], prepared["row_elements"], start)
        zero_up_to(padding, mask, 0.0, room)  # and not times zero: a mean may be inf
        out.add_(padding)
