"""Recipes for any merge method, made from what its signature says.

The checks of memory and determinism run every method that lazymerge knows, those of tomorrow
included, so they have no list of methods: how many models a method takes, what it does with a
base, and which parameters it has are read from `lazymerge.methods`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from lazymerge.recipe.signature import BaseModel, Parameter, Scalar, Scope, Signature

MOST_MODELS = 8
"""Of methods that take any number."""

SETTINGS = ("defaults", "numbers", "flags")
"""How the parameters that a recipe may leave out are set.

defaults: left out.
numbers: numbers given, 40% to 80% of their defaults; flags left out.
flags: numbers given, every flag the other way round; an optional base is named.
"""


def model_counts(signature: Signature, most: int = MOST_MODELS) -> list[int]:
    """Numbers of models, as the method counts them, up to `most`.

    The smallest number that the method takes is there even if it is above `most`.
    """
    upper = most if signature.max_models is None else min(most, signature.max_models)
    least = max(1, signature.min_models)
    return list(range(least, max(least, upper) + 1))


def recipe_for(
    signature: Signature,
    folders: Sequence[Path],
    count: int,
    *,
    setting: str = "numbers",
    out_dtype: str | None = None,
    random: Random,
) -> dict[str, Any]:
    """A recipe document that merges models by the method.

    folders: checkpoints, at least one more than `count`; the base is the first.
    count: models as the method counts them (a base that is OPTIONAL comes in addition).
    setting: one of SETTINGS.
    out_dtype: torch name of the output's dtype; None: the inputs'.
    random: where the values come from.

    Raises:
        ValueError: the method requires a text, and nothing says which.
    """
    has_base = signature.base is BaseModel.REQUIRED or (
        signature.base is BaseModel.OPTIONAL and setting == "flags"
    )
    first = 1 if has_base else 0
    others = count - 1 if signature.base is BaseModel.REQUIRED else count
    models: list[dict[str, Any]] = [
        {"model": str(folder)} for folder in folders[first : first + others]
    ]
    top_level: dict[str, Scalar] = {}
    for parameter in signature.parameters:
        if not parameter.required and not _is_given(parameter, setting):
            continue
        if parameter.scope is Scope.GLOBAL:
            top_level[parameter.name] = _value(parameter, random)
            continue
        if parameter.scope is Scope.MODEL and has_base:
            top_level[parameter.name] = _value(parameter, random)  # what the base is given
        for model in models:
            model.setdefault("parameters", {})[parameter.name] = _value(parameter, random)
    document: dict[str, Any] = {"merge_method": signature.name}
    if has_base:
        document["base_model"] = str(folders[0])
    document["models"] = models
    if top_level:
        document["parameters"] = top_level
    if out_dtype is not None:
        document["out_dtype"] = out_dtype
    return document


def _is_given(parameter: Parameter, setting: str) -> bool:
    if parameter.type is bool:
        return setting == "flags"
    return setting != "defaults" and parameter.type in (int, float)


def _value(parameter: Parameter, random: Random) -> Scalar:
    """A value that differs from the default and keeps its distance from every bound.

    A number that has a default is 40% to 80% of it: what methods demand of several parameters
    together (density + epsilon below 1) holds for the defaults, and then for these too.
    """
    if parameter.type is bool:
        return not parameter.default
    if parameter.type is str:
        if parameter.default is None:
            raise ValueError(f"nothing says which text the parameter {parameter.name} may have")
        return parameter.default
    share = round(random.uniform(0.4, 0.8), 3)
    default = parameter.default
    if default and not isinstance(default, str):
        value = default * share
    elif parameter.minimum is not None and parameter.maximum is not None:
        value = parameter.minimum + share * (parameter.maximum - parameter.minimum)
    else:
        value = (parameter.minimum or 0) + share
    if parameter.type is int:
        least = 1 if parameter.minimum is None else int(parameter.minimum)
        return max(least, int(value))
    if parameter.minimum is not None:
        value = max(value, parameter.minimum)
    return float(value) if parameter.maximum is None else float(min(value, parameter.maximum))
