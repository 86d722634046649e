"""The Gram matrix Gᵢⱼ = ⟨xᵢ, xⱼ⟩ of a few tensors, in float64: whole, by row, or by column.

Everything a spherical method asks of its inputs (norms, angles, whole iterations) is a function
of these n × n numbers, so one pass over the tensors answers all of it.

Where a method works on the changes δᵢ = xᵢ − x₀, they are formed block by block: from the Gram
matrix of the xᵢ that of the δᵢ would be the difference of large numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..operation import BlockInput, Cost, Done, Parameters, Pass, ReduceOperation, register
from ..vector import column_dot, dot, row_dot

if TYPE_CHECKING:
    from ..vector import Numbers, Vector

TABLES = 12
"""Arrays as long as there are vectors that coefficients are worked out in (methods/
spherical_vectors.py)."""

GramMatrix = tuple[tuple[float, ...], ...]


@register
class Gram(ReduceOperation["tuple[float, ...]", GramMatrix]):
    """⟨xᵢ, xⱼ⟩ for all pairs of inputs; the result is symmetric, n tuples of n floats.

    Each block gives a float64 dot product per pair, summed in a fixed order; these are summed
    exactly (math.fsum), so the matrix depends on the block boundaries alone.
    """

    name = "gram"
    is_recordable = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=input_count + 1)

    def load(self, inputs: Sequence[BlockInput], vectors: Sequence[Vector]) -> Sequence[Vector]:
        """Fills the vectors whose products are taken."""
        return _load(inputs, vectors)

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        pairs = input_count * (input_count + 1) // 2
        return block_count * (pairs * 32 + 64)  # a Python float and its place in a tuple

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
    ) -> tuple[float, ...]:
        *vectors, room = scratch
        return tuple(dot(one, other, room) for one, other in _pairs(self.load(inputs, vectors)))

    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: Any,
        partials: Sequence[tuple[float, ...]],
    ) -> Done[GramMatrix]:
        sums = [exact_sum(column) for column in zip(*partials, strict=True)]
        size = math.isqrt(2 * len(sums))
        lower = iter(sums)
        matrix = [[0.0] * size for _ in range(size)]
        for row in range(size):
            for column in range(row + 1):
                matrix[row][column] = matrix[column][row] = next(lower)
        return Done(tuple(map(tuple, matrix)))


def exact_sum(terms: Sequence[float]) -> float:
    """The correctly rounded sum; with inf or nan among the terms, what plain addition gives."""
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):
        return sum(terms)


def _load(inputs: Sequence[BlockInput], vectors: Sequence[Vector]) -> Sequence[Vector]:
    for source, vector in zip(inputs, vectors, strict=True):
        source.read_into(vector)
    return vectors


def _load_changes(inputs: Sequence[BlockInput], vectors: Sequence[Vector]) -> Sequence[Vector]:
    """δ₁ … δₙ for inputs x₀, x₁ … xₙ."""
    base, *changes = _load(inputs, vectors)
    for change in changes:
        change.sub_(base)
    return changes


def _pairs(vectors: Sequence[Vector]) -> list[tuple[Vector, Vector]]:
    """The lower triangle of all pairs, row by row."""
    return [
        (vectors[row], vectors[column]) for row in range(len(vectors)) for column in range(row + 1)
    ]


@register
class GramOfChanges(Gram):
    """⟨δᵢ, δⱼ⟩ for all pairs of δᵢ = xᵢ − x₀; inputs x₀, x₁ … xₙ, n tuples of n floats."""

    name = "gram_of_changes"

    def load(self, inputs: Sequence[BlockInput], vectors: Sequence[Vector]) -> Sequence[Vector]:
        return _load_changes(inputs, vectors)


class _Vectors(ReduceOperation["Any", "Any"]):
    """The lower triangle of the Gram matrix of many short vectors, rows or columns.

    Parameters:
        row_elements: length of a row.
        is_of_changes: of the δᵢ = xᵢ − x₀ for inputs x₀, x₁ … xₙ; else of all inputs.

    Result: for each pair, in the order of `Gram`, an array of float64, shape (vectors,).
    """

    is_recordable = True
    is_for_host = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def pair_count(self, input_count: int, parameters: Parameters) -> int:
        count = input_count - bool(parameters["is_of_changes"])
        return count * (count + 1) // 2

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

    def load(
        self, inputs: Sequence[BlockInput], parameters: Parameters, vectors: Sequence[Vector]
    ) -> Sequence[Vector]:
        return (_load_changes if parameters["is_of_changes"] else _load)(inputs, vectors)


@register
class GramOfRows(_Vectors):
    """The Gram matrix of every row."""

    name = "gram_of_rows"
    is_by_rows = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=input_count + 1, row_lists=self.pair_count(input_count, parameters))

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        rows = element_count // int(str(parameters["row_elements"]))
        pairs = self.pair_count(input_count, parameters)
        # those of the blocks, and all of them joined; then what coefficients are worked out in
        tables = max(TABLES, input_count + 4)
        return 8 * (2 * pairs + tables) * rows + block_count * pairs * 200

    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> Any:
        *vectors, room = scratch
        row = int(str(parameters["row_elements"]))
        loaded = self.load(inputs, parameters, vectors)
        return tuple(row_dot(one, other, row, room) for one, other in _pairs(loaded))

    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: Any,
        partials: Sequence[tuple[Numbers, ...]],
    ) -> Done[Any]:
        import numpy

        return Done([numpy.concatenate(pair) for pair in zip(*partials, strict=True)])


@register
class GramOfColumns(_Vectors):
    """The Gram matrix of every column: vectors along all dimensions but the last."""

    name = "gram_of_columns"
    is_joined = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=input_count + 1, column_lists=self.pair_count(input_count, parameters))

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        # one for every level of pairs, and those that are being made and joined
        levels = max(1, block_count).bit_length() + 3
        size = 8 * int(str(parameters["row_elements"])) + 200
        return (levels * self.pair_count(input_count, parameters) + TABLES) * size

    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> Any:
        *vectors, room = scratch
        row = int(str(parameters["row_elements"]))
        loaded = self.load(inputs, parameters, vectors)
        return tuple(column_dot(one, other, row, start, room) for one, other in _pairs(loaded))

    def joined(self, left: Any, right: Any) -> Any:
        import numpy

        with numpy.errstate(over="ignore", invalid="ignore"):
            return tuple(one + other for one, other in zip(left, right, strict=True))

    def finish(
        self, parameters: Parameters, element_count: int, state: Any, partials: Sequence[Any]
    ) -> Done[Any]:
        (only,) = partials
        return Done(list(only))
