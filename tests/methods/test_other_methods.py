"""sce, ram, ramplus_tl, nearswap and arcee_fusion from recipe to file, against the references.

All of them are computed in float64, in the order of the references: signs, counts, and what is
selected are the same, and little more than the output's own rounding is left to differ. Means over
whole tensors (energies, divergences) are summed in another order: right to `SUM` of their terms.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lazymerge.errors import InputError, RecipeError
from merge_and_compare import (
    OUT_DTYPES,
    check,
    finite_everywhere,
    merge,
    noise,
    recipe_for,
    refused,
    small_blocks,
)
from tensor_cases import BLOCK, KINDS, ROW_SHAPES, Family, checkpoints, families

from merging import bits
from reference import assert_within_ulps, reference, round_once, to_float64
from reference.case import as_rows
from reference.task_vectors import arcee_importance

EXAMPLES = settings(max_examples=40)

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
"""The references meet infinities too."""

SPOILT_KINDS = [*KINDS, "few", "spoilt"]

SUM = 2.0**-46


def cut(drawn: list[Family], count: int) -> list[Family]:
    """The same for so many models."""
    return [replace(family, dtypes=family.dtypes[:count]) for family in drawn]


def tensors_of(family: Family) -> list[np.ndarray]:
    return [to_float64(tensor) for tensor in family.tensors()]


# --------------------------------------------------------------------------------- sce

TOPK = st.sampled_from([0.0, 1e-9, 0.01, 0.2, 0.5, 0.9, 0.999, 1.0])


@given(
    drawn=families(5, SPOILT_KINDS),
    count=st.sampled_from([1, 2, 4]),
    parameters=st.fixed_dictionaries({}, optional={"select_topk": TOPK}),
    out=OUT_DTYPES,
)
@settings(max_examples=60)
def test_sce(
    drawn: list[Family], count: int, parameters: dict[str, Any], out: torch.dtype | None
) -> None:
    """A mean over 1, 2 or 4 models is exact enough for variances to be those of the reference,
    ties included. An infinity has the energy of all else, and weights that are no numbers."""
    names = ["base", "a", "b", "c", "d"][: 1 + count]
    drawn = cut(drawn, 1 + count)
    with small_blocks() as folder:
        recipe = recipe_for("sce", names[1:], None, parameters, base="base", out=out)
        merged = merge(folder, recipe, checkpoints(drawn, names))
    for number, family in enumerate(drawn):
        base, *models = tensors_of(family)
        actual = merged[f"t{number}"]
        if not finite_everywhere(family.tensors()).all():
            if parameters.get("select_topk", 1.0) > 0:
                assert torch.isnan(actual.double()).all()
            else:  # nothing is selected: the base
                check(actual, base, family, out, good=np.isfinite(base), bad=~np.isfinite(base))
            continue
        expected = reference("sce", base=base, models=models, parameters=parameters)
        slack = noise([base]) + noise([model - base for model in models], SUM)
        check(actual, expected, family, out, slack)


@pytest.mark.parametrize("topk", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("count", [3, 5, 7])
def test_sce_of_odd_numbers_of_models(tmp_path: Path, topk: float, count: int) -> None:
    """Of random numbers no two variances are so near that rounding might change their order."""
    random = np.random.default_rng(count)
    names = ["base", *"abcdefg"[:count]]
    base, *models = random.standard_normal((1 + count, 40, 30))
    checkpoint = {
        name: {"t": torch.from_numpy(tensor)}
        for name, tensor in zip(names, [base, *models], strict=True)
    }
    parameters = {"select_topk": topk}
    merged = merge(
        tmp_path, recipe_for("sce", names[1:], None, parameters, base="base"), checkpoint
    )
    expected = reference("sce", base=base, models=models, parameters=parameters)
    assert_within_ulps(merged["t"], expected, torch.float64, slack=1e-12)


def test_sce_by_hand(tmp_path: Path) -> None:
    """Variances 4, 0, 1, 4: of three elements that differ two are selected, the first and last.

    Energies (9 + 1)/4 and (1 + 9)/4 weigh the same. At the first 3 and −1 elect +, and at the last
    1 and −3 elect −.
    """
    models = {
        "base": {"t": torch.full((4,), 10.0)},
        "a": {"t": torch.tensor([13.0, 17.0, 12.0, 11.0])},
        "b": {"t": torch.tensor([9.0, 17.0, 10.0, 7.0])},
    }
    recipe = recipe_for("sce", "ab", None, {"select_topk": 0.7}, base="base")
    assert merge(tmp_path, recipe, models)["t"].tolist() == [13.0, 10.0, 10.0, 7.0]


def test_sce_weighs_by_energy(tmp_path: Path) -> None:
    """Energies 9 and 1: weights 0.9 and 0.1, of a sum where both agree."""
    models = {
        "base": {"t": torch.zeros(2, dtype=torch.float64)},
        "a": {"t": torch.tensor([3.0, -3.0], dtype=torch.float64)},
        "b": {"t": torch.tensor([1.0, 1.0], dtype=torch.float64)},
    }
    merged = merge(tmp_path, recipe_for("sce", "ab", base="base"), models)["t"]
    np.testing.assert_allclose(merged, [0.9 * 3 + 0.1 * 1, -3.0], rtol=1e-15)


def test_sce_divides_by_a_millionth_at_least(tmp_path: Path) -> None:
    """A model of so little energy does not make its changes alone where others make none."""
    models = {
        "base": {"t": torch.zeros(2, dtype=torch.float64)},
        "a": {"t": torch.tensor([2.0**10, 0.0], dtype=torch.float64)},
        "b": {"t": torch.tensor([0.0, 2.0**-4], dtype=torch.float64)},
    }
    merged = merge(tmp_path, recipe_for("sce", "ab", base="base"), models)["t"]
    weight = 2.0**-8 / (2.0**20 + 2.0**-8)  # 3.7e-9
    np.testing.assert_allclose(merged, [2.0**10, 2.0**-4 * weight / 1e-6], rtol=1e-14)


def test_sce_of_equal_variances_selects_the_first(tmp_path: Path) -> None:
    """Exactly int(0.25 · 480) of them; elements on which the models agree do not count."""
    same = torch.arange(1000) % 25 >= 12  # 520 of them
    models = {
        "base": {"t": torch.zeros(1000)},
        "a": {"t": torch.ones(1000)},
        "b": {"t": torch.where(same, 1.0, 3.0)},
    }
    recipe = recipe_for("sce", "ab", None, {"select_topk": 0.25}, base="base")
    with small_blocks() as folder:
        merged = merge(folder, recipe, models)["t"]
    selected = torch.nonzero(~same).flatten()[:120]
    assert torch.equal(torch.nonzero(merged).flatten(), selected)


def test_sce_of_changes_without_energy_takes_their_mean(tmp_path: Path) -> None:
    """Below 10⁻⁶: 2⁻¹¹ and 2⁻¹³ would weigh 16 : 1."""
    models = {
        "base": {"t": torch.zeros(3)},
        "a": {"t": torch.full((3,), 2.0**-11)},
        "b": {"t": torch.full((3,), 2.0**-13)},
    }
    merged = merge(tmp_path, recipe_for("sce", "ab", base="base"), models)["t"]
    assert merged.tolist() == [(2.0**-11 + 2.0**-13) / 2] * 3


def test_sce_of_energies_beyond_float64(tmp_path: Path) -> None:
    """Not numbers, as where one square overflows; no traceback."""
    shape = (2, 1 << 18)
    models = {
        "base": {"t": torch.zeros(shape, dtype=torch.float64)},
        "a": {"t": torch.full(shape, 2.4e151, dtype=torch.float64)},
        "b": {"t": torch.full(shape, 1.0, dtype=torch.float64)},
    }
    assert torch.isnan(merge(tmp_path, recipe_for("sce", "ab", base="base"), models)["t"]).all()


# ------------------------------------------------------------------------------ ram


EPSILONS = st.sampled_from([0.0, 1e-42, 1e-5, 0.25, 1.0, 1e9])
"""0.25 and 1 are differences of numbers on the grid: changes of just epsilon are none."""


@given(
    drawn=families(4, SPOILT_KINDS),
    count=st.integers(1, 3),
    parameters=st.fixed_dictionaries({}, optional={"epsilon": EPSILONS}),
    out=OUT_DTYPES,
)
@EXAMPLES
def test_ram(
    drawn: list[Family], count: int, parameters: dict[str, Any], out: torch.dtype | None
) -> None:
    names = ["base", "a", "b", "c"][: 1 + count]
    drawn = cut(drawn, 1 + count)
    with small_blocks() as folder:
        recipe = recipe_for("ram", names[1:], None, parameters, base="base", out=out)
        merged = merge(folder, recipe, checkpoints(drawn, names))
    for number, family in enumerate(drawn):
        base, *models = tensors_of(family)
        expected = reference("ram", base=base, models=models, parameters=parameters)
        check(merged[f"t{number}"], expected, family, out, noise([base, *models]))


@given(
    drawn=families(4, SPOILT_KINDS),
    count=st.integers(1, 3),
    parameters=st.fixed_dictionaries(
        {},
        optional={
            "epsilon": st.sampled_from([0.0, 1e-5, 0.25, 1.0, 3.0, 1e9]),
            "r": st.sampled_from([0.0, 0.1, -1.0, 2.0]),
            "alpha": st.sampled_from([0.0, 0.2, 1.5, 1e3, -0.5]),
        },
    ),
    out=OUT_DTYPES,
)
@EXAMPLES
def test_ramplus_tl(
    drawn: list[Family], count: int, parameters: dict[str, Any], out: torch.dtype | None
) -> None:
    """An infinite change counts as one, a nan as none; all other elements are what the counts
    make of them."""
    names = ["base", "a", "b", "c"][: 1 + count]
    drawn = cut(drawn, 1 + count)
    with small_blocks() as folder:
        recipe = recipe_for("ramplus_tl", names[1:], None, parameters, base="base", out=out)
        merged = merge(folder, recipe, checkpoints(drawn, names))
    if parameters.get("epsilon") == 0:  # divides by it where nothing is unique: to no effect
        parameters["epsilon"] = 1e-320
    boost = 1 + abs(parameters.get("r", 0.1)) * 1e3
    for number, family in enumerate(drawn):
        base, *models = tensors_of(family)
        expected = reference("ramplus_tl", base=base, models=models, parameters=parameters)
        slack = noise([base, *[boost * (model - base) for model in models]])
        check(merged[f"t{number}"], expected, family, out, slack)


def test_ram_by_hand(tmp_path: Path) -> None:
    """A change that one model makes is not halved; those below epsilon are not made."""
    models = {
        "base": {"t": torch.tensor([1.0, 1.0, 1.0, 1.0])},
        "a": {"t": torch.tensor([3.0, 2.0, 1.5, 1.0])},
        "b": {"t": torch.tensor([1.0, 5.0, 1.25, 1.0])},
    }
    recipe = recipe_for("ram", "ab", None, {"epsilon": 0.25}, base="base")
    assert merge(tmp_path, recipe, models)["t"].tolist() == [3.0, 3.5, 1.5, 1.0]


def test_ramplus_tl_by_hand(tmp_path: Path) -> None:
    """a changes two elements alone and one with b: ρ = 1/2; b one and one: ρ = 1, cut to 0.75."""
    models = {
        "base": {"t": torch.zeros(5)},
        "a": {"t": torch.tensor([1.0, 2.0, 0.0, 4.0, 0.0])},
        "b": {"t": torch.tensor([0.0, 0.0, 8.0, 2.0, 0.0])},
    }
    parameters = {"r": 0.5, "alpha": 0.75}
    recipe = recipe_for("ramplus_tl", "ab", None, parameters, base="base")
    merged = merge(tmp_path, recipe, models)["t"]
    assert merged.tolist() == [1.25, 2.5, 8 * 1.375, 3.0, 0.0]


def test_ramplus_tl_of_models_that_change_nothing_alone(tmp_path: Path) -> None:
    """ρ = shared/ε, cut to alpha; and with ε = 0 nothing is divided by it."""
    base = torch.zeros(3)
    models = {"base": {"t": base}, "a": {"t": base + 1}, "b": {"t": base - 3}}
    for epsilon in (0.0, 1e-5):
        parameters = {"epsilon": epsilon, "r": 5.0}
        recipe = recipe_for("ramplus_tl", "ab", None, parameters, base="base")
        assert merge(tmp_path, recipe, models)["t"].tolist() == [-1.0] * 3


# -------------------------------------------------------------------------- nearswap


@given(
    drawn=families(2, SPOILT_KINDS),
    t=st.sampled_from([0.0, -1.0, 1e-42, 1e-9, 1e-6, 1e-3, 0.25, 1.0, 7.5, 1e38]),
    out=OUT_DTYPES,
)
@EXAMPLES
def test_nearswap(drawn: list[Family], t: float, out: torch.dtype | None) -> None:
    """Taken as a bound of the change: |w·δ| ≤ t, but for |δ| < 10⁻⁶."""
    with small_blocks() as folder:
        recipe = recipe_for("nearswap", ["a"], None, {"t": t}, base="base", out=out)
        merged = merge(folder, recipe, checkpoints(drawn, ["base", "a"]))
    for number, family in enumerate(drawn):
        base, model = tensors_of(family)
        expected = reference("nearswap", base=base, models=[model], parameters={"t": t})
        slack = noise([base, expected])  # w·x₁ is as large as w·|δ| and x₀
        check(merged[f"t{number}"], expected, family, out, slack)


def test_nearswap_by_hand(tmp_path: Path) -> None:
    models = {
        "base": {"t": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)},
        "a": {"t": torch.tensor([1.25, 1.5, 3.0, -9.0, 1e-7, -1e-7], dtype=torch.float64)},
    }
    for t, expected in (
        (0.5, [1.25, 1.5, 1.5, 0.5, 1e-7, -1e-7]),
        (0.0, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]),
        (-2.0, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]),
        (100.0, [1.25, 1.5, 3.0, -9.0, 1e-7, -1e-7]),
        (5e-7, [1 + 5e-7, 1 + 5e-7, 1 + 5e-7, 1 - 5e-7, 5e-8, -5e-8]),
    ):
        recipe = recipe_for("nearswap", ["base", "a"], None, {"t": t}, base="base")
        merged = merge(tmp_path, recipe, models)["t"]
        np.testing.assert_allclose(merged, expected, rtol=1e-15)


# ---------------------------------------------------------------------- arcee_fusion


@given(drawn=families(2, SPOILT_KINDS, ROW_SHAPES), out=OUT_DTYPES)
@settings(max_examples=60)
def test_arcee_fusion(drawn: list[Family], out: torch.dtype | None) -> None:
    """Every element is x₀ or x₁ as the reference says, unless its importance is so near to the
    threshold that the last bits of a divergence decide: then either. A divergence is a sum of
    p ln(p/q), whose terms are right to 2⁻⁴⁸ or so, however small their sum is.

    A row with nan or ∞ has no divergence, and all of it is taken over. (−∞ has a probability: 0.)
    """
    with small_blocks() as folder:
        recipe = recipe_for("arcee_fusion", ["a"], base="base", out=out)
        merged = merge(folder, recipe, checkpoints(drawn, ["base", "a"]))
    for number, family in enumerate(drawn):
        base, model = tensors_of(family)
        actual = merged[f"t{number}"]
        good = finite_everywhere(family.tensors())
        if not base.size:
            check(actual, base, family, out)
            continue
        if not good.all():
            without = as_rows(np.isnan(base + model) | (base == np.inf) | (model == np.inf))
            rows = np.broadcast_to(without.any(axis=1, keepdims=True), without.shape)
            taken = rows.reshape(base.shape) & good
            check(actual, model, family, out, noise([base, model]), good=taken, bad=~good)
            either = good & ~taken
            assert_one_of(actual, base, model, either, out or family.dtypes[0])
            continue
        expected = reference("arcee_fusion", base=base, models=[model])
        change = np.abs(model - base)
        importance = arcee_importance(base, model, model - base)
        lower, median, upper = np.quantile(importance, [0.25, 0.5, 0.75])
        threshold = median + 1.5 * (upper - lower)
        unsure = SUM * (np.abs(importance) + threshold + change + 4 * change.max())
        near = np.abs(importance - threshold) <= unsure
        near &= bool(importance.any())  # else all are 0, exactly
        none = np.zeros_like(good)
        check(actual, expected, family, out, noise([base, model]), good=~near, bad=none)
        assert_one_of(actual, base, model, near, out or family.dtypes[0])


def assert_one_of(
    actual: torch.Tensor, base: np.ndarray, model: np.ndarray, where: np.ndarray, dtype: torch.dtype
) -> None:
    """Asserts that elements are x₀, or x₁ but for what float64 rounds off x₀ + (x₁ − x₀)."""
    found = to_float64(actual)
    tolerance = np.where(np.isfinite(model), noise([base, model]), 0.0)
    is_base = found == to_float64(round_once(base, dtype))
    lowest, highest = (to_float64(round_once(model + sign * tolerance, dtype)) for sign in (-1, 1))
    assert (is_base | ((lowest <= found) & (found <= highest)))[where].all()


def test_arcee_fusion_by_hand(tmp_path: Path) -> None:
    """One row, so that importance is |δ| times one number: sizes 0 … 8 and 100 have quartiles
    2.25, 4.5, 6.75 and the threshold 11.25, which the last alone reaches."""
    sizes = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 100.0])
    signs = torch.tensor([1.0, -1.0] * 5)
    models = {"base": {"t": torch.full((10,), 0.5)}, "a": {"t": 0.5 + sizes * signs}}
    merged = merge(tmp_path, recipe_for("arcee_fusion", ["a"], base="base"), models)["t"]
    assert merged.tolist() == [0.5] * 9 + [-99.5]


def test_arcee_fusion_of_equal_models_and_of_what_reaches_the_threshold(tmp_path: Path) -> None:
    """Importances that are all the same are their own threshold, and reach it."""
    base = torch.randn((30, 8), generator=torch.Generator().manual_seed(3))
    models = {"base": {"same": base}, "a": {"same": base}}
    models["base"]["one row"] = torch.tensor([1.0, 2.0, 3.0, 4.0] * 100)
    models["a"]["one row"] = models["base"]["one row"] + torch.tensor([1.0, -1.0] * 200)
    merged = merge(tmp_path, recipe_for("arcee_fusion", ["a"], base="base"), models)
    for name, tensor in models["a"].items():
        assert bits(merged[name]) == bits(tensor)


def test_arcee_fusion_of_a_row_that_is_not_finite(tmp_path: Path) -> None:
    """Its other elements are those of the other model; other rows are judged as they were."""
    generator = torch.Generator().manual_seed(3)
    base, model = torch.randn((2, 50, 40), generator=generator)
    model[7] *= 3  # the most important row
    for bad in (torch.nan, torch.inf):
        for name in ("base", "a"):
            models = {"base": {"t": base.clone()}, "a": {"t": model.clone()}}
            models[name]["t"][20, 11] = bad
            recipe = recipe_for("arcee_fusion", ["a"], base="base")
            merged = merge(tmp_path, recipe, models)["t"]
            assert not torch.isfinite(merged[20, 11])
            others = torch.arange(40) != 11
            assert torch.equal(merged[20][others], model[20][others])
            taken = (merged != base).float().mean(dim=1)
            assert taken[7] > 0.5
            assert taken[torch.arange(50) != 20].mean() < 0.3


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-20, 2.0**10, 2.0**110])
def test_arcee_fusion_of_tiny_and_huge_magnitudes(tmp_path: Path, scale: float) -> None:
    """Tiny numbers have flat distributions, huge ones sharp ones: neither over- nor underflows."""
    random = np.random.default_rng(3)
    base, model = random.integers(-15, 16, (2, 30, 60)) * scale
    models = {
        name: {"t": torch.from_numpy(tensor).float()}
        for name, tensor in (("base", base), ("a", model))
    }
    merged = merge(tmp_path, recipe_for("arcee_fusion", ["a"], base="base"), models)["t"]
    everywhere = np.ones(base.shape, bool)
    assert_one_of(merged, base, model, everywhere, torch.float32)
    if scale > 1e-6:
        expected = reference("arcee_fusion", base=base, models=[model])
        assert_within_ulps(merged, expected, torch.float32)


# --------------------------------------------------------------- sizes, and what is wrong

PARAMETERS: dict[str, dict[str, Any]] = {
    "sce": {"select_topk": 0.3},
    "ram": {},
    "ramplus_tl": {"r": 1.0, "alpha": 3.0},
    "nearswap": {"t": 0.75},
    "arcee_fusion": {},
}
ONE_OTHER = ("nearswap", "arcee_fusion")


@pytest.mark.parametrize("method", PARAMETERS)
def test_blocks_and_samples_of_real_size(tmp_path: Path, method: str) -> None:
    """Nothing made small: block multiples, ragged ends, and enough elements for a sample."""
    random = np.random.default_rng(8)
    sizes = {"rows": (1024, 700), "sampled": (1 << 20,), "long": (2, (1 << 18) + 5)}
    grids = {
        name: [random.integers(-127, 128, size) / 32 for _ in range(3)]
        for name, size in sizes.items()
    }
    models = {
        model: {name: torch.from_numpy(grid[i]).bfloat16() for name, grid in grids.items()}
        for i, model in enumerate(("base", "a", "b"))
    }
    count = 1 if method in ONE_OTHER else 2
    recipe = recipe_for(method, "ab"[:count], None, PARAMETERS[method], base="base")
    merged = merge(tmp_path, recipe, models)
    for name, grid in grids.items():
        expected = reference(
            method, base=grid[0], models=grid[1 : 1 + count], parameters=PARAMETERS[method]
        )
        assert_within_ulps(merged[name], expected, torch.bfloat16, slack=1e-12)


@pytest.mark.parametrize("method", PARAMETERS)
def test_the_output_does_not_depend_on_blocks(method: str) -> None:
    """Signs and selections are exact, and what is summed by block here is on a grid."""
    random = np.random.default_rng(4)
    tensors = torch.from_numpy(random.integers(-15, 16, (3, 40, 24)) / 4).float()
    models = {name: {"t": tensors[i]} for i, name in enumerate(("base", "a", "b"))}
    names = "a" if method in ONE_OTHER else "ab"
    recipe = recipe_for(method, names, None, PARAMETERS[method], base="base")
    found = set()
    for block in (BLOCK, 3 * BLOCK, 1 << 18):
        with small_blocks(block) as folder:
            found.add(bits(merge(folder, recipe, models)["t"]))
    assert len(found) == 1


@pytest.mark.parametrize("method", PARAMETERS)
def test_models_without_changes_give_the_base_bit_for_bit(tmp_path: Path, method: str) -> None:
    base = torch.randn(700, generator=torch.Generator().manual_seed(1))
    models = {name: {"t": base.bfloat16()} for name in ("base", "a", "b")}
    names = "a" if method in ONE_OTHER else "ab"
    recipe = recipe_for(method, names, None, PARAMETERS[method], base="base")
    assert bits(merge(tmp_path, recipe, models)["t"]) == bits(models["base"]["t"])


MODELS = {
    name: {"t": torch.arange(1.0 + index, 5.0 + index)}
    for index, name in enumerate(("base", "a", "b", "c"))
}


@pytest.mark.parametrize("method", PARAMETERS)
def test_every_method_needs_a_base_and_another_model(tmp_path: Path, method: str) -> None:
    parameters = PARAMETERS[method]
    recipe = recipe_for(method, "ab", None, parameters)
    refused(tmp_path, recipe, MODELS, f"{method} needs a base model", RecipeError)
    recipe = recipe_for(method, ["base"], None, parameters, base="base")
    refused(tmp_path, recipe, MODELS, "models?, the base included; here there is 1", RecipeError)


@pytest.mark.parametrize("method", ONE_OTHER)
def test_methods_of_two_models_refuse_a_third(tmp_path: Path, method: str) -> None:
    recipe = recipe_for(method, "ab", None, PARAMETERS[method], base="base")
    message = "exactly 2 models, the base included; here there are 3"
    refused(tmp_path, recipe, MODELS, message, RecipeError)


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("sce", {"select_topk": 1.5}, "'select_topk' must be .*from 0 to 1"),
        ("sce", {"select_topk": -0.1}, "'select_topk' must be .*from 0 to 1"),
        ("sce", {"weight": 1}, "has no parameter 'weight'"),
        ("sce", {"select_topkk": 1}, "did you mean 'select_topk'"),
        ("ram", {"epsilon": -1e-5}, "'epsilon' must be .*at least 0"),
        ("ram", {"r": 0.1}, "has no parameter 'r'"),
        ("ramplus_tl", {"epsilon": -1}, "'epsilon' must be .*at least 0"),
        ("ramplus_tl", {"alpha": "much"}, "'alpha' must be a number"),
        ("nearswap", {}, "needs the parameter 't'"),
        ("nearswap", {"t": True}, "'t' must be a number"),
        ("nearswap", {"t": 0.1, "weight": 1}, "has no parameter 'weight'"),
        ("arcee_fusion", {"t": 0.1}, "has no parameter 't'"),
    ],
)
def test_recipes_that_are_refused(
    tmp_path: Path, method: str, parameters: dict[str, Any], message: str
) -> None:
    names = "a" if method in ONE_OTHER else "ab"
    recipe = recipe_for(method, names, None, parameters, base="base")
    refused(tmp_path, recipe, MODELS, message, RecipeError)


@pytest.mark.parametrize("method", PARAMETERS)
def test_shapes_that_differ_are_refused(tmp_path: Path, method: str) -> None:
    models = {**MODELS, "a": {"t": torch.zeros(2, 2)}}
    names = "a" if method in ONE_OTHER else "ab"
    recipe = recipe_for(method, names, None, PARAMETERS[method], base="base")
    refused(tmp_path, recipe, models, "tensor t has different shapes", InputError)
