"""Several recipes in one file: later merges use earlier ones, by name, as models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import InputError, Problem, RecipeError
from .model import Recipe
from .tokenizer import BASE, UNION


def joined(recipes: Sequence[Recipe]) -> Recipe:
    """The recipe that the others lead to: the one without a name, else the one that none uses.

    Raises:
        RecipeError: a name is given twice, merges use each other in a circle, or there is not one
            recipe that the others lead to.
    """
    path = recipes[0].path
    named: dict[str, Recipe] = {}
    problems = []
    for recipe in recipes:
        if recipe.name is None:
            continue
        if recipe.name in named:
            first = named[recipe.name].name_position
            line = f", first in line {first.line}" if first else ""
            problems.append(
                Problem(f"two merges are named {recipe.name!r}{line}", recipe.name_position)
            )
        named.setdefault(recipe.name, recipe)
    if problems:
        raise RecipeError(path, problems)
    final = _final(recipes, named)
    merges = _in_order(final, named)
    used = {merge.name for merge in merges}
    unused = [
        Problem(f"the merge {recipe.name!r} is not used", recipe.name_position)
        for recipe in recipes
        if recipe is not final and recipe.name not in used
    ]
    inner = [warning for merge in merges for warning in merge.warnings]
    return replace(final, merges=tuple(merges), warnings=(*final.warnings, *inner, *unused))


def part_named(recipe: Recipe, name: str) -> Recipe:
    """One of the merges that a recipe uses, to be written by itself: as it is within the recipe,
    with the merges that it needs in turn.

    Raises:
        InputError: the recipe uses no merge of that name.
    """
    named = {str(merge.name): merge for merge in recipe.merges}
    if name not in named:
        raise InputError(_no_such_part(recipe, name, list(named)))
    part = named[name]
    merges = _in_order(part, named)
    inner = [warning for merge in merges for warning in merge.warnings]
    return replace(part, merges=tuple(merges), part_of=recipe, warnings=(*part.warnings, *inner))


def _no_such_part(recipe: Recipe, name: str, names: Sequence[str]) -> str:
    if not names:
        return f"{recipe.path} has no merge that is named {name!r}, for it uses no other merges"
    what = "the last merge, which is written in any case" if recipe.name == name else "none of them"
    known = ", ".join(map(repr, names))
    return f"{recipe.path}: the merges that the last one uses are {known}; {name!r} is {what}"


def _final(recipes: Sequence[Recipe], named: Mapping[str, Recipe]) -> Recipe:
    nameless = [recipe for recipe in recipes if recipe.name is None]
    if len(nameless) == 1:
        return nameless[0]
    if len(nameless) > 1:
        message = "two merges have no name; give one to each but the last"
        raise RecipeError(recipes[0].path, [Problem(message, nameless[1].method_position)])
    used = {reference for recipe in recipes for reference in _needed(recipe)}
    last = [recipe for recipe in recipes if recipe.name not in used]
    if len(last) != 1:
        names = ", ".join(repr(recipe.name) for recipe in last) or "none"
        message = (
            f"one merge must be the last, which no other uses; here these are: {names}. Leave out "
            "the name of the one that is wanted"
        )
        raise RecipeError(recipes[0].path, [Problem(message, recipes[-1].name_position)])
    return last[0]


def _in_order(final: Recipe, named: Mapping[str, Recipe]) -> list[Recipe]:
    """The merges that one needs, each after those that it needs itself.

    Raises:
        RecipeError: they use each other in a circle.
    """
    order: dict[str, Recipe] = {}
    waiting: list[tuple[Recipe, bool]] = [(final, False)]
    open_names: list[str] = []
    while waiting:
        recipe, is_done = waiting.pop()
        if is_done:
            if recipe is not final:
                order[str(recipe.name)] = recipe
                open_names.pop()
            continue
        if recipe is not final:
            if recipe.name in order:
                continue
            if recipe.name in open_names:
                circle = " uses ".join([*open_names[open_names.index(recipe.name) :], recipe.name])
                message = f"merges use each other in a circle: {circle}"
                raise RecipeError(recipe.path, [Problem(message, recipe.name_position)])
            open_names.append(str(recipe.name))
        waiting.append((recipe, True))
        waiting += [(named[name], False) for name in _needed(recipe) if name in named]
    return list(order.values())


def _needed(recipe: Recipe) -> tuple[str, ...]:
    """What a merge uses: its models, and the one whose tokenizer is the source of its own."""
    settings = recipe.tokenizer
    is_model = settings is not None and settings.source not in (UNION, BASE)
    return (*recipe.references, *((settings.source,) if settings and is_model else ()))
