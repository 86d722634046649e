"""Parameters by layer: where a gradient runs, and where a filter has set something else.

One row per parameter, model and part of the layers, one value per layer. Parts whose values are
the same in every layer are one row; parameters that are the same everywhere are told once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..architecture import LayerStacks
from ..graph.compile import ResolvedTensor
from ..recipe.signature import Scalar

COPIED = "copied"
"""The value where a tensor is copied and no parameter is used."""

DIFFERING = "differs"
"""The value where tensors of one layer that are called alike (experts) have several values."""

SILENT = frozenset({"int8_mask"})
"""Parameters that are accepted and do nothing."""

MOST_NAMES = 3
"""Names that a part is called by before the rest is only counted."""

Value = Scalar | None
Key = tuple[str, str | None]
"""A parameter, and the model that it is given for; None: it is given for all."""


@dataclass(frozen=True, slots=True)
class MapRow:
    """One row of the map.

    stack: prefix of the layer stack.
    parameter, model: whose values they are; model is None where it concerns all models.
    part: which tensors of the layers, in words; "" for all.
    values: by layer; None where the layer has no such tensor.
    """

    stack: str
    parameter: str
    model: str | None
    part: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class ParameterMap:
    """All parameters of a plan.

    constant: (parameter, model, value) that are the same for all merged tensors.
    rows: what differs, within layer stacks.
    outside: (tensor, method, its differing (parameter, model, value)) outside of the stacks.
    """

    constant: tuple[tuple[str, str | None, Value], ...]
    rows: tuple[MapRow, ...]
    outside: tuple[tuple[str, str, tuple[tuple[str, str | None, Value], ...]], ...]


MOST_OUTSIDE = 64
"""Tensors outside of the layers that are told of; a model has a handful."""


def parameter_map(tensors: Sequence[ResolvedTensor], stacks: LayerStacks) -> ParameterMap:
    """The parameters of output tensors by layer, parameter, model and part."""
    found: dict[Key, dict[Value, None]] = defaultdict(dict)
    for tensor in tensors:
        if tensor.method != "copy":
            for key, value in _settings(tensor):
                found[key][value] = None
    constant = {key: next(iter(values)) for key, values in found.items() if len(values) == 1}
    varying = [key for key in found if key not in constant]
    return ParameterMap(
        constant=tuple((*key, value) for key, value in constant.items()),
        rows=tuple(_rows(tensors, stacks, varying)) if varying else (),
        outside=tuple(
            (
                tensor.name,
                tensor.method,
                tuple((*k, v) for k, v in _settings(tensor) if k not in constant),
            )
            for tensor in tensors
            if stacks.locate(tensor.name) is None
        )[:MOST_OUTSIDE],
    )


def general(suffix: str) -> str:
    """A tensor's name within its layer with a star for every number: experts are called alike."""
    return ".".join("*" if part.isdecimal() else part for part in suffix.split("."))


def _settings(tensor: ResolvedTensor) -> Iterator[tuple[Key, Value]]:
    for name, value in tensor.parameters.items():
        if name not in SILENT:
            yield (name, None), value
    for model, values in tensor.by_model.items():
        for name, value in values.items():
            yield (name, model), value


def _rows(
    tensors: Sequence[ResolvedTensor], stacks: LayerStacks, keys: Sequence[Key]
) -> Iterator[MapRow]:
    """Rows of all stacks: parameter by parameter, model by model, part by part."""
    values: dict[str, dict[str, dict[int, dict[Key, Value]]]] = {}
    for tensor in tensors:
        place = stacks.locate(tensor.name)
        if place is None:
            continue
        layers = values.setdefault(place.stack.prefix, {}).setdefault(general(place.suffix), {})
        own: dict[Key, Value] = dict(_settings(tensor))
        if tensor.method == "copy":
            own = dict.fromkeys(keys, COPIED)
        before = layers.setdefault(place.index, own)
        if before is not own:
            for key in keys:
                if before.get(key) != own.get(key):
                    before[key] = DIFFERING
    for prefix, by_part in values.items():
        count = stacks.by_prefix[prefix].layer_count
        for key in keys:
            alike = _alike(
                (part, tuple(layers.get(n, {}).get(key) for n in range(count)))
                for part, layers in by_part.items()
            )
            for row, parts in alike:
                if any(value is not None for value in row):
                    yield MapRow(prefix, key[0], key[1], _part_text(parts, by_part), row)


def _alike(
    rows: Iterable[tuple[str, tuple[Value, ...]]],
) -> list[tuple[tuple[Value, ...], list[str]]]:
    """Rows with the parts they are of; rows that agree wherever both have a value are one."""
    found: list[tuple[tuple[Value, ...], list[str]]] = []
    for part, row in rows:
        for number, (other, parts) in enumerate(found):
            if all(a is None or b is None or a == b for a, b in zip(row, other, strict=True)):
                joined = tuple(b if a is None else a for a, b in zip(row, other, strict=True))
                found[number] = (joined, [*parts, part])
                break
        else:
            found.append((row, [part]))
    return found


def _part_text(parts: Sequence[str], known: Mapping[str, object]) -> str:
    """What these parts are called; "" if they are all."""
    if len(parts) == len(known):
        return ""
    heads = dict.fromkeys(part.split(".")[0] for part in parts)
    others = {part.split(".")[0] for part in known if part not in parts}
    names = list(heads)
    if others.intersection(heads):
        names = [part.removesuffix(".weight") for part in parts]
    more = len(names) - MOST_NAMES
    shown = ", ".join(names[:MOST_NAMES])
    return shown if more <= 0 else f"{shown}, {more} more"
