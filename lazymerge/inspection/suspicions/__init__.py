"""What looks wrong about a merge before it is run, from its plan alone.

    weights      sums, ranges, thinning                 influence   models that change nothing
    models       configs that do not fit                slices      layers left out by one
    dtypes       what the output cannot hold            heads       tied, or missing
    tokenizers   numbers that stand for other tokens

A "mistake" is very likely wrong, and no sane recipe has one; a "note" is worth knowing. Headers,
configs and tokenizer files are looked at, and no tensor data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...engine.plan import Plan
from ...recipe import Recipe
from .dtypes import dtype_suspicions
from .groups import Everywhere, Places, groups_of, groups_of_part
from .heads import head_suspicions
from .influence import influence_suspicions, parameter_suspicions
from .models import model_suspicions
from .slices import slice_suspicions
from .suspicion import Severity, Suspicion, short
from .tokenizers import tokenizer_suspicions
from .weights import weight_suspicions

__all__ = ["Severity", "Suspicion", "suspicions"]


def suspicions(plan: Plan) -> tuple[Suspicion, ...]:
    """Everything that looks wrong about a merge, mistakes first.

    Takes under a second for 90,000 tensors, and milliseconds for a usual model.
    """
    groups = groups_of(plan)
    found = [
        *influence_suspicions(plan, groups),
        *weight_suspicions(groups, Places(plan)),
        *_of_parts(plan.recipe),
        *slice_suspicions(plan),
        *model_suspicions(plan),
        *tokenizer_suspicions(plan),
        *head_suspicions(plan),
        *dtype_suspicions(plan),
    ]
    return tuple(sorted(found, key=lambda suspicion: suspicion.severity != "mistake"))


def _of_parts(recipe: Recipe) -> Iterator[Suspicion]:
    """What is odd about the parameters of merges whose results the recipe uses as models."""
    for merge in recipe.merges:
        groups = groups_of_part(merge)
        for each in (*parameter_suspicions(groups), *weight_suspicions(groups, Everywhere())):
            yield replace(each, message=f"{short(str(merge.name))}: {each.message}")
