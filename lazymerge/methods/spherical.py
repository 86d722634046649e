"""Methods that move along great circles. Their result lies in the span of the inputs, so the
Gram matrix gives the coefficients and a linear combination gives the result: one pass for the
matrix, a few operations on n × n numbers, one pass for the sum.

nuslerp and model_stock may work on every row or column by itself; the same is then done with
vectors in place of numbers (spherical_vectors.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from ..errors import InputError
from ..graph.operation import Parameters, register
from ..graph.operations.combination import LinearCombination, TaskVectors
from ..recipe.signature import BaseModel, Parameter, Scope, Signature
from .linear import SMALLEST_DIVISOR
from .merge import TensorMerge, merge_method

Gram = Sequence[Sequence[float]]

PARALLEL_COSINE = 0.9995
"""Above this |cos θ| slerp is a linear interpolation: sin θ is too small to divide by."""

SMALLEST_NORM = 1e-8
"""Vectors of at most this norm have no direction and are not normalised."""

SMALLEST_SINE_SQUARED = 1e-16
"""Below this sin² θ nuslerp is a linear interpolation."""

SMALLEST_WEIGHT_SUM = 1e-6
"""Below this |w₁ + w₂| nuslerp takes both models alike."""

SMALLEST_MEAN = 1e-7
"""Below this |m| multislerp's directions cancel, whatever eps: by way of the Gram matrix |m| is
known to 1e-8 only, the root of float64's precision."""

SMALLEST_PRODUCT = 1e-6
"""Of two norms, in the cosines of model_stock."""


def norm_of(gram: Gram, coefficients: Sequence[float]) -> float:
    """|Σ cᵢxᵢ|, by the Gram matrix of the xᵢ."""
    return math.sqrt(max(0.0, inner(gram, coefficients, coefficients)))


def inner(gram: Gram, left: Sequence[float], right: Sequence[float]) -> float:
    """⟨Σ aᵢxᵢ, Σ bᵢxᵢ⟩, by the Gram matrix of the xᵢ."""
    return math.fsum(
        a * b * gram[i][j]
        for i, a in enumerate(left)
        for j, b in enumerate(right)
        if a != 0 and b != 0
    )


def norms_of(gram: Gram) -> list[float]:
    """|xᵢ|."""
    return [math.sqrt(gram[i][i]) for i in range(len(gram))]


def is_finite(gram: Gram) -> bool:
    """Whether no input holds inf or nan, and no product of two has left the range of float64."""
    return all(math.isfinite(number) for row in gram for number in row)


def clamped(cosine: float) -> float:
    """A cosine that rounding has not taken beyond ±1; nan stays."""
    return cosine if math.isnan(cosine) else max(-1.0, min(1.0, cosine))


def cosine_of(gram: Gram) -> float:
    """cos ∠(a, b), by the 2 × 2 Gram matrix."""
    scale = math.prod(norm if norm > SMALLEST_NORM else 1.0 for norm in norms_of(gram))
    return clamped(gram[0][1] / scale)


def arc_coefficients(cosine: float, t: float) -> tuple[float, float]:
    """sin((1−t)θ)/sin θ and sin(tθ)/sin θ."""
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp_coefficients(gram: Gram, t: float) -> tuple[float, float]:
    """c₀, c₁ such that c₀a + c₁b lies at the fraction t of the arc from a to b.

    gram: 2 × 2, inner products of a and b.
    """
    cosine = cosine_of(gram)
    if abs(cosine) > PARALLEL_COSINE:
        return 1.0 - t, t
    return arc_coefficients(cosine, t)


def nuslerp_coefficients(gram: Gram, t: float) -> tuple[float, float]:
    """As slerp_coefficients, to the last sine that is not 0."""
    cosine = cosine_of(gram)
    if 1.0 - cosine * cosine <= SMALLEST_SINE_SQUARED:
        return 1.0 - t, t
    return arc_coefficients(cosine, t)


def multislerp_coefficients(gram: Gram, weights: Sequence[float], eps: float) -> list[float] | None:
    """cᵢ such that Σ cᵢxᵢ is the weighted mean direction at the weighted mean length.

    The method's step from the mean along the tangent T = Σ wᵢ(uᵢ − ⟨uᵢ,m̂⟩m̂) is no step: with
    m = Σ wᵢuᵢ, T = m − ⟨m,m̂⟩m̂ = 0.

    Returns None where three or more directions cancel.
    """
    norms = norms_of(gram)
    direction = [
        weight / (norm + eps) if norm + eps > 0 else 0.0
        for weight, norm in zip(weights, norms, strict=True)
    ]
    length = norm_of(gram, direction)
    if length < max(eps, SMALLEST_MEAN):
        # zeros in all models, as biases may be, have no directions that could cancel
        return list(weights) if len(weights) == 2 or max(norms) <= eps else None
    radius = math.fsum(weight * norm for weight, norm in zip(weights, norms, strict=True))
    return [radius * part / length for part in direction]


def karcher_coefficients(gram: Gram, max_iter: int, tol: float) -> list[float]:
    """cᵢ such that Σ cᵢxᵢ is the Karcher mean of the directions at the mean length.

    The iteration runs on coefficients: the mean is u = Σ cᵢxᵢ, and ⟨u, uᵢ⟩ = (G c)ᵢ / |xᵢ|.
    """
    norms = norms_of(gram)
    radius = math.fsum(norms) / len(norms)
    used = [index for index, norm in enumerate(norms) if norm > tol]
    if not used:
        return [0.0] * len(norms)
    alpha = 1.0 / len(used)

    def unit(index: int) -> list[float]:
        return [1.0 / norms[index] if place == index else 0.0 for place in range(len(norms))]

    units = {index: unit(index) for index in used}
    mean = [alpha * sum(units[index][place] for index in used) for place in range(len(norms))]
    length = norm_of(gram, mean)
    mean = units[used[0]] if length < tol or length == 0 else [part / length for part in mean]
    for _ in range(max_iter):
        tangent = [0.0] * len(norms)
        for index in used:
            cosine = clamped(inner(gram, mean, units[index]))
            angle = math.acos(cosine)
            # at the antipode there is no direction to go, and nowhere to go without an angle
            if tol <= angle <= math.pi - tol and math.sin(angle) > 0:
                step = alpha * angle / math.sin(angle)
                tangent = [
                    sum_so_far + step * (one - cosine * part)
                    for sum_so_far, one, part in zip(tangent, units[index], mean, strict=True)
                ]
        length = norm_of(gram, tangent)
        if length < tol or length == 0:
            break
        step = math.sin(length) / length
        mean = [
            math.cos(length) * part + step * along
            for part, along in zip(mean, tangent, strict=True)
        ]
        length = norm_of(gram, mean)
        mean = [part / length for part in mean]
    return [radius * part for part in mean]


def model_stock_share(gram: Gram) -> float:
    """t, the models' share in t·mean(xᵢ) + (1−t)·x₀, by the Gram matrix of the δᵢ."""
    count = len(gram)
    norms = norms_of(gram)
    cosines = [
        gram[i][j] / max(norms[i] * norms[j], SMALLEST_PRODUCT)
        for i in range(count)
        for j in range(i)
    ]
    cosine = clamped(math.fsum(cosines) / len(cosines))
    denominator = 1.0 + (count - 1) * cosine
    return 0.0 if abs(denominator) < SMALLEST_PRODUCT else count * cosine / denominator


def _weights(parameters: Parameters) -> Sequence[float]:
    return cast("Sequence[float]", parameters["weights"])


def _number(parameters: Parameters, name: str) -> float:
    return cast(float, parameters[name])


def _not_numbers(gram: Gram) -> list[float]:
    """Coefficients where an input is not finite: nan everywhere."""
    return [math.nan] * len(gram)


@register
class Slerp(LinearCombination):
    """c₀a + c₁b with the coefficients of spherical interpolation. Parameters: t."""

    name = "slerp"

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Sequence[float]:
        return slerp_coefficients(statistics[0], _number(parameters, "t"))


@register
class Nuslerp(LinearCombination):
    """c₁a + c₂b with the coefficients of nuslerp. Parameters: t."""

    name = "nuslerp"

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Sequence[float]:
        return nuslerp_coefficients(statistics[0], _number(parameters, "t"))


@register
class NuslerpOfChanges(TaskVectors):
    """x₀ + c₁δ₁ + c₂δ₂ with the coefficients of nuslerp. Parameters: t."""

    name = "nuslerp_of_changes"

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        return {"factors": nuslerp_coefficients(statistics[0], _number(parameters, "t"))}


def _multislerp(parameters: Parameters, gram: Gram) -> list[float]:
    if not is_finite(gram):
        return _not_numbers(gram)
    found = multislerp_coefficients(gram, _weights(parameters), _number(parameters, "eps"))
    if found is None:
        raise InputError(
            f"tensor {parameters['tensor']}: the weighted directions of the models cancel, so "
            "there is no mean direction; change their weights, or use linear for this merge"
        )
    return found


@register
class Multislerp(LinearCombination):
    """Σ cᵢxᵢ with the coefficients of multislerp. Parameters: weights, eps, tensor."""

    name = "multislerp"

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Sequence[float]:
        return _multislerp(parameters, statistics[0])


@register
class MultislerpOfChanges(TaskVectors):
    """x₀ + Σ cᵢδᵢ with the coefficients of multislerp. Parameters: weights, eps, tensor."""

    name = "multislerp_of_changes"

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        return {"factors": _multislerp(parameters, statistics[0])}


@register
class Karcher(LinearCombination):
    """Σ cᵢxᵢ with the coefficients of the Karcher mean. Parameters: max_iter, tol."""

    name = "karcher"

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Sequence[float]:
        gram = statistics[0]
        if not is_finite(gram):
            return _not_numbers(gram)
        iterations = int(_number(parameters, "max_iter"))
        return karcher_coefficients(gram, iterations, _number(parameters, "tol"))


@register
class ModelStock(TaskVectors):
    """x₀ + t · (mean(xᵢ) − x₀), t by the Gram matrix of the δᵢ."""

    name = "model_stock"

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        gram = statistics[0]
        share = model_stock_share(gram) if is_finite(gram) else math.nan
        return {"factors": (share / len(gram),) * len(gram)}


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


@merge_method(
    Signature(
        name="nuslerp",
        summary="Spherical interpolation of two models, or of their changes, by their weights.",
        formula="out = sin((1−t)θ)/sin θ · x₁ + sin(tθ)/sin θ · x₂,  t = w₂/(w₁+w₂),  "
        "θ = ∠(x₁, x₂);  with a base the same of δ₁, δ₂, plus x₀",
        parameters=(
            Parameter("weight", float, Scope.NON_BASE, "weight of the model", required=True),
            Parameter(
                "nuslerp_flatten", bool, Scope.GLOBAL, "whole tensors, not their vectors", True
            ),
            Parameter(
                "nuslerp_row_wise",
                bool,
                Scope.GLOBAL,
                "vectors along the first dimension, not the last",
                False,
            ),
        ),
        base=BaseModel.OPTIONAL,
        min_models=2,
        max_models=2,
        source="https://en.wikipedia.org/wiki/Slerp",
    )
)
def nuslerp(merge: TensorMerge) -> str:
    first, second = (model.number("weight") for model in merge.models)
    total = first + second
    t = 0.5 if abs(total) < SMALLEST_WEIGHT_SUM else second / total
    nodes = [model.node for model in merge.models]
    inputs = nodes if merge.base is None else [merge.base.node, *nodes]
    suffix = "" if merge.base is None else "_of_changes"
    is_by_column = merge.flag("nuslerp_row_wise") and len(merge.shape) > 1
    row = math.prod(merge.shape[1:]) if is_by_column else math.prod(merge.shape[-1:])
    is_one_vector = not is_by_column and row == merge.element_count
    if merge.flag("nuslerp_flatten") or is_one_vector:
        gram = merge.reduce(f"gram{suffix}", inputs)
        return merge.apply(f"nuslerp{suffix}", inputs, [gram], t=t)
    gram = merge.reduce(
        "gram_of_columns" if is_by_column else "gram_of_rows",
        inputs,
        row_elements=row,
        is_of_changes=merge.base is not None,
    )
    return merge.apply(
        f"nuslerp_by_vector{suffix}",
        inputs,
        [gram],
        t=t,
        row_elements=row,
        is_by_column=is_by_column,
    )


@merge_method(
    Signature(
        name="multislerp",
        summary="Weighted mean of many models' directions, at their weighted mean length.",
        formula="out = (Σ wᵢ|xᵢ|) · m/|m|,  m = Σ wᵢ xᵢ/(|xᵢ|+eps);  with a base the same of the "
        "δᵢ, plus x₀",
        parameters=(
            Parameter("weight", float, Scope.NON_BASE, "weight of the model", required=True),
            Parameter(
                "normalize_weights", bool, Scope.GLOBAL, "divide them by their sum first", True
            ),
            Parameter("eps", float, Scope.GLOBAL, "norms below it count as none", 1e-8, False, 0.0),
        ),
        base=BaseModel.OPTIONAL,
        min_models=2,
        source="https://en.wikipedia.org/wiki/Slerp",
    )
)
def multislerp(merge: TensorMerge) -> str:
    weights = [model.number("weight") for model in merge.models]
    if merge.flag("normalize_weights"):
        total = sum(weights)
        if abs(total) < SMALLEST_DIVISOR:
            merge.fail(
                f"the weights {weights} sum to zero, so they cannot be normalized; "
                "change them or set `normalize_weights: false`"
            )
        weights = [weight / total for weight in weights]
    nodes = [model.node for model in merge.models]
    inputs = nodes if merge.base is None else [merge.base.node, *nodes]
    suffix = "" if merge.base is None else "_of_changes"
    gram = merge.reduce(f"gram{suffix}", inputs)
    return merge.apply(
        f"multislerp{suffix}",
        inputs,
        [gram],
        weights=tuple(weights),
        eps=merge.number("eps"),
        tensor=merge.name,
    )


@merge_method(
    Signature(
        name="karcher",
        summary="Karcher mean of the models' directions, at their mean length.",
        formula="out = mean|xᵢ| · argmin over unit u of Σ ∠(u, xᵢ)²",
        parameters=(
            Parameter("max_iter", int, Scope.GLOBAL, "most iterations", 10, False, 0),
            Parameter("tol", float, Scope.GLOBAL, "shorter steps end them", 1e-5, False, 0.0),
        ),
        min_models=2,
        source="https://arxiv.org/abs/2603.04972",
    )
)
def karcher(merge: TensorMerge) -> str:
    inputs = [model.node for model in merge.models]
    gram = merge.reduce("gram", inputs)
    return merge.apply(
        "karcher", inputs, [gram], max_iter=merge.number("max_iter"), tol=merge.number("tol")
    )


@merge_method(
    Signature(
        name="model_stock",
        summary="Average of fine-tuned models, drawn to the base by the angle between them.",
        formula="out = t · mean(xᵢ) + (1−t) · x₀,  t = n cos θ/(1 + (n−1) cos θ),  "
        "cos θ the mean over pairs of cos ∠(δᵢ, δⱼ)",
        parameters=(Parameter("filter_wise", bool, Scope.GLOBAL, "every row by itself", False),),
        base=BaseModel.REQUIRED,
        min_models=3,
        source="https://arxiv.org/abs/2403.19522",
    )
)
def model_stock(merge: TensorMerge) -> str:
    inputs = [merge.required_base.node, *(model.node for model in merge.models)]
    row = math.prod(merge.shape[-1:])
    if not merge.flag("filter_wise") or row == merge.element_count:
        return merge.apply("model_stock", inputs, [merge.reduce("gram_of_changes", inputs)])
    gram = merge.reduce("gram_of_rows", inputs, row_elements=row, is_of_changes=True)
    return merge.apply("model_stock_by_row", inputs, [gram], row_elements=row)
