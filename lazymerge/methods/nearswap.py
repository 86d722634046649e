"""Moving to another model where it is near: changes cut to a bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..graph.operation import ApplyOperation, BlockInput, Cost, Parameters, register
from ..recipe.signature import BaseModel, Parameter, Scope, Signature
from .merge import TensorMerge, merge_method

if TYPE_CHECKING:
    from ..graph.vector import Vector

SMALLEST_DISTANCE = 1e-6
"""Distances below this count as this."""


@register
class BoundedChange(ApplyOperation):
    """x₀ + clamp(f·δ, −bound, bound); inputs x₀, x₁; parameters: factor (f), bound."""

    name = "bounded_change"
    is_recordable = True

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=2)

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        base, unbounded = scratch
        inputs[0].read_into(base)
        inputs[1].read_into(out)
        out.sub_(base)
        unbounded.copy_(out).mul_(0)  # nan for inf, which a bound would hide
        out.mul_(prepared["factor"]).clamp_min_(-prepared["bound"]).clamp_max_(prepared["bound"])
        out.add_(unbounded).add_(base)


@merge_method(
    Signature(
        name="nearswap",
        summary="Takes another model where it is near the base, and less of it farther away.",
        formula="out = w · x₁ + (1−w) · x₀,  w = clamp(t / max(|x₁−x₀|, 1e-6), 0, 1)",
        parameters=(
            Parameter("t", float, Scope.GLOBAL, "distance that is still near", required=True),
        ),
        base=BaseModel.REQUIRED,
        min_models=2,
        max_models=2,
        source="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    )
)
def nearswap(merge: TensorMerge) -> str:
    # w · δ is δ where |δ| ≤ t, and t · sign δ elsewhere; below 1e-6 it grows with t/1e-6
    t = max(0.0, merge.number("t"))
    return merge.apply(
        "bounded_change",
        [merge.required_base.node, merge.models[0].node],
        factor=min(1.0, t / SMALLEST_DISTANCE),
        bound=t,
    )
