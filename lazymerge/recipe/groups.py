"""Models that are merged with each other, counted and checked against the method's signature.

How models are counted against a signature's `min_models` and `max_models`:

- base REQUIRED: the listed models and the base, which counts once whether it is listed or not
  (slerp of a base and one other model is a merge of two).
- base OPTIONAL: the models other than the base. Where there is one, it is the origin the others
  are seen from and not itself merged, listed or not.
- base UNUSED: the listed models. A base that is only named decides config and tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import Position
from .model import ModelEntry
from .reporting import Reporter
from .settings import Settings
from .signature import BaseModel, Scope, Signature
from .source import MapNode, is_null, quote


@dataclass(frozen=True, slots=True)
class ModelItem:
    """One item of a list of models or sources as far as it could be read.

    place: where it stands, in words ("models[0]").
    reference: None where it is missing or wrong.
    position: of the reference, or of the item.
    layer_range: None where it is missing, wrong or has no place.
    """

    place: str
    reference: str | None
    position: Position
    block: Settings
    layer_range: tuple[int, int] | None = None

    def entry(self) -> ModelEntry:
        return ModelEntry(
            str(self.reference),
            self.block.settings,
            self.layer_range,
            self.position,
            self.block.positions,
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Models that are merged with each other.

    place: where they are listed, in words; position: of that.
    base: their base, or None.
    blocks: `parameters` that hold for all of them, the nearest first.
    lists_base: the base must be among the items.
    """

    place: str
    position: Position
    items: list[ModelItem]
    base: str | None
    blocks: tuple[Settings, ...]
    lists_base: bool = False


def check_base(
    reporter: Reporter,
    root: MapNode,
    signature: Signature,
    base: str | None,
    groups: list[Group],
    *,
    is_misspelt: bool,
) -> None:
    """Reports a method that needs a base and has none.

    is_misspelt: a key that was meant to name one is reported already.
    """
    if signature.base is not BaseModel.REQUIRED or base is not None or not groups:
        return
    if all(group.base is not None for group in groups):
        return  # slices that have their own
    entry = root.entries.get("base_model")
    if entry is not None and not is_null(entry.node):
        return  # given, and reported as wrong
    if is_misspelt:
        return
    reporter.report(
        f"{signature.name} needs a base model; add at the top level: base_model: <path>",
        entry.node.position if entry else root.entries["merge_method"].node.position,
    )


def check_count(reporter: Reporter, signature: Signature, group: Group) -> None:
    """Reports more models than the method merges, or fewer."""
    base = group.base
    if signature.base is BaseModel.REQUIRED and base is None:
        return  # reported; the count depends on it
    if any(item.reference is None for item in group.items):
        return
    references = dict.fromkeys(item.reference for item in group.items)
    note = ""
    if signature.base is BaseModel.REQUIRED:
        if group.lists_base and base not in references:
            reporter.report(
                f"the base model {quote(str(base))} is not among {group.place}; "
                "list it there, with its layer_range",
                group.position,
            )
            return
        references[base] = None
        note = ", the base included"
    elif signature.base is BaseModel.OPTIONAL and base is not None:
        references.pop(base, None)
        note = ", not counting the base"
    count = len(references)
    low, high = signature.min_models, signature.max_models
    if count >= low and (high is None or count <= high):
        return
    if high is None:
        wanted = f"at least {_models_text(low)}"
    elif low == high:
        wanted = f"exactly {_models_text(low)}"
    else:
        wanted = f"{low} to {_models_text(high)}"
    reporter.report(
        f"{signature.name} merges {wanted}{note}; here there {_are_text(count)}",
        group.position,
    )


def check_required(reporter: Reporter, root: MapNode, signature: Signature, group: Group) -> None:
    """Reports required parameters that are missing: one must have a setting somewhere for every
    model it belongs to.

    Whether its filters cover every tensor is seen when the tensors are known.
    """
    base, items = group.base, group.items
    method_position = root.entries["merge_method"].node.position
    uses_base = signature.base is not BaseModel.UNUSED and base is not None
    base_is_listed = any(item.reference == base for item in items)
    for parameter in signature.parameters:
        name = parameter.name
        if not parameter.required or any(name in block.mentioned for block in group.blocks):
            continue
        if parameter.scope is Scope.GLOBAL:
            if any(name in item.block.mentioned for item in items):
                continue  # reported, with the place to move it to
            reporter.report(
                f"{signature.name} needs the parameter {name!r}; "
                "give it under the top-level 'parameters'",
                method_position,
            )
            continue
        for item in items:
            is_base = uses_base and item.reference == base
            if name in item.block.mentioned or (is_base and parameter.scope is Scope.NON_BASE):
                continue
            who = item.place + (f" ({quote(item.reference)})" if item.reference else "")
            reporter.report(
                f"{who} has no {name!r}, which {signature.name} needs for every model; give "
                "it under this model's 'parameters', or for all under the top-level ones",
                item.position,
            )
        if (
            parameter.scope is Scope.MODEL
            and uses_base
            and not base_is_listed
            and not group.lists_base
        ):
            reporter.report(
                f"the base model has no {name!r}, which {signature.name} needs for every "
                "model; list the base under 'models' with its 'parameters', or give "
                f"{name!r} for all under the top-level 'parameters'",
                root.entries["base_model"].node.position,
            )


def _models_text(count: int) -> str:
    return f"{count} model" if count == 1 else f"{count} models"


def _are_text(count: int) -> str:
    return f"is {count}" if count == 1 else f"are {count}"
