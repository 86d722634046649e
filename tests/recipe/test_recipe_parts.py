"""Parts of a recipe of several documents: which merges they need, what they keep of the whole."""

from __future__ import annotations

import pytest
from lazymerge.errors import InputError
from lazymerge.recipe import Recipe, parse_recipe, part_named
from recipe_signatures import SIGNATURES


def document(name: str | None, *models: str, more: str = "") -> str:
    head = "" if name is None else f"name: {name}\n"
    listed = ", ".join(f"{{model: {model}, parameters: {{weight: 1}}}}" for model in models)
    return f"{head}merge_method: linear\nmodels: [{listed}]\n{more}"


def recipe_of(*documents: str) -> Recipe:
    return parse_recipe("---\n".join(documents), "recipe.yml", SIGNATURES)


#   a ──► b ──► d ──► the last
#   c ────────► d         a, too
WHOLE = recipe_of(
    document(None, "d", "a"),
    document("d", "b", "c", more="seed: 3\n"),
    document("c", "m1", "m2"),
    document("b", "a", "m3", more="seed: 2\n"),
    document("a", "m4", "m5"),
)


@pytest.mark.parametrize(
    ("name", "needs", "reads"),
    [
        ("a", [], ["m4", "m5"]),
        ("b", ["a"], ["m4", "m3", "m5"]),
        ("c", [], ["m1", "m2"]),
        ("d", ["a", "b", "c"], ["m4", "m3", "m5", "m1", "m2"]),
    ],
)
def test_what_a_part_needs(name: str, needs: list[str], reads: list[str]) -> None:
    part = part_named(WHOLE, name)
    assert part.name == name
    assert sorted(str(merge.name) for merge in part.merges) == needs
    # each after those that it needs itself
    seen: set[str | None] = set()
    for merge in (*part.merges, part):
        assert {r for r in merge.references if not r.startswith("m")} <= seen
        seen.add(merge.name)
    assert sorted(part.models_read) == sorted(reads)
    assert part.main_model == reads[0]
    assert part.part_of == WHOLE
    assert all(merge.merges == () for merge in part.merges)


def test_seeds_are_those_of_the_whole() -> None:
    def seeds(recipe: Recipe) -> dict[str | None, int]:
        return {merge.name: merge.seed for merge in (*recipe.merges, recipe)}

    assert seeds(part_named(WHOLE, "d")) == {"a": 0, "b": 2, "c": 0, "d": 3}
    assert set(seeds(part_named(WHOLE.with_seed(5), "d")).values()) == {5}
    assert part_named(WHOLE.with_seed(5), "d").part_of == WHOLE.with_seed(5)


def test_warnings_are_its_own() -> None:
    whole = recipe_of(
        document("a", "m", "n", more="parameters:\n  normalize: [{value: 1}, {value: 0}]\n"),
        document("b", "a", "n"),
        document(None, "b", "n", more="parameters:\n  normalize: [{value: 1}, {value: 0}]\n"),
        document("x", "m", "n"),
    )
    lines = {
        name: [warning.position and warning.position.line for warning in part.warnings]
        for name, part in (("a", part_named(whole, "a")), ("b", part_named(whole, "b")))
    }
    assert [len(found) for found in lines.values()] == [1, 1]
    assert lines["a"] == lines["b"]
    assert len(whole.warnings) == 3


@pytest.mark.parametrize(
    ("recipe", "name", "message"),
    [
        (WHOLE, "m1", "the merges that the last one uses are 'a', 'c', 'b', 'd'; 'm1' is none of"),
        (recipe_of(document("a", "m", "n")), "a", "no merge that is named 'a', for it uses no"),
        (
            recipe_of(document("a", "m", "n"), document("z", "a", "n")),
            "z",
            "'z' is the last merge, which is written in any case",
        ),
        # one that is not used is not part of what is computed
        (recipe_of(document("a", "m"), document("z", "n"), document(None, "a")), "z", "none of"),
    ],
)
def test_names_that_are_none(recipe: Recipe, name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        part_named(recipe, name)
    assert str(caught.value).startswith("recipe.yml")
    assert message in str(caught.value)
