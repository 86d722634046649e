"""Every complaint about a recipe, word for word and at its place: see problems.txt."""

from __future__ import annotations

from pathlib import Path

import pytest
from lazymerge.errors import RecipeError
from lazymerge.recipe import parse_recipe
from recipe_signatures import SIGNATURES


def _read_cases() -> dict[str, tuple[str, list[str]]]:
    sections = (Path(__file__).parent / "problems.txt").read_text("utf-8").split("\n=== ")[1:]
    cases = {}
    for section in sections:
        name, body = section.split("\n", 1)
        recipe, problems = body.split("--->\n")
        assert name not in cases
        cases[name] = (recipe, problems.strip("\n").split("\n"))
    return cases


CASES = _read_cases()


def test_the_cases_are_read() -> None:
    assert len(CASES) == 72


@pytest.mark.parametrize(("recipe", "problems"), CASES.values(), ids=CASES)
def test_every_problem_is_named_at_its_place(recipe: str, problems: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe, "some/recipe.yml", SIGNATURES)
    assert str(caught.value).split("\n") == [f"some/recipe.yml:{problem}" for problem in problems]
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("recipe", "problems"), CASES.values(), ids=CASES)
def test_positions_lie_in_the_text(recipe: str, problems: list[str]) -> None:
    lines = recipe.split("\n")
    for problem in problems:
        line, column, _ = problem.split(":", 2)
        assert 1 <= int(line) <= len(lines)
        assert 1 <= int(column) <= len(lines[int(line) - 1]) + 1


@pytest.mark.parametrize("weight", ["1e308", "-2e100"])
def test_numbers_whose_sums_would_not_be_finite(weight: str) -> None:
    text = f"merge_method: linear\nmodels:\n  - model: a\n    parameters: {{weight: {weight}}}\n"
    with pytest.raises(RecipeError, match="'weight' must be at most 1e\\+100 in magnitude"):
        parse_recipe(text, "some/recipe.yml", SIGNATURES)
