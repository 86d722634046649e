"""Methods that move along great circles. Their result lies in the span of the inputs, so the
Gram matrix gives the coefficients and a linear combination gives the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from ..graph.operation import Parameters, register
from ..graph.operations.combination import LinearCombination
from ..recipe.signature import BaseModel, Parameter, Scope, Signature
from .merge import TensorMerge, merge_method

PARALLEL_COSINE = 0.9995
"""Above this |cos θ| slerp is a linear interpolation: sin θ is too small to divide by."""

SMALLEST_NORM = 1e-8
"""Vectors of at most this norm have no direction and are not normalised."""


def slerp_coefficients(gram: Sequence[Sequence[float]], t: float) -> tuple[float, float]:
    """c₀, c₁ such that c₀a + c₁b lies at the fraction t of the arc from a to b.

    gram: 2 × 2, inner products of a and b.
    """
    norms = [math.sqrt(gram[i][i]) for i in range(2)]
    scale = math.prod(norm if norm > SMALLEST_NORM else 1.0 for norm in norms)
    cosine = gram[0][1] / scale
    if not math.isnan(cosine):
        cosine = max(-1.0, min(1.0, cosine))
    if abs(cosine) > PARALLEL_COSINE:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@register
class Slerp(LinearCombination):
    """c₀a + c₁b with the coefficients of spherical interpolation. Parameters: t."""

    name = "slerp"

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Sequence[float]:
        return slerp_coefficients(statistics[0], cast(float, parameters["t"]))


@merge_method(
    Signature(
        name="slerp",
        summary="Spherical interpolation from the base to one other model.",
        formula="out = sin((1−t)θ)/sin θ · x₀ + sin(tθ)/sin θ · x₁,  θ = ∠(x₀, x₁)",
        parameters=(
            Parameter(
                "t", float, Scope.GLOBAL, "0 gives the base, 1 the other model", required=True
            ),
        ),
        base=BaseModel.REQUIRED,
        min_models=2,
        max_models=2,
        source="https://en.wikipedia.org/wiki/Slerp",
    )
)
def slerp(merge: TensorMerge) -> str:
    inputs = [merge.required_base.node, merge.models[0].node]
    gram = merge.reduce("gram", inputs)
    return merge.apply("slerp", inputs, [gram], t=merge.number("t"))
