"""Statistics of tensors taken together: by layer, by part of layers, or one by one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..architecture import find_layer_stacks
from .statistics import Change, TensorStatistics, change_of


@dataclass(frozen=True, slots=True)
class Group:
    """Some tensors, and how they differ from the reference.

    label: "model.layers.0", "model.layers.0-3", "mlp.up_proj.weight", a tensor's name.
    """

    label: str
    tensors: int
    change: Change


def by_layer(tensors: Iterable[TensorStatistics], most: int | None = None) -> tuple[Group, ...]:
    """The layers, in order; then tensors that lie in none, one by one.

    most: layers of a stack that are told apart; more are taken together in even runs.
    """
    known = [tensor for tensor in tensors if tensor.moments is not None]
    stacks = find_layer_stacks(tensor.name for tensor in known)
    found: dict[str, list[TensorStatistics]] = defaultdict(list)
    alone: dict[str, list[TensorStatistics]] = {}
    for tensor in known:
        place = stacks.locate(tensor.name)
        if place is None:
            alone[tensor.name] = [tensor]
            continue
        count = place.stack.layer_count
        run = 1 if most is None else math.ceil(count / most)
        first = place.index // run * run
        last = min(first + run, count) - 1
        numbers = str(first) if first == last else f"{first}-{last}"
        found[f"{place.stack.prefix}.{numbers}"].append(tensor)
    return _groups({**found, **alone})


def by_part(tensors: Iterable[TensorStatistics]) -> tuple[Group, ...]:
    """The parts of layers, each over all layers that have it, in the order of the first layer."""
    known = [tensor for tensor in tensors if tensor.moments is not None]
    stacks = find_layer_stacks(tensor.name for tensor in known)
    several = len(stacks) > 1
    found: dict[str, list[TensorStatistics]] = defaultdict(list)
    for tensor in known:
        place = stacks.locate(tensor.name)
        if place is not None:
            prefix = f"{place.stack.prefix}.*." if several else ""
            found[f"{prefix}{place.suffix}"].append(tensor)
    return _groups(found)


def by_tensor(tensors: Iterable[TensorStatistics]) -> tuple[Group, ...]:
    """Every tensor by itself, the most changed first: by ‖δ‖ / ‖x₀‖."""
    groups = _groups({tensor.name: [tensor] for tensor in tensors if tensor.moments is not None})
    return tuple(sorted(groups, key=lambda group: _order(group.change.relative), reverse=True))


def _order(value: float) -> float:
    return value if math.isfinite(value) else -1.0


def _groups(found: dict[str, list[TensorStatistics]]) -> tuple[Group, ...]:
    groups = []
    for label, members in found.items():
        change = change_of(members)
        if change is not None:
            groups.append(Group(label, len(members), change))
    return tuple(groups)


def left_out(tensors: Iterable[TensorStatistics]) -> dict[str, Sequence[str]]:
    """Names of tensors of which nothing was gathered, by the reason why."""
    found: dict[str, list[str]] = defaultdict(list)
    for tensor in tensors:
        if tensor.moments is None:
            found[tensor.reason].append(tensor.name)
    return dict(found)
