"""dare_linear, dare_ties, della and della_linear from recipe to file, against the references.

Which elements survive is computed here from the random numbers of graph/random_bits.py (tested on
their own), a probability, and one comparison: number < p. Numbers are multiples of 2⁻²⁴, and p is
rounded to the dtype that a method computes in: float32, or float64 if an input is; dare_linear
sums in float64 wherever a density lies between 0 and 1. For della p comes from ranks, in two
roundings (thinning.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod, sqrt
from pathlib import Path
from typing import Any

import lazymerge
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from lazymerge.engine.resources import Resources
from lazymerge.errors import InputError, RecipeError
from lazymerge.graph.random_bits import fill_uniform, stream_key
from merge_and_compare import (
    ALL_KERNELS,
    EIGHTHS,
    OUT_DTYPES,
    WEIGHTS,
    arithmetic_of,
    check,
    float_slack,
    merge,
    noise,
    recipe_for,
    refused,
    small_blocks,
    undecided,
)
from tensor_cases import BLOCK, GRID_KINDS, KINDS, ROW_SHAPES, Family, checkpoints, families

from conftest import write_checkpoint
from merging import Tensors, bits, plan_of, run
from reference import assert_within_ulps, reference, to_float64
from reference.case import as_rows

EXAMPLES = settings(max_examples=40)

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
"""The references meet infinities too."""

DARE = ["dare_linear", "dare_ties"]
DELLA = ["della_linear", "della"]
METHODS = [*DARE, *DELLA]
BY_SIGN = ("dare_ties", "della")

SEEDS = st.sampled_from([0, 1, -7, 2**80])


# ------------------------------------------------------------------------------- masks


def numbers(seed: int, place: int, tensor: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random numbers of one model's tensor."""
    made, room = np.empty((2, prod(shape)))
    fill_uniform(made, stream_key(seed, place, tensor), 0, room)
    return made.reshape(shape)


def probabilities(
    change: np.ndarray, entry: dict[str, float], dtype: type[np.floating[Any]], *, ranked: bool
) -> np.ndarray:
    """With which each element of a change survives, in dtype."""
    density = entry.get("density", 1.0)
    rows = as_rows(change)
    length = rows.shape[1]
    if not ranked or not 0 < density < 1 or length <= 1:
        return np.full(change.shape, density, dtype)
    epsilon = entry.get("epsilon", 0.15)
    order = np.argsort(np.abs(rows), axis=1, kind="stable")
    ranks = np.empty(rows.shape, dtype)
    np.put_along_axis(ranks, order, np.arange(length, dtype=dtype)[None, :], axis=1)
    slope = dtype(2 * epsilon / (length - 1))
    return np.asarray(ranks * slope + dtype(density - epsilon)).reshape(change.shape)


def compare(
    method: str,
    drawn: list[Family],
    own: list[dict[str, float]],
    parameters: dict[str, Any],
    out: torch.dtype | None,
    seed: int,
) -> None:
    names = ["base", "a", "b", "c"][: 1 + len(own)]
    drawn = [replace(family, dtypes=family.dtypes[: len(names)]) for family in drawn]
    with small_blocks() as folder:
        recipe = recipe_for(method, names[1:], own, parameters, "base", out, seed=seed)
        merged = merge(folder, recipe, checkpoints(drawn, names))
    for number, family in enumerate(drawn):
        dtype = arithmetic_of(taking_part(family, method, own, parameters))
        if method == "dare_linear" or (
            method == "della_linear" and family.shape[-1:] in ((), (1,))
        ):
            dtype = np.float64
        base, *models = (to_float64(tensor) for tensor in family.tensors())
        keep, terms = [], []
        bad, unsure = ~np.isfinite(base), np.zeros(base.shape, bool)
        for place, (model, entry) in enumerate(zip(models, own, strict=True)):
            change = (model.astype(dtype) - base.astype(dtype)).astype(dtype)
            chance = probabilities(change, entry, dtype, ranked=method in DELLA)
            keep.append(numbers(seed, place, f"t{number}", family.shape) < chance)
            divisor = 1.0
            if parameters.get("rescale", True):
                divisor = np.where(chance > 0, chance, 1).astype(np.float64)
            terms.append(np.where(keep[-1], change / divisor, 0.0) * entry["weight"])
            bad = bad | (keep[-1] & ~np.isfinite(change))
            if entry.get("density", 1.0) <= 0:  # nan of a model that is divided by: stays
                unsure = unsure | np.isnan(change)
        expected = reference(
            method,
            base=base,
            models=models,
            model_parameters=own,
            parameters=parameters,
            keep=keep,
            difference_dtype=dtype,
        )
        slack = float_slack(dtype, base, terms, expected, own, parameters)
        if is_replaced(method, own, parameters):  # x₀ + 1 · (x₁ − x₀) is x₁, whatever x₀ was
            unsure = unsure | ~np.isfinite(base)
        good, bad = ~(bad | unsure), bad & ~unsure
        if method in BY_SIGN and not is_exact(method, own, parameters):
            slack = np.where(undecided(terms), np.inf, slack)
        check(merged[f"t{number}"], expected, family, out, slack, good=good, bad=bad)


def taking_part(
    family: Family, method: str, own: list[dict[str, float]], parameters: dict[str, Any]
) -> list[torch.Tensor]:
    """Without the tensors of models of which nothing is left: nobody reads them, unless their
    weights are divided by."""
    base, *models = family.tensors()
    if method not in BY_SIGN and parameters.get("normalize"):
        return [base, *models]
    return [base, *(m for m, entry in zip(models, own, strict=True) if entry.get("density", 1) > 0)]


def is_replaced(method: str, own: list[dict[str, float]], parameters: dict[str, Any]) -> bool:
    """Whether this is task arithmetic with one model, and 1 as the factor of its change."""
    if method in BY_SIGN:
        return False
    normalize = parameters.get("normalize", False)
    left = [entry for entry in own if normalize or entry.get("density", 1.0) > 0]
    if len(left) != 1 or left[0].get("density", 1.0) < 1:
        return False
    weight = left[0]["weight"]
    divisor = weight if normalize and abs(weight) >= 1e-8 else 1.0
    return parameters.get("lambda", 1.0) * weight / divisor == 1.0


def is_exact(method: str, own: list[dict[str, float]], parameters: dict[str, Any]) -> bool:
    """Whether thinned changes stay on the grid: divided by powers of two, if at all."""
    if not parameters.get("rescale", True):
        return True
    densities = {entry.get("density", 1.0) for entry in own}
    return method in DARE and densities <= {0.0, 0.25, 0.5, 1.0}


# -------------------------------------------------------------------------------- dare

DENSITIES = st.sampled_from([0.0, 1e-9, 0.01, 0.25, 0.3, 0.5, 0.9, 1 - 2.0**-26, 1.0])
SWITCHES: dict[str, st.SearchStrategy[Any]] = {
    "normalize": st.booleans(),
    "rescale": st.booleans(),
    "int8_mask": st.booleans(),
}


@given(
    drawn=families(4, [*KINDS, "few", "spoilt"]),
    own=st.lists(
        st.fixed_dictionaries({"weight": WEIGHTS}, optional={"density": DENSITIES}),
        min_size=1,
        max_size=3,
    ),
    parameters=st.fixed_dictionaries({}, optional={"lambda": WEIGHTS, **SWITCHES}),
    out=OUT_DTYPES,
    seed=SEEDS,
)
@settings(max_examples=60)
def test_dare_linear(
    drawn: list[Family],
    own: list[dict[str, float]],
    parameters: dict[str, Any],
    out: torch.dtype | None,
    seed: int,
) -> None:
    """What is dropped is gone: even of nan and infinities x₀ is left."""
    compare("dare_linear", drawn, own, parameters, out, seed)


@given(
    drawn=families(4, GRID_KINDS),
    own=st.lists(
        st.fixed_dictionaries({"weight": EIGHTHS}, optional={"density": DENSITIES}),
        min_size=1,
        max_size=3,
    ),
    parameters=st.fixed_dictionaries({}, optional={"lambda": EIGHTHS, **SWITCHES}),
    out=OUT_DTYPES,
    seed=SEEDS,
)
@settings(max_examples=60)
def test_dare_ties(
    drawn: list[Family],
    own: list[dict[str, float]],
    parameters: dict[str, Any],
    out: torch.dtype | None,
    seed: int,
) -> None:
    compare("dare_ties", drawn, own, parameters, out, seed)


# ------------------------------------------------------------------------------- della

SPREADS = st.sampled_from(
    [
        {},
        {"density": 0.0, "epsilon": 0.9},
        {"density": 0.5},
        {"density": 0.5, "epsilon": 0.0},
        {"density": 0.5, "epsilon": 0.4999999},
        {"density": 0.2, "epsilon": 0.1},
        {"density": 0.9, "epsilon": 0.0625},
        {"density": 1e-6, "epsilon": 1e-7},
        {"density": 1.0, "epsilon": 0.9},
    ]
)
DELLA_OWN = st.lists(
    st.builds(lambda weight, spread: {"weight": weight, **spread}, EIGHTHS, SPREADS),
    min_size=1,
    max_size=3,
)
DELLA_PARAMETERS = st.fixed_dictionaries({}, optional={"lambda": EIGHTHS, **SWITCHES})


@pytest.mark.parametrize("method", DELLA)
@given(
    drawn=families(4, GRID_KINDS, ROW_SHAPES),
    own=DELLA_OWN,
    parameters=DELLA_PARAMETERS,
    out=OUT_DTYPES,
    seed=SEEDS,
)
@EXAMPLES
def test_della_on_a_grid(
    method: str,
    drawn: list[Family],
    own: list[dict[str, float]],
    parameters: dict[str, Any],
    out: torch.dtype | None,
    seed: int,
) -> None:
    """Many magnitudes of a row are the same: they rank by position."""
    compare(method, drawn, own, parameters, out, seed)


@given(
    drawn=families(4, ["normal", "near", "identical", "tiny", "spoilt"], ROW_SHAPES),
    own=DELLA_OWN,
    parameters=DELLA_PARAMETERS,
    out=OUT_DTYPES,
    seed=SEEDS,
)
@EXAMPLES
def test_della_linear_of_any_numbers(
    drawn: list[Family],
    own: list[dict[str, float]],
    parameters: dict[str, Any],
    out: torch.dtype | None,
    seed: int,
) -> None:
    """Infinities rank highest, and nan above them."""
    compare("della_linear", drawn, own, parameters, out, seed)


# ------------------------------------------------------------------- masks as such


def own_of(method: str, density: float = 0.3, epsilon: float = 0.1) -> dict[str, float]:
    entry = {"weight": 1.0, "density": density}
    return {**entry, "epsilon": epsilon} if method in DELLA else entry


def kept(
    folder: Path,
    method: str,
    change: torch.Tensor,
    names: Sequence[str] = "a",
    tensors: Sequence[str] = ("t",),
    *,
    workers: int = 2,
    entry: dict[str, float] | None = None,
    **keys: Any,
) -> dict[str, torch.Tensor]:
    """Which elements of a change from zeros survive, by tensor; several models have the same."""
    models: dict[str, Tensors] = {
        "base": {name: torch.zeros_like(change) for name in tensors},
        **{model: dict.fromkeys(tensors, change) for model in names},
    }
    own = [entry or own_of(method)] * len(names)
    recipe = recipe_for(method, names, own, {"rescale": False}, base="base", **keys)
    plan = plan_of(folder, recipe, models, Resources(4 << 30, workers))
    return {name: tensor != 0 for name, tensor in run(plan, folder / "merged").items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_which(tmp_path: Path, method: str) -> None:
    """The recipe's, or that of lazymerge.plan; 0 if there is none."""
    change = torch.randn(3, 700, generator=torch.Generator().manual_seed(1))
    first = kept(tmp_path, method, change, seed=5)["t"]
    assert torch.equal(kept(tmp_path, method, change, seed=5)["t"], first)
    other = kept(tmp_path, method, change, seed=6)["t"]
    agreeing = float((first == other).float().mean())
    assert 0.45 < agreeing < 0.7  # 0.3² + 0.7² = 0.58
    default = kept(tmp_path, method, change)["t"]
    assert torch.equal(default, kept(tmp_path, method, change, seed=0)["t"])

    for name, value in (("base", 0 * change), ("a", change)):
        write_checkpoint(tmp_path / name, {"t": value})
    recipe = recipe_for(method, [str(tmp_path / "a")], [own_of(method)], {"rescale": False})
    recipe |= {"base_model": str(tmp_path / "base"), "seed": 6}
    path = tmp_path / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe))
    for seed, expected in ((None, other), (5, first), (0, default)):
        plan = lazymerge.plan(path, memory="4GiB", workers=1, seed=seed)
        assert torch.equal(run(plan, tmp_path / "merged")["t"] != 0, expected)


@pytest.mark.parametrize("method", DARE)
def test_an_element_survives_whose_number_is_below_its_density(tmp_path: Path, method: str) -> None:
    """Below, not at it: a number is 0 once in 2²⁴ times, and 0 is below every density."""
    found = numbers(0, 0, "t", (200,))
    assert ((found >= 0) & (found < 1) & (found * 2**24 % 1 == 0)).all()
    change = torch.ones(200)
    for place in (3, 77, 150):
        for density in (float(found[place]), float(found[place]) + 2.0**-24):
            merged = kept(tmp_path, method, change, entry=own_of(method, density))["t"]
            assert merged.tolist() == (found < density).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_models_and_tensors_have_masks_of_their_own(tmp_path: Path, method: str) -> None:
    """By their places and names: one model more, or another path, changes no other's masks."""
    change = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    both = kept(tmp_path, method, change, "a", ("t", "u"))
    assert 0.45 < float((both["t"] == both["u"]).float().mean()) < 0.7
    assert torch.equal(kept(tmp_path, method, change, "a", ("u",))["u"], both["u"])
    assert torch.equal(kept(tmp_path, method, change, "b", ("t",))["t"], both["t"])
    # of two models that change the same by the same: the elements that survive in either
    either = kept(tmp_path, method, change, "ab")["t"]
    assert bool(either[both["t"]].all())
    share = float(either.float().mean())
    assert 0.45 < share < 0.57  # 1 − 0.7² = 0.51


def test_a_base_among_the_models_takes_no_place(tmp_path: Path) -> None:
    tensor = torch.randn(500, generator=torch.Generator().manual_seed(1))
    models = {"base": {"t": torch.zeros(500)}, "a": {"t": tensor}, "b": {"t": tensor * 2}}
    found = set()
    for names in (["a", "b"], ["base", "a", "b"], ["a", "base", "b"]):
        parameters = {"weight": 1, "density": 0.5}
        recipe = recipe_for("dare_linear", names, None, parameters, base="base")
        found.add(bits(merge(tmp_path, recipe, models)["t"]))
    assert len(found) == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_output_does_not_depend_on_blocks_nor_workers(method: str) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(40, 24), (7, 131), (1000,), (3, 5, 2)]
    models = {
        name: {f"t{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(shapes)}
        for name in ("base", "a", "b")
    }
    own = [own_of(method), own_of(method, 0.6, 0.3)]
    recipe = recipe_for(method, "ab", own, base="base")
    found = set()
    for block in (BLOCK, 3 * BLOCK, 1 << 18):
        with small_blocks(block) as folder:
            plan = plan_of(folder, recipe, models)
            for workers in (1, 3):
                for kernels in ALL_KERNELS:
                    resources = Resources(4 << 30, workers, kernels=kernels)
                    merged = run(plan.with_resources(resources), folder / "merged")
                    found.add(b"".join(bits(merged[name]) for name in sorted(merged)))
    assert len(found) == 1


@pytest.mark.parametrize("method", METHODS)
def test_as_many_are_kept_as_density_says(tmp_path: Path, method: str) -> None:
    """Within five standard deviations, at any density, in any dtype."""
    count = 1 << 17
    for density in (0.001, 0.1, 0.5, 0.95):
        change = torch.ones(count // 64, 64, dtype=torch.bfloat16)
        entry = own_of(method, density, min(density, 1 - density) / 2)
        found = int(kept(tmp_path, method, change, entry=entry)["t"].sum())
        assert abs(found - density * count) < 5 * sqrt(density * (1 - density) * count)


@pytest.mark.parametrize("method", DELLA)
def test_larger_changes_survive_more_often(tmp_path: Path, method: str) -> None:
    """From density − ε at the smallest of a row to density + ε at the largest, in a line."""
    rows, length = 3000, 41
    random = np.random.default_rng(7)
    ranks = random.permuted(np.tile(np.arange(length), (rows, 1)), axis=1)
    signs = random.choice([-1, 1], (rows, length))
    change = torch.from_numpy((1 + ranks) * signs).float()
    entry = own_of(method, 0.4, 0.35)
    found = kept(tmp_path, method, change, entry=entry)["t"].numpy()
    for rank in range(length):
        expected = 0.05 + 0.7 * rank / (length - 1)
        share = found[ranks == rank].mean()
        assert abs(share - expected) < 5 * sqrt(expected * (1 - expected) / rows)


@pytest.mark.parametrize("method", METHODS)
def test_survivors_make_up_for_the_rest(tmp_path: Path, method: str) -> None:
    """The mean over seeds is the change itself: every element's, and that of all of them.

    (Of one model. Where several elect a sign, what they agree on is no sum, and its mean neither.)
    """
    seeds = 64
    random = np.random.default_rng(2)
    base, change = random.standard_normal((2, 6, 40))
    models = {"base": {"t": torch.from_numpy(base)}, "a": {"t": torch.from_numpy(base + change)}}
    entry = own_of(method, 0.4, 0.3)
    total = np.zeros(change.shape)
    for seed in range(seeds):
        # divided by its own weight, where it is at all
        recipe = recipe_for(method, "a", [entry], {"normalize": True}, base="base", seed=seed)
        plan = plan_of(tmp_path, recipe, models, Resources(4 << 30, 1))
        total += to_float64(run(plan, tmp_path / "merged")["t"]) - base
    chance = probabilities(change, entry, np.float64, ranked=method in DELLA)
    deviation = np.abs(change) * np.sqrt((1 - chance) / chance / seeds)
    standard = (total / seeds - change) / deviation
    assert abs(standard.sum()) < 5 * sqrt(standard.size)
    assert abs((standard**2).sum() - standard.size) < 5 * sqrt(2 * standard.size)
    assert np.abs(standard).max() < 6


# ---------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("method", METHODS)
def test_density_one_keeps_all_and_density_zero_none(tmp_path: Path, method: str) -> None:
    """Whatever epsilon is, and the seed; nothing is rescaled."""
    base, *changes = torch.from_numpy(np.random.default_rng(1).integers(-8, 9, (3, 50)) / 4)
    models = {"base": {"t": base}, "a": {"t": base + changes[0]}, "b": {"t": base + changes[1]}}
    for first, second in ((1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        own = [own_of(method, first, 0.9), own_of(method, second, 0.9)]
        recipe = recipe_for(method, "ab", own, base="base")
        expected = base + first * changes[0] + second * changes[1]
        assert torch.equal(merge(tmp_path, recipe, models)["t"], expected)


@pytest.mark.parametrize("method", METHODS)
def test_models_without_changes_give_the_base_bit_for_bit(tmp_path: Path, method: str) -> None:
    base = torch.randn((70, 10), generator=torch.Generator().manual_seed(1))
    models = {name: {"t": base.bfloat16()} for name in ("base", "a", "b")}
    own = [own_of(method), own_of(method)]
    recipe = recipe_for(method, "ab", own, base="base")
    assert bits(merge(tmp_path, recipe, models)["t"]) == bits(models["base"]["t"])


def test_without_an_election_all_weights_are_divided_by(tmp_path: Path) -> None:
    """Those of models of which nothing is left too; but not where they cancel."""
    models = {name: {"t": torch.full((9,), value)} for name, value in VALUES.items()}
    for second, expected in ((1.0, 2.0), (-1.0, 6.0), (-2.0, 6.0)):
        own = [{"weight": 2.0}, {"weight": second, "density": 0.0}]
        for method in ("dare_linear", "della_linear"):
            recipe = recipe_for(method, "ab", own, {"normalize": True}, base="base")
            assert merge(tmp_path, recipe, models)["t"].tolist() == [expected] * 9


VALUES = {"base": 0.0, "a": 3.0, "b": 5.0}


@pytest.mark.parametrize("method", METHODS)
def test_signs_are_elected_among_survivors(tmp_path: Path, method: str) -> None:
    """a has 2 everywhere, b −3: where both survive b wins alone, or −1 is left of their sum."""
    shape = (20, 30)
    models = {
        "base": {"t": torch.ones(shape)},
        "a": {"t": torch.full(shape, 3.0)},
        "b": {"t": torch.full(shape, -2.0)},
    }
    own = [own_of(method, 0.5, 0.25)] * 2
    parameters = {"rescale": False, "normalize": False}
    recipe = recipe_for(method, "ab", own, parameters, base="base", seed=9)
    merged = merge(tmp_path, recipe, models)["t"] - 1
    masks = []
    for place in range(2):
        chance = probabilities(np.ones(shape), own[0], np.float32, ranked=method in DELLA)
        masks.append(torch.from_numpy(numbers(9, place, "t", shape) < chance))
    first, second = masks
    both = -3.0 if method in BY_SIGN else -1.0
    expected = torch.where(first, torch.where(second, both, 2.0), torch.where(second, -3.0, 0.0))
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-140, 2.0**-126, 2.0**110])
def test_tiny_and_huge_magnitudes(tmp_path: Path, scale: float, method: str) -> None:
    """Denormals are not flushed, and nothing overflows that need not."""
    grid = np.random.default_rng(3).integers(-15, 16, (3, 10, 30)) * scale
    models = {
        name: {"t": torch.from_numpy(grid[i]).float()} for i, name in enumerate(("base", "a", "b"))
    }
    own = [own_of(method, 0.5, 0.25)] * 2
    recipe = recipe_for(method, "ab", own, {"rescale": False}, base="base")
    merged = merge(tmp_path, recipe, models)["t"]
    keep = []
    for place in range(2):
        change = grid[1 + place] - grid[0]
        chance = probabilities(change, own[0], np.float32, ranked=method in DELLA)
        keep.append(numbers(0, place, "t", change.shape) < chance)
    expected = reference(
        method,
        base=grid[0],
        models=list(grid[1:]),
        model_parameters=own,
        parameters={"rescale": False},
        keep=keep,
    )
    assert_within_ulps(merged, expected, torch.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_dropped_or_stays(tmp_path: Path, method: str, bad: float) -> None:
    """A dropped element is x₀, whatever the other model has; no other element is touched."""
    random = np.random.default_rng(5)
    base = torch.from_numpy(random.integers(-15, 16, (60, 10)) / 4).float()
    change = torch.from_numpy(random.integers(1, 16, (60, 10)) / 4).float()
    spoilt = change.clone()
    spoilt[:, 3] = bad
    spoilt[5] = bad
    found = []
    for other in (change, spoilt):
        models = {"base": {"t": base}, "a": {"t": base + other}}
        recipe = recipe_for(method, "a", [own_of(method, 0.5, 0.0)], base="base")
        if method in DARE:
            recipe = recipe_for(method, "a", [own_of(method, 0.5)], base="base")
        found.append(merge(tmp_path, recipe, models)["t"])
    # without a slope ranks are of no influence
    sound, merged = found
    where = ~torch.isfinite(spoilt)
    assert torch.equal(merged[~where], sound[~where])
    assert torch.equal(torch.isfinite(merged)[where], (sound == base)[where])
    assert torch.equal(merged[where & (sound == base)], base[where & (sound == base)])
    assert bool((where & (sound != base)).any())


def test_blocks_of_real_size(tmp_path: Path) -> None:
    """Nothing made small: block multiples, rows longer than a block, ragged ends."""
    random = np.random.default_rng(8)
    shapes = {"rows": (700, 600), "long": (2, (1 << 18) + 5), "flat": ((1 << 18) + 777,)}
    grids = {
        name: [random.integers(-127, 128, shape) / 32 for _ in range(3)]
        for name, shape in shapes.items()
    }
    models = {
        model: {name: torch.from_numpy(grid[i]).bfloat16() for name, grid in grids.items()}
        for i, model in enumerate(("base", "a", "b"))
    }
    for method in METHODS:
        own = [own_of(method, 0.5, 0.25), own_of(method, 0.25, 0.125)]
        parameters = {"rescale": False}
        recipe = recipe_for(method, "ab", own, parameters, base="base", seed=3)
        merged = merge(tmp_path / method, recipe, models)
        for name, grid in grids.items():
            keep = []
            for place, entry in enumerate(own):
                change = grid[1 + place] - grid[0]
                chance = probabilities(change, entry, np.float32, ranked=method in DELLA)
                keep.append(numbers(3, place, name, change.shape) < chance)
            expected = reference(
                method,
                base=grid[0],
                models=grid[1:],
                model_parameters=own,
                parameters=parameters,
                keep=keep,
            )
            slack = noise([grid[0], *grid[1:]], 2.0**-22)
            assert_within_ulps(merged[name], expected, torch.bfloat16, slack=slack)


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
        ("a", {"weight": 1, "gamma": 0.1}, "base", "has no parameter 'gamma'"),
        ("a", {"weight": 1, "rescale": "often"}, "base", "'rescale' must be"),
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


@pytest.mark.parametrize("method", DELLA)
@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.5, 0.5), (0.15, 0.15), (0.85, 0.15)]
)
def test_della_refuses_probabilities_outside_their_range(
    tmp_path: Path, method: str, density: float, epsilon: float
) -> None:
    """When it is planned, with the tensor's name and the model's."""
    own = [own_of(method, 0.5, 0.1), own_of(method, density, epsilon)]
    recipe = recipe_for(method, "ab", own, base="base")
    message = rf"tensor t: density {density:g} ± epsilon {epsilon:g} of model \S*b leaves \(0, 1\)"
    refused(tmp_path, recipe, MODELS, message, InputError)


@pytest.mark.parametrize("method", DELLA)
def test_epsilon_is_a_share(tmp_path: Path, method: str) -> None:
    for epsilon in (-0.1, 1.5):
        parameters = {"weight": 1, "density": 0.5, "epsilon": epsilon}
        recipe = recipe_for(method, "a", None, parameters, base="base")
        refused(tmp_path, recipe, MODELS, "'epsilon' must be .*from 0 to 1", RecipeError)


@pytest.mark.parametrize("method", DARE)
def test_dare_has_no_epsilon(tmp_path: Path, method: str) -> None:
    parameters = {"weight": 1, "epsilon": 0.1}
    recipe = recipe_for(method, "a", None, parameters, base="base")
    refused(tmp_path, recipe, MODELS, "has no parameter 'epsilon'", RecipeError)


@pytest.mark.parametrize("seed", [1.5, "many", True])
def test_a_seed_is_a_whole_number(tmp_path: Path, seed: object) -> None:
    recipe = recipe_for("dare_linear", "a", None, {"weight": 1}, base="base", seed=seed)
    refused(tmp_path, recipe, MODELS, "'seed' must be a whole number", RecipeError)
