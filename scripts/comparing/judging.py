"""Two merged tensors against what they should be, element by element.

For every element there are

    ours, theirs   what lazymerge and mergekit have written
    exact          what mergekit writes when it is told to compute in float64
    expected       the float64 reference

and it is looked at closely if ours or theirs is more than an ulp from expected, if they are more
than an ulp apart, or if exact is not expected. Then it must be explained, by the first that holds:

    rounding     near expected, within what rounding leaves of the terms that were added
    threshold    near an alternative: the other outcome of a decision (survival, election, activity)
                 whose deciding quantity lies within rounding of its threshold, in float64
    departure    theirs, and exact too, follow a definition that lazymerge is known not to follow
    float32      theirs alone: none of the above, but the same program in float64 gives expected,
                 so that nothing but its float32 arithmetic can be the reason

What is none of these is unexplained: one of the two computes something else than documented.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray

from comparing.expectations import (
    LAZYMERGE_MARGINS,
    MERGEKIT_MARGINS,
    Array,
    Expectation,
    Margin,
    Mask,
)
from reference import to_float64, ulp
from reference.rounding import distance_in_ulps

EXPLANATIONS = ("none needed", "rounding", "threshold", "departure", "float32", "unexplained")
"""From the best to the worst; an element's is the worst of those of its values."""

NOT_NEEDED, ROUNDING, THRESHOLD, DEPARTURE, FLOAT32, UNEXPLAINED = range(len(EXPLANATIONS))

FLOAT32_RESULT = 2.0**-15
"""How near to a value theirs must be to have meant it: float32 arithmetic with norms and inner
products of whole tensors, in proportion to the magnitudes."""

Codes = NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Example:
    """One element that is not explained."""

    tensor: str
    place: int
    ours: float
    theirs: float
    exact: float
    expected: float

    def __str__(self) -> str:
        return (
            f"{self.tensor}[{self.place}]: lazymerge {self.ours!r}, mergekit {self.theirs!r}, "
            f"mergekit in float64 {self.exact!r}, reference {self.expected!r}"
        )


@dataclass(slots=True)
class Verdict:
    """What was found in a number of elements.

    apart: lazymerge and mergekit more than an ulp from each other.
    ours_off, theirs_off: lazymerge, mergekit more than an ulp from the reference.
    worst_*: the largest of these distances, in ulps.
    rounding … unexplained: how many of the elements that were looked at have this explanation.
    """

    elements: int = 0
    apart: int = 0
    worst_apart: float = 0.0
    ours_off: int = 0
    worst_ours: float = 0.0
    theirs_off: int = 0
    worst_theirs: float = 0.0
    rounding: int = 0
    threshold: int = 0
    departure: int = 0
    float32: int = 0
    unexplained: int = 0
    examples: list[Example] = field(default_factory=list)

    def add(self, other: Verdict) -> None:
        """Takes in what was found in other elements."""
        for entry in fields(self):
            mine, more = getattr(self, entry.name), getattr(other, entry.name)
            is_worst = entry.name.startswith("worst")
            setattr(self, entry.name, max(mine, more) if is_worst else mine + more)


def ulps_apart(one: torch.Tensor, other: torch.Tensor) -> Array:
    """Distances in ulps at the larger of the two; infinite where only one is nan or infinite."""
    left, right = to_float64(one), to_float64(other)
    larger = np.maximum(np.abs(left), np.abs(right))
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    comparable = np.isfinite(left) & np.isfinite(right)
    with np.errstate(invalid="ignore"):
        distance = np.abs(left - right) / ulp(np.where(comparable, larger, 1.0), one.dtype)
    return np.where(same, 0.0, np.where(comparable, distance, np.inf))


def judge(
    name: str, ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, expected: Expectation
) -> Verdict:
    """What there is to say of one tensor; ours and theirs of one dtype, exact in float64."""
    apart = ulps_apart(ours, theirs).reshape(-1)
    from_ours = distance_in_ulps(ours, expected.value).reshape(-1)
    from_theirs = distance_in_ulps(theirs, expected.value).reshape(-1)
    definition = np.abs(to_float64(exact) - expected.value).reshape(-1)
    is_other = ~(definition <= expected.same.reshape(-1))
    verdict = Verdict(
        elements=apart.size,
        apart=int(np.count_nonzero(apart > 1)),
        worst_apart=float(apart.max(initial=0.0)),
        ours_off=int(np.count_nonzero(from_ours > 1)),
        worst_ours=float(from_ours.max(initial=0.0)),
        theirs_off=int(np.count_nonzero(from_theirs > 1)),
        worst_theirs=float(from_theirs.max(initial=0.0)),
    )
    places = np.flatnonzero((apart > 1) | (from_ours > 1) | (from_theirs > 1) | is_other)
    if not places.size:
        return verdict
    codes = _explain(
        ours.reshape(-1)[places],
        theirs.reshape(-1)[places],
        exact.reshape(-1)[places],
        expected,
        places,
    )
    # within an ulp of the reference on either side of it
    codes = np.maximum(codes, ROUNDING)
    for code, explanation in enumerate(EXPLANATIONS):
        if code != NOT_NEEDED:
            setattr(verdict, explanation, int(np.count_nonzero(codes == code)))
    for index in np.flatnonzero(codes == UNEXPLAINED)[:3]:
        place = int(places[index])
        verdict.examples.append(
            Example(
                name,
                place,
                float(ours.reshape(-1)[place]),
                float(theirs.reshape(-1)[place]),
                float(exact.reshape(-1)[place]),
                float(expected.value.reshape(-1)[place]),
            )
        )
    return verdict


def _explain(
    ours: torch.Tensor,
    theirs: torch.Tensor,
    exact: torch.Tensor,
    expected: Expectation,
    places: NDArray[np.int64],
) -> Codes:
    magnitude = expected.magnitude.reshape(-1)[places]
    slack = expected.slack.reshape(-1)[places]
    rough = FLOAT32_RESULT * magnitude
    tight = expected.same.reshape(-1)[places]
    value = expected.value.reshape(-1)[places]

    our_code = _nearest(ours, expected, places, slack, LAZYMERGE_MARGINS.get(expected.method))
    their_margin = MERGEKIT_MARGINS.get(expected.method)
    their_code = _nearest(theirs, expected, places, rough, their_margin)
    exact_code = _nearest(exact, expected, places, tight, their_margin)
    for departure in expected.departures.values():
        other = departure.reshape(-1)[places]
        follows = _is_near(exact, other, tight) & (np.abs(other - value) > tight)
        exact_code = np.where(follows, np.minimum(exact_code, DEPARTURE), exact_code)
        near = _is_near(theirs, other, rough)
        their_code = np.where(follows & near, np.minimum(their_code, DEPARTURE), their_code)
    # what mergekit's float64 arithmetic has right, its float32 arithmetic has wrong by rounding
    is_understood = exact_code != UNEXPLAINED
    their_code = np.where((their_code == UNEXPLAINED) & is_understood, FLOAT32, their_code)
    return np.maximum(np.maximum(our_code, their_code), exact_code).astype(np.int8)


def _nearest(
    written: torch.Tensor,
    expected: Expectation,
    places: NDArray[np.int64],
    slack: Array,
    margin: Margin | None,
) -> Codes:
    """NOT_NEEDED, ROUNDING, THRESHOLD or UNEXPLAINED for each element."""
    value = expected.value.reshape(-1)[places]
    codes = np.full(places.shape, UNEXPLAINED, np.int8)
    codes[_is_near(written, value, slack)] = ROUNDING
    codes[_is_near(written, value)] = NOT_NEEDED
    if margin is None or not (codes == UNEXPLAINED).any():
        return codes
    for other in expected.alternatives(margin, places):
        near = _is_near(written, other.value, slack + other.spread)
        codes[near & other.allowed & (codes == UNEXPLAINED)] = THRESHOLD
    return codes


def _is_near(written: torch.Tensor, value: Array, slack: Array | float = 0.0) -> Mask:
    """Within an ulp and the slack of a value."""
    if written.dtype == torch.float64:  # an ulp of it is nothing, and near 0 too little to count in
        return np.abs(to_float64(written) - value) <= slack
    return distance_in_ulps(written, value, slack) <= 1
