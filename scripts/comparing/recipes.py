"""Random recipes of any method: models, base and parameters in every form the language has.

How many models a method takes and which parameters it has, its signature says; which values are
worth trying, this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from lazymerge.recipe.signature import BaseModel, Parameter, Scalar, Scope, Signature

from method_recipes import model_counts, recipe_for

MOST_MODELS = 5
"""Of deterministic methods, as methods count them; an optional base comes in addition."""

OUT_DTYPES = (None, None, "float32", "bfloat16", "float16")
"""None: as dtype says, float32."""

FILTERS = ("mlp", "self_attn", "layernorm", "embed_tokens", "layers.1.", "down_proj", "lm_head")

Draw = Callable[[Random], Scalar]


def _uniform(low: float, high: float) -> Draw:
    return lambda random: round(random.uniform(low, high), 4)


def _power(low: float, high: float) -> Draw:
    return lambda random: float(f"{10 ** random.uniform(low, high):.3g}")


def _one_of(*draws: Draw | float) -> Draw:
    def draw(random: Random) -> Scalar:
        chosen = random.choice(draws)
        return chosen(random) if callable(chosen) else chosen

    return draw


def _power_of_two(random: Random) -> Scalar:
    """A value that differences of float16 and bfloat16 numbers hit exactly."""
    return 2.0 ** -random.randint(8, 12)


_DENSITY = _one_of(*(4 * [_uniform(0.05, 0.95)]), 0.0, 1.0, _uniform(0.001, 0.05))

VALUES: dict[str, Draw] = {
    "weight": _one_of(_uniform(0.1, 1.5), _uniform(0.1, 1.5), _uniform(-0.6, 1.0), 1.0, 0.5, 0.0),
    "density": _DENSITY,
    "gamma": _one_of(_uniform(0.0, 0.3), 0.01, 0.0),
    "lambda": _uniform(-0.5, 1.5),
    "scale": _uniform(-1.0, 2.0),
    "t": _uniform(-0.1, 1.1),
    "eps": _one_of(1e-8, 1e-6),
    "max_iter": lambda random: random.randint(0, 12),
    "tol": _power(-6, -4),
    "select_topk": _one_of(_uniform(0.02, 0.98), _uniform(0.02, 0.98), 1.0, 0.0),
    "epsilon": _one_of(_power(-5, -2), _power_of_two),
    "r": _uniform(0.0, 1.0),
    "alpha": _uniform(0.0, 1.0),
}
"""By parameter name."""

ALWAYS_GIVEN = frozenset({"density"})
"""Parameters without which a method is another one."""

VALUES_OF_METHOD: dict[tuple[str, str], Draw] = {
    ("linear", "weight"): _uniform(0.2, 1.5),
    ("multislerp", "weight"): _uniform(0.2, 1.5),
    ("nearswap", "t"): _one_of(_power(-4, -1.5), _power_of_two, _power(-7, -5)),
    # density ± epsilon must lie between 0 and 1
    ("della", "density"): _one_of(_uniform(0.25, 0.75), _uniform(0.25, 0.75), 1.0),
    ("della_linear", "density"): _uniform(0.25, 0.75),
    ("della", "epsilon"): _uniform(0.01, 0.2),
    ("della_linear", "epsilon"): _uniform(0.01, 0.2),
    # few of a small tensor's elements survive a small one: nothing to count
    ("dare_linear", "density"): _uniform(0.1, 0.9),
    ("dare_ties", "density"): _uniform(0.1, 0.9),
}


def _value(method: str, parameter: Parameter, random: Random) -> Scalar:
    if parameter.type is bool:
        return random.random() < 0.5
    draw = VALUES_OF_METHOD.get((method, parameter.name)) or VALUES.get(parameter.name)
    if draw is None:
        raise ValueError(f"nothing says which values of {parameter.name} are worth trying")
    return draw(random)


def _setting(method: str, parameter: Parameter, random: Random) -> Any:
    """A scalar, a gradient, or conditions with filters."""

    def draw() -> Scalar:
        return _value(method, parameter, random)

    def gradient() -> list[Scalar]:
        return [draw() for _ in range(random.randint(2, 4))]

    form = random.random()
    is_whole = parameter.type is int  # mergekit refuses what a gradient of them passes through
    if form < 0.55 or (is_whole and form < 0.75):
        return draw()
    if form < 0.75:
        return gradient()
    conditions: list[dict[str, Any]] = []
    for text in random.sample(FILTERS, random.randint(1, 3)):
        is_scalar = is_whole or random.random() < 0.7
        conditions.append({"filter": text, "value": draw() if is_scalar else gradient()})
    if parameter.required or random.random() < 0.8:  # else what no filter matches has the default
        conditions.append({"value": draw()})
    return conditions


def random_recipe(
    signature: Signature, folders: Sequence[Path], random: Random, most: int
) -> dict[str, Any]:
    """A recipe document that computes in float32.

    folders: checkpoints, more than `most`; the base is the first.
    most: models, as the method counts them.
    """
    count = random.choice(model_counts(signature, most))
    has_base = signature.base is BaseModel.REQUIRED or (
        signature.base is BaseModel.OPTIONAL and random.random() < 0.5
    )
    base, *others = folders
    if signature.base is BaseModel.UNUSED:  # there the base is a model like any other
        chosen = random.sample(list(folders), count)
    else:
        chosen = [base, *random.sample(others, len(others))]
    frame = recipe_for(
        signature,
        chosen if has_base or signature.base is BaseModel.UNUSED else chosen[1:],
        count,
        setting="flags" if has_base else "defaults",
        random=random,
    )
    models = [{"model": entry["model"]} for entry in frame["models"]]
    document: dict[str, Any] = {"merge_method": signature.name}
    if has_base:
        document["base_model"] = str(base)
        if random.random() < 0.3:
            models.insert(random.randint(0, len(models)), {"model": str(base)})
    elif signature.base is BaseModel.UNUSED and random.random() < 0.3:
        # one of those listed: mergekit adds a base that is not to the models
        document["base_model"] = random.choice(models)["model"]
    document["models"] = models
    _set_parameters(document, signature, random)
    document["dtype"] = "float32"
    out_dtype = random.choice(OUT_DTYPES)
    if out_dtype is not None:
        document["out_dtype"] = out_dtype
    return document


def _set_parameters(document: dict[str, Any], signature: Signature, random: Random) -> None:
    base = document.get("base_model")
    top: dict[str, Any] = {}
    for parameter in signature.parameters:
        is_given = parameter.required or parameter.name in ALWAYS_GIVEN
        if not is_given and random.random() < 0.35:
            continue
        if parameter.scope is Scope.GLOBAL:
            top[parameter.name] = _setting(signature.name, parameter, random)
            continue
        place = random.choice(("models", "models", "models", "top", "both"))
        if place != "models":
            top[parameter.name] = _setting(signature.name, parameter, random)
        for model in document["models"]:
            is_base = signature.base is not BaseModel.UNUSED and model["model"] == base
            if is_base or place == "top" or (place == "both" and random.random() < 0.5):
                continue
            setting = _setting(signature.name, parameter, random)
            model.setdefault("parameters", {})[parameter.name] = setting
    if top:
        document["parameters"] = top


def with_float64(document: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, computed and written in float64 by mergekit."""
    return {**document, "dtype": "float64", "out_dtype": "float64"}
