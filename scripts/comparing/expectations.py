"""What a merged tensor should be, and which of its elements may fall either way.

The value is that of the float64 references in tests/reference. Beside it stand

    slack        what lazymerge's own arithmetic may leave where terms cancel
    magnitude    of the terms that are added: what float32 arithmetic's rounding is in proportion to
    alternatives the values of elements that depend on a decision (which changes survive, which
                 sign is elected, whether a change counts), each allowed where the quantity that
                 decides lies within rounding of its threshold, and nowhere else
    departures   where lazymerge and mergekit are known to mean something else: mergekit's value
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from lazymerge.engine.plan import Plan
from lazymerge.graph.compile import ResolvedTensor
from lazymerge.methods import METHODS
from lazymerge.recipe.signature import BaseModel
from numpy.typing import NDArray

from comparing.inputs import load_exactly
from reference import reference
from reference.case import Case
from reference.sparsified import magnitude_mask, outlier_mask
from reference.task_vectors import arcee_importance

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

FLOAT32_ROUNDING = 2.0**-24
"""Of one operation, in proportion to its result."""

FLOAT64_ROUNDING = 2.0**-53

SAME_DEFINITION = 2.0**-30
"""Far below a float32's spacing, far above what float64 loses; in proportion to the magnitude."""

SPARSIFIED_BY_MAGNITUDE = ("ties", "breadcrumbs", "breadcrumbs_ties")
BY_SIGN = frozenset({"ties", "breadcrumbs_ties"})


@dataclass(frozen=True, slots=True)
class Margin:
    """How far rounding may move what decides, in proportion to what it is made of.

    survival: of magnitudes, variances, importances. election: of the sum whose sign is elected.
    """

    survival: float
    election: float


LAZYMERGE_MARGINS = {
    # float32, several operations each
    **dict.fromkeys(SPARSIFIED_BY_MAGNITUDE, Margin(4 * FLOAT32_ROUNDING, 16 * FLOAT32_ROUNDING)),
    # float64; what is compared is itself a sum that the order of its terms changes
    "sce": Margin(64 * FLOAT64_ROUNDING, 16 * FLOAT64_ROUNDING),
    "ram": Margin(0.0, 0.0),
    "ramplus_tl": Margin(0.0, 0.0),
    # the logarithm of a number near 1 loses most of its digits
    "arcee_fusion": Margin(1e-7, 0.0),
}

MERGEKIT_MARGINS = {
    # float32, with sums of whole tensors among the factors
    **dict.fromkeys(SPARSIFIED_BY_MAGNITUDE, Margin(4 * FLOAT32_ROUNDING, 2.0**-18)),
    "sce": Margin(16 * FLOAT32_ROUNDING, 16 * FLOAT32_ROUNDING),
    "ram": Margin(4 * FLOAT32_ROUNDING, 0.0),
    "ramplus_tl": Margin(4 * FLOAT32_ROUNDING, 0.0),
}
"""arcee_fusion is not among them: its importance in float32 has few right digits."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """What elements may be instead.

    value: float64, unrounded. allowed: where it may be.
    spread: how far it may be moved by what is decided at other elements.
    """

    value: Array
    allowed: Mask
    spread: Array | float = 0.0


@dataclass(frozen=True)
class Expectation:
    """What one tensor of a merge should be.

    case: the operands, as the references see them.
    value: float64, unrounded.
    slack, magnitude: see the module.
    same: how far mergekit's float64 result may be off and still mean the same.
    departures: name → mergekit's value, float64.
    """

    method: str
    case: Case
    value: Array
    slack: Array
    magnitude: Array
    same: Array
    departures: Mapping[str, Array]

    def alternatives(self, margin: Margin, places: NDArray[Any]) -> Iterator[Alternative]:
        """Of the elements at flat `places`."""
        if self.method in SPARSIFIED_BY_MAGNITUDE:
            yield from _of_sparsified(self.method, self.case, margin, places)
        elif self.method == "sce":
            yield from _of_sce(self.case, margin, places)
        elif self.method in ("ram", "ramplus_tl"):
            yield from _of_ram(self.method, self.case, margin, places)
        elif self.method == "arcee_fusion":
            yield from _of_arcee_fusion(self.case, margin, places)


def operands(plan: Plan, resolved: ResolvedTensor) -> dict[str, Any]:
    """What the references are called with for one tensor of a plan."""
    recipe = plan.recipe
    is_used = METHODS[recipe.merge_method].signature.base is not BaseModel.UNUSED
    base = recipe.base_model if is_used else None

    def tensor(model: str) -> Array:
        return load_exactly(Path(model))[resolved.name]

    def known(parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in parameters.items()
            if value is not None and name != "int8_mask"
        }

    models = [model for model in resolved.by_model if model != base]
    return {
        "base": None if base is None else tensor(base),
        "models": [tensor(model) for model in models],
        "parameters": known(resolved.parameters),
        "model_parameters": [known(resolved.by_model[model]) for model in models],
    }


def expect(method: str, operands: Mapping[str, Any]) -> Expectation:
    """The expectation of one tensor; operands: of `reference`."""
    base, models = operands["base"], operands["models"]
    case = Case(
        base,
        tuple(models),
        operands["parameters"],
        tuple(operands["model_parameters"]),
        None,
        np.float64,
    )
    value = reference(method, **operands)
    magnitude = np.abs(value) + sum(np.abs(tensor) for tensor in models)
    if base is not None:
        magnitude = magnitude + np.abs(base)
    slack = 2.0**-44 * magnitude
    if method in SPARSIFIED_BY_MAGNITUDE:
        slack = slack + _float32_slack(method, case)
    same = SAME_DEFINITION * magnitude
    if method == "ramplus_tl":  # its factors of unique changes are float32 whatever the dtype
        same = same + 4 * FLOAT32_ROUNDING * sum(np.abs(delta) for delta in case.deltas)
    departures = {}
    if method == "arcee_fusion":
        departures["lower quantiles"] = _fused(case, _lower_quantile_threshold(case))
    return Expectation(
        method, case, value, slack, np.asarray(magnitude), np.asarray(same), departures
    )


# Task vectors of which the largest, or those of middle rank, survive


def _survivors(method: str, case: Case) -> list[Mask]:
    densities = case.per_model("density", 1.0)
    if method == "ties":
        pairs = zip(case.deltas, densities, strict=True)
        return [magnitude_mask(delta, density) for delta, density in pairs]
    return [
        outlier_mask(delta, density, gamma)
        for delta, density, gamma in zip(
            case.deltas, densities, case.per_model("gamma", 0.01), strict=True
        )
    ]


def _scales(case: Case, survivors: Sequence[Mask]) -> list[float]:
    """What restores the L1 norms, where asked for."""
    scales = []
    for delta, mask in zip(case.deltas, survivors, strict=True):
        norm = float(np.sum(np.abs(delta[mask])))
        is_rescaled = case.flag("rescale", False) and norm >= 1e-7
        scales.append(float(np.sum(np.abs(delta))) / norm if is_rescaled else 1.0)
    return scales


def _float32_slack(method: str, case: Case) -> Array:
    """What float32 arithmetic may leave: in proportion to the largest terms it may have added."""
    scales = _scales(case, _survivors(method, case))
    weights = case.per_model("weight")
    terms = sum(
        np.abs(weight * scale * delta)
        for weight, scale, delta in zip(weights, scales, case.deltas, strict=True)
    )
    smallest = 1.0
    if case.flag("normalize", method == "ties"):
        sums = [
            abs(sum(chosen))
            for chosen in product(*((0.0, weight) for weight in weights))
            if abs(sum(chosen)) > 1e-12
        ]
        smallest = min([1.0, *sums]) if method in BY_SIGN else min(1.0, abs(sum(weights)) or 1.0)
    count = len(weights) + 6
    terms = abs(case.number("lambda", 1.0)) * terms / max(smallest, 1e-8)
    return np.asarray(count * FLOAT32_ROUNDING * (np.abs(case.base) + terms))


def undecided(deciding: Array, kept: Mask, error: Array) -> Mask:
    """Elements whose survival rounding may turn.

    deciding: what was compared. kept: those on one side. error: how far each may be off.

    One that was kept is undecided if one that was not may be as large (or, where the largest are
    dropped, as small), and the other way round.
    """
    result = np.zeros(kept.shape, bool)
    if kept.all() or not kept.any():
        return result
    low, high = deciding - error, deciding + error
    # the kept ones lie between those dropped below and those dropped above
    bottom, top = low[kept].min(), high[kept].max()
    below = ~kept & (deciding <= deciding[kept].min())
    above = ~kept & ~below
    for dropped, edge, reach in (
        (below, bottom, high[below].max() if below.any() else -np.inf),
        (above, top, low[above].min() if above.any() else np.inf),
    ):
        if dropped is below:
            result |= dropped & (high >= edge)
            result |= kept & (low <= reach)
        else:
            result |= dropped & (low <= edge)
            result |= kept & (high >= reach)
    return result


def _of_sparsified(
    method: str, case: Case, margin: Margin, places: NDArray[Any]
) -> Iterator[Alternative]:
    survivors = _survivors(method, case)
    scales = _scales(case, survivors)
    weights = case.per_model("weight")
    by_sign = method in BY_SIGN
    normalize = case.flag("normalize", method == "ties")
    base = case.base.reshape(-1)[places]
    kept, open_, terms = [], [], []
    for delta, mask, weight, scale in zip(case.deltas, survivors, weights, scales, strict=True):
        size = np.abs(delta)
        kept.append(mask.reshape(-1)[places])
        open_.append(undecided(size, mask, margin.survival * size).reshape(-1)[places])
        terms.append(weight * scale * delta.reshape(-1)[places])
    for choice in product((False, True), repeat=len(weights)):
        allowed = np.ones(places.shape, bool)
        chosen = []
        for is_kept, mask, may_turn, term in zip(choice, kept, open_, terms, strict=True):
            allowed &= (mask == is_kept) | may_turn
            chosen.append(term if is_kept else np.zeros_like(term))
        if not allowed.any():
            continue
        total = np.asarray(sum(chosen))
        if not by_sign:
            divisor = sum(weights) if normalize and abs(sum(weights)) >= 1e-8 else 1.0
            yield Alternative(base + case.number("lambda", 1.0) * total / divisor, allowed)
            continue
        size = np.asarray(sum(np.abs(term) for term in chosen))
        elected = np.where(total >= 0, 1.0, -1.0)
        for sign in (1.0, -1.0):
            may_elect = (elected == sign) | (np.abs(total) <= margin.election * size)
            mixed = np.zeros_like(base)
            divisors = np.zeros_like(base)
            for weight, term in zip(weights, chosen, strict=True):
                agrees = np.sign(term) == sign
                mixed += np.where(agrees, term, 0.0)
                divisors += np.where(agrees, weight, 0.0)
            if normalize:
                mixed = mixed / np.where(divisors == 0, 1.0, divisors)
            value = base + case.number("lambda", 1.0) * mixed
            yield Alternative(value, allowed & may_elect)


# sce


def _of_sce(case: Case, margin: Margin, places: NDArray[Any]) -> Iterator[Alternative]:
    deltas = case.deltas
    topk = case.number("select_topk", 1.0)
    squares = np.asarray(sum(delta * delta for delta in deltas)) / len(deltas)
    selected = np.full(squares.shape, topk >= 1)
    may_turn = np.zeros(squares.shape, bool)
    if 0 < topk < 1:
        mean = sum(deltas) / len(deltas)
        variance = np.asarray(sum((delta - mean) ** 2 for delta in deltas)) / len(deltas)
        count = int(topk * np.count_nonzero(variance))
        order = np.argsort(-variance.reshape(-1), kind="stable")
        selected.reshape(-1)[order[:count]] = True
        may_turn = undecided(variance, selected, margin.survival * squares)
    energies = [float(np.mean(np.where(selected, delta, 0.0) ** 2)) for delta in deltas]
    whole = sum(energies)
    is_equal = whole < 1e-6
    shares = [1 / len(deltas) if is_equal else energy / whole for energy in energies]
    moves = [0.0 if is_equal else move for move in _share_moves(deltas, selected, may_turn, shares)]
    base = case.base.reshape(-1)[places]
    is_selected = selected.reshape(-1)[places]
    turns = may_turn.reshape(-1)[places]
    chosen = [delta.reshape(-1)[places] for delta in deltas]
    yield Alternative(base, ~is_selected | turns)
    total = np.asarray(sum(chosen))
    size = np.asarray(sum(np.abs(delta) for delta in chosen))
    elected = np.where(total >= 0, 1.0, -1.0)
    for sign in (1.0, -1.0):
        mixed = np.zeros_like(base)
        divisors = np.zeros_like(base)
        moved = np.zeros_like(base)
        largest = np.zeros_like(base)
        for share, move, delta in zip(shares, moves, chosen, strict=True):
            agrees = np.sign(delta) == sign
            mixed += np.where(agrees, share * delta, 0.0)
            divisors += np.where(agrees, share, 0.0)
            moved += np.where(agrees, move, 0.0)
            largest = np.maximum(largest, np.where(agrees, np.abs(delta), 0.0))
        # a mean of changes of one sign, whose weights move, stays among these changes
        left = np.maximum(divisors - moved, 1e-12)
        spread = largest * np.minimum(1.0, 2 * moved / left)
        may_elect = (elected == sign) | (np.abs(total) <= margin.election * size)
        yield Alternative(
            base + mixed / np.maximum(divisors, 1e-6), (is_selected | turns) & may_elect, spread
        )


def _share_moves(
    deltas: Sequence[Array], selected: Mask, may_turn: Mask, shares: Sequence[float]
) -> list[float]:
    """How far the selection of other undecided elements may move the models' shares.

    As many of them are selected in any case: those of least, or of most, energy at the worst.
    """
    count = int(np.count_nonzero(selected & may_turn))
    moves = []
    for delta in deltas:
        squares = np.sort(delta[may_turn] ** 2)
        chosen = float(np.sum(delta[selected & may_turn] ** 2))
        least, most = float(squares[:count].sum()), float(squares[squares.size - count :].sum())
        moves.append(max(most - chosen, chosen - least))
    whole = float(sum(np.sum(delta[selected] ** 2) for delta in deltas))
    left = max(whole - sum(moves), 1e-300)
    return [(move + share * sum(moves)) / left for move, share in zip(moves, shares, strict=True)]


# ram


def _of_ram(method: str, case: Case, margin: Margin, places: NDArray[Any]) -> Iterator[Alternative]:
    epsilon = case.number("epsilon", 1e-5)
    actives = [np.abs(delta) > epsilon for delta in case.deltas]
    count = np.asarray(sum(active.astype(int) for active in actives))
    boosts = [1.0] * len(actives)
    if method == "ramplus_tl":
        for index, active in enumerate(actives):
            alone = float(np.count_nonzero(active & (count == 1)))
            ratio = float(np.count_nonzero(active & (count > 1))) / max(alone, epsilon)
            boosts[index] = 1 + case.number("r", 0.1) * min(ratio, case.number("alpha", 0.2))
    base = case.base.reshape(-1)[places]
    deltas = [delta.reshape(-1)[places] for delta in case.deltas]
    for choice in product((False, True), repeat=len(deltas)):
        allowed = np.ones(places.shape, bool)
        total = np.zeros_like(base)
        for is_active, active, delta, boost in zip(choice, actives, deltas, boosts, strict=True):
            may_turn = np.abs(np.abs(delta) - epsilon) <= margin.survival * epsilon
            allowed &= (active.reshape(-1)[places] == is_active) | may_turn
            if is_active:
                total += delta * (boost if sum(choice) == 1 else 1.0)
        yield Alternative(base + total / max(sum(choice), 1), allowed)


# arcee_fusion


def _importance(case: Case) -> Array:
    (other,), (delta,) = case.models, case.deltas
    return arcee_importance(case.base, other, delta)


def _fused(case: Case, threshold: float) -> Array:
    (delta,) = case.deltas
    return np.where(_importance(case) >= threshold, case.base + delta, case.base)


def _lower_quantile_threshold(case: Case) -> float:
    """With the element at or below each quantile, where lazymerge interpolates between two."""
    lower, median, upper = np.quantile(_importance(case), [0.25, 0.5, 0.75], method="lower")
    return float(median + 1.5 * (upper - lower))


def _of_arcee_fusion(case: Case, margin: Margin, places: NDArray[Any]) -> Iterator[Alternative]:
    importance = _importance(case)
    lower, median, upper = np.quantile(importance, [0.25, 0.5, 0.75])
    threshold = median + 1.5 * (upper - lower)
    near = np.abs(importance - threshold) <= margin.survival * abs(threshold)
    (delta,) = case.deltas
    is_near = near.reshape(-1)[places]
    base = case.base.reshape(-1)[places]
    yield Alternative(base, is_near)
    yield Alternative(base + delta.reshape(-1)[places], is_near)
