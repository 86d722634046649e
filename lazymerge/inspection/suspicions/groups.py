"""A plan's tensors by how they are merged, and where in the model they are.

A plan of 90,000 tensors has a handful of groups, or one for each layer where a gradient is used, so
that what is looked for in groups takes no time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from ...architecture.layers import LayerPlace
from ...engine.plan import Plan
from ...methods import METHODS
from ...recipe.model import Conditions, Gradient, Recipe
from ...recipe.signature import BaseModel, Scalar, Scope
from .suspicion import short

COPY = "copy"
"""The method of tensors that there is nothing to merge with."""

MOST_PARTS = 3
"""Parts of a layer that are named before they are only counted."""

Values = Mapping[str, Scalar | None]


@dataclass(frozen=True, slots=True)
class Group:
    """Output tensors that are merged alike.

    base: the model whose differences to the others are merged; None: there is none.
    by_model: per-model parameters, the base's among them.
    names: of the tensors, in the order of the output.
    """

    method: str
    base: str | None
    parameters: Values
    by_model: Mapping[str, Values]
    names: list[str] = field(default_factory=list)

    @property
    def others(self) -> list[str]:
        """The models but the base."""
        return [model for model in self.by_model if model != self.base]

    def value(self, model: str, parameter: str, default: float) -> float:
        """A model's numeric parameter."""
        return _as_number(self.by_model[model].get(parameter), default)

    def shared(self, parameter: str, default: float) -> float:
        """A numeric parameter of the method."""
        return _as_number(self.parameters.get(parameter), default)

    def flag(self, parameter: str) -> bool:
        """A boolean parameter of the method."""
        return bool(self.parameters.get(parameter))


def _as_number(value: Scalar | None, default: float) -> float:
    return float(value) if isinstance(value, int | float) else default


def groups_of(plan: Plan) -> tuple[Group, ...]:
    """The groups of a plan, in the order of their first tensors."""
    found: dict[object, Group] = {}
    for tensor in plan.tensors:
        key = (
            tensor.method,
            tuple(tensor.parameters.items()),
            tuple((model, tuple(values.items())) for model, values in tensor.by_model.items()),
        )
        group = found.get(key)
        if group is None:
            base = _base(plan, tensor.method, tensor.by_model)
            group = Group(tensor.method, base, tensor.parameters, tensor.by_model)
            found[key] = group
        group.names.append(tensor.name)
    return tuple(found.values())


def _base(plan: Plan, method: str, by_model: Mapping[str, Values]) -> str | None:
    """The base of a tensor: it comes first where there is one, and has no values of parameters that
    are for the others."""
    if method not in METHODS or not by_model:
        return None
    signature = METHODS[method].signature
    first = next(iter(by_model))
    if signature.base is BaseModel.REQUIRED:
        return first
    if signature.base is BaseModel.UNUSED:
        return None
    of_others = [p.name for p in signature.parameters if p.scope is Scope.NON_BASE]
    if of_others:
        return None if of_others[0] in by_model[first] else first
    return first if first == plan.recipe.base_model else None


def groups_of_part(merge: Recipe) -> tuple[Group, ...]:
    """The group of a merge whose result is another's input, as far as the recipe says it: none
    where its parameters differ from tensor to tensor."""
    signature = METHODS[merge.merge_method].signature
    models = {entry.model: entry.parameters for entry in merge.models}
    base = None if signature.base is BaseModel.UNUSED else merge.base_model
    if base is not None:
        models = {base: models.pop(base, {}), **models}
    values: dict[str, dict[str, Scalar | None]] = {model: {} for model in models}
    shared: dict[str, Scalar | None] = {}
    for parameter in signature.parameters:
        default = merge.parameters.get(parameter.name, parameter.default)
        if parameter.scope is Scope.GLOBAL:
            if not isinstance(default, _Varying):
                shared[parameter.name] = default
            continue
        for model, own in models.items():
            value = own.get(parameter.name, default)
            if isinstance(value, _Varying):
                return ()
            if parameter.scope is Scope.MODEL or model != base:
                values[model][parameter.name] = value
    if not models or shared.keys() != {
        p.name for p in signature.parameters if p.scope is Scope.GLOBAL
    }:
        return ()
    return (Group(merge.merge_method, base, shared, values, [str(merge.name)]),)


_Varying = (Gradient, Conditions)


class Where(Protocol):
    """Says where tensors are."""

    def where(self, names: Sequence[str]) -> str:
        """Where some tensors are, as the end of a sentence."""


class Everywhere:
    """Of a merge that is looked at as one."""

    def where(self, names: Sequence[str]) -> str:
        return "in all tensors"


class Places:
    """Says where a plan's tensors are."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._merged = [tensor.name for tensor in plan.tensors if tensor.method != COPY]

    @cached_property
    def _places(self) -> dict[str, LayerPlace]:
        """Of all tensors within layers."""
        located = ((name, self._plan.stacks.locate(name)) for name in self._merged)
        return {name: place for name, place in located if place is not None}

    @cached_property
    def _by_layer(self) -> Counter[tuple[str, int]]:
        """How many tensors are merged in every layer."""
        return Counter((place.stack.prefix, place.index) for place in self._places.values())

    def where(self, names: Sequence[str]) -> str:
        """`in all tensors`, `in layers 0–3 of 40`, `in mlp of layers 2–5 of 40 and in lm_head`."""
        if len(names) >= len(self._merged):
            return "in all tensors"
        outside: list[str] = []
        inside: dict[str, list[LayerPlace]] = {}
        for name in names:
            place = self._places.get(name)
            if place is None:
                outside.append(name)
            else:
                inside.setdefault(place.stack.prefix, []).append(place)
        parts = [
            self._of_stack(places, is_one=len(self._plan.stacks) == 1) for places in inside.values()
        ]
        if outside:
            more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
            parts.append(f"in {short(outside[0])}{more}")
        return " and ".join(parts)

    def _of_stack(self, places: Sequence[LayerPlace], *, is_one: bool) -> str:
        stack = places[0].stack
        indices = sorted({place.index for place in places})
        found = Counter(place.index for place in places)
        is_whole = all(found[i] == self._by_layer[stack.prefix, i] for i in indices)
        of = "" if is_one else f" {short(stack.prefix)}"
        layers = f"{layers_text(indices)} of {stack.layer_count}{of}"
        if is_whole:
            return f"in {layers}"
        return f"in {_parts(places)} of {layers}"


def _parts(places: Iterable[LayerPlace]) -> str:
    """The parts of a layer that some tensors are of."""
    suffixes = list(dict.fromkeys(place.suffix for place in places))
    heads = list(dict.fromkeys(suffix.partition(".")[0] for suffix in suffixes))
    shown = suffixes if len(suffixes) <= MOST_PARTS else heads
    more = f" and {len(shown) - MOST_PARTS} more parts" if len(shown) > MOST_PARTS else ""
    return ", ".join(short(part) for part in shown[:MOST_PARTS]) + more


def layers_text(numbers: Sequence[int]) -> str:
    """`layer 3`, or `layers 0–3, 8`."""
    ordered = sorted(set(numbers))
    return f"{'layer' if len(ordered) == 1 else 'layers'} {runs(ordered)}"


def runs(numbers: Sequence[int], most: int = 4) -> str:
    """`0–3, 8`: ascending numbers, those in a row as one."""
    found: list[list[int]] = []
    for value in numbers:
        if found and value == found[-1][1] + 1:
            found[-1][1] = value
        else:
            found.append([value, value])
    shown = [str(a) if a == b else f"{a}–{b}" for a, b in found[:most]]
    return ", ".join(shown) + (" …" if len(found) > most else "")
