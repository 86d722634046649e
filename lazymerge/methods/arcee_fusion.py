"""Taking over the changes that matter most: by size, and by what they do to their row.

divergence   Reduce, by rows: KL(softmax(x₁ row) ‖ softmax(x₀ row))
quartiles    Reduce: of |δ| · divergence, exactly, without sorting
fuse         Apply: x₀ + δ where the importance reaches median + 1.5 (q₇₅ − q₂₅)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ..graph.operation import (
    ApplyOperation,
    BlockInput,
    Cost,
    Done,
    Parameters,
    Pass,
    ReduceOperation,
    register,
)
from ..graph.vector import (
    div_rows,
    exponential,
    hold,
    logarithm,
    row_max,
    row_total,
    scale_rows,
    sub_rows,
    wait_for_rows,
    zero_up_to,
)
from ..recipe.signature import BaseModel, Signature
from .merge import TensorMerge, merge_method

if TYPE_CHECKING:
    from ..graph.vector import Numbers, Vector

SMALLEST_PROBABILITY = 1e-8
"""Added to both distributions."""

QUARTILES = (0.25, 0.5, 0.75)


@register
class RowDivergence(ReduceOperation[Any, Any]):
    """KL(p ‖ q) of every row, p and q the softmax of x₁ and x₀, each plus 1e-8.

    Inputs x₀, x₁. Parameters: row_elements. Result: an array of float64, shape (rows,).
    """

    name = "row_divergence"
    is_recordable = True
    is_by_rows = True
    is_for_host = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=4, stores=2, row_lists=5)

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        rows = element_count // cast(int, parameters["row_elements"])
        return 16 * rows + 200 * block_count

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
        vectors, (room, more_room) = scratch[:2], scratch[2:]
        row = cast(int, parameters["row_elements"])
        largest: list[Numbers] = []
        sums: list[Numbers] = []
        for source, vector in zip(inputs, vectors, strict=True):
            source.read_into(vector)
            largest.append(row_max(vector, row))
        wait_for_rows(vectors[0])
        for source, vector, most in zip(inputs, vectors, largest, strict=True):
            source.read_into(vector)
            sub_rows(vector, most, row)
            exponential(vector, room, more_room)
            hold(vector)
            sums.append(row_total(vector, row))
        wait_for_rows(vectors[0])
        for vector, sum_of_row in zip(vectors, sums, strict=True):
            div_rows(vector, sum_of_row, row)
            vector.add_(SMALLEST_PROBABILITY)
        q, p = vectors
        ratio = q  # p / q takes q's place
        _divide(ratio, p, room)
        logarithm(ratio, room, more_room)
        return row_total(ratio.mul_(p), row)

    def finish(
        self, parameters: Parameters, element_count: int, state: Any, partials: Sequence[Any]
    ) -> Done[Any]:
        import numpy

        return Done(numpy.concatenate(list(partials)))


def _divide(divisor: Vector, dividend: Vector, room: Vector) -> None:
    """Replaces the divisor by dividend / divisor."""
    room.copy_(dividend).div_(divisor)
    divisor.copy_(room)


@register
class Importance(ApplyOperation):
    """|x₁ − x₀| times the number of its row; inputs x₀, x₁; statistic: the rows' divergences.

    Parameters: row_elements.
    """

    is_positional = True
    name = "importance"
    is_recordable = True
    is_for_host = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=1)

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        return statistics[0], cast(int, parameters["row_elements"])

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        table, row = prepared
        inputs[0].read_into(scratch[0])
        inputs[1].read_into(out)
        out.sub_(scratch[0]).abs_()
        scale_rows(out, table, row, start)


@register
class ImportantChanges(ApplyOperation):
    """x₀ + δ where the importance reaches the threshold that its quartiles give.

    Inputs x₀, x₁, the importance; statistic: the order statistics on both sides of each quartile.
    Parameters: elements.
    """

    is_positional = True
    name = "important_changes"
    is_recordable = True
    is_for_host = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=3)

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        by_count = dict(zip(_counts(cast(int, parameters["elements"])), statistics[0], strict=True))
        quartiles = []
        for share in QUARTILES:
            place, lower, upper = _neighbours(share, cast(int, parameters["elements"]))
            low, high = by_count[lower].value, by_count[upper].value
            # as numpy.quantile does: from the nearer end
            fraction = place - math.floor(place)
            step = (high - low) * fraction
            quartiles.append(
                high - (high - low) * (1 - fraction) if fraction >= 0.5 else low + step
            )
        first, median, third = quartiles
        threshold = median + 1.5 * (third - first)
        return math.nextafter(threshold, -math.inf)

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        base, importance, room = scratch
        inputs[2].read_into(importance)
        inputs[0].read_into(base)
        inputs[1].read_into(out)
        out.sub_(base)
        zero_up_to(out, importance, prepared, room)  # nan: kept
        out.add_(base)


def _neighbours(share: float, elements: int) -> tuple[float, int, int]:
    """Where a quantile lies among the sorted elements (from 0), and the k of the k-th largest
    elements below and above it."""
    place = share * (elements - 1)
    return place, elements - math.floor(place), elements - math.ceil(place)


def _counts(elements: int) -> tuple[int, ...]:
    """The k of all elements that quartiles are interpolated from."""
    return tuple(sorted({k for share in QUARTILES for k in _neighbours(share, elements)[1:]}))


@merge_method(
    Signature(
        name="arcee_fusion",
        summary="Takes over the changes of one model that matter most.",
        formula="out = x₀ + δ where |δ| · KL(softmax(x₁ row) ‖ softmax(x₀ row)) ≥ "
        "median + 1.5 (q₇₅ − q₂₅), else x₀",
        base=BaseModel.REQUIRED,
        min_models=2,
        max_models=2,
        source="https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration",
    )
)
def arcee_fusion(merge: TensorMerge) -> str:
    inputs = [merge.required_base.node, merge.models[0].node]
    row = math.prod(merge.shape[-1:])
    divergence = merge.reduce("row_divergence", inputs, row_elements=row)
    importance = merge.apply("importance", inputs, [divergence], row_elements=row)
    quartiles = merge.reduce(
        "largest_values", [importance], keep=_counts(merge.element_count), is_sampled=False
    )
    return merge.apply(
        "important_changes", [*inputs, importance], [quartiles], elements=merge.element_count
    )
