"""breadcrumbs and breadcrumbs_ties from recipe to file, against the float64 references.

Both compare magnitudes with thresholds and compute in float32 (in float64 where an input is), so
what may differ is rounding in proportion to the terms. Inputs lie on a coarse grid where a sign is
elected, and where magnitudes must tie; breadcrumbs is also tried on others, with a reference that
rounds every change to float32 before it ranks it. ties itself is in test_merge_methods.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lazymerge.errors import RecipeError
from merge_and_compare import (
    EIGHTHS,
    OUT_DTYPES,
    arithmetic_of,
    check,
    float_slack,
    merge,
    recipe_for,
    refused,
    small_blocks,
    undecided,
)
from tensor_cases import BLOCK, GRID_KINDS, Family, checkpoints, families

from merging import bits
from reference import assert_within_ulps, reference, to_float64
from reference.sparsified import outlier_mask

EXAMPLES = settings(max_examples=40)

METHODS = ["breadcrumbs", "breadcrumbs_ties"]

DENSITIES = st.sampled_from([0.0, 1e-9, 0.01, 0.2, 0.5, 0.9, 0.999, 1.0])
GAMMAS = st.sampled_from([0.0, 1e-9, 0.01, 0.1, 0.5, 0.8, 1.0])

OWN = st.lists(
    st.fixed_dictionaries({"weight": EIGHTHS}, optional={"density": DENSITIES, "gamma": GAMMAS}),
    min_size=1,
    max_size=3,
)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "lambda": EIGHTHS,
        "normalize": st.booleans(),
        "rescale": st.booleans(),
        "int8_mask": st.booleans(),
    },
)


def survivors(change: np.ndarray, entry: dict[str, float], rescale: bool) -> np.ndarray:
    """One model's thinned, weighted change."""
    kept = outlier_mask(change, entry.get("density", 1.0), entry.get("gamma", 0.01))
    factor = 1.0
    norm = np.abs(change[kept]).sum()
    if rescale and norm >= 1e-7:
        factor = float(np.abs(change).sum() / norm)
    return np.where(kept, change, 0.0) * factor * entry["weight"]


@pytest.mark.parametrize("method", METHODS)
@given(drawn=families(4, GRID_KINDS), own=OWN, parameters=PARAMETERS, out=OUT_DTYPES)
@EXAMPLES
def test_on_a_grid(
    method: str,
    drawn: list[Family],
    own: list[dict[str, float]],
    parameters: dict[str, Any],
    out: torch.dtype | None,
) -> None:
    """Thresholds, ties and elected signs are the reference's."""
    compare(method, drawn, own, parameters, out)


@given(
    drawn=families(4, ["normal", "near", "identical", "tiny"]),
    own=OWN,
    parameters=PARAMETERS,
    out=OUT_DTYPES,
)
@EXAMPLES
def test_breadcrumbs_of_any_numbers(
    drawn: list[Family],
    own: list[dict[str, float]],
    parameters: dict[str, Any],
    out: torch.dtype | None,
) -> None:
    compare("breadcrumbs", drawn, own, parameters, out)


def compare(
    method: str,
    drawn: list[Family],
    own: list[dict[str, float]],
    parameters: dict[str, Any],
    out: torch.dtype | None,
) -> None:
    names = ["base", "a", "b", "c"][: 1 + len(own)]
    drawn = [replace(family, dtypes=family.dtypes[: len(names)]) for family in drawn]
    with small_blocks() as folder:
        recipe = recipe_for(method, names[1:], own, parameters, base="base", out=out)
        merged = merge(folder, recipe, checkpoints(drawn, names))
    rescale = parameters.get("rescale", False)
    for number, family in enumerate(drawn):
        base, *models = (to_float64(tensor) for tensor in family.tensors())
        dtype = arithmetic_of(taking_part(family, method, own, parameters))
        expected = reference(
            method,
            base=base,
            models=models,
            model_parameters=own,
            parameters=parameters,
            difference_dtype=dtype,
        )
        terms = [
            survivors((model - base).astype(dtype).astype(np.float64), entry, rescale)
            for model, entry in zip(models, own, strict=True)
        ]
        slack = float_slack(dtype, base, terms, expected, own, parameters)
        if method == "breadcrumbs_ties" and rescale:
            slack = np.where(undecided(terms), np.inf, slack)  # the factors are no grid numbers
        check(merged[f"t{number}"], expected, family, out, slack)


def taking_part(
    family: Family, method: str, own: list[dict[str, float]], parameters: dict[str, Any]
) -> list[torch.Tensor]:
    """Without the tensors of models of which nothing is left: nobody reads them, unless their
    weights are divided by."""
    base, *models = family.tensors()
    if method == "breadcrumbs" and parameters.get("normalize"):
        return [base, *models]
    counts = [int(entry.get("density", 1.0) * base.numel()) for entry in own]
    return [base, *(model for model, count in zip(models, counts, strict=True) if count)]


# ---------------------------------------------------------------------------- by hand


def thinned(
    folder: Path,
    change: Sequence[float] | torch.Tensor,
    method: str = "breadcrumbs",
    parameters: dict[str, Any] | None = None,
    **own: float,
) -> list[float]:
    """What is left of the change of one model from zeros."""
    tensor = torch.as_tensor(change, dtype=torch.float64)
    models = {"base": {"t": torch.zeros_like(tensor)}, "a": {"t": tensor}}
    recipe = recipe_for(method, "a", [{"weight": 1.0, **own}], parameters, base="base")
    return merge(folder, recipe, models)["t"].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_the_smallest_and_the_outliers_are_dropped(tmp_path: Path, method: str) -> None:
    change = [5.0, -1.0, 9.0, -3.0, 2.0, 8.0, -7.0, 0.0, 4.0, 6.0]
    for density, gamma, expected in (
        # five of ten are kept: not 9 and 8, and of the rest the largest
        (0.5, 0.2, [5.0, 0.0, 0.0, -3.0, 0.0, 0.0, -7.0, 0.0, 4.0, 6.0]),
        (0.5, 0.0, [5.0, 0.0, 9.0, 0.0, 0.0, 8.0, -7.0, 0.0, 0.0, 6.0]),
        # eight: three outliers would leave seven, so that 7 is none
        (0.8, 0.3, [5.0, -1.0, 0.0, -3.0, 2.0, 0.0, -7.0, 0.0, 4.0, 6.0]),
        (0.1, 1.0, [0.0] * 10),  # the smallest, which is 0
        (0.2, 1.0, [0.0, -1.0] + [0.0] * 8),
        (0.09, 0.0, [0.0] * 10),
        (1.0, 0.5, change),
        (0.0, 0.0, [0.0] * 10),
    ):
        assert thinned(tmp_path, change, method, density=density, gamma=gamma) == expected


def test_of_equal_magnitudes_the_middle_is_kept(tmp_path: Path) -> None:
    """In ascending order ties go by position: the first are smallest, the last are outliers.

    (In ties, which ranks from above, the first survive.)
    """
    change = torch.ones(1000)
    change[::3] = -1
    with small_blocks() as folder:
        merged = thinned(folder, change, density=0.333, gamma=0.1)
    expected = change.double()
    expected[:567] = 0  # 1000 − 333 − 100
    expected[900:] = 0
    assert merged == expected.tolist()


def test_rescaling_restores_the_norm(tmp_path: Path) -> None:
    change = np.arange(1.0, 9.0)
    merged = thinned(tmp_path, change.tolist(), parameters={"rescale": True}, density=0.5, gamma=0)
    assert merged[:4] == [0.0] * 4
    np.testing.assert_allclose(merged[4:], change[4:] * 36 / 26, rtol=1e-15)


def test_norms_too_small_to_divide_by_are_not_restored(tmp_path: Path) -> None:
    change = np.arange(1.0, 9.0) * 1e-9
    merged = thinned(tmp_path, change.tolist(), parameters={"rescale": True}, density=0.5, gamma=0)
    assert merged == [0.0] * 4 + change[4:].tolist()


def test_signs_are_elected_among_what_is_left(tmp_path: Path) -> None:
    """a's −100 is an outlier, and b's 3 wins; nothing is divided unless asked for."""
    models = {
        "base": {"t": torch.ones(4)},
        "a": {"t": 1 + torch.tensor([-100.0, 4.0, 2.0, 1.0])},
        "b": {"t": 1 + torch.tensor([3.0, -2.0, 8.0, 1.0])},
    }
    own = [
        {"weight": 1.0, "density": 0.5, "gamma": 0.25},  # keeps 4 and 2
        {"weight": 0.5, "density": 1.0},
    ]
    for normalize, expected in ((False, [1.5, 4.0, 6.0, 0.5]), (True, [3.0, 4.0, 4.0, 1.0])):
        parameters = {"normalize": normalize}
        recipe = recipe_for("breadcrumbs_ties", "ab", own, parameters, base="base")
        merged = merge(tmp_path, recipe, models)["t"] - 1
        assert merged.tolist() == expected
    recipe = recipe_for("breadcrumbs", "ab", own, {"lambda": 2.0}, base="base")
    merged = merge(tmp_path, recipe, models)["t"] - 1
    assert merged.tolist() == [3.0, 6.0, 12.0, 1.0]


CHANGES = (("a", 3.0), ("b", 5.0))


def test_all_weights_are_divided_by_even_of_models_of_which_nothing_is_left(
    tmp_path: Path,
) -> None:
    models = {name: {"t": torch.full((9,), value)} for name, value in (("o", 0.0), *CHANGES)}
    for own in (
        [{"weight": 2.0, "density": 1.0}, {"weight": 1.0, "density": 0.0}],
        [{"weight": 2.0, "density": 1.0}, {"weight": 1.0, "density": 0.1}],  # int(0.9) = 0
    ):
        recipe = recipe_for("breadcrumbs", "ab", own, {"normalize": True}, base="o")
        assert merge(tmp_path, recipe, models)["t"].tolist() == [2.0] * 9
        recipe = recipe_for("breadcrumbs_ties", "ab", own, {"normalize": True}, base="o")
        assert merge(tmp_path, recipe, models)["t"].tolist() == [3.0] * 9


def test_weights_that_cancel_are_not_divided_by(tmp_path: Path) -> None:
    models = {name: {"t": torch.full((5,), value)} for name, value in (("o", 0.0), *CHANGES)}
    own = [{"weight": 1.0}, {"weight": -1.0}]
    recipe = recipe_for("breadcrumbs", "ab", own, {"normalize": True}, base="o")
    assert merge(tmp_path, recipe, models)["t"].tolist() == [-2.0] * 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-140, 2.0**-126, 2.0**120])
def test_tiny_and_huge_magnitudes(tmp_path: Path, scale: float, method: str) -> None:
    """Denormals are not flushed, and nothing overflows that need not."""
    grid = np.random.default_rng(3).integers(-15, 16, (3, 300)) * scale
    models = {
        name: {"t": torch.from_numpy(grid[i]).float()} for i, name in enumerate(("base", "a", "b"))
    }
    own = [{"weight": 1.0, "density": 0.3}, {"weight": 1.0, "density": 0.6, "gamma": 0.2}]
    merged = merge(tmp_path, recipe_for(method, "ab", own, base="base"), models)["t"]
    expected = reference(method, base=grid[0], models=list(grid[1:]), model_parameters=own)
    assert_within_ulps(merged, expected, torch.float32)


# ------------------------------------------------------------------ nan, infinities, size

OTHER = {"weight": 0.25, "density": 0.5, "gamma": 0.1}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf")])
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_an_infinite_change_is_an_outlier(
    tmp_path: Path, method: str, bad: float, gamma: float
) -> None:
    """The largest of all: dropped if any are, and then the output is x₀ and what others add."""
    grid = np.random.default_rng(5).integers(-15, 16, (3, 200)) / 4
    grid[1, 17] = bad
    models = {
        name: {"t": torch.from_numpy(grid[i]).float()} for i, name in enumerate(("base", "a", "b"))
    }
    own = [{"weight": 0.5, "density": 0.5, "gamma": gamma}, OTHER]
    merged = merge(tmp_path, recipe_for(method, "ab", own, base="base"), models)["t"]
    expected = reference(method, base=grid[0], models=list(grid[1:]), model_parameters=own)
    assert bool(torch.isfinite(merged[17])) == (gamma > 0)
    assert np.isfinite(expected[17]) == (gamma > 0)
    assert_within_ulps(merged, expected, torch.float32, slack=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_infinite_base_stays(tmp_path: Path, method: str, bad: float) -> None:
    """Its changes are outliers, but x₀ + 0 is x₀."""
    grid = torch.from_numpy(np.random.default_rng(5).integers(-15, 16, (3, 200)) / 4).float()
    grid[0, 17] = bad
    models = {name: {"t": grid[i]} for i, name in enumerate(("base", "a", "b"))}
    own = [{"weight": 0.5, "density": 0.5, "gamma": 0.1}, OTHER]
    merged = merge(tmp_path, recipe_for(method, "ab", own, base="base"), models)["t"]
    assert torch.isfinite(merged).sum() == 199
    assert not torch.isfinite(merged[17])


@pytest.mark.parametrize("method", METHODS)
def test_nan_has_no_rank_and_stays(tmp_path: Path, method: str) -> None:
    """It is neither small nor an outlier; the others are ranked as if it were the smallest."""
    random = np.random.default_rng(5)
    change = random.permutation(np.arange(1.0, 201.0))
    change[random.permutation(200)[:20]] = np.nan
    with small_blocks() as folder:
        merged = np.array(thinned(folder, change.tolist(), method, density=0.5, gamma=0.1))
    assert (np.isnan(merged) == np.isnan(change)).all()
    kept = outlier_mask(np.nan_to_num(change), 0.5, 0.1) & ~np.isnan(change)
    np.testing.assert_array_equal(merged[~np.isnan(change)], np.where(kept, change, 0)[change > 0])


@pytest.mark.parametrize("method", METHODS)
def test_blocks_and_samples_of_real_size(tmp_path: Path, method: str) -> None:
    """Nothing made small: block multiples, ragged ends, and enough elements for a sample."""
    random = np.random.default_rng(8)
    sizes = {"two_blocks": 2 << 18, "sampled": (1 << 20) + 777}
    grids = {
        name: [random.integers(-127, 128, size) / 32 for _ in range(3)]
        for name, size in sizes.items()
    }
    models = {
        model: {name: torch.from_numpy(grid[i]).bfloat16() for name, grid in grids.items()}
        for i, model in enumerate(("base", "a", "b"))
    }
    own = [{"weight": 0.5, "density": 0.5, "gamma": 0.03}, OTHER]
    merged = merge(tmp_path, recipe_for(method, "ab", own, base="base"), models)
    for name, grid in grids.items():
        expected = reference(method, base=grid[0], models=grid[1:], model_parameters=own)
        assert_within_ulps(merged[name], expected, torch.bfloat16, slack=2.0**-20)


@pytest.mark.parametrize("method", METHODS)
def test_the_output_does_not_depend_on_blocks(method: str) -> None:
    random = np.random.default_rng(4)
    grid = torch.from_numpy(random.integers(-15, 16, (3, 1000)) / 4).float()
    models = {name: {"t": grid[i]} for i, name in enumerate(("base", "a", "b"))}
    own = [{"weight": 0.5, "density": 0.3, "gamma": 0.2}, OTHER]
    recipe = recipe_for(method, "ab", own, {"rescale": True}, base="base")
    found = set()
    for block in (BLOCK, 3 * BLOCK, 1 << 18):
        with small_blocks(block) as folder:
            found.add(bits(merge(folder, recipe, models)["t"]))
    assert len(found) == 1


@pytest.mark.parametrize("method", METHODS)
def test_models_without_changes_give_the_base_bit_for_bit(tmp_path: Path, method: str) -> None:
    base = torch.randn(700, generator=torch.Generator().manual_seed(1))
    models = {name: {"t": base.bfloat16()} for name in ("base", "a", "b")}
    own = [{"weight": 0.5, "density": 0.3, "gamma": 0.2}, OTHER]
    recipe = recipe_for(method, "ab", own, {"rescale": True, "normalize": True}, base="base")
    assert bits(merge(tmp_path, recipe, models)["t"]) == bits(models["base"]["t"])


# ------------------------------------------------------------------------ what is wrong

MODELS = {
    name: {"t": torch.arange(1.0 + index, 5.0 + index)}
    for index, name in enumerate(("base", "a", "b"))
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("names", "parameters", "base", "message"),
    [
        ("ab", {"weight": 1}, None, "needs a base model"),
        (["base"], {"weight": 1}, "base", "at least 2 models, the base included; here there is 1"),
        ("a", {}, "base", "has no 'weight'"),
        ("a", {"weight": 1, "density": 1.01}, "base", "'density' must be .*from 0 to 1"),
        ("a", {"weight": 1, "density": -0.5}, "base", "'density' must be .*from 0 to 1"),
        ("a", {"weight": 1, "gamma": 1.5}, "base", "'gamma' must be .*from 0 to 1"),
        ("a", {"weight": 1, "gamma": -0.01}, "base", "'gamma' must be .*from 0 to 1"),
        ("a", {"weight": 1, "epsilon": 0.1}, "base", "has no parameter 'epsilon'"),
        ("a", {"weight": "heavy"}, "base", "'weight' must be a number"),
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
