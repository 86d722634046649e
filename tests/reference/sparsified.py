"""Sparsified task vectors: δᵢ → δ̃ᵢ, then mix.

TIES arXiv:2306.01708, DARE arXiv:2311.03099, Breadcrumbs arXiv:2312.06795, DELLA
arXiv:2406.11617. Random methods take their keep bits as masks from the caller.

All kinds of sparsification agree at the ends: density ≥ 1 returns δ as it is (no mask is looked
at, nothing is rescaled), density ≤ 0 returns zeros.
"""

from __future__ import annotations

import numpy as np

from .case import Case, Mask, Tensor, as_rows


def magnitude_mask(delta: Tensor, density: float) -> Mask:
    """Exactly k = max(1, int(density·N)) largest |δ|; equal ones in ascending element order."""
    if density <= 0:
        return np.zeros(delta.shape, bool)
    if density >= 1:
        return np.ones(delta.shape, bool)
    count = max(1, int(density * delta.size))
    descending = np.argsort(-np.abs(delta.reshape(-1)), kind="stable")
    mask = np.zeros(delta.size, bool)
    mask[descending[:count]] = True
    return mask.reshape(delta.shape)


def outlier_mask(delta: Tensor, density: float, gamma: float) -> Mask:
    """Drop the largest int(gamma·N) |δ| and the smallest, so that int(density·N) remain.

    Where density + gamma > 1 nothing small is dropped and fewer large ones are.
    """
    if density <= 0:
        return np.zeros(delta.shape, bool)
    if density >= 1:
        return np.ones(delta.shape, bool)
    keep_count = int(density * delta.size)
    bottom_count = max(0, delta.size - keep_count - int(gamma * delta.size))
    ascending = np.argsort(np.abs(delta.reshape(-1)), kind="stable")
    mask = np.zeros(delta.size, bool)
    mask[ascending[bottom_count : bottom_count + keep_count]] = True
    return mask.reshape(delta.shape)


def della_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Keep probability of each element, rising with its rank of |δ| within its row.

    A row of one element has no ranks to spread over: p = density.

    Raises ValueError where density ± epsilon leaves (0, 1), unless density is 0 or ≥ 1.
    """
    if density == 0:
        return np.zeros(delta.shape)
    if density >= 1:
        return np.ones(delta.shape)
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise ValueError(f"density {density} ± epsilon {epsilon} must lie within (0, 1)")
    rows = as_rows(delta)
    length = rows.shape[1]
    if length == 1:
        return np.full(delta.shape, density)
    probabilities = np.zeros_like(rows)
    for row, probability in zip(rows, probabilities, strict=True):
        ascending = np.argsort(np.abs(row), kind="stable")
        probability[ascending] = density - epsilon + 2 * epsilon * np.arange(length) / (length - 1)
    return probabilities.reshape(delta.shape)


def _l1_rescaled(delta: Tensor, sparse: Tensor) -> Tensor:
    """δ̃ scaled to the L1 norm of δ, unless δ̃ has none to speak of."""
    norm = np.sum(np.abs(sparse))
    return sparse if norm < 1e-7 else sparse * (np.sum(np.abs(delta)) / norm)


def _mix(case: Case, sparse: list[Tensor], *, consensus: bool, normalize: bool) -> Tensor:
    """x₀ + λ Σ wᵢδ̃ᵢ / D; with consensus, over the models that agree with the elected sign."""
    weights = case.per_model("weight")
    normalize = case.flag("normalize", normalize)
    weighted = [weight * delta for weight, delta in zip(weights, sparse, strict=True)]
    total = np.zeros_like(case.base)
    divisor = np.zeros_like(case.base)
    for term in weighted:
        total = total + term
    if consensus:
        elected = np.where(total >= 0, 1.0, -1.0)
        total = np.zeros_like(case.base)
        for weight, term in zip(weights, weighted, strict=True):
            agrees = np.sign(term) == elected
            total = total + np.where(agrees, term, 0.0)
            divisor = divisor + np.where(agrees, weight, 0.0)
        divisor = np.where(divisor == 0, 1.0, divisor)
    else:
        weight_sum = sum(weights)
        divisor = divisor + (1.0 if abs(weight_sum) < 1e-8 else weight_sum)
    if normalize:
        total = total / divisor
    return case.base + case.number("lambda", 1.0) * total


def _dare(case: Case, *, consensus: bool) -> Tensor:
    sparse = []
    for index, delta in enumerate(case.deltas):
        density = case.per_model("density", 1.0)[index]
        if density >= 1:
            sparse.append(delta)
        elif density <= 0:
            sparse.append(np.zeros_like(delta))
        else:
            scale = 1 / density if case.flag("rescale", True) else 1.0
            sparse.append(np.where(case.keep[index], delta * scale, 0.0))
    return _mix(case, sparse, consensus=consensus, normalize=False)


def _della(case: Case, *, consensus: bool, normalize: bool) -> Tensor:
    sparse = []
    for index, delta in enumerate(case.deltas):
        density = case.per_model("density", 1.0)[index]
        epsilon = case.per_model("epsilon", 0.15)[index]
        probabilities = della_probabilities(delta, density, epsilon)
        if density >= 1:
            sparse.append(delta)
        elif density == 0:
            sparse.append(np.zeros_like(delta))
        else:
            scaled = delta / probabilities if case.flag("rescale", True) else delta
            sparse.append(np.where(case.keep[index], scaled, 0.0))
    return _mix(case, sparse, consensus=consensus, normalize=normalize)


def _masked(case: Case, masks: list[Mask], *, consensus: bool, normalize: bool) -> Tensor:
    sparse = []
    for delta, mask in zip(case.deltas, masks, strict=True):
        kept = np.where(mask, delta, 0.0)
        sparse.append(_l1_rescaled(delta, kept) if case.flag("rescale", False) else kept)
    return _mix(case, sparse, consensus=consensus, normalize=normalize)


def _breadcrumbs(case: Case, *, consensus: bool) -> Tensor:
    masks = [
        outlier_mask(delta, density, gamma)
        for delta, density, gamma in zip(
            case.deltas,
            case.per_model("density", 1.0),
            case.per_model("gamma", 0.01),
            strict=True,
        )
    ]
    return _masked(case, masks, consensus=consensus, normalize=False)


def ties(case: Case) -> Tensor:
    """Trim by magnitude, elect a sign, average those that agree."""
    masks = [
        magnitude_mask(delta, density)
        for delta, density in zip(case.deltas, case.per_model("density", 1.0), strict=True)
    ]
    return _masked(case, masks, consensus=True, normalize=True)


def dare_linear(case: Case) -> Tensor:
    """Random drop and rescale by 1/density, then the weighted sum."""
    return _dare(case, consensus=False)


def dare_ties(case: Case) -> Tensor:
    """Random drop and rescale by 1/density, then sign election."""
    return _dare(case, consensus=True)


def breadcrumbs(case: Case) -> Tensor:
    """Drop the largest and the smallest, then the weighted sum."""
    return _breadcrumbs(case, consensus=False)


def breadcrumbs_ties(case: Case) -> Tensor:
    """Drop the largest and the smallest, then sign election."""
    return _breadcrumbs(case, consensus=True)


def della(case: Case) -> Tensor:
    """Rank-dependent random drop, rescale by 1/pⱼ, then sign election."""
    return _della(case, consensus=True, normalize=True)


def della_linear(case: Case) -> Tensor:
    """Rank-dependent random drop, rescale by 1/pⱼ, then the weighted sum."""
    return _della(case, consensus=False, normalize=False)
