"""The plan's tensors, folded: one row for each run of layers that are merged alike."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..architecture import LayerStacks
from ..engine.plan import Plan
from ..graph.compile import ResolvedTensor
from ..recipe.signature import Scalar

ABSENT = "–"
"""Shown where a parameter has no value, and for models that it does not concern."""

MOST_NAMES_OF_A_PART = 3
"""Tensor names by which a part of a layer is called before the rest is only counted."""


def models_of(plan: Plan) -> list[str]:
    """All that parameters are given for: the models, and the merges of the recipe that it uses."""
    return [*plan.checkpoints, *(str(merge.name) for merge in plan.recipe.merges)]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """Tensors that are merged alike.

    where: which they are. tensors: how many. elements: of all of them.
    values: parameter name → its value, or its values for the models in recipe order.
    """

    where: str
    tensors: int
    elements: int
    method: str
    values: Mapping[str, str]


class Values:
    """Parameters as text, worked out once for all tensors that have the same."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._found: dict[Hashable, dict[str, str]] = {}

    def of(self, tensor: ResolvedTensor) -> dict[str, str]:
        """What values_of gives."""
        by_model = ((model, tuple(own.items())) for model, own in tensor.by_model.items())
        key = (tuple(tensor.parameters.items()), tuple(by_model))
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = values_of(self._plan, tensor)
        return found


def layer_rows(plan: Plan) -> list[LayerRow]:
    """The plan's tensors, folded: one row per run of layers that are merged alike.

    A layer whose tensors differ in their parameters (filters) is broken into parts, and each
    part is folded over the layers by itself. Rows stand in the order of their first tensor.
    """
    sizes = {write.name: write.element_count for write in plan.graph.writes}
    values = Values(plan)
    stacks: dict[str, dict[int, list[ResolvedTensor]]] = {}
    order: list[str | ResolvedTensor] = []
    for tensor in plan.tensors:
        place = plan.stacks.locate(tensor.name)
        if place is None:
            order.append(tensor)
            continue
        prefix = place.stack.prefix
        if prefix not in stacks:
            stacks[prefix] = {}
            order.append(prefix)
        stacks[prefix].setdefault(place.index, []).append(tensor)
    rows: list[LayerRow] = []
    for entry in order:
        if isinstance(entry, ResolvedTensor):
            size, name = sizes[entry.name], entry.name
            rows.append(LayerRow(name, 1, size, entry.method, values.of(entry)))
        else:
            rows += _rows_of_stack(plan, values, entry, stacks[entry], sizes)
    return rows


def _rows_of_stack(
    plan: Plan,
    values: Values,
    prefix: str,
    layers: Mapping[int, Sequence[ResolvedTensor]],
    sizes: Mapping[str, int],
) -> list[LayerRow]:
    """A stack's rows: part by part, each folded over consecutive layers that are alike."""
    parts: dict[str, list[tuple[int, LayerRow]]] = {}
    for index in sorted(layers):
        for part, tensors in _parts_of_layer(plan, values, layers[index]):
            elements = sum(sizes[tensor.name] for tensor in tensors)
            first = tensors[0]
            row = LayerRow(part, len(tensors), elements, first.method, values.of(first))
            parts.setdefault(part, []).append((index, row))
    rows = []
    for part, members in parts.items():
        # consecutive indices with equal rows have one key: index minus place in the list
        numbered = enumerate(members)
        for _, run in groupby(numbered, lambda item: (item[1][0] - item[0], item[1][1])):
            alike = [member for _, member in run]
            begin, end, row = alike[0][0], alike[-1][0], alike[0][1]
            numbers = str(begin) if begin == end else f"{begin}–{end}"
            rows.append(
                LayerRow(
                    f"{prefix}.{numbers} {part}".rstrip(),
                    len(alike) * row.tensors,
                    len(alike) * row.elements,
                    row.method,
                    row.values,
                )
            )
    return rows


def _parts_of_layer(
    plan: Plan, values: Values, tensors: Sequence[ResolvedTensor]
) -> list[tuple[str, list[ResolvedTensor]]]:
    """A layer's tensors grouped by equal method and values, each group with a name."""
    groups: dict[object, list[ResolvedTensor]] = {}
    for tensor in tensors:
        found = values.of(tensor)
        groups.setdefault((tensor.method, tuple(found.items())), []).append(tensor)
    if len(groups) == 1:
        return [("", list(tensors))]
    return [(_part_name(plan, members, tensors), members) for members in groups.values()]


def _part_name(
    plan: Plan, members: Sequence[ResolvedTensor], layer: Sequence[ResolvedTensor]
) -> str:
    """What the members have in common that the rest of the layer has not."""

    def suffix(tensor: ResolvedTensor) -> str:
        place = plan.stacks.locate(tensor.name)
        return tensor.name if place is None else place.suffix

    heads = sorted({suffix(tensor).split(".")[0] for tensor in members})
    own = {tensor.name for tensor in members}
    others = {suffix(t).split(".")[0] for t in layer if t.name not in own}
    if not others.intersection(heads):
        return ", ".join(heads)
    names = [suffix(tensor).removesuffix(".weight") for tensor in members]
    shown = ", ".join(names[:MOST_NAMES_OF_A_PART])
    more = len(names) - MOST_NAMES_OF_A_PART
    return shown if more <= 0 else f"{shown}, {more} more"


def values_of(plan: Plan, tensor: ResolvedTensor) -> dict[str, str]:
    """Every parameter's value as text; per-model values in the order of the models table."""
    values = {
        name: value_text(value) for name, value in tensor.parameters.items() if not is_silent(name)
    }
    names = dict.fromkeys(name for model in tensor.by_model.values() for name in model)
    for name in names:
        values[name] = " ".join(
            value_text(tensor.by_model.get(model, {}).get(name)) for model in models_of(plan)
        )
    return values


def is_silent(name: str) -> bool:
    """Parameters that are accepted and do nothing."""
    return name == "int8_mask"


def per_model_parameters(plan: Plan) -> frozenset[str]:
    """The names of parameters that each model has a value of."""
    by_model = (values for tensor in plan.tensors for values in tensor.by_model.values())
    return frozenset(name for values in by_model for name in values)


def common_values(plan: Plan) -> tuple[dict[str, str], list[str]]:
    """The parameters that are the same for all that is merged, by name; and the names of those that
    are not."""
    values = Values(plan)
    merged = (values.of(tensor) for tensor in plan.tensors if tensor.method != "copy")
    distinct = list({id(own): own for own in merged}.values())
    names = dict.fromkeys(name for own in distinct for name in own)
    common = {
        name: distinct[0][name] for name in names if len({own.get(name) for own in distinct}) == 1
    }
    return common, [name for name in names if name not in common]


def folded_names(names: Iterable[str], stacks: LayerStacks) -> tuple[str, ...]:
    """Tensor names in short: `model.layers.0–39 (360)`, `lm_head.weight`."""
    counts: dict[str, dict[int, int]] = {}
    for name in names:
        place = stacks.locate(name)
        if place is None:
            counts[name] = {}
        else:
            layers = counts.setdefault(place.stack.prefix, {})
            layers[place.index] = layers.get(place.index, 0) + 1
    return tuple(_folded(prefix, layers) for prefix, layers in counts.items())


def _folded(prefix: str, layers: Mapping[int, int]) -> str:
    """layers: number of tensors by layer; none of a tensor outside of stacks."""
    if not layers:
        return prefix
    runs = []
    for _, run in groupby(enumerate(sorted(layers)), lambda item: item[1] - item[0]):
        indices = [index for _, index in run]
        first, last = indices[0], indices[-1]
        runs.append(str(first) if first == last else f"{first}–{last}")
    return f"{prefix}.{','.join(runs)} ({sum(layers.values())})"


def value_text(value: Scalar | None) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
