"""Methods on spheres: slerp, nuslerp, multislerp, karcher (arXiv:2603.04972), model_stock
(arXiv:2403.19522).

Everything here works on the vectors themselves, never on their Gram matrix: the engine does
the opposite, so agreement means something.
"""

from __future__ import annotations

from math import acos, cos, pi, sin

import numpy as np

from .case import Case, Tensor, by_column, by_row


def _norm(tensor: Tensor) -> float:
    return float(np.sqrt(np.sum(tensor * tensor)))


def _dot(left: Tensor, right: Tensor) -> float:
    return float(np.sum(left * right))


def _clamp(cosine: float) -> float:
    return min(1.0, max(-1.0, cosine))


def _cosine(first: Tensor, second: Tensor) -> float:
    """Cosine of the angle between two tensors; one of norm ≤ 1e-8 is not normalised."""
    units = []
    for tensor in (first, second):
        norm = _norm(tensor)
        units.append(tensor / norm if norm > 1e-8 else tensor)
    return _clamp(_dot(*units))


def _arc(first: Tensor, second: Tensor, t: float, cosine: float) -> Tensor:
    """sin((1−t)θ)/sin θ · first + sin(tθ)/sin θ · second."""
    theta = acos(cosine)
    return (sin((1 - t) * theta) * first + sin(t * theta) * second) / sin(theta)


def slerp(case: Case) -> Tensor:
    """From the base (t = 0) to the one other model (t = 1)."""
    (other,) = case.models
    t = case.number("t")
    cosine = _cosine(case.base, other)
    if abs(cosine) > 0.9995:
        return (1 - t) * case.base + t * other
    return _arc(case.base, other, t, cosine)


def nuslerp(case: Case) -> Tensor:
    """Slerp of two models, or of their task vectors where there is a base, by their weights.

    Whole tensors, or rows (vectors along the last dimension), or columns (along the first).
    """
    first_weight, second_weight = case.per_model("weight")
    weight_sum = first_weight + second_weight
    t = 0.5 if abs(weight_sum) < 1e-6 else second_weight / weight_sum

    def between(first: Tensor, second: Tensor) -> Tensor:
        cosine = _cosine(first, second)
        if 1 - cosine * cosine <= 1e-16:
            return (1 - t) * first + t * second
        return _arc(first, second, t, cosine)

    first, second = case.models if case.base_or_none is None else case.deltas
    if case.flag("nuslerp_flatten", True):
        result = between(first, second)
    elif case.flag("nuslerp_row_wise", False):
        result = by_column(between, first, second)
    else:
        result = by_row(between, first, second)
    return result if case.base_or_none is None else case.base + result


def multislerp(case: Case) -> Tensor:
    """One step of the barycentre on the sphere, at the weighted mean length.

    Raises ValueError where the mean of three or more directions vanishes.
    """
    weights = case.per_model("weight")
    if case.flag("normalize_weights", True):
        weight_sum = sum(weights)
        if weight_sum == 0:
            raise ValueError("the weights sum to 0 and cannot be normalised")
        weights = [weight / weight_sum for weight in weights]
    eps = case.number("eps", 1e-8)
    vectors = list(case.models) if case.base_or_none is None else case.deltas
    offset = 0.0 if case.base_or_none is None else case.base

    units = [vector / (_norm(vector) + eps) for vector in vectors]
    mean = sum(weight * unit for weight, unit in zip(weights, units, strict=True))
    mean = np.asarray(mean)
    if _norm(mean) < eps:
        if max(map(_norm, vectors)) < eps:  # nothing in any model: nothing in the merge
            return offset + np.asarray(
                sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
            )
        if len(vectors) != 2:
            raise ValueError("the weighted directions cancel: no mean direction")
        return offset + weights[0] * vectors[0] + weights[1] * vectors[1]
    mean = mean / _norm(mean)
    tangent = np.zeros_like(mean)
    for weight, unit in zip(weights, units, strict=True):
        tangent = tangent + weight * (unit - _dot(unit, mean) * mean)
    length = _norm(tangent)
    direction = cos(length) * mean
    if length > 0:
        direction = direction + sin(length) / length * tangent
    radius = sum(weight * _norm(vector) for weight, vector in zip(weights, vectors, strict=True))
    return offset + radius * direction


def karcher(case: Case) -> Tensor:
    """The equally weighted Karcher mean of the directions, at the mean length.

    A term at θᵢ > π − tol has no direction (the logarithm is undefined at the antipode) and is
    skipped as one at θᵢ < tol is.
    """
    tol = case.number("tol", 1e-5)
    norms = [_norm(model) for model in case.models]
    radius = sum(norms) / len(norms)
    units = [model / norm for model, norm in zip(case.models, norms, strict=True) if norm > tol]
    if not units:
        return np.zeros_like(case.models[0])
    alpha = 1 / len(units)

    start = np.asarray(sum(alpha * unit for unit in units))
    mean = units[0] if _norm(start) < tol else start / _norm(start)
    for _ in range(int(case.number("max_iter", 10))):
        tangent = np.zeros_like(mean)
        for unit in units:
            cosine = _clamp(_dot(mean, unit))
            theta = acos(cosine)
            if tol <= theta <= pi - tol:
                tangent = tangent + alpha * theta / sin(theta) * (unit - cosine * mean)
        length = _norm(tangent)
        if length < tol:
            break
        mean = cos(length) * mean + sin(length) / length * tangent
        mean = mean / _norm(mean)
    return radius * mean


def model_stock(case: Case) -> Tensor:
    """t·mean(xᵢ) + (1−t)·x₀ with t = n cos/(1 + (n−1) cos), cos the mean over pairs of δ."""
    count = len(case.models)
    if count < 2:
        raise ValueError("model_stock needs two models besides the base")

    def stock(base: Tensor, *models_and_deltas: Tensor) -> Tensor:
        models, deltas = models_and_deltas[:count], models_and_deltas[count:]
        cosines = [
            _dot(deltas[i], deltas[j]) / max(_norm(deltas[i]) * _norm(deltas[j]), 1e-6)
            for i in range(count)
            for j in range(i)
        ]
        cosine = _clamp(sum(cosines) / len(cosines))
        denominator = 1 + (count - 1) * cosine
        t = 0.0 if abs(denominator) < 1e-6 else count * cosine / denominator
        return t * (sum(models) / count) + (1 - t) * base

    operands = (case.base, *case.models, *case.deltas)
    if case.flag("filter_wise", False):
        return by_row(stock, *operands)
    return stock(*operands)
