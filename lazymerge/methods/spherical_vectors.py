"""The spherical methods for every row or column by itself: coefficients are vectors of float64.

What spherical.py does with the numbers of one Gram matrix, this file does with arrays of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ..graph.operation import ApplyOperation, BlockInput, Cost, Parameters, register
from ..graph.vector import scale_columns, scale_rows
from .spherical import SMALLEST_NORM, SMALLEST_PRODUCT, SMALLEST_SINE_SQUARED

if TYPE_CHECKING:
    from ..graph.vector import Numbers, Vector


def nuslerp_tables(gram: Sequence[Numbers], t: float) -> tuple[Numbers, Numbers]:
    """The two coefficients of every vector.

    gram: |a|², ⟨a,b⟩, |b|² of every vector.
    """
    import numpy

    with numpy.errstate(invalid="ignore", over="ignore", divide="ignore"):
        norms = [numpy.sqrt(gram[0]), numpy.sqrt(gram[2])]
        usable = [numpy.where(norm > SMALLEST_NORM, norm, 1.0) for norm in norms]
        cosine = numpy.clip(gram[1] / (usable[0] * usable[1]), -1.0, 1.0)
        angle = numpy.arccos(cosine)
        sine = numpy.sin(angle)
        first = numpy.sin((1.0 - t) * angle) / sine
        second = numpy.sin(t * angle) / sine
        is_parallel = 1.0 - cosine * cosine <= SMALLEST_SINE_SQUARED
    return numpy.where(is_parallel, 1.0 - t, first), numpy.where(is_parallel, t, second)


def model_stock_table(gram: Sequence[Numbers]) -> Numbers:
    """t/n of every row. gram: the lower triangle, row by row."""
    import numpy

    count = int((2 * len(gram)) ** 0.5)
    place = {(i, j): i * (i + 1) // 2 + j for i in range(count) for j in range(i + 1)}
    with numpy.errstate(invalid="ignore", over="ignore", divide="ignore"):
        norms = [numpy.sqrt(gram[place[i, i]]) for i in range(count)]
        total = numpy.zeros_like(norms[0])
        for i in range(count):
            for j in range(i):
                product = norms[i] * norms[j]
                numpy.maximum(product, SMALLEST_PRODUCT, out=product)
                total += numpy.divide(gram[place[i, j]], product, out=product)
        cosine = numpy.clip(total / (count * (count - 1) // 2), -1.0, 1.0)
        del norms, total, product
        denominator = 1.0 + (count - 1) * cosine
        share = numpy.where(
            numpy.abs(denominator) < SMALLEST_PRODUCT, 0.0, count * cosine / denominator
        )
    table: Numbers = share / count
    return table


class _ByVector(ApplyOperation):
    """Σ cᵢxᵢ, or x₀ + Σ cᵢδᵢ, with coefficients by row or by column.

    Parameters: row_elements; is_by_column where it may be either.
    """

    is_positional = True
    is_recordable = True
    is_for_host = True
    is_of_changes = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=2)

    def tables(self, parameters: Parameters, gram: Sequence[Numbers]) -> Sequence[Numbers]:
        """A table for each model."""
        raise NotImplementedError(self.name)

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        row = cast(int, parameters["row_elements"])
        return self.tables(parameters, statistics[0]), row, parameters.get("is_by_column", False)

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        tables, row, is_by_column = prepared
        base, term = scratch
        if self.is_of_changes:
            inputs[0].read_into(base)
            inputs = inputs[1:]
        for number, (source, table) in enumerate(zip(inputs, tables, strict=True)):
            vector = term if number else out
            source.read_into(vector)
            if self.is_of_changes:
                vector.sub_(base)
            if is_by_column:
                scale_columns(vector, table, start)
            else:
                scale_rows(vector, table, row, start)
            if number:
                out.add_(term)
        if self.is_of_changes:
            out.add_(base)


@register
class NuslerpByVector(_ByVector):
    """nuslerp of every row or column of two models. Parameters: t besides."""

    name = "nuslerp_by_vector"
    is_of_changes = False

    def tables(self, parameters: Parameters, gram: Sequence[Numbers]) -> Sequence[Numbers]:
        return nuslerp_tables(gram, cast(float, parameters["t"]))


@register
class NuslerpByVectorOfChanges(NuslerpByVector):
    """nuslerp of every row or column of two models' changes. Parameters: t besides."""

    name = "nuslerp_by_vector_of_changes"
    is_of_changes = True


@register
class ModelStockByRow(_ByVector):
    """model_stock of every row."""

    name = "model_stock_by_row"

    def tables(self, parameters: Parameters, gram: Sequence[Numbers]) -> Sequence[Numbers]:
        table = model_stock_table(gram)
        count = int((2 * len(gram)) ** 0.5)
        return [table] * count
