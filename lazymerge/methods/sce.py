"""Select, calculate, erase: changes on which the models differ most, weighed by their energy.

count      Reduce: elements on which the models differ at all (variance > 0)
threshold  Reduce: the variance that the wanted share of them reaches, found exactly
energies   Reduce: Σ δᵢ² of what is selected, for every model
mix        Apply: select, elect a sign per element, average those that agree
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
from ..graph.operations.gram import exact_sum
from ..graph.vector import dot, keep_largest, total, zero_up_to
from ..recipe.signature import BaseModel, Parameter, Scope, Signature
from .merge import TensorMerge, merge_method

if TYPE_CHECKING:
    from ..graph.operations.selection import Threshold
    from ..graph.vector import Vector

SMALLEST_ENERGY = 1e-6
"""Below this sum of mean energies all models weigh the same."""

SMALLEST_DIVISOR = 1e-6


def load_changes(inputs: Sequence[BlockInput], base: Vector, changes: Sequence[Vector]) -> None:
    """Fills `base` with x₀ and each of `changes` with xᵢ − x₀."""
    inputs[0].read_into(base)
    for source, change in zip(inputs[1:], changes, strict=True):
        source.read_into(change)
        change.sub_(base)


@register
class Variance(ApplyOperation):
    """The population variance of δ₁ … δₙ, element by element; inputs x₀, x₁ … xₙ."""

    name = "variance"
    is_recordable = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=input_count + 1)

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        base, mean, *changes = scratch
        load_changes(inputs, base, changes)
        mean.copy_(changes[0])
        for change in changes[1:]:
            mean.add_(change)
        mean.mul_(1 / len(changes))
        for number, change in enumerate(changes):
            change.sub_(mean)
            change.mul_(change)
            if number:
                out.add_(change)
            else:
                out.copy_(change)
        out.mul_(1 / len(changes))


@register
class CountPositive(ReduceOperation[float, int]):
    """How many elements of the input are above 0."""

    name = "count_positive"
    is_recordable = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=1)

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        return 64 * block_count

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
    ) -> float:
        (values,) = scratch
        inputs[0].read_into(values)
        return total(values.gt_(0))

    def finish(
        self, parameters: Parameters, element_count: int, state: Any, partials: Sequence[float]
    ) -> Done[int]:
        return Done(int(sum(partials)))


class _Selection:
    """Changes, those of them zeroed that are not selected."""

    @staticmethod
    def load(
        inputs: Sequence[BlockInput],
        is_selected: bool,
        threshold: Threshold | None,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        """Fills `base` and `changes`; inputs x₀, x₁ … xₙ, and the variance where it matters."""
        base, variance, room, *changes = scratch
        models = inputs[: len(changes) + 1]
        if not is_selected:
            load_changes(models, base, changes)
            return
        inputs[len(models)].read_into(variance)
        if threshold is not None:
            keep_largest(variance, threshold.value, threshold.below, threshold.stop_index, start)
        load_changes(models, base, changes)
        for change in changes:
            # without a threshold there is nothing to select: k is 0
            zero_up_to(change, variance, 0.0 if threshold is not None else math.inf, room)


@register
class SelectedEnergies(ReduceOperation["tuple[float, ...]", "tuple[float, ...]"]):
    """Σ δᵢ² over the selected elements, for every model.

    Inputs x₀, x₁ … xₙ, and the variance where is_selected; then its threshold is the statistic.
    """

    name = "selected_energies"
    is_recordable = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=input_count + 1 + (not parameters["is_selected"]))

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        return block_count * (input_count * 32 + 64)

    def expected_passes(self, parameters: Parameters) -> int:
        return 1

    def first_pass(
        self,
        parameters: Parameters,
        statistics: Sequence[Any],
        element_count: int,
        block_count: int,
    ) -> Pass:
        return Pass(state=(statistics[0] if parameters["is_selected"] else None,))

    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> tuple[float, ...]:
        _Selection.load(inputs, bool(parameters["is_selected"]), state[0], scratch, start)
        _, _, room, *changes = scratch
        return tuple(dot(change, change, room) for change in changes)

    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: Any,
        partials: Sequence[tuple[float, ...]],
    ) -> Done[tuple[float, ...]]:
        return Done(tuple(exact_sum(column) for column in zip(*partials, strict=True)))


@register
class SelectedConsensus(ApplyOperation):
    """x₀ + the mean, by energy, of the selected changes that agree with the elected sign.

    Inputs x₀, x₁ … xₙ, and the variance where is_selected. Statistics: its threshold, likewise,
    then the energies. Parameters: is_selected, elements (of the tensor).
    """

    is_positional = True
    name = "selected_consensus"
    is_recordable = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=input_count + 1 + (not parameters["is_selected"]))

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        is_selected = bool(parameters["is_selected"])
        energies = [energy / int(str(parameters["elements"])) for energy in statistics[-1]]
        sum_of_all = exact_sum(energies)
        weights = [
            1 / len(energies) if sum_of_all < SMALLEST_ENERGY else energy / sum_of_all
            for energy in energies
        ]
        return is_selected, statistics[0] if is_selected else None, weights

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        is_selected, threshold, weights = prepared
        _Selection.load(inputs, is_selected, threshold, scratch, start)
        base, divisor, sign, *changes = scratch
        sign.copy_(changes[0])
        for change in changes[1:]:
            sign.add_(change)
        sign.ge_(0).mul_(2).sub_(1)
        # times the sign, those that agree are positive; the others become zero
        for number, (change, weight) in enumerate(zip(changes, weights, strict=True)):
            change.mul_(sign).clamp_min_(0)
            if number:
                out.add_(change.mul_(weight))
            else:
                out.copy_(change.mul_(weight))
            change.gt_(0)
        # an underflown product counts as none: its share of the sum is none either
        divisor.copy_(changes[0].mul_(weights[0]))
        for change, weight in zip(changes[1:], weights[1:], strict=True):
            divisor.add_(change.mul_(weight))
        out.div_(divisor.clamp_min_(SMALLEST_DIVISOR)).mul_(sign).add_(base)


@merge_method(
    Signature(
        name="sce",
        summary="Selects where the models differ most, weighs them by energy, elects a sign.",
        formula="out = x₀ + Σ Wᵢδᵢ[sign δᵢ = s] / Σ Wᵢ[sign δᵢ = s],  Wᵢ ∝ mean(δᵢ²),  "
        "s = sign Σ δᵢ,  over the select_topk elements of largest variance",
        parameters=(
            Parameter(
                "select_topk",
                float,
                Scope.GLOBAL,
                "fraction of the differing elements that is selected",
                1.0,
                False,
                0.0,
                1.0,
            ),
            Parameter("int8_mask", bool, Scope.GLOBAL, "accepted, without effect", False),
        ),
        base=BaseModel.REQUIRED,
        min_models=2,
        source="https://arxiv.org/abs/2408.07990",
    )
)
def sce(merge: TensorMerge) -> str:
    share = merge.number("select_topk")
    base = merge.required_base.node
    if share <= 0:
        return merge.apply("linear_combination", [base], coefficients=(1.0,))
    inputs = [base, *(model.node for model in merge.models)]
    statistics: list[str] = []
    is_selected = share < 1
    if is_selected:
        variance = merge.apply("variance", inputs)
        count = merge.reduce("count_positive", [variance])
        statistics = [
            merge.reduce("largest_values", [variance], [count], share=share, is_sampled=True)
        ]
        inputs = [*inputs, variance]
    energies = merge.reduce("selected_energies", inputs, statistics, is_selected=is_selected)
    return merge.apply(
        "selected_consensus",
        inputs,
        [*statistics, energies],
        is_selected=is_selected,
        elements=merge.element_count,
    )
