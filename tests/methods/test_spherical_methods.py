"""nuslerp, multislerp, karcher and model_stock from recipe to file, against the references.

All four sum in float64, so what the engine rounds off besides the output's own rounding is the
error of a few coefficients: inner products are right to about 2⁻⁴⁶ of the norms (`PRODUCT`), and
each test says by how much its formula magnifies that. Cases that magnify it without bound (vectors
that point away from each other, directions that cancel) have tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lazymerge.errors import InputError, RecipeError
from merge_and_compare import (
    OUT_DTYPES,
    WEIGHTS,
    check,
    merge,
    noise,
    recipe_for,
    refused,
    small_blocks,
)
from tensor_cases import KINDS, ROW_SHAPES, Family, checkpoints, families

from merging import bits, plan_of
from reference import assert_within_ulps, reference, to_float64
from reference.case import by_column, by_row

EXAMPLES = settings(max_examples=40)

SPOILT_KINDS = [*KINDS, "few", "spoilt"]

PRODUCT = 2.0**-46

By = Callable[..., np.ndarray]


def whole(function: Callable[..., np.ndarray], *tensors: np.ndarray) -> np.ndarray:
    """As by_row, for the whole tensor as one vector."""
    return function(*(tensor.reshape(-1) for tensor in tensors)).reshape(tensors[0].shape)


def without_base(drawn: list[Family]) -> list[Family]:
    return [replace(family, dtypes=family.dtypes[:-1]) for family in drawn]


def cleaned(family: Family, by: By) -> tuple[list[np.ndarray], np.ndarray]:
    """The tensors, vectors that are not finite in all of them replaced by zeros; and which are."""
    tensors = [to_float64(tensor) for tensor in family.tensors()]
    every = np.isfinite(np.array(tensors)).all(axis=0).astype(float)
    good = by(lambda vector: np.full_like(vector, vector.all()), every) > 0
    return [np.where(good, tensor, 0.0) for tensor in tensors], good


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Of vectors that have a direction; 0 of others."""
    norms = [float(np.linalg.norm(vector)) for vector in (first, second)]
    return float(first @ second) / (norms[0] * norms[1]) if min(norms) > 1e-8 else 0.0


# ----------------------------------------------------------------------------- nuslerp


def nuslerp_slack(t: float) -> Callable[..., np.ndarray]:
    """What may be rounded off the slerp of two vectors.

    The coefficients sin(tθ)/sin θ are smooth in cos θ where it is positive, with a slope of at most
    (|t| + |1−t| + 1)³; else the slope is (|t| + 2)/sin³ θ. Of vectors of one element the cosine is
    exact: ±1, which is linear.
    """

    def slack(base: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        both = np.abs(first) + np.abs(second)
        cosine_of_both = cosine(first, second)
        sine = sqrt(max(0.0, 1 - min(1.0, cosine_of_both**2)))
        slope = (abs(t) + abs(1 - t) + 1) ** 3
        size = slope
        if len(first) > 1 and cosine_of_both < 0:
            if sine < 1e-3:
                return np.full_like(both, np.inf)
            slope += (abs(t) + 2) / sine**3
            size /= sine
        return noise([base, size * both]) + PRODUCT * slope * both

    return slack


@given(
    drawn=families(3, SPOILT_KINDS, ROW_SHAPES),
    weights=st.tuples(WEIGHTS, WEIGHTS),
    has_base=st.booleans(),
    parameters=st.fixed_dictionaries(
        {}, optional={"nuslerp_flatten": st.booleans(), "nuslerp_row_wise": st.booleans()}
    ),
    out=OUT_DTYPES,
)
@settings(max_examples=60)
def test_nuslerp(
    drawn: list[Family],
    weights: tuple[float, float],
    has_base: bool,
    parameters: dict[str, Any],
    out: torch.dtype | None,
) -> None:
    own = [{"weight": weight} for weight in weights]
    names = ["base", "a", "b"] if has_base else ["a", "b"]
    drawn = drawn if has_base else without_base(drawn)
    with small_blocks() as folder:
        base_name = "base" if has_base else None
        recipe = recipe_for("nuslerp", "ab", own, parameters, base=base_name, out=out)
        merged = merge(folder, recipe, checkpoints(drawn, names))
    t = weights[1] / sum(weights) if abs(sum(weights)) >= 1e-6 else 0.5
    by: By = by_column if parameters.get("nuslerp_row_wise") else by_row
    if parameters.get("nuslerp_flatten", True):
        by = whole
    for number, family in enumerate(drawn):
        tensors, good = cleaned(family, by)
        base, *models = tensors if has_base else [np.zeros(family.shape), *tensors]
        expected = reference(
            "nuslerp",
            base=base if has_base else None,
            models=models,
            model_parameters=own,
            parameters=parameters,
        )
        changes = [model - base for model in models]
        slack = by(nuslerp_slack(t), base, *changes)
        check(merged[f"t{number}"], expected, family, out, slack, good=good)


HALF = sqrt(0.5)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([2.0, 0.0], [1.5, 0.0]),  # parallel: linear
        ([-1.0, 0.0], [0.0, 0.0]),  # antiparallel: linear too
        ([-3.0, 0.0], [-1.0, 0.0]),
        ([0.0, 1.0], [HALF, HALF]),
        ([0.0, 0.0], [HALF, 0.0]),  # no direction: cos θ = 0
    ],
)
@pytest.mark.parametrize("form", ["whole", "rows", "columns", "changes", "changes of rows"])
def test_nuslerp_by_hand(
    tmp_path: Path, other: list[float], expected: list[float], form: str
) -> None:
    """The same two vectors as tensors, rows, and columns; and as changes of a base."""
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    second = torch.tensor([other, [0.0, 1.0]])
    wanted = np.array([expected, [0.0, 1.0]])
    if form in ("whole", "changes"):
        first, second, wanted = first[0], second[0], wanted[0]
    elif form == "columns":
        first, second, wanted = first.T, second.T, wanted.T
    models = {"a": {"t": first}, "b": {"t": second}}
    base = None
    if form.startswith("changes"):
        base = "base"
        models = {name: {"t": tensors["t"] + 2} for name, tensors in models.items()}
        models["base"] = {"t": torch.full_like(first, 2)}
        wanted = wanted + 2
    parameters = {
        "weight": 1,
        "nuslerp_flatten": form in ("whole", "changes"),
        "nuslerp_row_wise": form == "columns",
    }
    merged = merge(tmp_path, recipe_for("nuslerp", "ab", None, parameters, base=base), models)
    assert_within_ulps(merged["t"], wanted, torch.float32, slack=1e-12)


def test_nuslerp_of_weights_that_cancel_goes_half_way(tmp_path: Path) -> None:
    models = {"a": {"t": torch.tensor([2.0, 0.0])}, "b": {"t": torch.tensor([0.0, 1.0])}}
    own = [{"weight": 0.3}, {"weight": -0.3}]
    merged = merge(tmp_path, recipe_for("nuslerp", "ab", own), models)
    assert_within_ulps(merged["t"], np.array([2 * HALF, HALF]), torch.float32)


@pytest.mark.parametrize("flatten", [True, False])
def test_nuslerp_of_one_weight_is_that_model(tmp_path: Path, flatten: bool) -> None:
    tensors = torch.randn((3, 40, 7), generator=torch.Generator().manual_seed(4))
    models = {name: {"t": tensors[i]} for i, name in enumerate(("base", "a", "b"))}
    own = [{"weight": 0}, {"weight": 0.7}]
    for base in (None, "base"):
        recipe = recipe_for("nuslerp", "ab", own, {"nuslerp_flatten": flatten}, base=base)
        merged = merge(tmp_path / str(base), recipe, models)
        expected = to_float64(tensors[2])
        assert_within_ulps(merged["t"], expected, torch.float32, 0.51, slack=1e-13)


def test_nuslerp_turns_every_row_by_itself(tmp_path: Path) -> None:
    """What a row is at does not depend on the others: not on nan among them, nor on their size."""
    tensors = torch.randn((2, 300, 5), generator=torch.Generator().manual_seed(6))
    models = {name: {"t": tensors[i].clone()} for i, name in enumerate("ab")}
    models["a"]["t"][3] *= 1e30
    models["b"]["t"][5, 2] = torch.nan
    models["b"]["t"][7, 0] = torch.inf
    recipe = recipe_for("nuslerp", "ab", None, {"weight": 1, "nuslerp_flatten": False})
    with small_blocks() as folder:
        every = merge(folder, recipe, models)["t"]
    rows = {name: {f"r{i}": row for i, row in enumerate(m["t"])} for name, m in models.items()}
    one_by_one = merge(tmp_path, recipe, rows)
    for number, row in enumerate(every):
        if number in (5, 7):
            assert torch.isnan(row).all()
        else:
            alone = one_by_one[f"r{number}"]
            assert_within_ulps(row, to_float64(alone), torch.float32, slack=1e-12)


# -------------------------------------------------------------------------- multislerp


@given(
    drawn=families(4, SPOILT_KINDS, ROW_SHAPES),
    weights=st.lists(WEIGHTS, min_size=2, max_size=3),
    has_base=st.booleans(),
    parameters=st.fixed_dictionaries(
        {},
        optional={
            "normalize_weights": st.booleans(),
            "eps": st.sampled_from([1e-12, 1e-8, 1e-3, 0.5]),
        },
    ),
    out=OUT_DTYPES,
)
@EXAMPLES
def test_multislerp(
    drawn: list[Family],
    weights: list[float],
    has_base: bool,
    parameters: dict[str, Any],
    out: torch.dtype | None,
) -> None:
    """Of directions that do not cancel: |m| ≥ 0.001 Σ|wᵢ|, which magnifies errors by its inverse,
    and twice that for the length."""
    if parameters.get("normalize_weights", True):
        assume(abs(sum(weights)) > 1e-6)
    names = ["base", "a", "b", "c"][0 if has_base else 1 : 1 + len(weights)]
    cut = [replace(family, dtypes=family.dtypes[: len(names)]) for family in drawn]
    cases = []
    for family in cut:
        tensors, good = cleaned(family, whole)
        base, *models = tensors if has_base else [np.zeros(family.shape), *tensors]
        changes = [model - base for model in models]
        slack = multislerp_slack(changes, weights, parameters)
        if slack is not None:
            cases.append((family, base, models, good, slack + noise([base])))
    assume(cases)
    own = [{"weight": weight} for weight in weights]
    with small_blocks() as folder:
        recipe = recipe_for(
            "multislerp",
            names[1:] if has_base else names,
            own,
            parameters,
            base="base" if has_base else None,
            out=out,
        )
        merged = merge(folder, recipe, checkpoints([family for family, *_ in cases], names))
    for number, (family, base, models, good, slack) in enumerate(cases):
        expected = reference(
            "multislerp",
            base=base if has_base else None,
            models=models,
            model_parameters=own,
            parameters=parameters,
        )
        check(merged[f"t{number}"], expected, family, out, slack, good=good)


def multislerp_slack(
    vectors: list[np.ndarray], weights: list[float], parameters: dict[str, Any]
) -> np.ndarray | None:
    """What may be rounded off, for vectors that do not cancel; else None."""
    eps = parameters.get("eps", 1e-8)
    divisor = sum(weights) if parameters.get("normalize_weights", True) else 1.0
    shares = [weight / divisor for weight in weights]
    norms = [float(np.linalg.norm(vector)) for vector in vectors]
    terms = [w / (n + eps) * v for w, n, v in zip(shares, norms, vectors, strict=True)]
    length = float(np.linalg.norm(np.sum(terms, axis=0)))
    if len(vectors) == 2 and max(norms) < 1e-20:  # no directions at all: linear
        return noise([share * vector for share, vector in zip(shares, vectors, strict=True)])
    if length < 1e-3 * sum(map(abs, shares)) or length < 2 * eps:
        return None
    radius = sum(abs(share) * norm for share, norm in zip(shares, norms, strict=True))
    magnified = (sum(map(abs, shares)) / length) ** 2
    return noise([term * radius / length for term in terms], PRODUCT * (1 + magnified))


def test_multislerp_by_hand(tmp_path: Path) -> None:
    """Directions e₁, e₂: the mean points to 45°, at the length (2 + 4)/2; or 2 + 4."""
    models = {"a": {"t": torch.tensor([2.0, 0.0])}, "b": {"t": torch.tensor([0.0, 4.0])}}
    for normalize, length in ((True, 3.0), (False, 6.0)):
        parameters = {"weight": 1, "normalize_weights": normalize}
        merged = merge(tmp_path, recipe_for("multislerp", "ab", None, parameters), models)
        assert_within_ulps(merged["t"], np.full(2, length * HALF), torch.float32)


def test_multislerp_of_models_shorter_than_eps(tmp_path: Path) -> None:
    """eps bounds the mean direction and not the models: it is 6·0.2/0.7 − 5·0.1/0.6 long here."""
    models = {"a": {"t": torch.tensor([0.2, 0.0])}, "b": {"t": torch.tensor([0.1, 0.0])}}
    recipe = recipe_for("multislerp", "ab", None, {"eps": 0.5})
    for entry, weight in zip(recipe["models"], (0.3, -0.25), strict=True):
        entry["parameters"] = {"weight": weight}
    merged = merge(tmp_path, recipe, models)
    assert_within_ulps(merged["t"], np.array([6 * 0.2 - 5 * 0.1, 0.0]), torch.float32, slack=1e-7)


def test_multislerp_of_the_same_changes_makes_them_once(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    base, model = torch.randn((2, 400), generator=generator, dtype=torch.float64)
    models = {"base": {"t": base}, "a": {"t": model}, "b": {"t": model}, "c": {"t": model}}
    recipe = recipe_for("multislerp", "abc", None, {"weight": 0.4}, base="base")
    merged = merge(tmp_path, recipe, models)["t"]
    assert_within_ulps(merged, to_float64(model), torch.float64, slack=1e-13)


def opposed(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """A random vector, and one that points the other way, of another length."""
    random = np.random.default_rng(seed)
    vector = torch.from_numpy(random.standard_normal(200)).to(dtype)
    return vector, (-vector.double() * random.choice([0.5, 1.0, 2.0, 4.0])).to(dtype)


@pytest.mark.parametrize("has_base", [False, True])
def test_multislerp_of_two_opposite_models_is_linear(tmp_path: Path, has_base: bool) -> None:
    """Whatever their lengths are: the same numbers times a power of two cancel exactly."""
    first, second = opposed(1)
    models = {"a": {"t": first}, "b": {"t": second}, "base": {"t": torch.zeros_like(first)}}
    base = "base" if has_base else None
    recipe = recipe_for("multislerp", "ab", None, {"weight": 2}, base=base)
    expected = to_float64(first + second) / 2
    assert_within_ulps(merge(tmp_path, recipe, models)["t"], expected, torch.float64)


def test_multislerp_of_more_opposite_models_names_the_tensor(tmp_path: Path) -> None:
    first, second = opposed(1)
    models = {
        "a": {"fine": torch.ones(3), "unlucky": first},
        "b": {"fine": torch.ones(3), "unlucky": second},
        "c": {"fine": torch.ones(3), "unlucky": torch.zeros_like(first)},
    }
    with pytest.raises(InputError, match=r"tensor unlucky: the weighted directions .* cancel"):
        merge(tmp_path, recipe_for("multislerp", "abc", None, {"weight": 1}), models)


def test_multislerp_sees_that_directions_cancel_but_for_rounding(tmp_path: Path) -> None:
    """Float64 leaves 10⁻¹⁶ of what cancels, whatever the lengths: far below eps."""
    for seed in range(8):
        random = np.random.default_rng(seed)
        first = torch.from_numpy(random.standard_normal(200))
        second = -first * random.uniform(0.5, 3.0)
        recipe = recipe_for("multislerp", "ab", None, {"weight": 1})
        merged = merge(tmp_path / f"{seed}", recipe, {"a": {"t": first}, "b": {"t": second}})
        expected = to_float64(first + second) / 2
        assert_within_ulps(merged["t"], expected, torch.float64, slack=1e-9)


@pytest.mark.parametrize("has_base", [False, True])
def test_multislerp_without_eps_of_tensors_without_direction(
    tmp_path: Path, has_base: bool
) -> None:
    """eps: 0 is within its bounds; |m| = 0 is not below it, but there is nothing to turn."""
    models = {name: {"t": torch.zeros(5)} for name in ("base", "a", "b")}
    parameters = {"weight": 1, "eps": 0}
    recipe = recipe_for("multislerp", "ab", None, parameters, base="base" if has_base else None)
    assert merge(tmp_path, recipe, models)["t"].tolist() == [0.0] * 5


# ----------------------------------------------------------------------------- karcher


@given(
    drawn=families(4, SPOILT_KINDS, ROW_SHAPES),
    count=st.integers(2, 4),
    parameters=st.fixed_dictionaries(
        {},
        optional={
            "max_iter": st.sampled_from([0, 1, 3, 50]),
            "tol": st.sampled_from([1e-9, 1e-5, 1e-2]),
        },
    ),
    out=OUT_DTYPES,
)
@EXAMPLES
def test_karcher(
    drawn: list[Family], count: int, parameters: dict[str, Any], out: torch.dtype | None
) -> None:
    """Of directions none of which opposes another (cos > −0.99): then nothing is magnified by more
    than 1/sin³ θ = 360 in each of some iterations, and 2⁻³⁶ of the length is generous."""
    names = ["a", "b", "c", "d"][:count]
    cut = [replace(family, dtypes=family.dtypes[:count]) for family in drawn]
    cases = []
    for family in cut:
        models, good = cleaned(family, whole)
        flat = [model.reshape(-1) for model in models]
        cosines = [cosine(flat[i], flat[j]) for i in range(count) for j in range(i)]
        if min(cosines) > -0.99:
            cases.append((family, models, good))
    assume(cases)
    with small_blocks() as folder:
        recipe = recipe_for("karcher", names, None, parameters, out=out)
        merged = merge(folder, recipe, checkpoints([family for family, *_ in cases], names))
    for number, (family, models, good) in enumerate(cases):
        expected = reference("karcher", models=models, parameters=parameters)
        norms = [float(np.linalg.norm(model)) for model in models]
        units = [model / (norm or 1.0) for model, norm in zip(models, norms, strict=True)]
        slack = noise([sum(norms) * unit for unit in units], 2.0**-36)
        check(merged[f"t{number}"], expected, family, out, slack, good=good)


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ([[2, 0], [0, 4]], [3 * HALF, 3 * HALF]),
        # on a circle the mean is that of the angles: 0°, 0°, 90° → 30°
        ([[1, 0], [1, 0], [0, 1]], [sqrt(0.75), 0.5]),
        ([[2, 0], [0, 4], [0, 0]], [sqrt(2), sqrt(2)]),  # no direction, but in the mean length
        ([[1, 0], [-3, 0]], [2, 0]),  # opposite: along the first
        ([[0, 0], [0, 0]], [0, 0]),
        ([[1e-6, 0], [0, 1e-7]], [0, 0]),  # below tol
    ],
)
def test_karcher_by_hand(tmp_path: Path, vectors: list[list[float]], expected: list[float]) -> None:
    names = "abc"[: len(vectors)]
    models = {
        name: {"t": torch.tensor(vector, dtype=torch.float64)}
        for name, vector in zip(names, vectors, strict=True)
    }
    merged = merge(tmp_path, recipe_for("karcher", names, None, {"max_iter": 50}), models)["t"]
    np.testing.assert_allclose(to_float64(merged), expected, rtol=1e-9, atol=1e-12)


def test_karcher_does_not_care_for_the_order(tmp_path: Path) -> None:
    """Nor for the base model, which may or may not be one of those that are averaged."""
    tensors = torch.randn((3, 500), generator=torch.Generator().manual_seed(3)).double()
    models = {name: {"t": tensor} for name, tensor in zip("abc", tensors, strict=True)}
    parameters = {"max_iter": 100, "tol": 1e-7}
    found = [
        merge(tmp_path / order, recipe_for("karcher", order, None, parameters, base=base), models)
        for order, base in (("abc", None), ("cab", None), ("bac", "b"))
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other["t"], found[0]["t"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("other", [[1.0, 0.0], [-1.0, 0.0], [3.0, 0.0]])
def test_karcher_without_tolerance(tmp_path: Path, other: list[float]) -> None:
    """tol: 0 is within its bounds."""
    models = {"a": {"t": torch.tensor([1.0, 0.0])}, "b": {"t": torch.tensor(other)}}
    merged = merge(tmp_path, recipe_for("karcher", "ab", None, {"tol": 0}), models)["t"]
    assert merged.tolist() == [(1 + abs(other[0])) / 2, 0.0]


# ------------------------------------------------------------------------- model_stock


def stock_slack(base: np.ndarray, *models: np.ndarray) -> np.ndarray:
    """t = n cos/(1 + (n−1) cos) has the slope n/(1 + (n−1) cos)²."""
    changes = [model - base for model in models]
    count = len(changes)
    norms = [float(np.linalg.norm(change)) for change in changes]
    cosines = [
        float(changes[i] @ changes[j]) / max(norms[i] * norms[j], 1e-6)
        for i in range(count)
        for j in range(i)
    ]
    mean = np.mean(np.abs(changes), axis=0)
    denominator = 1 + (count - 1) * min(1.0, max(-1.0, float(np.mean(cosines))))
    if abs(denominator) < 1e-4:  # nearly opposed: the limit of 1e-6 decides, in their last bits
        exact = len(base) == 1  # but then cosines are ±1, exactly
        return noise([base]) if exact else np.full_like(base, np.inf)
    share = count / denominator
    return noise([base, *models], 2.0**-50 * (1 + abs(share))) + PRODUCT * share**2 * mean


@given(
    drawn=families(4, SPOILT_KINDS, ROW_SHAPES),
    count=st.integers(2, 3),
    parameters=st.fixed_dictionaries({}, optional={"filter_wise": st.booleans()}),
    out=OUT_DTYPES,
)
@EXAMPLES
def test_model_stock(
    drawn: list[Family], count: int, parameters: dict[str, Any], out: torch.dtype | None
) -> None:
    names = ["base", "a", "b", "c"][: 1 + count]
    drawn = [replace(family, dtypes=family.dtypes[: 1 + count]) for family in drawn]
    with small_blocks() as folder:
        recipe = recipe_for("model_stock", names[1:], None, parameters, base="base", out=out)
        merged = merge(folder, recipe, checkpoints(drawn, names))
    by: By = by_row if parameters.get("filter_wise") else whole
    for number, family in enumerate(drawn):
        (base, *models), good = cleaned(family, by)
        expected = reference("model_stock", base=base, models=models, parameters=parameters)
        slack = by(stock_slack, base, *models)
        check(merged[f"t{number}"], expected, family, out, slack, good=good)


@pytest.mark.parametrize("filter_wise", [True, False])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([[1, 0], [0, 1]], [0, 0]),  # at right angles: the base
        ([[1, 0], [1, 0]], [1, 0]),  # the same: the mean
        ([[1, 0], [3, 0]], [2, 0]),
        ([[1, 0], [-1, 0]], [0, 0]),  # 1 + cos θ = 0: the base
        ([[0, 0], [0, 0]], [0, 0]),
        # cos θ = 0.6: t = 1.2/1.6, the mean (0.8, 0.4)
        ([[1, 0], [0.6, 0.8]], [0.6, 0.3]),
    ],
)
def test_model_stock_by_hand(
    tmp_path: Path, changes: list[list[float]], expected: list[float], filter_wise: bool
) -> None:
    base = torch.tensor([[5.0, 7.0]], dtype=torch.float64)
    models = {"base": {"t": base}}
    for name, change in zip("ab", changes, strict=True):
        models[name] = {"t": base + torch.tensor(change)}
    recipe = recipe_for("model_stock", "ab", None, {"filter_wise": filter_wise}, base="base")
    merged = merge(tmp_path, recipe, models)["t"]
    np.testing.assert_allclose(to_float64(merged - base)[0], expected, atol=1e-12)


def test_model_stock_without_changes_gives_the_base_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn((40, 30), generator=torch.Generator().manual_seed(1))
    models = {name: {"t": base.bfloat16()} for name in ("base", "a", "b")}
    for filter_wise in (False, True):
        parameters = {"filter_wise": filter_wise}
        recipe = recipe_for("model_stock", "ab", None, parameters, base="base")
        merged = merge(tmp_path / str(filter_wise), recipe, models)
        assert bits(merged["t"]) == bits(models["base"]["t"])


# --------------------------------------------------------------- sizes, and what is wrong


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("nuslerp", {"weight": 0.75, "nuslerp_flatten": False}),
        ("nuslerp", {"weight": 0.75, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("multislerp", {"weight": 0.75}),
        ("karcher", {}),
        ("model_stock", {"filter_wise": True}),
    ],
)
def test_blocks_of_real_size(tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    """Nothing made small: several blocks, one that a row does not fit in, and ragged ends."""
    random = np.random.default_rng(8)
    sizes = {"rows": (700, 600), "long": (2, (1 << 18) + 5), "narrow": (90_000, 3)}
    if "nuslerp_row_wise" in parameters:
        del sizes["long"]  # the reference takes its time over so many columns
    # changes are positive, so that none points away from another
    grids = {
        name: [random.integers(low, 128, size) / 32 for low in (-127, 1, 1)]
        for name, size in sizes.items()
    }
    for base, *models in grids.values():
        for model in models:
            model += base
    checkpoints = {
        model: {name: torch.from_numpy(grid[i]) for name, grid in grids.items()}
        for i, model in enumerate(("base", "a", "b"))
    }
    recipe = recipe_for(method, "ab", None, parameters, base="base")
    merged = merge(tmp_path, recipe, checkpoints)
    for name, grid in grids.items():
        base = None if method == "karcher" else grid[0]
        expected = reference(method, base=base, models=grid[1:], parameters=parameters)
        assert_within_ulps(merged[name], expected, torch.float64, slack=1e-10)


MODELS = {
    name: {"t": torch.arange(1.0 + index, 5.0 + index)}
    for index, name in enumerate(("base", "a", "b", "c"))
}
ONE = {"weight": 1}


@pytest.mark.parametrize(
    ("method", "names", "parameters", "base", "message"),
    [
        ("nuslerp", "a", ONE, None, "nuslerp merges exactly 2 models; here there is 1"),
        ("nuslerp", "abc", ONE, None, "nuslerp merges exactly 2 models; here there are 3"),
        ("nuslerp", ["base", "a"], ONE, "base", "not counting the base; here there is 1"),
        ("nuslerp", "ab", ONE | {"t": 0.5}, None, "has no parameter 't'"),
        ("nuslerp", "ab", ONE | {"nuslerp_flatten": 2}, None, "nuslerp_flatten"),
        ("multislerp", "a", ONE, None, "multislerp merges at least 2 models"),
        ("multislerp", "ab", ONE | {"eps": -1e-9}, None, "'eps' must be .*at least 0"),
        ("multislerp", "ab", ONE | {"tol": 0.1}, None, "has no parameter 'tol'"),
        ("karcher", "a", {}, None, "karcher merges at least 2 models"),
        ("karcher", "ab", {"max_iter": -1}, None, "'max_iter' must be .*at least 0"),
        ("karcher", "ab", {"max_iter": 1.5}, None, "'max_iter' must be a whole number"),
        ("karcher", "ab", {"tol": -1.0}, None, "'tol' must be .*at least 0"),
        ("karcher", "ab", ONE, None, "has no parameter 'weight'"),
        ("model_stock", "ab", {}, None, "model_stock needs a base model"),
        ("model_stock", "a", {}, "base", "at least 3 models, the base included"),
        ("model_stock", "ab", ONE, "base", "has no parameter 'weight'"),
    ],
)
def test_recipes_that_are_refused(
    tmp_path: Path,
    method: str,
    names: list[str],
    parameters: dict[str, Any],
    base: str | None,
    message: str,
) -> None:
    recipe = recipe_for(method, names, None, parameters, base=base)
    refused(tmp_path, recipe, MODELS, message, RecipeError)


def test_nuslerp_needs_a_weight_for_every_model(tmp_path: Path) -> None:
    recipe = recipe_for("nuslerp", "ab", [{"weight": 1}, {}])
    refused(tmp_path, recipe, MODELS, r"models\[1\] .* has no 'weight'", RecipeError)


def test_multislerp_refuses_weights_that_cancel_and_names_the_tensor(tmp_path: Path) -> None:
    own = [{"weight": 1}, {"weight": 0.5}, {"weight": -1.5}]
    message = r"tensor t: the weights \[1.0, 0.5, -1.5\] sum to zero"
    refused(tmp_path, recipe_for("multislerp", "abc", own), MODELS, message)
    unnormalized = recipe_for("multislerp", "abc", own, {"normalize_weights": False})
    plan_of(tmp_path, unnormalized, MODELS)


def test_multislerp_refuses_weights_that_cancel_but_for_rounding(tmp_path: Path) -> None:
    own = [{"weight": 0.1}, {"weight": 0.2}, {"weight": -0.3}]  # 5.6e-17
    refused(tmp_path, recipe_for("multislerp", "abc", own), MODELS, "sum to zero")


def test_antipodes_of_a_circle_have_no_mean(tmp_path: Path) -> None:
    """Three directions at 120°: they cancel but for 10⁻¹⁶, and multislerp says so."""
    angles = [0, 2 * pi / 3, 4 * pi / 3]
    models = {
        name: {"t": torch.tensor([np.cos(angle), np.sin(angle)], dtype=torch.float64)}
        for name, angle in zip("abc", angles, strict=True)
    }
    with pytest.raises(InputError, match="tensor t"):
        merge(tmp_path, recipe_for("multislerp", "abc", None, ONE), models)
