"""What methods that draw random numbers give on average, and how far off one draw may be.

The two programs draw different numbers, so their elements cannot be compared one by one. But for
every element there are only 2ⁿ outcomes (each of n changes survives or not), with known values and
probabilities, which give its mean and variance. A sum over the elements of a tensor is then nearly
normal, and how many standard deviations it is off (z) tells whether the program draws from that
distribution. Three sums are looked at:

    changed   elements that differ from the base's: the share of changes that survive
    mean      out − x₀
    gain      (out − x₀) in proportion to its expectation, element by element: 1 on average

Each program is held to its own definition. They differ where changes are scaled up to make up for
those dropped: lazymerge divides by the probability of survival; mergekit multiplies all survivors
by one factor that restores the L1 norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

import numpy as np
import torch

from comparing.expectations import Array
from reference import reference, round_once, to_float64
from reference.case import Case
from reference.sparsified import della_probabilities

RANDOM_METHODS = ("dare_linear", "dare_ties", "della", "della_linear")

MOST_MODELS = 4
"""The base included: the outcomes of three changes are eight."""

LEAST_ELEMENTS = 4000
"""Of a tensor whose sums count as normal."""

LIMIT_Z = 6.0
"""Beyond, it is no accident: among a hundred thousand sums one is beyond 5."""

STATISTICS = ("changed", "mean", "gain")


@dataclass(frozen=True, slots=True)
class Outcome:
    """Element by element: mean and variance of out − x₀, probability that out is not x₀."""

    base: Array
    mean: Array
    variance: Array
    changed: Array


@dataclass(slots=True)
class Tally:
    """What was found in a number of elements, of one program.

    changed, expected_changed: elements that differ from the base, and how many were expected to.
    change, expected_change: Σ (out − x₀).
    projection, expected_projection: Σ (out − x₀)·E[out − x₀]; their ratio is the gain.
    worst_z: by statistic, over tensors.
    worst: where that was.
    """

    elements: int = 0
    changed: int = 0
    expected_changed: float = 0.0
    change: float = 0.0
    expected_change: float = 0.0
    projection: float = 0.0
    expected_projection: float = 0.0
    worst_z: dict[str, float] = field(default_factory=dict)
    worst: dict[str, str] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Takes in what was found in other elements."""
        for entry in fields(self):
            if entry.name not in ("worst_z", "worst"):
                mine, more = getattr(self, entry.name), getattr(other, entry.name)
                setattr(self, entry.name, mine + more)
        for name, z in other.worst_z.items():
            if z > self.worst_z.get(name, -1.0):
                self.worst_z[name] = z
                self.worst[name] = other.worst[name]

    @property
    def largest_z(self) -> float:
        """Of all statistics."""
        return max(self.worst_z.values(), default=0.0)


def probabilities(method: str, case: Case) -> list[Array]:
    """Of survival, for every model and element."""
    densities = case.per_model("density", 1.0)
    if method.startswith("dare"):
        return [np.full(case.base.shape, min(1.0, max(0.0, density))) for density in densities]
    epsilons = case.per_model("epsilon", 0.15)
    return [
        della_probabilities(delta, density, epsilon)
        for delta, density, epsilon in zip(case.deltas, densities, epsilons, strict=True)
    ]


def outcome(method: str, operands: Mapping[str, Any], *, restores_norm: bool) -> Outcome:
    """What to expect of a tensor; operands: of `reference`.

    restores_norm: as mergekit scales up, where `rescale` asks for it.
    """
    base: Array = operands["base"]
    models: list[Array] = list(operands["models"])
    parameters: dict[str, Any] = dict(operands["parameters"])
    own = operands["model_parameters"]
    case = Case(base, tuple(models), parameters, tuple(own), None, np.float64)
    chances = probabilities(method, case)
    if restores_norm and case.flag("rescale", True):
        for index, (delta, chance) in enumerate(zip(case.deltas, chances, strict=True)):
            norm = float(np.sum(chance * np.abs(delta)))
            factor = float(np.sum(np.abs(delta))) / norm if norm >= 1e-7 else 1.0
            models[index] = base + factor * delta
        parameters["rescale"] = False
    mean, square, changed = (np.zeros_like(base) for _ in range(3))
    for choice in product((False, True), repeat=len(models)):
        chance = np.ones_like(base)
        for is_kept, survival in zip(choice, chances, strict=True):
            chance = chance * (survival if is_kept else 1 - survival)
        if not chance.any():
            continue
        value = reference(
            method,
            base=base,
            models=models,
            parameters=parameters,
            model_parameters=own,
            keep=[np.full(base.shape, is_kept) for is_kept in choice],
        )
        change = value - base
        mean += chance * change
        square += chance * change * change
        changed += chance * (to_float64(round_once(value, torch.float32)) != base)
    return Outcome(base, mean, np.maximum(square - mean * mean, 0.0), changed)


def tally(name: str, written: torch.Tensor, expected: Outcome) -> Tally:
    """How one tensor, written in float32, compares with what was to be expected."""
    values = to_float64(written)
    change = values - expected.base
    is_changed = values != expected.base
    result = Tally(
        elements=values.size,
        changed=int(np.count_nonzero(is_changed)),
        expected_changed=float(expected.changed.sum()),
        change=float(change.sum()),
        expected_change=float(expected.mean.sum()),
        projection=float((change * expected.mean).sum()),
        expected_projection=float((expected.mean * expected.mean).sum()),
    )
    if values.size < LEAST_ELEMENTS:
        return result
    error = change - expected.mean
    off = {
        "changed": (
            result.changed - result.expected_changed,
            (expected.changed * (1 - expected.changed)).sum(),
        ),
        "mean": (error.sum(), expected.variance.sum()),
        "gain": (
            (error * expected.mean).sum(),
            (expected.variance * expected.mean * expected.mean).sum(),
        ),
    }
    # what float32 arithmetic leaves, where nothing is random
    rounding = 2.0**-20 * float(np.abs(expected.base).max(initial=0.0)) * values.size**0.5
    allowance = {
        "changed": 1.0,
        "mean": rounding,
        "gain": rounding * float(np.abs(expected.mean).max(initial=0.0)),
    }
    for statistic, (difference, variance) in off.items():
        beyond = max(0.0, abs(float(difference)) - allowance[statistic])
        deviation = float(np.sqrt(max(float(variance), 0.0)))
        z = 0.0 if beyond == 0 else beyond / deviation if deviation > 0 else float("inf")
        result.worst_z[statistic] = z
        result.worst[statistic] = name
    return result
