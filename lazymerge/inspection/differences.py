"""What would change if another recipe were merged.

Output tensors are compared by the ids of their writes: an id is a hash of all that a tensor is
computed from, so that equal ids are equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..engine.plan import Plan
from ..graph.compile import ResolvedTensor
from ..graph.node import Write
from ..recipe.signature import Scalar
from .layers import ABSENT, folded_names, is_silent, models_of, value_text


@dataclass(frozen=True, slots=True)
class Change:
    """One fact in both plans. what: its name; before, after: as text."""

    what: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class ValueChange:
    """A parameter, or the method, that differs for some tensors.

    where: the tensors, folded over layers; "all that change". tensors: how many.
    """

    where: str
    tensors: int
    parameter: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Differences:
    """What would change from one plan to another.

    is_equal: nothing would: equal fingerprints.
    facts: of the recipes and outputs as wholes, those that differ.
    models_added, models_removed: references.
    added, removed, changed: output tensors, folded over layers; with their numbers.
    unchanged: how many output tensors have the same bytes.
    reshaped: of the changed ones, those with another shape or dtype, as changes.
    values: parameters that differ, by runs of layers.
    before, after: bytes read, bytes written and projected memory of both.
    """

    is_equal: bool
    facts: tuple[Change, ...]
    models_added: tuple[str, ...]
    models_removed: tuple[str, ...]
    added: tuple[int, str]
    removed: tuple[int, str]
    changed: tuple[int, str]
    unchanged: int
    reshaped: tuple[ValueChange, ...]
    values: tuple[ValueChange, ...]
    before: Mapping[str, int]
    after: Mapping[str, int]


def differences(before: Plan, after: Plan) -> Differences:
    """Compares two plans."""
    old = {write.name: write for write in before.graph.writes}
    new = {write.name: write for write in after.graph.writes}
    added = [name for name in new if name not in old]
    removed = [name for name in old if name not in new]
    changed = [name for name in new if name in old and new[name].id != old[name].id]
    same = len(new) - len(added) - len(changed)
    old_models, new_models = models_of(before), models_of(after)
    return Differences(
        is_equal=before.fingerprint == after.fingerprint,
        facts=tuple(_facts(before, after)),
        models_added=tuple(model for model in new_models if model not in old_models),
        models_removed=tuple(model for model in old_models if model not in new_models),
        added=(len(added), _folded(added, after)),
        removed=(len(removed), _folded(removed, before)),
        changed=(len(changed), _folded(changed, after)),
        unchanged=same,
        reshaped=_reshaped(after, changed, old, new),
        values=_values(before, after, changed),
        before=_totals(before),
        after=_totals(after),
    )


ALL = "all that change"

MOST_PLACES = 12
"""Runs of layers and single tensors that are named before the rest is counted."""


def _folded(names: list[str], plan: Plan) -> str:
    parts = folded_names(names, plan.stacks)
    more = len(parts) - MOST_PLACES
    return ", ".join(parts if more <= 0 else [*parts[:MOST_PLACES], f"and {more} more"])


def _facts(before: Plan, after: Plan) -> list[Change]:
    pairs = [
        ("method", before.recipe.merge_method, after.recipe.merge_method),
        ("order of models", *_orders(models_of(before), models_of(after))),
        ("base", before.recipe.base_model or ABSENT, after.recipe.base_model or ABSENT),
        ("dtype", _dtypes(before), _dtypes(after)),
        ("seed", str(before.recipe.seed), str(after.recipe.seed)),
        ("device", before.execution.device, after.execution.device),
        ("shards", str(len(before.shards)), str(len(after.shards))),
        ("tokenizer", _tokenizer(before), _tokenizer(after)),
        ("config keys", _config(before, after), _config(after, before)),
    ]
    return [Change(*pair) for pair in pairs if pair[1] != pair[2]]


def _orders(before: list[str], after: list[str]) -> tuple[str, str]:
    """The models in both orders, if that is all that differs: numbers are added up in it."""
    if sorted(before) != sorted(after):
        return ("", "")
    return (", ".join(before), ", ".join(after))


def _dtypes(plan: Plan) -> str:
    return ", ".join(dict.fromkeys(write.dtype for write in plan.graph.writes))


def _tokenizer(plan: Plan) -> str:
    if plan.tokenizer is None:
        return f"copied from {plan.recipe.main_model}"
    return "made for the output"


def _config(plan: Plan, other: Plan) -> str:
    """The values of config.json that are others in another plan."""
    own, its = plan.config or {}, other.config or {}
    keys = [key for key in {**own, **its} if own.get(key) != its.get(key)]
    return ", ".join(f"{key} {own.get(key, ABSENT)}" for key in sorted(keys)) or ABSENT


def _reshaped(
    plan: Plan, changed: list[str], old: Mapping[str, Write], new: Mapping[str, Write]
) -> tuple[ValueChange, ...]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in changed:
        was, is_ = old[name], new[name]
        if was.dtype != is_.dtype:
            groups.setdefault(("dtype", was.dtype, is_.dtype), []).append(name)
        if was.shape != is_.shape:
            shapes = ("shape", _shape(was), _shape(is_))
            groups.setdefault(shapes, []).append(name)
    return _grouped(plan, groups, len(changed))


def _shape(write: Write) -> str:
    return " × ".join(map(str, write.shape)) or "scalar"


def _values(before: Plan, after: Plan, changed: list[str]) -> tuple[ValueChange, ...]:
    """Parameters of tensors that both have."""
    old = {tensor.name: tensor for tensor in before.tensors}
    new = {tensor.name: tensor for tensor in after.tensors}
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in changed:
        if old[name].method != new[name].method:
            key = ("method", old[name].method, new[name].method)
            groups.setdefault(key, []).append(name)
            continue
        was, is_ = _settings(old[name]), _settings(new[name])
        for what in {**was, **is_}:
            one, other = was.get(what), is_.get(what)
            if one != other:
                groups.setdefault((what, *_texts(one, other)), []).append(name)
    return _grouped(after, groups, len(changed))


def _settings(tensor: ResolvedTensor) -> dict[str, Scalar | None]:
    """Every parameter that has an effect, by name; those of models with the model's name."""
    values = {name: value for name, value in tensor.parameters.items() if not is_silent(name)}
    for model, own in tensor.by_model.items():
        values |= {f"{name} of {model}": value for name, value in own.items()}
    return values


def _texts(one: Scalar | None, other: Scalar | None) -> tuple[str, str]:
    """Two values that differ, with as many digits as that takes."""
    short = (value_text(one), value_text(other))
    return short if short[0] != short[1] else (repr(one), repr(other))


def _grouped(
    plan: Plan, groups: Mapping[tuple[str, str, str], list[str]], changed: int
) -> tuple[ValueChange, ...]:
    return tuple(
        ValueChange(ALL if len(names) == changed else _folded(names, plan), len(names), *key)
        for key, names in groups.items()
    )


def _totals(plan: Plan) -> dict[str, int]:
    return {
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "projected_bytes": plan.memory.projected_bytes,
        "workers": plan.memory.workers,
    }
