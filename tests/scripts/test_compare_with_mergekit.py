"""The comparison with mergekit: what it tries, how it judges, and that it sees a difference.

mergekit itself is not needed here: what it would have written is made up.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lazymerge.engine.planning import make_plan, signatures
from lazymerge.engine.resources import Resources
from lazymerge.recipe import parse_recipe
from lazymerge.recipe.signature import Parameter, Scope, Signature
from safetensors.torch import load_file, save_file

import compare_with_mergekit as script
from benchmarking.processes import BenchError
from comparing import chance, inputs, judging
from comparing.chance import LIMIT_Z, RANDOM_METHODS, outcome, tally
from comparing.expectations import MERGEKIT_MARGINS, expect, undecided
from comparing.judging import Verdict, judge, ulps_apart
from comparing.programs import Mergekit, Refused, merge_with_lazymerge
from comparing.recipes import MOST_MODELS, random_recipe, with_float64
from conftest import write_checkpoint
from make_synthetic_checkpoint import LlamaShape
from reference import reference, round_once

DETERMINISTIC = [method for method in signatures() if method not in RANDOM_METHODS]

ULP = 2.0**-23
"""Of a float32 between 1 and 2."""


def operands(
    base: np.ndarray | None,
    models: list[np.ndarray],
    weights: list[float] | None = None,
    **more: Any,
) -> dict[str, Any]:
    own = [{} for _ in models] if weights is None else [{"weight": weight} for weight in weights]
    return {"base": base, "models": models, "parameters": more, "model_parameters": own}


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float64)


def judged(
    method: str,
    of: Mapping[str, Any],
    *,
    ours: np.ndarray | None = None,
    theirs: np.ndarray | None = None,
    exact: np.ndarray | None = None,
) -> Verdict:
    """The verdict on float32 tensors; what is not given is the reference's."""
    value = reference(method, **of)
    ours, theirs, exact = (value if given is None else given for given in (ours, theirs, exact))
    return judge(
        "w",
        round_once(ours, torch.float32),
        round_once(theirs, torch.float32),
        torch.from_numpy(np.array(exact)),
        expect(method, of),
    )


def explanation(verdict: Verdict) -> dict[str, int]:
    """The explanations that were needed."""
    counts = {name: getattr(verdict, name) for name in judging.EXPLANATIONS[1:]}
    return {name: count for name, count in counts.items() if count}


# Recipes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    names = ("embed_tokens", "layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "lm_head")
    tensors = {f"model.{name}.weight": torch.zeros(3, 4) for name in names}
    return [write_checkpoint(folder / str(number), tensors) for number in range(6)]


@pytest.mark.parametrize("method", signatures())
def test_random_recipes_are_planned(method: str, folders: list[Path]) -> None:
    forms: set[type] = set()
    for number in range(12):
        most = chance.MOST_MODELS if method in RANDOM_METHODS else MOST_MODELS
        random = Random(number)
        document = random_recipe(signatures()[method], folders, random, most)
        assert document["dtype"] == "float32"
        recipe = parse_recipe(yaml.safe_dump(document), "recipe.yml", signatures())
        assert make_plan(recipe, Resources(4 << 30)).tensors
        blocks = [document.get("parameters", {})]
        blocks += [model.get("parameters", {}) for model in document["models"]]
        forms |= {type(setting) for block in blocks for setting in block.values()}
        assert document == random_recipe(signatures()[method], folders, Random(number), most)
        assert with_float64(document)["out_dtype"] == "float64"
    if signatures()[method].parameters:
        assert list in forms  # gradients or conditions


def test_a_parameter_without_values_is_seen(folders: list[Path]) -> None:
    signature = Signature("any", "", "", (Parameter("novel", float, Scope.GLOBAL, "", 1.0, True),))
    with pytest.raises(ValueError, match="novel"):
        random_recipe(signature, folders, Random(0), 2)


def test_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SHAPE", LlamaShape(16, 24, 2, 2, 1, 40))
    made = inputs.make_inputs(tmp_path, 3, ["mixed"])["mixed"]
    assert [path.name for path in made] == [f"mixed-{role}" for role in inputs.ROLES]
    base, *models = (inputs.load_tensors(path) for path in made)
    assert [tensors["lm_head.weight"].dtype for tensors in (base, *models)] == [
        getattr(torch, name) for name in inputs.SETS["mixed"]
    ]
    name = "model.embed_tokens.weight"
    assert torch.equal(models[2][name], models[3][name])
    assert torch.equal(models[4]["lm_head.weight"], base["lm_head.weight"])
    changed = (models[4][name] != base[name]).any(dim=1)
    assert not changed[::3].any()
    assert changed[1::3].all()
    assert inputs.load_exactly(made[0])[name].dtype == np.float64


# Judging


def test_ulps_apart() -> None:
    one = torch.tensor([1.0, 1.0, 0.0, 2.0, torch.inf, torch.nan, 1.0, torch.inf])
    other = torch.tensor([1 + 3 * ULP, 1.0, -0.0, 2 - ULP, torch.inf, torch.nan, torch.nan, 1.0])
    assert ulps_apart(one, other).tolist() == [3, 0, 0, 0.5, 0, 0, np.inf, np.inf]


def test_nothing_needs_an_explanation_where_all_agree() -> None:
    of = operands(None, [array(1, 2, 3), array(3, 5, 7)], [1.0, 2.0])
    verdict = judged("linear", of)
    assert (verdict.elements, verdict.apart, explanation(verdict)) == (3, 0, {})
    assert verdict.worst_ours <= 0.5


def test_what_rounding_cannot_explain_is_unexplained() -> None:
    of = operands(None, [array(1, 2), array(3, 5)], [1.0, 1.0])
    value = reference("linear", **of)
    for off in ("ours", "theirs", "exact"):
        verdict = judged("linear", of, **{off: value + array(0, 0.01)})
        expected = {"float32": 1} if off == "theirs" else {"unexplained": 1}
        assert explanation(verdict) == expected, off
    verdict = judged("linear", of, theirs=value + 0.01, exact=value + 0.01)
    assert explanation(verdict) == {"unexplained": 2}
    assert verdict.apart == verdict.theirs_off == 2
    assert verdict.ours_off == 0
    assert verdict.worst_theirs == pytest.approx(0.01 / ULP / 2, rel=0.1)
    assert [example.place for example in verdict.examples] == [0, 1]
    assert "mergekit in float64 2.01" in str(verdict.examples[0])


def test_rounding_is_in_proportion_to_the_terms() -> None:
    of = operands(None, [array(1 + 2**-20, 1), array(-1, 3)], [1.0, 1.0])
    value = reference("linear", **of)
    off = array(4 * ULP, 0)  # 64 ulps of the small difference, four of the terms
    assert explanation(judged("linear", of, theirs=value + off)) == {"rounding": 1}
    # lazymerge adds up in float64
    assert explanation(judged("linear", of, ours=value + off)) == {"unexplained": 1}


def test_elements_of_one_magnitude_may_survive_or_not() -> None:
    # three of four survive: which of the equal ones is not a matter of arithmetic
    base, change = np.zeros(4), array(3, 1, 2, -1)
    of = operands(base, [base + change], [1.0], density=0.75)
    other = array(3, 0, 2, -1)
    assert reference("ties", **of).tolist() == [3, 1, 2, 0]
    assert explanation(judged("ties", of, theirs=other)) == {"threshold": 2}
    assert explanation(judged("ties", of, theirs=other, exact=other)) == {"threshold": 2}
    # but where magnitudes differ it is
    of = operands(base, [base + array(3, 1, 2, -1.001)], [1.0], density=0.75)
    other = array(3, 1, 2, 0)
    assert explanation(judged("ties", of, ours=other)) == {"unexplained": 2}
    assert explanation(judged("ties", of, theirs=other, exact=other)) == {"unexplained": 2}


def test_a_sum_near_zero_may_elect_either_sign() -> None:
    base = array(1, 1)
    of = operands(base, [base + array(0.5, 0.5), base + array(-0.5, -0.25)], [1.0, 1 - 2**-30])
    assert reference("ties", **of).tolist() == [1.5, 1.5]
    elected = array(0.5, 1.5)
    assert explanation(judged("ties", of, ours=elected)) == {"threshold": 1}
    elected = array(1.5, 0.75)
    assert explanation(judged("ties", of, ours=elected)) == {"unexplained": 1}


def test_undecided() -> None:
    size = array(1, 2, 2, 3, 4, 4, 5)
    kept = np.array([0, 0, 1, 1, 1, 0, 0], bool)
    assert undecided(size, kept, 0 * size).tolist() == [0, 1, 1, 0, 1, 1, 0]
    error = np.full(7, 0.4)
    assert undecided(size, kept, error).tolist() == [0, 1, 1, 0, 1, 1, 0]
    error = np.full(7, 0.5)
    assert undecided(size, kept, error).tolist() == [1, 1, 1, 1, 1, 1, 1]
    for none in (np.zeros(7, bool), np.ones(7, bool)):
        assert not undecided(size, none, error).any()


def test_breadcrumbs_drops_from_both_ends() -> None:
    base, change = np.zeros(8), array(1, 1, 2, 3, 4, 5, 6, 6)
    of = operands(base, [change], [1.0], density=0.75, gamma=0.125)
    assert reference("breadcrumbs", **of).tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    other = array(1, 0, 2, 3, 4, 5, 0, 6)
    assert explanation(judged("breadcrumbs", of, theirs=other)) == {"threshold": 4}
    other = array(1, 1, 0, 3, 4, 5, 6, 0)
    verdict = judged("breadcrumbs", of, theirs=other, exact=other)
    assert explanation(verdict) == {"threshold": 1, "unexplained": 1}


def test_sce_at_its_threshold() -> None:
    # two of four are selected; the second and the third have one variance
    base, first = np.zeros(4), array(9, 4, 4, 1)
    of = operands(base, [first, -first / 2], select_topk=0.5)
    value = reference("sce", **of)
    assert np.flatnonzero(value).tolist() == [0, 1]
    other = value[[0, 2, 1, 3]]
    assert explanation(judged("sce", of, theirs=other, exact=other)) == {"threshold": 2}
    other = value[[3, 1, 2, 0]]
    assert explanation(judged("sce", of, ours=other)) == {"unexplained": 2}


def test_sce_shares_move_with_what_is_selected() -> None:
    # of two elements of one variance, the one has the models' changes far from zero
    base = np.zeros(3)
    changes = [array(10, 1, 6), array(4, -1, 4)]
    of = operands(base, changes, select_topk=0.67)
    value = reference("sce", **of)
    assert value[1] == 1
    shares = array(136, 32)
    other = array(
        (shares * array(10, 4)).sum() / shares.sum(), 0, (shares * array(6, 4)).sum() / 168
    )
    assert explanation(judged("sce", of, theirs=other, exact=other)) == {"threshold": 3}
    other[0] = -5
    assert explanation(judged("sce", of, theirs=other, exact=other)) == {
        "threshold": 2,
        "unexplained": 1,
    }


def test_ram_at_epsilon() -> None:
    base = np.zeros(2)
    of = operands(base, [array(1, 1), array(0.25, 0.5)], epsilon=0.25)
    assert reference("ram", **of).tolist() == [1, 0.75]
    other = array(0.625, 0.75)
    assert explanation(judged("ram", of, theirs=other, exact=other)) == {"threshold": 1}
    other = array(1, 1)
    assert explanation(judged("ram", of, theirs=other, exact=other)) == {"unexplained": 1}


def test_arcee_fusion_with_lower_quantiles(random: np.random.Generator) -> None:
    base = random.standard_normal((8, 16))
    of = operands(base, [base + random.standard_normal((8, 16))])
    expected = expect("arcee_fusion", of)
    (departure,) = expected.departures.values()
    differing = int(np.count_nonzero(departure != expected.value))
    verdict = judged("arcee_fusion", of, theirs=departure, exact=departure)
    assert explanation(verdict) == ({"departure": differing} if differing else {})
    verdict = judged("arcee_fusion", of, theirs=base, exact=base)
    assert verdict.unexplained > 0
    assert explanation(judged("arcee_fusion", of, theirs=base)).keys() <= {"float32", "departure"}


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", "sce", "ram"])
def test_an_alternative_is_the_reference(method: str, random: np.random.Generator) -> None:
    """Every element's value is among those that are allowed, whatever the parameters."""
    base = random.standard_normal((4, 5))
    models = [base + 0.1 * random.standard_normal((4, 5)) for _ in range(3)]
    settings = {
        "sce": {"select_topk": 0.6},
        "ram": {"epsilon": 0.05},
        "breadcrumbs": {"density": 0.6, "gamma": 0.1, "normalize": True, "lambda": 0.7},
        "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1, "rescale": True},
        "ties": {"density": 0.4, "rescale": True, "lambda": 1.3},
    }[method]
    weights = None if method in ("sce", "ram") else [0.5, -0.3, 1.2]
    expected = expect(method, operands(base, models, weights, **settings))
    places = np.arange(base.size)
    found = np.zeros(base.size, bool)
    for other in expected.alternatives(MERGEKIT_MARGINS[method], places):
        near = np.abs(other.value - expected.value.reshape(-1)) < 1e-12
        found |= near & other.allowed
    assert found.all()


def test_verdicts_add_up() -> None:
    of = operands(None, [array(1, 2), array(3, 5)], [1.0, 1.0])
    value = reference("linear", **of)
    verdict = judged("linear", of, theirs=value + 0.01)
    verdict.add(judged("linear", of, ours=value + 0.02))
    assert (verdict.elements, verdict.apart) == (4, 4)
    assert (verdict.float32, verdict.unexplained, len(verdict.examples)) == (2, 2, 2)
    assert verdict.worst_ours > verdict.worst_theirs > 1


# Chance


def float32(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).astype(np.float64)


def drawn(
    method: str, of: Mapping[str, Any], chances: list[np.ndarray], random: np.random.Generator
) -> torch.Tensor:
    keep = [random.random(chance.shape) < chance for chance in chances]
    return round_once(reference(method, **of, keep=keep), torch.float32)


@pytest.mark.parametrize("method", RANDOM_METHODS)
def test_draws_from_the_distribution_pass_and_others_do_not(
    method: str, random: np.random.Generator
) -> None:
    base = float32(random.standard_normal((64, 128)) * 0.02)
    models = [base + 0.01 * random.standard_normal(base.shape) for _ in range(2)]
    of = operands(base, models, [0.7, -0.4], density=0.6)
    case = expect_case(of)
    chances = chance.probabilities(method, case)
    expected = outcome(method, of, restores_norm=False)
    found = tally("w", drawn(method, of, chances, random), expected)
    assert set(found.worst_z) == set(chance.STATISTICS)
    assert found.largest_z < LIMIT_Z
    fewer = [0.85 * survival for survival in chances]
    found = tally("w", drawn(method, of, fewer, random), expected)
    assert found.worst_z["changed"] > LIMIT_Z
    assert found.worst_z["gain"] > LIMIT_Z


def expect_case(of: Mapping[str, Any]) -> Any:
    return SimpleNamespace(
        base=of["base"],
        deltas=[model - of["base"] for model in of["models"]],
        per_model=lambda name, default: [of["parameters"].get(name, default)] * len(of["models"]),
    )


def test_dare_on_average_is_task_arithmetic(random: np.random.Generator) -> None:
    base = float32(random.standard_normal((3, 5)))
    models = [base + random.standard_normal((3, 5)) for _ in range(3)]
    of = operands(base, models, [0.7, 0.4, -0.2], density=0.3, **{"lambda": 0.5})
    mean = outcome("dare_linear", of, restores_norm=False).mean
    without = {**of, "parameters": {"lambda": 0.5}}
    np.testing.assert_allclose(base + mean, reference("task_arithmetic", **without), rtol=1e-12)
    # one factor for all survivors comes to the same, as all have one probability
    restored = outcome("dare_linear", of, restores_norm=True)
    np.testing.assert_allclose(restored.mean, mean, rtol=1e-9)
    np.testing.assert_allclose(restored.changed, 1 - 0.7**3)


def test_della_on_average(random: np.random.Generator) -> None:
    base = random.standard_normal((2, 6))
    change = random.standard_normal((2, 6))
    of = operands(base, [base + change], [1.0], density=0.5, epsilon=0.3)
    ours = outcome("della_linear", of, restores_norm=False)
    np.testing.assert_allclose(ours.mean, change, rtol=1e-9)
    # one factor for all survivors favours the large changes
    theirs = outcome("della_linear", of, restores_norm=True)
    np.testing.assert_allclose(np.abs(theirs.mean).sum(), np.abs(change).sum())
    smallest = np.argmin(np.abs(change), axis=1)
    largest = np.argmax(np.abs(change), axis=1)
    ratio = theirs.mean / change
    assert (ratio[[0, 1], smallest] < 1).all()
    assert (ratio[[0, 1], largest] > 1).all()


def test_small_tensors_are_counted_and_not_tested() -> None:
    base = np.zeros(10)
    of = operands(base, [base + 1], [1.0], density=0.5)
    expected = outcome("dare_linear", of, restores_norm=False)
    found = tally("w", torch.full((10,), 2.0), expected)
    found.add(tally("v", torch.zeros(10), expected))
    assert (found.elements, found.changed, found.expected_changed) == (20, 10, 10)
    assert found.projection / found.expected_projection == 1
    assert found.worst_z == {}


# The programs and the script


class Stand(Mergekit):
    """In mergekit's place: lazymerge, and what a test makes of its output."""

    spoils = ""
    refuses = False

    def __init__(self, *_: object) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def merge(self, document: Mapping[str, Any], output: Path, seed: int) -> None:
        if self.refuses:
            raise Refused("no")
        merge_with_lazymerge(document, output, seed)
        if self.spoils:
            file = output / "model.safetensors"
            tensors = load_file(file)
            tensors[self.spoils][1:] *= 1.5
            save_file(tensors, file)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SHAPE", LlamaShape(32, 48, 2, 2, 1, 40))
    monkeypatch.setattr(chance, "LEAST_ELEMENTS", 1000)
    monkeypatch.setattr(script, "Mergekit", Stand)
    monkeypatch.setattr(script, "peer_facts", lambda *_: "0")


VENV = ("--mergekit-venv", "nowhere")


@pytest.mark.usefixtures("small")
def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ("--methods", "linear", "dare_linear")
    arguments = [*VENV, "--work", str(tmp_path), "--recipes", "3", "--seed", "5", *methods]
    assert script.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "seed 5" in shown
    (row,) = (line for line in shown.splitlines() if line.startswith("| linear |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert (cells[1], cells[3], cells[-1]) == ("3", "0", "0")
    assert [line.split("|")[4].strip() for line in shown.splitlines() if "| dare_lin" in line] == [
        "lazymerge",
        "mergekit",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("method", ["linear", "dare_linear"])
def test_a_difference_is_found(
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Stand, "spoils", "model.layers.1.mlp.up_proj.weight")
    assert script.main([*VENV, "--work", str(tmp_path), "--only", "7", "--methods", method]) == 1
    shown = capsys.readouterr().out
    assert f"{method}, recipe 7:" in shown
    assert "model.layers.1.mlp.up_proj.weight" in shown
    assert f"merge_method: {method}" in shown


@pytest.mark.usefixtures("small")
def test_a_refusal_of_one_is_unexplained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Stand, "refuses", True)
    arguments = [*VENV, "--work", str(tmp_path), "--recipes", "1", "--methods", "linear"]
    assert script.main(arguments) == 1
    assert "mergekit: no" in capsys.readouterr().out


def test_the_process_of_mergekit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    job = json.loads(line)\n"
        "    if job['seed'] == 2:\n"
        "        sys.exit('broken')\n"
        "    answer = {'error': job['recipe']} if job['seed'] else {}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    monkeypatch.setattr("comparing.programs.DRIVER", driver)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    with Mergekit(tmp_path, tmp_path / "log") as mergekit:
        mergekit.merge({"merge_method": "linear"}, tmp_path, 0)
        with pytest.raises(Refused, match="merge_method: linear"):
            mergekit.merge({"merge_method": "linear"}, tmp_path, 1)
        for _ in range(2):
            with pytest.raises(BenchError, match="broken"):
                mergekit.merge({}, tmp_path, 2)
