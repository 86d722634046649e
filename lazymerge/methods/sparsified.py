"""Methods that thin the task vectors δᵢ = xᵢ − x₀ before they mix them.

threshold   Reduce: the magnitudes that k largest |δᵢ| reach, for every model in one pass
rescale     Reduce, if asked for: ‖δᵢ‖₁ and the norm of what survives
mix         Apply: thin, weigh, and add up; or elect a sign per element and average those that agree

              which survive          how they are mixed
ties          the largest            by sign
breadcrumbs   those of middle rank   added          breadcrumbs_ties   by sign
dare_linear   some, at random        added          dare_ties          by sign
della_linear  some, by rank          added          della              by sign

The rules of survival are in thinning.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ..graph.operation import (
    ApplyOperation,
    BlockInput,
    Cost,
    Done,
    Parameters,
    Pass,
    ReduceOperation,
    register,
)
from ..graph.random_bits import stream_key
from ..graph.vector import rank_rows, total
from ..recipe.signature import BaseModel, Parameter, Scope, Signature
from .linear import SMALLEST_DIVISOR
from .merge import Contribution, TensorMerge, merge_method
from .thinning import Kind, rules

if TYPE_CHECKING:
    from ..graph.node import ParameterValue
    from ..graph.vector import Vector
    from .thinning import Rule

SMALLEST_NORM = 1e-7
"""L1 norms below this are not rescaled to."""


@register
class SurvivingNorms(ReduceOperation["tuple[tuple[float, float], ...]", "tuple[float, ...]"]):
    """Per model, what the surviving changes must be multiplied by to restore the L1 norm.

    Inputs x₀, x₁ … xₙ; statistic: the thresholds. Parameters: those of the rules (thinning.py).
    Result: n factors ‖δ‖₁/‖δ̃‖₁.
    """

    name = "surviving_norms"
    is_recordable = True

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        return Cost(scratch=3)

    def statistics_bytes(
        self,
        input_count: int,
        parameters: Parameters,
        element_count: int,
        block_count: int,
        item_bytes: int,
    ) -> int:
        return block_count * input_count * 160

    def expected_passes(self, parameters: Parameters) -> int:
        return 1

    def first_pass(
        self,
        parameters: Parameters,
        statistics: Sequence[Any],
        element_count: int,
        block_count: int,
    ) -> Pass:
        return Pass(state=tuple(statistics))

    def run(
        self,
        inputs: Sequence[BlockInput],
        parameters: Parameters,
        state: Sequence[Any],
        scratch: Sequence[Vector],
        start: int,
    ) -> tuple[tuple[float, float], ...]:
        base, change, room = scratch
        inputs[0].read_into(base)
        norms = []
        for source, rule in zip(inputs[1:], rules(parameters, state), strict=True):
            source.read_into(change)
            change.sub_(base).abs_()
            before = total(change)
            rule.thin(change, start, room=room)
            norms.append((before, total(change)))
        return tuple(norms)

    def finish(
        self,
        parameters: Parameters,
        element_count: int,
        state: Any,
        partials: Sequence[tuple[tuple[float, float], ...]],
    ) -> Done[tuple[float, ...]]:
        factors = []
        for column in zip(*partials, strict=True):
            before, after = (sum(norms) for norms in zip(*column, strict=True))
            usable = before >= SMALLEST_NORM and after >= SMALLEST_NORM
            factors.append(before / after if usable and math.isfinite(before) else 1.0)
        return Done(tuple(factors))


class _Mix(ApplyOperation):
    """Thinned, weighted changes, and what becomes of them.

    Inputs x₀, x₁ … xₙ. Statistics: the thresholds, then the rescaling factors, each if used.

    Parameters, besides those of the rules (thinning.py):
        weights: n floats.
        lambda: factor of the mixed change.
        normalize: divide by the sum of the weights that take part, else by 1.
        is_rescaled: whether the rescaling factors are there.
        row_elements: length of a row, where ranks are used.
    """

    is_positional = True
    is_recordable = True
    ranks_rows = False
    """Whether rules need the ranks of magnitudes within rows."""

    def rank_count(self, input_count: int) -> int:
        """Vectors that hold ranks."""
        return input_count - 1 if self.ranks_rows else 0

    def prepare(self, parameters: Parameters, statistics: Sequence[Any]) -> Any:
        weights = cast("tuple[float, ...]", parameters["weights"])
        made = rules(parameters, statistics)
        factors = statistics[-1] if parameters["is_rescaled"] else [1.0] * len(weights)
        scales = [
            weight * factor * rule.scale
            for weight, factor, rule in zip(weights, factors, made, strict=True)
        ]
        return weights, scales, made, parameters

    def ranks(
        self,
        inputs: Sequence[BlockInput],
        made: Sequence[Rule],
        parameters: Parameters,
        base: Vector,
        vectors: Sequence[Vector],
    ) -> Sequence[Vector | None]:
        """Fills the vectors with the ranks of |δᵢ| in their rows; of models that need none, with
        nothing."""
        if not self.ranks_rows:
            return [None] * len(made)
        row = cast(int, parameters["row_elements"])
        for source, rule, vector in zip(inputs[1:], made, vectors, strict=True):
            if rule.kind == "ranked":
                inputs[0].read_into(base)
                source.read_into(vector)
                rank_rows(vector.sub_(base), row)
        return vectors


@register
class SignConsensus(_Mix):
    """x₀ + λ · (mean of the weighted surviving changes that agree with the elected sign)."""

    name = "sign_consensus"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        ranks = self.rank_count(input_count)
        return Cost(scratch=input_count + 3 + ranks, stores=ranks, is_ranking=bool(ranks))

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        weights, scales, made, parameters = prepared
        rank_count = self.rank_count(len(inputs))
        rank_vectors, scratch = scratch[:rank_count], scratch[rank_count:]
        *changes, base, total, spare, room = scratch
        ranks = self.ranks(inputs, made, parameters, base, rank_vectors)
        inputs[0].read_into(base)
        for source, change, scale, rule, rank in zip(
            inputs[1:], changes, scales, made, ranks, strict=True
        ):
            source.read_into(change)
            change.sub_(base)
            rule.thin(change, start, spare, room, rank)
            if scale != 1.0:
                change.mul_(scale)

        # the elected sign, +1 or -1, as floats: arithmetic on 0, 1 and -1 costs a fraction of
        # boolean masks here
        out.copy_(changes[0])
        for change in changes[1:]:
            out.add_(change)
        sign = out.ge_(0).mul_(2).sub_(1)

        # times the sign, those that agree are positive; the others become zero
        for change in changes:
            change.mul_(sign).clamp_min_(0)
        total.copy_(changes[0])
        for change in changes[1:]:
            total.add_(change)
        if parameters["normalize"]:
            divisor = changes[0].gt_(0).mul_(weights[0])
            for change, weight in zip(changes[1:], weights[1:], strict=True):
                divisor.add_(change.gt_(0).mul_(weight))
            spare.copy_(divisor).eq_(0)
            total.div_(divisor.add_(spare))
        sign.mul_(total)
        if parameters["lambda"] != 1.0:
            sign.mul_(parameters["lambda"])
        sign.add_(base)


@register
class SparseSum(_Mix):
    """x₀ + λ · Σ of the weighted surviving changes, divided by the sum of the weights if asked for.

    Where no threshold is compared with, everything is computed in float64, as all sums are.
    """

    name = "sparse_sum"

    def cost(self, input_count: int, parameters: Parameters) -> Cost:
        ranks = self.rank_count(input_count)
        return Cost(scratch=4 + ranks, stores=ranks, is_ranking=bool(ranks))

    def run(
        self,
        out: Vector,
        inputs: Sequence[BlockInput],
        prepared: Any,
        scratch: Sequence[Vector],
        start: int,
    ) -> None:
        weights, scales, made, parameters = prepared
        rank_count = self.rank_count(len(inputs))
        rank_vectors, scratch = scratch[:rank_count], scratch[rank_count:]
        change, base, draws, room = scratch
        ranks = self.ranks(inputs, made, parameters, base, rank_vectors)
        divisor = 1.0
        if parameters["normalize"] and abs(sum(weights)) >= SMALLEST_DIVISOR:
            divisor = sum(weights)
        inputs[0].read_into(base)
        out.copy_(base)
        for source, scale, rule, rank in zip(inputs[1:], scales, made, ranks, strict=True):
            source.read_into(change)
            change.sub_(base)
            rule.thin(change, start, draws, room, rank)
            out.add_(change.mul_(scale * parameters["lambda"] / divisor))


@register
class RandomSum(SparseSum):
    """As sparse_sum, for rules without thresholds: in float64, as all sums are."""

    name = "random_sum"

    def working_dtype(self, input_dtypes: Sequence[str]) -> str:
        return "F64"


@register
class RankedSignConsensus(SignConsensus):
    """As sign_consensus, for rules that look at ranks within rows."""

    name = "ranked_sign_consensus"
    is_by_rows = True
    is_for_host = True
    ranks_rows = True


@register
class RankedSum(SparseSum):
    """As sparse_sum, for rules that look at ranks within rows."""

    name = "ranked_sum"
    is_by_rows = True
    is_for_host = True
    ranks_rows = True


def _mix(
    merge: TensorMerge,
    by_sign: bool,
    kinds: Sequence[Kind],
    models: Sequence[Contribution],
    statistics: Sequence[str] = (),
    **rule_parameters: ParameterValue,
) -> str:
    """The node that mixes models, of each of which something survives."""
    inputs = [merge.required_base.node, *(model.node for model in models)]
    weights = tuple(model.number("weight") for model in models)
    normalize = merge.flag("normalize")
    if not by_sign and set(kinds) == {"keep"}:  # nothing is thinned: task arithmetic
        divisor = sum(weights) if normalize and abs(sum(weights)) >= SMALLEST_DIVISOR else 1.0
        factors = tuple(merge.number("lambda") * weight / divisor for weight in weights)
        return merge.apply("task_vectors", inputs, factors=factors)
    if "ranked" in kinds:
        operation = "ranked_sign_consensus" if by_sign else "ranked_sum"
    elif by_sign:
        operation = "sign_consensus"
    else:
        operation = "random_sum" if "random" in kinds else "sparse_sum"
    return merge.apply(
        operation,
        inputs,
        statistics,
        weights=weights,
        kinds=tuple(kinds),
        normalize=normalize,
        **{"is_rescaled": False, "lambda": merge.number("lambda"), **rule_parameters},
    )


def _mix_by_magnitude(
    merge: TensorMerge,
    by_sign: bool,
    kinds: Sequence[Kind],
    models: Sequence[Contribution],
    keep: tuple[ParameterValue, ...],
    **rule_parameters: ParameterValue,
) -> str:
    """Finds the thresholds, and mixes. keep: as of magnitude_thresholds."""
    inputs = [merge.required_base.node, *(model.node for model in models)]
    statistics = []
    is_thinned = any(kind in ("largest", "band") for kind in kinds)
    is_rescaled = is_thinned and merge.flag("rescale")
    if is_thinned:
        searched: dict[str, ParameterValue] = {"keep": keep}
        if "band" in kinds:
            searched["keeps_last"] = True
        statistics.append(merge.reduce("magnitude_thresholds", inputs, (), **searched))
    if is_rescaled:
        statistics.append(
            merge.reduce(
                "surviving_norms", inputs, statistics[:1], kinds=tuple(kinds), **rule_parameters
            )
        )
    return _mix(
        merge, by_sign, kinds, models, statistics, is_rescaled=is_rescaled, **rule_parameters
    )


def _surviving(merge: TensorMerge) -> list[Contribution]:
    """The models of which anything survives: the others take part in neither the election nor the
    average. (Without an election all weights may be divided by, so there they stay.)"""
    return [model for model in merge.models if model.number("density") > 0]


def _unchanged(merge: TensorMerge) -> str:
    return merge.apply("linear_combination", [merge.required_base.node], coefficients=(1.0,))


def _by_largest(merge: TensorMerge) -> str:
    models = _surviving(merge)
    if not models:
        return _unchanged(merge)
    kinds: list[Kind] = []
    keep: list[ParameterValue] = []
    for model in models:
        density = model.number("density")
        kinds.append("keep" if density >= 1 else "largest")
        keep.append(None if density >= 1 else max(1, int(density * merge.element_count)))
    return _mix_by_magnitude(merge, True, kinds, models, tuple(keep))


def _by_band(merge: TensorMerge, by_sign: bool) -> str:
    count = merge.element_count
    models: list[Contribution] = []
    kinds: list[Kind] = []
    keep: list[ParameterValue] = []
    bounds: list[ParameterValue] = []
    for model in merge.models:
        density = model.number("density")
        kept = count if density >= 1 else int(density * count)
        dropped_below = max(0, count - kept - int(model.number("gamma") * count))
        dropped_above = count - kept - dropped_below
        if density >= 1:
            dropped_below = dropped_above = 0
        if not kept and (by_sign or not merge.flag("normalize")):
            continue  # it adds nothing, and nothing is divided by its weight
        has = (dropped_below > 0, dropped_above > 0) if kept else (False, False)
        models.append(model)
        kinds.append("none" if not kept else "band" if any(has) else "keep")
        searched = [count - dropped_below] * has[0] + [dropped_above] * has[1]
        keep.append(tuple(searched) if any(has) else None)
        bounds.append(has)
    if not models:
        return _unchanged(merge)
    return _mix_by_magnitude(merge, by_sign, kinds, models, tuple(keep), bounds=tuple(bounds))


def _at_random(merge: TensorMerge, by_sign: bool, *, ranked: bool) -> str:
    row = math.prod(merge.shape[-1:])
    models: list[Contribution] = []
    kinds: list[Kind] = []
    keys: list[int] = []
    probabilities: list[float] = []
    slopes: list[float] = []
    for model in merge.models:
        density = model.number("density")
        if density <= 0 and (by_sign or not merge.flag("normalize")):
            continue
        models.append(model)
        keys.append(stream_key(merge.seed, model.place, merge.name))
        is_ranked = ranked and 0 < density < 1 and row > 1
        if density <= 0:
            kinds.append("none")
        else:
            kinds.append("keep" if density >= 1 else "ranked" if is_ranked else "random")
        epsilon = model.number("epsilon") if ranked and 0 < density < 1 else 0.0
        if ranked and 0 < density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            merge.fail(
                f"density {density:g} ± epsilon {epsilon:g} of model {model.model} leaves (0, 1), "
                "and both are probabilities; choose a smaller epsilon"
            )
        probabilities.append(density - epsilon if is_ranked else density)
        slopes.append(2 * epsilon / (row - 1) if is_ranked else 0.0)
    if not models:
        return _unchanged(merge)
    return _mix(
        merge,
        by_sign,
        kinds,
        models,
        keys=tuple(keys),
        probabilities=tuple(probabilities),
        slopes=tuple(slopes),
        is_divided=merge.flag("rescale"),
        row_elements=row,
    )


WEIGHT = Parameter("weight", float, Scope.NON_BASE, "weight of the task vector", required=True)
DENSITY = Parameter(
    "density", float, Scope.NON_BASE, "fraction of elements kept", 1.0, False, 0.0, 1.0
)
GAMMA = Parameter(
    "gamma", float, Scope.NON_BASE, "fraction of outliers dropped", 0.01, False, 0.0, 1.0
)
EPSILON = Parameter(
    "epsilon",
    float,
    Scope.NON_BASE,
    "density changes by up to this with rank",
    0.15,
    False,
    0.0,
    1.0,
)
LAMBDA = Parameter("lambda", float, Scope.GLOBAL, "factor of the mixed task vector", 1.0)
INT8_MASK = Parameter("int8_mask", bool, Scope.GLOBAL, "accepted, without effect", False)


def _signature(
    name: str,
    summary: str,
    survivors: str,
    source: str,
    *,
    by_sign: bool,
    normalize: bool,
    rescale: bool,
    extra: tuple[Parameter, ...] = (),
    rescaling: str = "restore the L1 norm after thinning",
) -> Signature:
    mixed = "Σ yᵢ[sign yᵢ = s] / Σ wᵢ[sign yᵢ = s]" if by_sign else "Σ yᵢ"
    sign = ",  s = sign Σ yᵢ" if by_sign else ""
    divisor = "the agreeing weights" if by_sign else "the sum of weights"
    return Signature(
        name=name,
        summary=summary,
        formula=f"out = x₀ + λ {mixed},  yᵢ = wᵢ {survivors}{sign}",
        parameters=(
            WEIGHT,
            DENSITY,
            *extra,
            Parameter("normalize", bool, Scope.GLOBAL, f"divide by {divisor}", normalize),
            Parameter("rescale", bool, Scope.GLOBAL, rescaling, rescale),
            LAMBDA,
            INT8_MASK,
        ),
        base=BaseModel.REQUIRED,
        min_models=2,
        source=source,
    )


@merge_method(
    _signature(
        "ties",
        "Trims task vectors to their largest elements, elects a sign, averages agreement.",
        "topk(xᵢ − x₀)",
        "https://arxiv.org/abs/2306.01708",
        by_sign=True,
        normalize=True,
        rescale=False,
        rescaling="restore the L1 norm after trimming",
    )
)
def ties(merge: TensorMerge) -> str:
    return _by_largest(merge)


@merge_method(
    _signature(
        "breadcrumbs",
        "Drops the smallest and the very largest changes of each model, adds the rest.",
        "middle(xᵢ − x₀)",
        "https://arxiv.org/abs/2312.06795",
        by_sign=False,
        normalize=False,
        rescale=False,
        extra=(GAMMA,),
    )
)
def breadcrumbs(merge: TensorMerge) -> str:
    return _by_band(merge, by_sign=False)


@merge_method(
    _signature(
        "breadcrumbs_ties",
        "As breadcrumbs, then elects a sign and adds what agrees.",
        "middle(xᵢ − x₀)",
        "https://arxiv.org/abs/2312.06795",
        by_sign=True,
        normalize=False,
        rescale=False,
        extra=(GAMMA,),
    )
)
def breadcrumbs_ties(merge: TensorMerge) -> str:
    return _by_band(merge, by_sign=True)


BY_PROBABILITY = "divide by the probability of survival"


@merge_method(
    _signature(
        "dare_linear",
        "Drops changes at random, scales the rest up to the same expectation, adds them.",
        "random(xᵢ − x₀)/density",
        "https://arxiv.org/abs/2311.03099",
        by_sign=False,
        normalize=False,
        rescale=True,
        rescaling=BY_PROBABILITY,
    )
)
def dare_linear(merge: TensorMerge) -> str:
    return _at_random(merge, by_sign=False, ranked=False)


@merge_method(
    _signature(
        "dare_ties",
        "As dare_linear, then elects a sign and adds what agrees.",
        "random(xᵢ − x₀)/density",
        "https://arxiv.org/abs/2311.03099",
        by_sign=True,
        normalize=False,
        rescale=True,
        rescaling=BY_PROBABILITY,
    )
)
def dare_ties(merge: TensorMerge) -> str:
    return _at_random(merge, by_sign=True, ranked=False)


@merge_method(
    _signature(
        "della",
        "Drops changes at random, small ones more often; elects a sign, averages agreement.",
        "random(xᵢ − x₀)/p,  p = density ± epsilon by rank in the row",
        "https://arxiv.org/abs/2406.11617",
        by_sign=True,
        normalize=True,
        rescale=True,
        extra=(EPSILON,),
        rescaling=BY_PROBABILITY,
    )
)
def della(merge: TensorMerge) -> str:
    return _at_random(merge, by_sign=True, ranked=True)


@merge_method(
    _signature(
        "della_linear",
        "Drops changes at random, small ones more often; adds the rest.",
        "random(xᵢ − x₀)/p,  p = density ± epsilon by rank in the row",
        "https://arxiv.org/abs/2406.11617",
        by_sign=False,
        normalize=False,
        rescale=True,
        extra=(EPSILON,),
        rescaling=BY_PROBABILITY,
    )
)
def della_linear(merge: TensorMerge) -> str:
    return _at_random(merge, by_sign=False, ranked=True)
