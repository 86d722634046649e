"""Other methods on task vectors: sce (FuseChat, arXiv:2408.07990), ram and ramplus_tl
(arXiv:2601.13572), nearswap, arcee_fusion."""

from __future__ import annotations

import numpy as np

from .case import Case, Mask, Tensor, as_rows


def sce(case: Case) -> Tensor:
    """Select by variance across models, weigh by energy, erase the minority sign.

    select_topk ≥ 1 selects every element, those without variance included; ≤ 0 selects none.
    """
    deltas = case.deltas
    topk = case.number("select_topk", 1.0)
    if case.base.size == 0 or topk <= 0:
        return case.base.copy()
    if topk < 1:
        mean = sum(deltas) / len(deltas)
        variance = np.asarray(sum((delta - mean) ** 2 for delta in deltas) / len(deltas))
        count = int(topk * np.count_nonzero(variance))
        descending = np.argsort(-variance.reshape(-1), kind="stable")
        selected = np.zeros(variance.size, bool)
        selected[descending[:count]] = True
        selected = selected.reshape(variance.shape)
        deltas = [np.where(selected, delta, 0.0) for delta in deltas]

    energies = [float(np.mean(delta * delta)) for delta in deltas]
    if sum(energies) < 1e-6:
        weights = [1 / len(deltas)] * len(deltas)
    else:
        weights = [energy / sum(energies) for energy in energies]

    elected = np.where(sum(deltas) >= np.zeros_like(case.base), 1.0, -1.0)
    total = np.zeros_like(case.base)
    divisor = np.zeros_like(case.base)
    for weight, delta in zip(weights, deltas, strict=True):
        agrees = np.sign(delta) == elected
        total = total + np.where(agrees, weight * delta, 0.0)
        divisor = divisor + np.where(agrees, weight, 0.0)
    return case.base + total / np.maximum(divisor, 1e-6)


def _active(case: Case) -> list[Mask]:
    epsilon = case.number("epsilon", 1e-5)
    return [np.abs(delta) > epsilon for delta in case.deltas]


def ram(case: Case) -> Tensor:
    """x₀ + the mean, per element, of the task vectors that move it by more than epsilon."""
    total = np.zeros_like(case.base)
    count = np.zeros_like(case.base)
    for delta, active in zip(case.deltas, _active(case), strict=True):
        total = total + np.where(active, delta, 0.0)
        count = count + active
    return case.base + total / np.maximum(count, 1)


def ramplus_tl(case: Case) -> Tensor:
    """As ram, with what only one model moves scaled by 1 + r·min(ρ, alpha)."""
    actives = _active(case)
    count = np.zeros_like(case.base)
    for active in actives:
        count = count + active
    total = np.zeros_like(case.base)
    for delta, active in zip(case.deltas, actives, strict=True):
        shared_count = np.count_nonzero(active & (count > 1))
        unique_count = np.count_nonzero(active & (count == 1))
        rho = shared_count / max(unique_count, case.number("epsilon", 1e-5))
        boost = 1 + case.number("r", 0.1) * min(rho, case.number("alpha", 0.2))
        scaled = np.where(count == 1, boost * delta, delta)
        total = total + np.where(active, scaled, 0.0)
    return case.base + total / np.maximum(count, 1)


def nearswap(case: Case) -> Tensor:
    """Take the other model where it is nearer than t, and less of it the farther it is."""
    (other,) = case.models
    (delta,) = case.deltas
    weight = np.clip(case.number("t") / np.maximum(np.abs(delta), 1e-6), 0.0, 1.0)
    return weight * other + (1 - weight) * case.base


def _softmax_rows(rows: Tensor) -> Tensor:
    exponentials = np.exp(rows - rows.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def arcee_importance(base: Tensor, other: Tensor, delta: Tensor) -> Tensor:
    """|δ| times its row's KL(softmax(x₁)‖softmax(x₀)), 1e-8 added to both distributions."""
    if delta.size == 0:
        return np.zeros_like(delta)
    p = _softmax_rows(as_rows(other)) + 1e-8
    q = _softmax_rows(as_rows(base)) + 1e-8
    divergence = np.sum(p * np.log(p / q), axis=1, keepdims=True)
    return (np.abs(as_rows(delta)) * divergence).reshape(delta.shape)


def arcee_fusion(case: Case) -> Tensor:
    """x₀ + δ where importance ≥ median + 1.5 (q₇₅ − q₂₅), quantiles interpolated linearly."""
    (other,) = case.models
    (delta,) = case.deltas
    if delta.size == 0:
        return case.base.copy()
    importance = arcee_importance(case.base, other, delta)
    lower, median, upper = np.quantile(importance, [0.25, 0.5, 0.75])
    threshold = median + 1.5 * (upper - lower)
    return np.where(importance >= threshold, case.base + delta, case.base)
