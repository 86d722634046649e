"""The references themselves: cases worked out on paper, and properties that must hold."""

from __future__ import annotations

import itertools
from math import atan2, cos, log, pi, sin, sqrt
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from . import METHODS, reference
from .case import Mask, Tensor
from .sparsified import della_probabilities, magnitude_mask, outlier_mask
from .task_vectors import arcee_importance

EXACT = {"rtol": 1e-14, "atol": 1e-14}

PAIRWISE = {"slerp", "nearswap", "arcee_fusion", "passthrough"}
"""One entry in models."""
WITHOUT_BASE = {"linear", "passthrough", "karcher"}
MASKED = {"dare_linear", "dare_ties", "della", "della_linear"}
SPARSIFIED = {"ties", "breadcrumbs", "breadcrumbs_ties"} | MASKED


def array(*values: float) -> Tensor:
    return np.array(values, dtype=np.float64)


def case_of(method: str, seed: int, shape: tuple[int, ...], count: int = 3) -> dict[str, Any]:
    """Arguments for any method: random tensors, weights in eighths, masks where needed."""
    random = np.random.default_rng(seed)
    if method in PAIRWISE:
        count = 1
    elif method == "nuslerp":
        count = 2
    own: list[dict[str, Any]] = [{} for _ in range(count)]
    parameters: dict[str, Any] = {}
    names = METHODS[method][1]
    if "weight" in names:
        for entry in own:
            entry["weight"] = int(random.integers(1, 16)) / 8
    if method in SPARSIFIED:
        for entry in own:
            entry["density"] = float(random.choice([0.3, 0.5, 0.7]))
    if "t" in names:
        parameters["t"] = 0.3
    arguments: dict[str, Any] = {
        "base": None if method in WITHOUT_BASE else random.standard_normal(shape),
        "models": [random.standard_normal(shape) for _ in range(count)],
        "parameters": parameters,
        "model_parameters": own,
    }
    if method in MASKED:
        arguments["keep"] = [random.random(shape) < 0.5 for _ in range(count)]
    return arguments


# --------------------------------------------------------------------- linear family


def test_linear_by_hand() -> None:
    models = [array(1, 2), array(3, 6)]
    weights = [{"weight": 1}, {"weight": 3}]
    # (1·1 + 3·3)/4 = 2.5, (1·2 + 3·6)/4 = 5; without normalising 10 and 20.
    result = reference("linear", models=models, model_parameters=weights)
    np.testing.assert_array_equal(result, [2.5, 5])
    result = reference(
        "linear", models=models, model_parameters=weights, parameters={"normalize": False}
    )
    np.testing.assert_array_equal(result, [10, 20])


def test_linear_takes_no_notice_of_a_base_that_is_not_a_model() -> None:
    arguments: dict[str, Any] = {"models": [array(1)], "parameters": {"weight": 1}}
    assert reference("linear", base=array(100), **arguments) == reference("linear", **arguments)


def test_linear_refuses_weights_that_cancel() -> None:
    with pytest.raises(ValueError, match="sum to 0"):
        reference(
            "linear",
            models=[array(1), array(2)],
            model_parameters=[{"weight": 1}, {"weight": -1}],
        )


def test_passthrough_by_hand() -> None:
    model = array(1, -0.0)
    np.testing.assert_array_equal(reference("passthrough", models=[model]), model)
    scaled = reference("passthrough", models=[model], parameters={"scale": -2})
    np.testing.assert_array_equal(scaled, [-2, 0])


def test_task_arithmetic_by_hand() -> None:
    # δ₁ = (1, −1), δ₂ = (2, 0); ½δ₁ + 2δ₂ = (4.5, −0.5).
    arguments: dict[str, Any] = {
        "base": array(1, 1),
        "models": [array(2, 0), array(3, 1)],
        "model_parameters": [{"weight": 0.5}, {"weight": 2}],
    }
    np.testing.assert_array_equal(reference("task_arithmetic", **arguments), [5.5, 0.5])
    result = reference("task_arithmetic", **arguments, parameters={"lambda": 0.5})
    np.testing.assert_array_equal(result, [3.25, 0.75])
    # D = 2.5: (4.5, −0.5)/2.5 = (1.8, −0.2).
    result = reference("task_arithmetic", **arguments, parameters={"normalize": True})
    np.testing.assert_allclose(result, [2.8, 0.8], **EXACT)


def test_task_arithmetic_does_not_divide_by_weights_that_cancel() -> None:
    result = reference(
        "task_arithmetic",
        base=array(1),
        models=[array(2), array(5)],
        model_parameters=[{"weight": 1}, {"weight": -1}],
        parameters={"normalize": True},
    )
    np.testing.assert_array_equal(result, [1 + 1 - 4])


# ------------------------------------------------------------------ spherical family


def test_slerp_by_hand() -> None:
    # θ = 90°, t = 1/3: sin 60° · (2, 0) + sin 30° · (0, 1).
    result = reference("slerp", base=array(2, 0), models=[array(0, 1)], parameters={"t": 1 / 3})
    np.testing.assert_allclose(result, [sqrt(3), 0.5], **EXACT)


@pytest.mark.parametrize("turn", [0.0, pi])
def test_slerp_is_linear_only_where_the_vectors_are_nearly_parallel(turn: float) -> None:
    # cos 0.0316 = 0.999501 is beyond the threshold 0.9995, cos 0.0317 = 0.999498 is not.
    base = array(1, 0)
    for angle, linear in ((0.0316 + turn, True), (0.0317 + turn, False)):
        other = array(cos(angle), sin(angle))
        result = reference("slerp", base=base, models=[other], parameters={"t": 0.3})
        assert np.allclose(result, 0.7 * base + 0.3 * other, **EXACT) == linear
        if not linear:
            np.testing.assert_allclose(np.linalg.norm(result), 1, rtol=1e-12)


def test_slerp_does_not_normalise_a_zero_vector() -> None:
    # ⟨0, b⟩ = 0: θ = 90°, and sin 45° · (0, 2) remains.
    result = reference("slerp", base=array(0, 0), models=[array(0, 2)], parameters={"t": 0.5})
    np.testing.assert_allclose(result, [0, sqrt(2)], **EXACT)


vectors = arrays(np.float64, 4, elements=st.floats(-8, 8, width=32))


@given(vectors, vectors, st.floats(0, 1))
@settings(deadline=None)
def test_slerp_invariants(first: Tensor, second: Tensor, t: float) -> None:
    def between(a: Tensor, b: Tensor, at: float) -> Tensor:
        return reference("slerp", base=a, models=[b], parameters={"t": at})

    close = {"rtol": 1e-11, "atol": 1e-11}
    np.testing.assert_allclose(between(first, second, 0), first, **close)
    np.testing.assert_allclose(between(first, second, 1), second, **close)
    np.testing.assert_allclose(between(first, second, t), between(second, first, 1 - t), **close)
    if np.linalg.norm(first) > 1e-8:  # shorter ones have no direction that they could keep
        np.testing.assert_allclose(between(first, first, t), first, **close)
    scaled = between(4 * first, 4 * second, t)
    if min(np.linalg.norm(first), np.linalg.norm(second)) > 1e-8:
        np.testing.assert_allclose(scaled, 4 * between(first, second, t), **close)


def test_nuslerp_by_hand() -> None:
    # t = 1/(2 + 1): the same arc as slerp's; with a base it is the arc between the δ.
    weights = [{"weight": 2}, {"weight": 1}]
    result = reference("nuslerp", models=[array(2, 0), array(0, 1)], model_parameters=weights)
    np.testing.assert_allclose(result, [sqrt(3), 0.5], **EXACT)
    result = reference(
        "nuslerp",
        base=array(1, 1),
        models=[array(3, 1), array(1, 2)],
        model_parameters=weights,
    )
    np.testing.assert_allclose(result, [1 + sqrt(3), 1.5], **EXACT)


def test_nuslerp_by_rows_and_by_columns() -> None:
    # Row 0 as above. Row 1 is parallel: 2/3 · 1 + 1/3 · 3 = 5/3.
    first = np.array([[2.0, 0.0], [1.0, 0.0]])
    second = np.array([[0.0, 1.0], [3.0, 0.0]])
    expected = [[sqrt(3), 0.5], [5 / 3, 0]]
    weights = [{"weight": 2}, {"weight": 1}]
    by_row = reference(
        "nuslerp",
        models=[first, second],
        model_parameters=weights,
        parameters={"nuslerp_flatten": False},
    )
    np.testing.assert_allclose(by_row, expected, **EXACT)
    by_column = reference(
        "nuslerp",
        models=[first.T.copy(), second.T.copy()],
        model_parameters=weights,
        parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True},
    )
    np.testing.assert_allclose(by_column.T, expected, **EXACT)


def test_nuslerp_columns_run_along_the_first_dimension() -> None:
    random = np.random.default_rng(0)
    first, second = random.standard_normal((2, 3, 4, 5))
    result = reference(
        "nuslerp",
        models=[first, second],
        parameters={"weight": 1, "nuslerp_flatten": False, "nuslerp_row_wise": True},
    )
    for i, j in itertools.product(range(4), range(5)):
        column = reference(
            "nuslerp",
            models=[first[:, i, j], second[:, i, j]],
            parameters={"weight": 1},
        )
        np.testing.assert_array_equal(result[:, i, j], column)


def test_nuslerp_goes_half_way_where_the_weights_cancel() -> None:
    # sin 45° of each.
    result = reference(
        "nuslerp",
        models=[array(2, 0), array(0, 1)],
        model_parameters=[{"weight": 1}, {"weight": -1}],
    )
    np.testing.assert_allclose(result, [sqrt(2), sqrt(0.5)], **EXACT)


def test_multislerp_by_hand() -> None:
    # Directions e₁, e₂: the mean points to 45°, the radius is (2 + 4)/2 = 3.
    arguments: dict[str, Any] = {"parameters": {"weight": 1, "eps": 1e-30}}
    result = reference("multislerp", models=[array(2, 0), array(0, 4)], **arguments)
    np.testing.assert_allclose(result, [3 / sqrt(2)] * 2, **EXACT)
    # The same δ on a base.
    result = reference(
        "multislerp", base=array(1, -1), models=[array(3, -1), array(1, 3)], **arguments
    )
    np.testing.assert_allclose(result, [1 + 3 / sqrt(2), -1 + 3 / sqrt(2)], **EXACT)
    # Weights that are not normalised: the radius is 2 + 4.
    result = reference(
        "multislerp",
        models=[array(2, 0), array(0, 4)],
        parameters={"weight": 1, "eps": 1e-30, "normalize_weights": False},
    )
    np.testing.assert_allclose(result, [6 / sqrt(2)] * 2, **EXACT)


def test_multislerp_where_the_directions_cancel() -> None:
    # Two: linear, ½ · 1 + ½ · (−3) = −1.
    opposite = [array(1, 0), array(-3, 0)]
    result = reference("multislerp", models=opposite, parameters={"weight": 1})
    np.testing.assert_allclose(result, [-1, 0], **EXACT)
    with pytest.raises(ValueError, match="cancel"):
        reference("multislerp", models=[*opposite, array(0, 0)], parameters={"weight": 1})


@given(st.integers(0, 10**6), st.integers(2, 5))
@settings(deadline=None, max_examples=30)
def test_multislerp_has_a_closed_form(seed: int, count: int) -> None:
    # Σ wᵢvᵢ = m − ⟨m, m̂⟩m̂ = 0: what remains is (Σ wᵢ|xᵢ|) m̂.
    arguments = case_of("multislerp", seed, (7,), count)
    del arguments["base"]
    weights = np.array([entry["weight"] for entry in arguments["model_parameters"]])
    weights = weights / weights.sum()
    norms = np.array([np.linalg.norm(model) for model in arguments["models"]])
    mean = (weights / norms) @ np.array(arguments["models"])
    expected = (weights @ norms) * mean / np.linalg.norm(mean)
    # eps = 1e-8 in the definition's divisions; an element may be near zero
    found = reference("multislerp", **arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_karcher_by_hand() -> None:
    # Two: half way, at the mean length 3.
    result = reference("karcher", models=[array(2, 0), array(0, 4)])
    np.testing.assert_allclose(result, [3 / sqrt(2)] * 2, **EXACT)
    # On a circle the mean is that of the angles: 0°, 0°, 90° → 30° (their chord mean is 26.6°).
    three = [array(1, 0), array(1, 0), array(0, 1)]
    result = reference("karcher", models=three)
    np.testing.assert_allclose(result, [cos(pi / 6), sin(pi / 6)], rtol=1e-12)
    start = reference("karcher", models=three, parameters={"max_iter": 0})
    np.testing.assert_allclose(start, [2 / sqrt(5), 1 / sqrt(5)], **EXACT)


def test_karcher_with_zero_vectors() -> None:
    # The zero tensor has no direction but counts in the length: (2 + 4 + 0)/3 = 2 at 45°.
    result = reference("karcher", models=[array(2, 0), array(0, 4), array(0, 0)])
    np.testing.assert_allclose(result, [sqrt(2), sqrt(2)], **EXACT)
    result = reference("karcher", models=[array(0, 0), array(1e-6, 0)])
    np.testing.assert_array_equal(result, [0, 0])


def test_karcher_starts_at_the_first_where_the_directions_cancel() -> None:
    # The antipode has no direction to go to: length (1 + 3)/2 along the first.
    result = reference("karcher", models=[array(1, 0), array(-3, 0)])
    np.testing.assert_allclose(result, [2, 0], atol=1e-15)
    # Nearly the antipode: still within tol, so the sideways 1e-7 does not turn it by 90°.
    result = reference("karcher", models=[array(1, 0), array(-1, 1e-7)])
    np.testing.assert_allclose(result, [1, 0], atol=1e-15)


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_karcher_of_two_is_the_direction_of_slerp_half_way(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = (v / np.linalg.norm(v) for v in random.standard_normal((2, 5)))
    assume(abs(first @ second) < 0.999)
    half = reference("slerp", base=first, models=[second], parameters={"t": 0.5})
    result = reference("karcher", models=[3 * first, 5 * second])
    np.testing.assert_allclose(result, 4 * half, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 5))
@settings(deadline=None, max_examples=30)
def test_karcher_minimises_the_squared_angles(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    models = list(random.standard_normal((count, 6)) + 2)
    mean = reference("karcher", models=models, parameters={"tol": 1e-9, "max_iter": 100})

    def spread(point: Tensor) -> float:
        total = 0.0
        for model in models:
            p, m = point / np.linalg.norm(point), model / np.linalg.norm(model)
            # Half-angle form, accurate where acos is not.
            angle = 2 * atan2(float(np.linalg.norm(p - m)), float(np.linalg.norm(p + m)))
            total += angle * angle
        return total

    best = spread(mean)
    for _ in range(8):
        assert spread(mean + 1e-3 * random.standard_normal(6)) > best


def test_model_stock_by_hand() -> None:
    # n = 2, cos 60° = ½: t = 2·½/(1 + ½) = 2/3; mean δ = (¾, √3/4), so x₀ + (½, √3/6).
    base = array(1, 2)
    models = [base + array(1, 0), base + array(0.5, sqrt(3) / 2)]
    result = reference("model_stock", base=base, models=models)
    np.testing.assert_allclose(result, [1.5, 2 + sqrt(3) / 6], **EXACT)
    # n = 3, pairs 0, 1, 0 → cos = 1/3: t = 3·⅓/(1 + ⅔) = 0.6; mean δ = (⅔, ⅓).
    models = [base + array(1, 0), base + array(0, 1), base + array(1, 0)]
    result = reference("model_stock", base=base, models=models)
    np.testing.assert_allclose(result, [1.4, 2.2], **EXACT)


def test_model_stock_guards() -> None:
    base = array(1, 2)
    # cos = −1: the denominator is 0, and so is t, though the mean is not the base.
    models = [base + array(1, 0), base + array(-3, 0)]
    result = reference("model_stock", base=base, models=models)
    np.testing.assert_array_equal(result, base)
    # |δᵢ||δⱼ| = 1e-8 is divided by 1e-6 instead: cos = 0.01, t = 0.02/1.01.
    delta = array(1e-4, 0)
    result = reference("model_stock", base=array(0, 0), models=[delta, delta])
    np.testing.assert_allclose(result, delta * 0.02 / 1.01, rtol=1e-12)
    with pytest.raises(ValueError, match="two models"):
        reference("model_stock", base=base, models=[base])


def test_model_stock_filter_wise_treats_each_row_alone() -> None:
    # Row 0: cos = 1, t = 1, the mean. Row 1: cos = 0, t = 0, the base.
    base = np.array([[1.0, 1.0], [5.0, 5.0]])
    deltas = np.array([[[1, 0], [1, 0]], [[2, 0], [0, 1]]])
    models = [base + delta for delta in deltas]
    result = reference("model_stock", base=base, models=models, parameters={"filter_wise": True})
    np.testing.assert_allclose(result, [[2.5, 1], [5, 5]], **EXACT)


@pytest.mark.parametrize("count", [2, 3, 4])
@given(distance=st.floats(0.1, 10), spread=st.floats(0.1, 10))
@settings(deadline=None, max_examples=20)
def test_model_stock_is_the_papers_foot_of_the_perpendicular(
    count: int, distance: float, spread: float
) -> None:
    # The paper's picture: seen from the centre of all fine-tuned weights (here the origin), the
    # base and the models lie at right angles, the models equally far. Model Stock is then the
    # point of the plane through them all that is nearest to the centre.
    axes = np.eye(count + 2)
    base = distance * axes[0]
    models = [spread * axis for axis in axes[1 : count + 1]]
    plane = np.array([model - base for model in models]).T
    nearest = base + plane @ np.linalg.lstsq(plane, -base, rcond=None)[0]
    result = reference("model_stock", base=base, models=models)
    np.testing.assert_allclose(result, nearest, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- sparsified vectors


def test_magnitude_mask_by_hand() -> None:
    # int(½ · 4) = 2: 4 and −3.
    np.testing.assert_array_equal(magnitude_mask(array(4, -1, 2, -3), 0.5), [1, 0, 0, 1])
    # 5 and the first of the two 2s.
    np.testing.assert_array_equal(magnitude_mask(array(-1, 5, -2, 2), 0.5), [0, 1, 1, 0])
    # int(0.1 · 4) = 0, but one always survives.
    np.testing.assert_array_equal(magnitude_mask(array(0, 1, 1, 0), 0.1), [0, 1, 0, 0])
    # 0.29 · 100 is 28.999999999999996 in binary.
    assert magnitude_mask(np.arange(100.0), 0.29).sum() == 28


@given(
    arrays(np.float64, st.integers(1, 12), elements=st.integers(-3, 3).map(float)),
    st.floats(-0.5, 1.5),
)
@settings(deadline=None)
def test_magnitude_mask_keeps_the_k_largest(delta: Tensor, density: float) -> None:
    mask = magnitude_mask(delta, density)
    if density <= 0:
        assert not mask.any()
    elif density >= 1:
        assert mask.all()
    else:
        assert mask.sum() == max(1, int(density * delta.size))
        for kept, dropped in itertools.product(*map(np.flatnonzero, (mask, ~mask))):
            # The larger survives; of equal ones, the earlier.
            assert (-abs(delta[kept]), kept) < (-abs(delta[dropped]), dropped)


def test_outlier_mask_by_hand() -> None:
    # N = 10, keep 5, drop the largest 2, so n_bot = 3: ranks 3 … 7, magnitudes 4 … 8.
    delta = array(5, -1, 10, 2, -4, 8, -7, 3, 9, -6)
    expected = [abs(value) in range(4, 9) for value in delta]
    np.testing.assert_array_equal(outlier_mask(delta, 0.5, 0.2), expected)
    # Equal magnitudes rank by position: one dropped at either end.
    np.testing.assert_array_equal(outlier_mask(array(1, -1, 1, 1), 0.5, 0.25), [0, 1, 1, 0])
    # density + gamma > 1: n_bot = max(0, 10 − 9 − 3) = 0, only the largest goes.
    expected = [abs(value) < 10 for value in delta]
    np.testing.assert_array_equal(outlier_mask(delta, 0.9, 0.3), expected)


@given(
    arrays(np.float64, st.integers(1, 12), elements=st.integers(-3, 3).map(float)),
    st.floats(0, 1),
    st.floats(0, 1),
)
@settings(deadline=None)
def test_outlier_mask_keeps_a_run_of_ranks(delta: Tensor, density: float, gamma: float) -> None:
    ranked = sorted(range(delta.size), key=lambda i: (abs(delta[i]), i))
    keep_count = int(density * delta.size)
    bottom_count = max(0, delta.size - keep_count - int(gamma * delta.size))
    kept = {ranked[rank] for rank in range(bottom_count, bottom_count + keep_count)}
    assert set(np.flatnonzero(outlier_mask(delta, density, gamma))) == kept


@given(st.permutations(range(1, 11)), st.floats(0.11, 1))
@settings(deadline=None)
def test_outliers_without_gamma_are_magnitudes(values: list[int], density: float) -> None:
    delta = np.array(values, dtype=np.float64)
    np.testing.assert_array_equal(outlier_mask(delta, density, 0.0), magnitude_mask(delta, density))


def test_ties_by_hand() -> None:
    # Trimmed: (4, 0, 0, −3) and (0, 5, −2, 0); nowhere do they meet, each keeps its value.
    result = reference(
        "ties",
        base=array(10, 10, 10, 10),
        models=[array(14, 9, 12, 7), array(9, 15, 8, 12)],
        parameters={"weight": 0.25, "density": 0.5},
    )
    np.testing.assert_array_equal(result, [14, 15, 8, 7])


def test_ties_elects_and_averages() -> None:
    # y₁ = (2, −½, 1, −1.5), y₂ = (−1.5, 7.5, 3, 1.5), Σ = (½, 7, 4, 0): all signs +, the last
    # because Σ ≥ 0. Kept sums (2, 7.5, 4, 1.5) over kept weights (½, 1.5, 2, 1.5).
    arguments: dict[str, Any] = {
        "base": array(0, 0, 0, 0),
        "models": [array(4, -1, 2, -3), array(-1, 5, 2, 1)],
        "model_parameters": [{"weight": 0.5}, {"weight": 1.5}],
    }
    np.testing.assert_array_equal(reference("ties", **arguments), [4, 5, 2, 1])
    result = reference("ties", **arguments, parameters={"normalize": False, "lambda": 0.5})
    np.testing.assert_array_equal(result, [1, 3.75, 2, 0.75])


def test_ties_rescales_to_the_l1_norm() -> None:
    # 7 of 10 remain: × 10/7.
    result = reference(
        "ties",
        base=array(0, 0, 0, 0),
        models=[array(4, -1, 2, -3)],
        parameters={"weight": 1, "density": 0.5, "rescale": True},
    )
    np.testing.assert_allclose(result, [40 / 7, 0, 0, -30 / 7], **EXACT)


def test_negative_weights_vote_with_the_sign_of_their_product() -> None:
    # y = (−3, 1): Σ = −2, elected −, kept −3 over its weight −1: +3.
    result = reference(
        "ties",
        base=array(0),
        models=[array(3), array(1)],
        model_parameters=[{"weight": -1}, {"weight": 1}],
    )
    np.testing.assert_array_equal(result, [3])


def test_kept_weights_that_cancel_are_not_divided_by() -> None:
    # y = (2, 3), both positive, kept weights 1 − 1 = 0: D = 1.
    result = reference(
        "ties",
        base=array(0),
        models=[array(2), array(-3)],
        model_parameters=[{"weight": 1}, {"weight": -1}],
    )
    np.testing.assert_array_equal(result, [5])


def test_dare_by_hand() -> None:
    arguments: dict[str, Any] = {
        "base": array(1, 1, 1, 1),
        "models": [array(2, 3, -2, 5)],
        "keep": [np.array([True, False, True, False])],
    }
    # δ = (1, 2, −3, 4), kept 1 and −3, doubled, times the weight 3.
    parameters: dict[str, Any] = {"weight": 3, "density": 0.5}
    result = reference("dare_linear", **arguments, parameters=parameters)
    np.testing.assert_array_equal(result, [7, 1, -17, 1])
    result = reference("dare_linear", **arguments, parameters={**parameters, "rescale": False})
    np.testing.assert_array_equal(result, [4, 1, -8, 1])
    result = reference("dare_linear", **arguments, parameters={**parameters, "normalize": True})
    np.testing.assert_array_equal(result, [3, 1, -5, 1])


def test_dare_ties_by_hand() -> None:
    # y₁ = (2, 0), y₂ = (−4, −8)·½ = (−2, −4) after dropping and doubling; Σ = (0, −4):
    # signs (+, −), nothing divided.
    keep = np.array([True, False]), np.array([True, True])
    arguments: dict[str, Any] = {
        "base": array(0, 0),
        "models": [array(1, 9), array(-2, -4)],
        "model_parameters": [{"weight": 1}, {"weight": 0.5}],
        "keep": keep,
    }
    result = reference("dare_ties", **arguments, parameters={"density": 0.5})
    np.testing.assert_array_equal(result, [2, -4])
    result = reference("dare_ties", **arguments, parameters={"density": 0.5, "normalize": True})
    np.testing.assert_array_equal(result, [2, -8])


def all_masks(size: int) -> list[Mask]:
    return [np.array(bits) for bits in itertools.product([False, True], repeat=size)]


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_rescaled_random_methods_are_unbiased(method: str) -> None:
    # The expectation over all 2⁵ masks, each with its probability, is the full task vector.
    base, model = array(1, 2, 3, 4, 5), array(2, 1, 6, 4, 7)
    probability = np.full(5, 0.4)
    if method == "della_linear":
        probability = della_probabilities(model - base, 0.4, 0.3)
    parameters = {"weight": 0.5, "density": 0.4}
    if method == "della_linear":
        parameters["epsilon"] = 0.3
    expectation = np.zeros(5)
    for mask in all_masks(5):
        chance = np.prod(np.where(mask, probability, 1 - probability))
        expectation += chance * reference(
            method, base=base, models=[model], keep=[mask], parameters=parameters
        )
    np.testing.assert_allclose(expectation, base + 0.5 * (model - base), rtol=1e-12)


def test_della_probabilities_by_hand() -> None:
    # Ascending |δ|: −1, 2, 3 with 0.3, 0.5, 0.7; each row is ranked alone; ties by position.
    delta = np.array([[3.0, -1.0, 2.0], [7.0, 7.0, -7.0]])
    expected = [[0.7, 0.3, 0.5], [0.3, 0.5, 0.7]]
    np.testing.assert_allclose(della_probabilities(delta, 0.5, 0.2), expected, **EXACT)
    # One element has no rank: density itself.
    np.testing.assert_array_equal(della_probabilities(array(4), 0.5, 0.2), [0.5])
    np.testing.assert_array_equal(della_probabilities(np.array(4.0), 0.5, 0.2), 0.5)
    np.testing.assert_array_equal(della_probabilities(array(4, 5), 1.0, 0.2), [1, 1])
    np.testing.assert_array_equal(della_probabilities(array(4, 5), 0.0, 0.2), [0, 0])


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.1), (0.9, 0.15), (0.5, 0.5)])
def test_della_refuses_probabilities_outside_the_open_interval(
    density: float, epsilon: float
) -> None:
    with pytest.raises(ValueError, match="within"):
        della_probabilities(array(1, 2), density, epsilon)


@given(arrays(np.float64, (2, 6), elements=st.integers(-3, 3).map(float)), st.floats(0.3, 0.7))
@settings(deadline=None)
def test_della_probabilities_average_to_density(delta: Tensor, density: float) -> None:
    probabilities = della_probabilities(delta, density, 0.25)
    np.testing.assert_allclose(probabilities.mean(axis=1), density, rtol=1e-12)
    for row, probability in zip(np.abs(delta), probabilities, strict=True):
        for i, j in itertools.combinations(range(6), 2):
            assert (row[i] <= row[j]) == (probability[i] < probability[j])


def test_della_by_hand() -> None:
    # p = (0.7, 0.3, 0.5); all kept: δ/p = (30/7, −10/3, 4); Σ has one term, so D = w.
    arguments: dict[str, Any] = {
        "base": array(0, 0, 0),
        "models": [array(3, -1, 2)],
        "keep": [np.ones(3, bool)],
    }
    parameters: dict[str, Any] = {"weight": 2, "density": 0.5, "epsilon": 0.2}
    result = reference("della", **arguments, parameters=parameters)
    np.testing.assert_allclose(result, [30 / 7, -10 / 3, 4], rtol=1e-13)
    result = reference("della_linear", **arguments, parameters=parameters)
    np.testing.assert_allclose(result, [60 / 7, -20 / 3, 8], rtol=1e-13)
    result = reference("della", **arguments, parameters={**parameters, "rescale": False})
    np.testing.assert_array_equal(result, [3, -1, 2])


def test_breadcrumbs_by_hand() -> None:
    # N = 4, density ½, gamma ¼: |δ| ascending −1, 2, −3, 4: drop 4 and −1, keep 2 and −3.
    arguments: dict[str, Any] = {"base": array(0, 0, 0, 0), "models": [array(4, -1, 2, -3)]}
    parameters: dict[str, Any] = {"weight": 3, "density": 0.5, "gamma": 0.25}
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        result = reference(method, **arguments, parameters=parameters)
        np.testing.assert_array_equal(result, [0, 0, 6, -9])
    # 5 of 10 remain: rescaling doubles.
    result = reference("breadcrumbs", **arguments, parameters={**parameters, "rescale": True})
    np.testing.assert_array_equal(result, [0, 0, 12, -18])
    # Against a second model that outvotes the first at element 2: y = 6 against −8.
    result = reference(
        "breadcrumbs_ties",
        base=array(0, 0, 0, 0),
        models=[array(4, -1, 2, -3), array(9, 1, -8, 2)],
        model_parameters=[{"weight": 3}, {"weight": 1}],
        parameters={"density": 0.5, "gamma": 0.25},
    )
    # The second keeps −8 and 2: Σ = (0, 0, −2, −7), kept −8 and −9.
    np.testing.assert_array_equal(result, [0, 0, -8, -9])


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_full_density_is_task_arithmetic(seed: int) -> None:
    arguments = case_of("task_arithmetic", seed, (3, 4))
    expected = reference("task_arithmetic", **arguments)
    for method in ("dare_linear", "della_linear", "breadcrumbs"):
        result = reference(method, **arguments | {"parameters": {"density": 1}})
        np.testing.assert_allclose(result, expected, **EXACT)
    one = {**arguments, "models": arguments["models"][:1], "model_parameters": [{"weight": 1}]}
    np.testing.assert_allclose(
        reference("ties", **one), reference("task_arithmetic", **one), **EXACT
    )
    # TIES of one model divides by its own weight.
    heavier = {**one, "model_parameters": [{"weight": 8}]}
    np.testing.assert_allclose(reference("ties", **heavier), one["models"][0], **EXACT)


@pytest.mark.parametrize("method", sorted(SPARSIFIED))
def test_density_zero_is_the_base(method: str) -> None:
    arguments = case_of(method, 1, (3, 4))
    for entry in arguments["model_parameters"]:
        entry["density"] = 0
    np.testing.assert_array_equal(reference(method, **arguments), arguments["base"])


def test_della_without_spread_is_dare() -> None:
    arguments = case_of("della_linear", 3, (3, 4))
    spread = reference("della_linear", **arguments | {"parameters": {"epsilon": 0}})
    np.testing.assert_allclose(spread, reference("dare_linear", **arguments), **EXACT)


def test_int8_mask_is_accepted_and_has_no_effect() -> None:
    arguments = case_of("ties", 5, (4,))
    with_mask = reference("ties", **arguments | {"parameters": {"int8_mask": True}})
    np.testing.assert_array_equal(with_mask, reference("ties", **arguments))


# ---------------------------------------------------------------- other task vectors


def test_sce_by_hand() -> None:
    # Variances (1, 1, 0, 0): two are nonzero, int(½ · 2) = 1 selected, the first of the equals.
    # Energies 9 and 1 (quarters): W = 0.9, 0.1; (0.9 · 3 + 0.1 · 1)/1 = 2.8.
    arguments: dict[str, Any] = {
        "base": array(1, 1, 1, 1),
        "models": [array(4, 2, 1, 3), array(2, 0, 1, 3)],
    }
    result = reference("sce", **arguments, parameters={"select_topk": 0.5})
    np.testing.assert_allclose(result, [3.8, 1, 1, 1], **EXACT)
    # All: energies 14 and 6: W = 0.7, 0.3. Element 0: 2.1 + 0.3; element 1: Σδ = 0 elects +,
    # δ₁ = 1 alone; element 3: both 2.
    np.testing.assert_allclose(reference("sce", **arguments), [3.4, 2, 1, 3], **EXACT)
    result = reference("sce", **arguments, parameters={"select_topk": 0})
    np.testing.assert_array_equal(result, arguments["base"])


def test_sce_weighs_equally_where_there_is_little_energy() -> None:
    # Mean squares 5e-7 and 1.25e-7 add up to less than 1e-6: ½, ½.
    base = array(0, 0)
    result = reference("sce", base=base, models=[array(1e-3, 0), array(5e-4, 0)])
    np.testing.assert_allclose(result, [7.5e-4, 0], rtol=1e-12)
    # 9.8e-7 and 2.45e-7 add up to more: 0.8, 0.2.
    result = reference("sce", base=base, models=[array(1.4e-3, 0), array(7e-4, 0)])
    np.testing.assert_allclose(result, [1.26e-3, 0], rtol=1e-12)


def test_sce_selects_by_variance() -> None:
    # Variances 1 and 2 · 1.3²/4 = 0.845: the first, though the second has the widest range. Of
    # (1, −1, 1, −1) the positive ones stay: mean squares are equal, their mean is 1.
    deltas = ((1, 1.3), (-1, -1.3), (1, 0), (-1, 0))
    result = reference(
        "sce",
        base=array(0, 0),
        models=[array(*delta) for delta in deltas],
        parameters={"select_topk": 0.5},
    )
    np.testing.assert_allclose(result, [1, 0], **EXACT)


def test_ram_by_hand() -> None:
    # Element 0 is shared: (1 + 3)/2. Elements 2 and 3 are unique; 1e-6 is not active.
    result = reference(
        "ram", base=array(0, 0, 0, 1), models=[array(1, 0, 2, 1 + 1e-6), array(3, 0, 0, 6)]
    )
    np.testing.assert_array_equal(result, [2, 0, 2, 6])
    # Exactly epsilon is not active.
    result = reference("ram", base=array(0), models=[array(0.5)], parameters={"epsilon": 0.5})
    np.testing.assert_array_equal(result, [0])


def test_ramplus_tl_by_hand() -> None:
    # Model 1: shared 1, unique 2 (elements 1, 2): ρ = ½. Model 2: shared 1, unique 1: ρ = 1.
    base = array(0, 0, 0, 0)
    models = [array(1, 4, 2, 0), array(3, 0, 0, 5)]
    # alpha = 0.8, r = 0.5: boosts 1 + 0.5 · 0.5 = 1.25 and 1 + 0.5 · 0.8 = 1.4.
    result = reference("ramplus_tl", base=base, models=models, parameters={"r": 0.5, "alpha": 0.8})
    np.testing.assert_allclose(result, [2, 5, 2.5, 7], **EXACT)
    # Defaults: 1 + 0.1 · 0.2 = 1.02 for both.
    result = reference("ramplus_tl", base=base, models=models)
    np.testing.assert_allclose(result, [2, 4.08, 2.04, 5.1], **EXACT)
    without = reference("ramplus_tl", base=base, models=models, parameters={"r": 0})
    np.testing.assert_array_equal(without, reference("ram", base=base, models=models))


def test_nearswap_by_hand() -> None:
    # t = 2: w = 1, 2/4, 2/8; and 1 where nothing differs.
    result = reference(
        "nearswap",
        base=array(0, 0, 0, 3),
        models=[array(1, 4, -8, 3)],
        parameters={"t": 2},
    )
    np.testing.assert_array_equal(result, [1, 2, -2, 3])
    # |δ| = 1e-7 counts as 1e-6: w = ½.
    result = reference("nearswap", base=array(0), models=[array(1e-7)], parameters={"t": 5e-7})
    np.testing.assert_allclose(result, [5e-8], rtol=1e-12)


def test_arcee_fusion_by_hand() -> None:
    # Row 0: softmax(ln 3, 0) = (¾, ¼) against (½, ½): KL = ¾ ln 1.5 + ¼ ln ½ = 0.130812.
    # Row 1 moves by 0.01: KL ≈ 1e-5, importance ≈ 1e-7. Importances (0.1437, 0, 1e-7, 0):
    # median ≈ 0, q₂₅ = 0, q₇₅ ≈ 0.0359, threshold ≈ 0.054: only the first is taken.
    base = np.zeros((2, 2))
    other = np.array([[log(3), 0.0], [0.01, 0.0]])
    importance = arcee_importance(base, other, other - base)
    divergence = 0.75 * log(1.5) + 0.25 * log(0.5)
    np.testing.assert_allclose(importance[0], [log(3) * divergence, 0], rtol=1e-6)
    assert 0 < importance[1, 0] < 1e-6
    result = reference("arcee_fusion", base=base, models=[other])
    np.testing.assert_array_equal(result, [[log(3), 0], [0, 0]])


def test_arcee_fusion_interpolates_its_quantiles() -> None:
    # One column: softmax of one element is 1, KL is 0, every importance and the threshold is 0,
    # so everything is taken.
    base, other = np.zeros((3, 1)), np.array([[1.0], [2.0], [3.0]])
    np.testing.assert_array_equal(reference("arcee_fusion", base=base, models=[other]), other)
    random = np.random.default_rng(0)
    base, other = random.standard_normal((2, 4, 6))
    importance = arcee_importance(base, other, other - base)
    ordered = np.sort(importance.reshape(-1))
    # N = 24: positions 5.75, 11.5 and 17.25 counted from 0.
    q25 = 0.25 * ordered[5] + 0.75 * ordered[6]
    median = 0.5 * ordered[11] + 0.5 * ordered[12]
    q75 = 0.75 * ordered[17] + 0.25 * ordered[18]
    taken = importance >= median + 1.5 * (q75 - q25)
    assert 0 < taken.sum() < taken.size
    result = reference("arcee_fusion", base=base, models=[other])
    np.testing.assert_allclose(result, np.where(taken, other, base), **EXACT)


# ------------------------------------------------------------------ what all share

PERMUTABLE = sorted(set(METHODS) - PAIRWISE)


@pytest.mark.parametrize("method", PERMUTABLE)
@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=5)
def test_the_order_of_models_does_not_matter(method: str, seed: int) -> None:
    arguments = case_of(method, seed, (3, 5))
    expected = reference(method, **arguments)
    order = np.random.default_rng(seed).permutation(len(arguments["models"]))
    for name in ("models", "model_parameters", "keep"):
        if name in arguments:
            arguments[name] = [arguments[name][index] for index in order]
    np.testing.assert_allclose(reference(method, **arguments), expected, rtol=1e-9, atol=1e-12)


SCALABLE = sorted(set(METHODS) - {"ram", "ramplus_tl", "nearswap", "arcee_fusion", "multislerp"})


@pytest.mark.parametrize("method", SCALABLE)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-3, 6))
@settings(deadline=None, max_examples=5)
def test_scaling_every_tensor_scales_the_result(method: str, seed: int, exponent: int) -> None:
    arguments = case_of(method, seed, (3, 5))
    expected = 2.0**exponent * reference(method, **arguments)
    if arguments["base"] is not None:
        arguments["base"] = arguments["base"] * 2.0**exponent
    arguments["models"] = [model * 2.0**exponent for model in arguments["models"]]
    np.testing.assert_allclose(reference(method, **arguments), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", sorted(set(METHODS) - WITHOUT_BASE - {"multislerp"}))
def test_models_equal_to_the_base_give_the_base(method: str) -> None:
    arguments = case_of(method, 7, (3, 5))
    arguments["models"] = [arguments["base"].copy() for _ in arguments["models"]]
    result = reference(method, **arguments)
    np.testing.assert_allclose(result, arguments["base"], **EXACT)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 4), (2, 3, 4), (3, 0)])
def test_every_shape_is_merged_and_no_input_changes(method: str, shape: tuple[int, ...]) -> None:
    arguments = case_of(method, 11, shape)
    tensors = [*arguments["models"], *([] if arguments["base"] is None else [arguments["base"]])]
    for tensor in tensors:
        tensor.flags.writeable = False
    result = reference(method, **arguments)
    assert result.shape == shape
    assert result.dtype == np.float64
    assert np.isfinite(result).all()


def test_differences_may_be_rounded_to_float32() -> None:
    # 1 − 2⁻⁴⁰ is 1 in float32: the magnitudes tie, and the earlier survives.
    arguments: dict[str, Any] = {
        "base": array(2.0**-40, 0),
        "models": [array(1, 1)],
        "parameters": {"weight": 1, "density": 0.5},
    }
    exact = reference("ties", **arguments)
    np.testing.assert_array_equal(exact, [2.0**-40, 1])
    rounded = reference("ties", **arguments, difference_dtype=np.float32)
    np.testing.assert_array_equal(rounded, [1 + 2.0**-40, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": [array(1)], "parameters": {"weigth": 1}}, "no parameter weigth"),
        ({"models": [array(1)]}, "'weight' is required"),
        ({"models": [], "parameters": {"weight": 1}}, "no models"),
        ({"models": [array(1), array(1, 2)], "parameters": {"weight": 1}}, "shapes differ"),
        ({"models": [np.ones(1, np.float32)], "parameters": {"weight": 1}}, "float64"),
        ({"models": [array(1)], "model_parameters": [{}, {}]}, "2 model_parameters for 1"),
        (
            {"models": [array(1)], "parameters": {"weight": 1}, "keep": [array(1)]},
            "boolean",
        ),
    ],
)
def test_a_call_that_means_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference("linear", **arguments)


def test_missing_operands_are_named() -> None:
    with pytest.raises(ValueError, match="needs a base"):
        reference("ram", models=[array(1)])
    with pytest.raises(ValueError, match="needs keep masks"):
        reference(
            "dare_linear",
            base=array(0),
            models=[array(1)],
            parameters={"weight": 1, "density": 0.5},
        )
