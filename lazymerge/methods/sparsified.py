"""Methods that thin the task vectors δᵢ = xᵢ − x₀ before they mix them.

threshold   Reduce: the magnitude that the k largest |δᵢ| reach, for every model in one pass
rescale     Reduce, if asked for: ‖δᵢ‖₁ and the norm of what survives
mix         Apply: thin, weigh, elect a sign per element, average those that agree
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
from ..graph.operations.selection import Threshold
from ..graph.vector import keep_largest, total
from ..recipe.signature import BaseModel, Parameter, Scope, Signature
from .merge import TensorMerge, merge_method

if TYPE_CHECKING:
    from ..graph.vector import Vector

SMALLEST_NORM = 1e-7
"""L1 norms below this are not rescaled to."""


def thin(change: Vector, threshold: Threshold | None, start: int) -> None:
    """Zeroes, in place, the elements of a block that do not reach the threshold; None keeps all."""
    if threshold is not None:
        keep_largest(change, threshold.value, threshold.below, threshold.stop_index, start)


def _thresholds(parameters: Parameters, statistics: Sequence[Any]) -> Sequence[Threshold | None]:
    """The first statistic where thresholds were searched, else nothing is thinned."""
    count = len(cast("tuple[float, ...]", parameters["weights"]))
    return statistics[0] if parameters["is_thinned"] else [None] * count


@register
class SurvivingNorms(ReduceOperation["tuple[tuple[float, float], ...]", "tuple[float, ...]"]):
    """Per model, what the surviving changes must be multiplied by to restore the L1 norm.

    Inputs x₀, x₁ … xₙ; statistic: the thresholds. Result: n factors ‖δ‖₁/‖δ̃‖₁.
    """

    name = "surviving_norms"
    is_recordable = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=2)

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
        return Pass(state=statistics[0])

    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: Sequence[Threshold | None],
        scratch: Sequence[Vector],
        start: int,
    ) -> tuple[tuple[float, float], ...]:
        base, change = scratch
        inputs[0].read_into(base)
        norms = []
        for source, threshold in zip(inputs[1:], state, strict=True):
            source.read_into(change)
            change.sub_(base).abs_()
            before = total(change)
            thin(change, threshold, start)
            norms.append((before, total(change)))
        return tuple(norms)

    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: Any,
        partials: Sequence[tuple[tuple[float, float], ...]],
    ) -> Done[tuple[float, ...]]:
        factors = []
        for column in zip(*partials, strict=True):
            before, after = (sum(norms) for norms in zip(*column, strict=True))
            usable = before >= SMALLEST_NORM and after >= SMALLEST_NORM
            factors.append(before / after if usable and math.isfinite(before) else 1.0)
        return Done(tuple(factors))


@register
class SignConsensus(ApplyOperation):
    """x₀ + λ · (mean of the weighted surviving changes that agree with the elected sign).

    Inputs x₀, x₁ … xₙ. Statistics: the thresholds, then the rescaling factors, each if used.

    Parameters:
        weights: n floats.
        lambda: factor of the mixed change.
        normalize: divide by the sum of the weights that agree, else by 1.
        is_thinned, is_rescaled: whether the statistics are there.
    """

    name = "sign_consensus"
    is_recordable = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=input_count + 2)

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        weights = cast("tuple[float, ...]", parameters["weights"])
        factors = statistics[-1] if parameters["is_rescaled"] else [1.0] * len(weights)
        scales = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
        return weights, scales, _thresholds(parameters, statistics), parameters

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        weights, scales, thresholds, parameters = prepared
        *changes, base, total, spare = scratch
        inputs[0].read_into(base)
        for source, change, scale, threshold in zip(
            inputs[1:], changes, scales, thresholds, strict=True
        ):
            source.read_into(change)
            change.sub_(base)
            thin(change, threshold, start)
            if scale != 1.0:
                change.mul_(scale)

        # the elected sign, +1 or -1, as floats: arithmetic on 0, 1 and -1 costs a fraction of
        # boolean masks here
        out.copy_(changes[0])
        for change in changes[1:]:
            out.add_(change)
        sign = out.ge_(0).mul_(2).sub_(1)

        # times the sign, those that agree are positive; the others become zero
        for change in changes:
            change.mul_(sign).clamp_min_(0)
        total.copy_(changes[0])
        for change in changes[1:]:
            total.add_(change)
        if parameters["normalize"]:
            divisor = changes[0].gt_(0).mul_(weights[0])
            for change, weight in zip(changes[1:], weights[1:], strict=True):
                divisor.add_(change.gt_(0).mul_(weight))
            spare.copy_(divisor).eq_(0)
            total.div_(divisor.add_(spare))
        sign.mul_(total)
        if parameters["lambda"] != 1.0:
            sign.mul_(parameters["lambda"])
        sign.add_(base)


@merge_method(
    Signature(
        name="ties",
        summary="Trims task vectors to their largest elements, elects a sign, averages agreement.",
        formula="out = x₀ + λ Σ yᵢ[sign yᵢ = s] / Σ wᵢ[sign yᵢ = s],  "
        "yᵢ = wᵢ topk(xᵢ − x₀),  s = sign Σ yᵢ",
        parameters=(
            Parameter("weight", float, Scope.NON_BASE, "weight of the task vector", required=True),
            Parameter(
                "density", float, Scope.NON_BASE, "fraction of elements kept", 1.0, False, 0.0, 1.0
            ),
            Parameter("normalize", bool, Scope.GLOBAL, "divide by the agreeing weights", True),
            Parameter("rescale", bool, Scope.GLOBAL, "restore the L1 norm after trimming", False),
            Parameter("lambda", float, Scope.GLOBAL, "factor of the mixed task vector", 1.0),
            Parameter("int8_mask", bool, Scope.GLOBAL, "accepted, without effect", False),
        ),
        base=BaseModel.REQUIRED,
        min_models=2,
        source="https://arxiv.org/abs/2306.01708",
    )
)
def ties(merge: TensorMerge) -> str:
    base = merge.required_base.node
    # a model of which nothing survives takes part in neither the election nor the average
    models = [model for model in merge.models if model.number("density") > 0]
    if not models:
        return merge.apply("linear_combination", [base], coefficients=(1.0,))
    keep = tuple(
        None
        if model.number("density") >= 1
        else max(1, int(model.number("density") * merge.element_count))
        for model in models
    )
    inputs = [base, *(model.node for model in models)]
    is_thinned = any(count is not None for count in keep)
    is_rescaled = is_thinned and merge.flag("rescale")
    statistics = []
    if is_thinned:
        statistics.append(merge.reduce("magnitude_thresholds", inputs, keep=keep))
    if is_rescaled:
        statistics.append(merge.reduce("surviving_norms", inputs, statistics[:1]))
    return merge.apply(
        "sign_consensus",
        inputs,
        statistics,
        weights=tuple(model.number("weight") for model in models),
        is_thinned=is_thinned,
        is_rescaled=is_rescaled,
        normalize=merge.flag("normalize"),
        **{"lambda": merge.number("lambda")},
    )
