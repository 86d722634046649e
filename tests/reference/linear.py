"""out = Σ cᵢ xᵢ: linear (model soups, arXiv:2203.05482), passthrough, task arithmetic
(arXiv:2212.04089)."""

from __future__ import annotations

import numpy as np

from .case import Case, Tensor


def linear(case: Case) -> Tensor:
    """Σ wᵢxᵢ / (normalize ? Σw : 1). Raises ValueError where Σw = 0 is to be divided by."""
    weights = case.per_model("weight")
    divisor = 1.0
    if case.flag("normalize", True):
        divisor = sum(weights)
        if divisor == 0:
            raise ValueError("the weights sum to 0 and cannot be normalised")
    total = np.zeros_like(case.models[0])
    for weight, model in zip(weights, case.models, strict=True):
        total = total + weight * model
    return total / divisor


def passthrough(case: Case) -> Tensor:
    """scale · x₁, or x₁ where no scale is given."""
    (model,) = case.models
    (scale,) = case.per_model("scale", None)
    return model.copy() if scale is None else scale * model


def task_arithmetic(case: Case) -> Tensor:
    """x₀ + λ Σ wᵢδᵢ / (normalize ? D : 1), D = Σw, or 1 where |D| < 1e-8."""
    weights = case.per_model("weight")
    divisor = 1.0
    if case.flag("normalize", False):
        divisor = sum(weights)
        if abs(divisor) < 1e-8:
            divisor = 1.0
    total = np.zeros_like(case.base)
    for weight, delta in zip(weights, case.deltas, strict=True):
        total = total + weight * delta
    return case.base + case.number("lambda", 1.0) * total / divisor
