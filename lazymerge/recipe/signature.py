"""How a merge method declares what a recipe may say to it.

A method's file holds one `Signature`; everything that must know a method's parameters (the
recipe's validation, `lazymerge methods`, the JSON Schema, the documentation) reads it from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

Scalar = bool | int | float | str


class Scope(Enum):
    """Whom a parameter's value belongs to."""

    GLOBAL = "global"
    """One value per output tensor; only in the recipe's top-level `parameters`."""

    MODEL = "model"
    """One value per (model, tensor), the base included; in a model's `parameters`, or at the
    top level for all models."""

    NON_BASE = "non-base model"
    """As MODEL, but for the models other than the base: the base's value has no meaning."""


class BaseModel(Enum):
    """What a method does with `base_model`."""

    REQUIRED = "required"
    OPTIONAL = "optional"
    UNUSED = "unused"
    """Accepted (it decides config and tokenizer) and without influence on the values."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a merge method.

    name: as written in recipes.
    type: float, int, bool or str; an int is accepted for a float.
    scope: whom its value belongs to.
    help: one line.
    default: the value when nothing in the recipe gives one; None: no value.
    required: a value must be given for every model and tensor (default is then not used).
    minimum, maximum: inclusive bounds of numeric values; None: unbounded.
    """

    name: str
    type: type[float] | type[int] | type[bool] | type[str]
    scope: Scope
    help: str
    default: Scalar | None = None
    required: bool = False
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class Signature:
    """What a merge method is called, takes and computes.

    name: as written in `merge_method`.
    summary: one line.
    formula: the value of an output element, in the notation of the methods page.
    parameters: in the order they are documented.
    base: what the method does with base_model.
    min_models, max_models: how many models it merges; None: no upper bound. The base counts once
        where it is REQUIRED, listed or not; not at all where it is OPTIONAL (there it is the
        origin of the others); like any other model where it is UNUSED, that is, if listed.
    source: the paper or page that defines the method.
    """

    name: str
    summary: str
    formula: str
    parameters: tuple[Parameter, ...] = ()
    base: BaseModel = BaseModel.UNUSED
    min_models: int = 1
    max_models: int | None = None
    source: str = ""
    by_name: Mapping[str, Parameter] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {p.name: p for p in self.parameters})
