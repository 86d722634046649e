"""The Gram matrix Gᵢⱼ = ⟨xᵢ, xⱼ⟩ of a few tensors, in float64.

Everything a spherical method asks of its inputs (norms, angles, whole iterations) is a function
of these n × n numbers, so one pass over the tensors answers all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..operation import BlockInput, Cost, Done, Parameters, Pass, ReduceOperation, register
from ..vector import dot

if TYPE_CHECKING:
    from ..vector import Vector

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
        for source, vector in zip(inputs, vectors, strict=True):
            source.read_into(vector)
        return tuple(
            dot(vectors[row], vectors[column], room)
            for row in range(len(inputs))
            for column in range(row + 1)
        )

    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: Any,
        partials: Sequence[tuple[float, ...]],
    ) -> Done[GramMatrix]:
        sums = [_exact_sum(column) for column in zip(*partials, strict=True)]
        size = math.isqrt(2 * len(sums))
        lower = iter(sums)
        matrix = [[0.0] * size for _ in range(size)]
        for row in range(size):
            for column in range(row + 1):
                matrix[row][column] = matrix[column][row] = next(lower)
        return Done(tuple(map(tuple, matrix)))


def _exact_sum(terms: Sequence[float]) -> float:
    """The correctly rounded sum; with inf or nan among the terms, what plain addition gives."""
    try:
        return math.fsum(terms)
    except (OverflowError, ValueError):
        return sum(terms)
