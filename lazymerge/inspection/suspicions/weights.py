"""Weights, interpolation and thinning that give something other than people expect of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...methods.linear import SMALLEST_DIVISOR
from .groups import Group, Where
from .suspicion import Severity, Suspicion, listed, number, short, spread

ROUNDED = 0.001
"""Sums of weights differ from 1 by as much where they were rounded to three digits."""

SLIGHT = 0.02
"""0.33 three times sums to 0.99: not exact, and hardly a mistake."""

LARGE_FACTOR = 3.0
"""Task vectors are published with factors of 0.1 to 2 (task arithmetic: 0.3 to 0.5 for each of
many; extrapolation beyond one fine-tune: 1.1 to 1.5)."""

LARGE_SUM = 2.0
"""Of the factors of two models; of more, one for each."""

SUMMED = ("task_arithmetic", "dare_linear", "breadcrumbs", "della_linear")
BY_SIGN = ("ties", "dare_ties", "breadcrumbs_ties", "della")
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


@dataclass(slots=True)
class Finding:
    """Tensors that one thing is found in, and the values it is found with."""

    names: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, group: Group, *values: float) -> None:
        self.names += group.names
        self.values += values


def weight_suspicions(groups: Sequence[Group], places: Where) -> Iterator[Suspicion]:
    """What is odd about the parameters of the methods."""
    for look in (
        _sums,
        _extrapolations,
        _outside_of_range,
        _scales,
        _factors,
        _signs_lost,
        _densities,
        _rescaled,
        _outliers,
        _settings_of_methods,
    ):
        yield from look(groups, places)


Look = Callable[[Sequence[Group], Where], Iterator[Suspicion]]


def _sums(groups: Sequence[Group], places: Where) -> Iterator[Suspicion]:
    """Weights that are not divided by their sum, and do not sum to 1."""
    found: dict[str, Finding] = {}
    for group in groups:
        key = {"linear": "normalize", "multislerp": "normalize_weights"}.get(group.method)
        if key is None or group.flag(key) or group.base is not None:
            continue
        total = sum(group.value(model, "weight", 0.0) for model in group.by_model)
        if abs(total - 1) > ROUNDED:
            found.setdefault(key, Finding()).add(group, total)
    for key, finding in found.items():
        worst = max(abs(value - 1) for value in finding.values)
        yield Suspicion(
            "weights-sum",
            f"the weights sum to {spread(finding.values)} {places.where(finding.names)}, and the "
            f"output is scaled by as much, since {key} is false; set {key}: true, or make them "
            "sum to 1",
            "mistake" if worst > SLIGHT else "note",
        )


def _extrapolations(groups: Sequence[Group], places: Where) -> Iterator[Suspicion]:
    """Averages that lie outside of what they are made of."""
    found: dict[Severity, dict[str, Finding]] = {}
    for group in groups:
        if group.method != "linear":
            continue
        weights = {model: group.value(model, "weight", 0.0) for model in group.by_model}
        divisor = sum(weights.values()) if group.flag("normalize") else 1.0
        if abs(divisor) < SMALLEST_DIVISOR or min(weights.values()) >= 0:
            continue
        shares = {model: weight / divisor for model, weight in weights.items()}
        is_far = max(map(abs, shares.values())) > LARGE_FACTOR
        of_severity = found.setdefault("mistake" if is_far else "note", {})
        for model, share in shares.items():
            if share < 0 or is_far:
                of_severity.setdefault(model, Finding()).add(group, share)
    for severity, models in found.items():
        names = list(dict.fromkeys(name for each in models.values() for name in each.names))
        verb = "has the coefficient" if len(models) == 1 else "have the coefficients"
        yield Suspicion(
            "weights-extrapolate",
            f"{listed(list(models))} {verb} {_values(models)} {places.where(names)}: the output "
            "lies outside of the models, not between them; weights of one sign give an average",
            severity,
        )


def _values(models: Mapping[str, Finding]) -> str:
    return listed([spread(finding.values) for finding in models.values()])


def _outside_of_range(groups: Sequence[Group], places: Where) -> Iterator[Suspicion]:
    """Interpolation beyond its ends."""
    beyond, shares = Finding(), Finding()
    for group in groups:
        if group.method == "slerp":
            t = group.shared("t", 0.5)
            if not 0 <= t <= 1:
                beyond.add(group, t)
        elif group.method == "nuslerp" and len(group.others) == 2:
            first, second = (group.value(model, "weight", 0.0) for model in group.others)
            if abs(first + second) >= 1e-6 and not 0 <= second / (first + second) <= 1:
                shares.add(group, second / (first + second))
    if beyond.names:
        yield Suspicion(
            "interpolation-range",
            f"t is {spread(beyond.values)} {places.where(beyond.names)}: 0 gives the base and 1 "
            "the other model, and beyond them slerp leaves both; choose t from 0 to 1",
            "mistake",
        )
    if shares.names:
        yield Suspicion(
            "interpolation-range",
            f"the weights give the second model a share of {spread(shares.values)} "
            f"{places.where(shares.names)}, outside of 0 to 1, where nuslerp leaves both models; "
            "choose weights of one sign",
            "mistake",
        )


def _scales(groups: Sequence[Group], places: Where) -> Iterator[Suspicion]:
    """A model that is scaled as a whole. One part of its layers is scaled on purpose."""
    scaled = Finding()
    for group in groups:
        if group.method != "passthrough":
            continue
        scale = group.value(next(iter(group.by_model)), "scale", 1.0)
        if scale == 1:
            return
        scaled.add(group, scale)
    if scaled.names:
        yield Suspicion(
            "scale-everything",
            f"scale is {spread(scaled.values)} {places.where(scaled.names)}, norms and embeddings "
            "among them, so that every layer's output changes by it; give it a filter, such as "
            "o_proj or down_proj",
            "mistake",
        )


def factors_of(group: Group) -> dict[str, float]:
    """By how much the task vector of every model is multiplied; where signs are elected and the
    weights normalized, by how much that of all is."""
    strength = group.shared("lambda", 1.0)
    weights = {model: group.value(model, "weight", 1.0) for model in group.others}
    if group.flag("normalize"):
        if group.method in BY_SIGN:
            return dict.fromkeys(weights, strength / max(1, len(weights)))
        total = sum(weights.values())
        if abs(total) >= SMALLEST_DIVISOR:
            return {model: strength * weight / total for model, weight in weights.items()}
    return {model: strength * weight for model, weight in weights.items()}


def _factors(groups: Sequence[Group], places: Where) -> Iterator[Suspicion]:
    """Task vectors that are added several times over, or subtracted."""
    large: dict[str, dict[str, Finding]] = {}
    sums: dict[tuple[str, Severity], Finding] = {}
    negative: dict[str, Finding] = {}
    for group in groups:
        if group.method not in SUMMED + BY_SIGN or group.base is None:
            continue
        factors = factors_of(group)
        too_large = {m: f for m, f in factors.items() if abs(f) > LARGE_FACTOR}
        for model, factor in too_large.items():
            large.setdefault(group.base, {}).setdefault(model, Finding()).add(group, factor)
        total, usual = sum(map(abs, factors.values())), max(LARGE_SUM, len(factors))
        if total > usual + ROUNDED and not too_large:
            severity: Severity = "mistake" if total > 2 * usual else "note"
            sums.setdefault((group.base, severity), Finding()).add(group, total)
        for model, factor in factors.items():
            if -LARGE_FACTOR <= factor < 0:
                negative.setdefault(model, Finding()).add(group, factor)
    for base, models in large.items():
        names = list(dict.fromkeys(name for each in models.values() for name in each.names))
        yield Suspicion(
            "weight-large",
            f"what distinguishes {listed(list(models))} from {short(base)} is multiplied by "
            f"{_values(models)} {places.where(names)}; weight and lambda are factors, 1 means "
            "once, and more than 2 is rarely meant",
            "mistake",
        )
    for (base, severity), finding in sums.items():
        yield Suspicion(
            "weights-sum",
            f"weights (times lambda) sum to {spread(finding.values)} "
            f"{places.where(finding.names)}: the models' changes of {short(base)} are added up "
            "that many times over; lower the weights, or set lambda",
            severity,
        )
    for model, finding in negative.items():
        yield Suspicion(
            "weight-negative",
            f"the change of {short(model)} is subtracted (factor {spread(finding.values)}) "
            f"{places.where(finding.names)}: the output moves away from that model; a weight "
            "above 0 moves towards it",
            "note",
        )


def _signs_lost(groups: Sequence[Group], places: Where) -> Iterator[Suspicion]:
    """Negative weights that are divided by themselves."""
    found: dict[tuple[str, str], Finding] = {}
    for group in groups:
        if group.method in BY_SIGN and group.flag("normalize"):
            for model in group.others:
                weight = group.value(model, "weight", 1.0)
                if weight < 0:
                    found.setdefault((model, group.method), Finding()).add(group, weight)
    for (model, method), finding in found.items():
        yield Suspicion(
            "weight-sign-lost",
            f"{short(model)} has the weight {spread(finding.values)} "
            f"{places.where(finding.names)}, and {method} divides by the weights of the models "
            "that agree: where it is alone its sign cancels, and elsewhere the divisor may come "
            "near 0; set normalize: false, or use a weight above 0",
            "mistake",
        )


def _densities(groups: Sequence[Group], places: Where) -> Iterator[Suspicion]:
    """Methods that drop nothing."""
    thinning = [g for g in groups if g.method in SUMMED + BY_SIGN and g.method != "task_arithmetic"]
    densities = [g.value(m, "density", 1.0) for g in thinning for m in g.others]
    if not densities or min(densities) < 1:
        return
    method = thinning[0].method
    what = {
        "ties": "only a sign is elected",
        "dare_ties": "it only elects a sign",
        "breadcrumbs_ties": "it only elects a sign",
        "della": "it only elects a sign",
    }.get(method, "it does what task_arithmetic does")
    yield Suspicion(
        "density-keeps-all",
        f"{method} drops nothing, since every density is 1 (as it is where none is given), and "
        f"{what}; give the models a density below 1, such as 0.5",
        "note",
    )


LOW_DENSITY = 0.05
"""The DARE paper finds 0.1 harmless for fine-tunes of 7 to 13 billion parameters, and 0.01 only for
larger ones."""

LOW_PROBABILITY = 0.02
"""An element that survives with it is multiplied by 50."""


def _rescaled(groups: Sequence[Group], places: Where) -> Iterator[Suspicion]:
    """Survivors that are scaled up a lot, and ranks that decide nothing."""
    found: dict[str, Finding] = {}
    lowest: dict[str, Finding] = {}
    without: Finding = Finding()
    for group in groups:
        if group.method not in RANDOM:
            continue
        is_ranked = group.method.startswith("della")
        for model in group.others:
            density = group.value(model, "density", 1.0)
            epsilon = group.value(model, "epsilon", 0.0) if is_ranked else 0.0
            if not 0 < density < 1:
                continue
            if is_ranked and epsilon == 0:
                without.add(group)
            if group.flag("rescale") and density < LOW_DENSITY:
                found.setdefault(model, Finding()).add(group, density)
            elif group.flag("rescale") and density - epsilon < LOW_PROBABILITY:
                lowest.setdefault(model, Finding()).add(group, density - epsilon)
    for model, finding in found.items():
        yield Suspicion(
            "density-low",
            f"{short(model)} keeps {spread(finding.values)} of its changes "
            f"{places.where(finding.names)}, each multiplied by up to "
            f"{number(1 / min(finding.values))}: a few elements move far; 0.1 and more is usual",
            "note",
        )
    for model, finding in lowest.items():
        yield Suspicion(
            "epsilon-large",
            f"density minus epsilon of {short(model)} is {spread(finding.values)} "
            f"{places.where(finding.names)}: its smallest changes survive that rarely, and are "
            f"multiplied by up to {number(1 / min(finding.values))}; choose a smaller epsilon",
            "note",
        )
    if without.names:
        yield Suspicion(
            "epsilon-zero",
            f"epsilon is 0 {places.where(without.names)}: large and small changes survive alike, "
            "as with dare; an epsilon such as 0.1 prefers the large ones",
            "note",
        )


def _outliers(groups: Sequence[Group], places: Where) -> Iterator[Suspicion]:
    """Breadcrumbs whose gamma is more than there is to drop."""
    found: dict[str, Finding] = {}
    for group in groups:
        if group.method not in ("breadcrumbs", "breadcrumbs_ties"):
            continue
        for model in group.others:
            density, gamma = group.value(model, "density", 1.0), group.value(model, "gamma", 0.01)
            if 0 < density < 1 < density + gamma - 1e-9:
                found.setdefault(model, Finding()).add(group, gamma)
    for model, finding in found.items():
        yield Suspicion(
            "gamma-large",
            f"gamma of {short(model)} is {spread(finding.values)} {places.where(finding.names)}, "
            "more than density leaves to drop: only the largest changes are dropped, and none of "
            "the small ones; choose gamma below 1 − density",
            "note",
        )


FAR_FOR_NEARSWAP = 0.1
"""Weights of fine-tunes seldom differ by as much; nearswap's author uses 0.0001."""

COARSE_EPSILON = 0.01
"""Fine-tuning changes most weights by less."""


def _settings_of_methods(groups: Sequence[Group], places: Where) -> Iterator[Suspicion]:
    near, coarse, still = Finding(), Finding(), Finding()
    for group in groups:
        if group.method == "nearswap" and group.shared("t", 0.0) >= FAR_FOR_NEARSWAP:
            near.add(group, group.shared("t", 0.0))
        elif group.method in ("ram", "ramplus_tl") and group.shared("epsilon", 0) >= COARSE_EPSILON:
            coarse.add(group, group.shared("epsilon", 0.0))
        elif group.method == "karcher" and group.shared("max_iter", 10) < 1:
            still.add(group)
    if near.names:
        yield Suspicion(
            "nearswap-distance",
            f"t is {spread(near.values)} {places.where(near.names)}; to nearswap it is a distance "
            "between weights and not a share: nearly all of them are nearer, and become the other "
            "model's; 0.0001 to 0.01 is usual",
            "note",
        )
    if coarse.names:
        yield Suspicion(
            "epsilon-large",
            f"epsilon is {spread(coarse.values)} {places.where(coarse.names)}: changes below it "
            "count as none, and most that fine-tuning makes are smaller; 1e-5 is usual",
            "note",
        )
    if still.names:
        yield Suspicion(
            "no-iteration",
            f"max_iter is 0 {places.where(still.names)}: the result is the mean direction, not the "
            "Karcher mean; 10 is usual",
            "note",
        )
