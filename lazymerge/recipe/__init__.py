"""The user's YAML: read, checked as a whole, and handed on as a value.

`load_recipe` and `parse_recipe` turn YAML into a `Recipe`, or into one `RecipeError` that names
everything that is wrong with its line and column. What may be said is declared by the
`Signature` of each merge method; `json_schema` says the same to editors. `evaluate` gives the
value of a parameter's setting for one tensor.

Nothing here opens a model or imports torch.
"""

from __future__ import annotations

from .documents import part_named
from .model import Condition, Conditions, Gradient, ModelEntry, Recipe, Setting, evaluate
from .parse import FLOAT_DTYPE_NAMES, load_recipe, parse_recipe
from .schema import json_schema
from .signature import BaseModel, Parameter, Scalar, Scope, Signature

__all__ = [
    "FLOAT_DTYPE_NAMES",
    "BaseModel",
    "Condition",
    "Conditions",
    "Gradient",
    "ModelEntry",
    "Parameter",
    "Recipe",
    "Scalar",
    "Scope",
    "Setting",
    "Signature",
    "evaluate",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "part_named",
]
