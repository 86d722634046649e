"""Changes that are averaged over the models that make them, and not over all.

counts   Reduce (ramplus_tl): elements that one model changes alone, and with others
mix      Apply: the mean of the changes, per element, over the models that make one
"""

from __future__ import annotations

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
from ..graph.vector import keep_largest, total
from ..recipe.signature import BaseModel, Parameter, Scope, Signature
from .merge import TensorMerge, merge_method
from .sce import load_changes

if TYPE_CHECKING:
    from ..graph.vector import Vector


def _load_active(
    inputs: Sequence[BlockInput], epsilon: float, scratch: Sequence[Vector], start: int
) -> None:
    """Fills `base`, the changes (those of at most epsilon zeroed), and how many there are."""
    base, count, spare, *changes = scratch
    load_changes(inputs, base, changes)
    for number, change in enumerate(changes):
        keep_largest(change, epsilon, epsilon, 0, start)
        spare.copy_(change).abs_().gt_(0)
        if number:
            count.add_(spare)
        else:
            count.copy_(spare)


class _Float64:
    """What sums and counts are made in."""

    is_recordable = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=input_count + 2)


@register
class ActiveCounts(_Float64, ReduceOperation["tuple[tuple[float, float], ...]", Any]):
    """Per model, how many elements it changes together with others, and alone.

    Inputs x₀, x₁ … xₙ. Parameters: epsilon; changes of at most that are none.
    """

    name = "active_counts"

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        return block_count * input_count * 160

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
    ) -> tuple[tuple[float, float], ...]:
        _load_active(inputs, cast(float, parameters["epsilon"]), scratch, start)
        _, count, spare, *changes = scratch
        spare.copy_(count).eq_(1)
        counts = []
        for change in changes:
            change.abs_().gt_(0)
            every = total(change)
            counts.append((every, total(change.mul_(spare))))
        return tuple(counts)

    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: Any,
        partials: Sequence[tuple[tuple[float, float], ...]],
    ) -> Done[Any]:
        counts = []
        for column in zip(*partials, strict=True):
            every, alone = (sum(numbers) for numbers in zip(*column, strict=True))
            counts.append((every - alone, alone))
        return Done(tuple(counts))


@register
class ActiveMean(_Float64, ApplyOperation):
    """x₀ + the mean, per element, of the changes above epsilon.

    Inputs x₀, x₁ … xₙ. Statistics: the counts, where unique changes are scaled. Parameters:
    epsilon; r and alpha where unique changes are scaled by 1 + r · min(shared/unique, alpha).
    """

    is_positional = True
    name = "active_mean"

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        epsilon = cast(float, parameters["epsilon"])
        if not statistics:
            return epsilon, None
        r, alpha = cast(float, parameters["r"]), cast(float, parameters["alpha"])
        return epsilon, [
            1 + r * min(shared / max(alone, epsilon), alpha)
            if max(alone, epsilon) > 0
            else 1 + r * alpha
            for shared, alone in statistics[0]
        ]

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        epsilon, boosts = prepared
        _load_active(inputs, epsilon, scratch, start)
        base, count, factor, *changes = scratch
        for number, change in enumerate(changes):
            if boosts is not None and boosts[number] != 1.0:
                factor.copy_(count).eq_(1).mul_(boosts[number] - 1).add_(1)
                change.mul_(factor)
            if number:
                out.add_(change)
            else:
                out.copy_(change)
        out.div_(count.clamp_min_(1)).add_(base)


EPSILON = Parameter(
    "epsilon", float, Scope.GLOBAL, "smaller changes count as none", 1e-5, False, 0.0
)
SOURCE = "https://arxiv.org/abs/2601.13572"


@merge_method(
    Signature(
        name="ram",
        summary="Averages every element's changes over the models that change it.",
        formula="out = x₀ + Σ δᵢ[|δᵢ| > ε] / max(c, 1),  c = number of models with |δᵢ| > ε",
        parameters=(EPSILON,),
        base=BaseModel.REQUIRED,
        min_models=2,
        source=SOURCE,
    )
)
def ram(merge: TensorMerge) -> str:
    inputs = [merge.required_base.node, *(model.node for model in merge.models)]
    return merge.apply("active_mean", inputs, epsilon=merge.number("epsilon"))


@merge_method(
    Signature(
        name="ramplus_tl",
        summary="As ram, with changes that one model makes alone scaled up.",
        formula="out = x₀ + Σ bᵢδᵢ[|δᵢ| > ε] / max(c, 1),  bᵢ = 1 + r · min(shared/unique, alpha) "
        "where c = 1, else 1",
        parameters=(
            Parameter("r", float, Scope.GLOBAL, "how much unique changes are scaled up", 0.1),
            Parameter("alpha", float, Scope.GLOBAL, "bound of the ratio shared/unique", 0.2),
            EPSILON,
        ),
        base=BaseModel.REQUIRED,
        min_models=2,
        source=SOURCE,
    )
)
def ramplus_tl(merge: TensorMerge) -> str:
    inputs = [merge.required_base.node, *(model.node for model in merge.models)]
    epsilon = merge.number("epsilon")
    counts = merge.reduce("active_counts", inputs, epsilon=epsilon)
    return merge.apply(
        "active_mean",
        inputs,
        [counts],
        epsilon=epsilon,
        r=merge.number("r"),
        alpha=merge.number("alpha"),
    )
