"""Layers that slices leave out by one or list in reverse, and gradients that are longer than the
layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from ...architecture import find_layer_stacks
from ...engine.plan import Plan
from ...recipe.model import Conditions, Gradient, Setting, Slice
from .groups import runs
from .suspicion import Suspicion, short


def slice_suspicions(plan: Plan) -> Iterator[Suspicion]:
    """What is odd about the slices and gradients of a recipe."""
    recipe = plan.recipe
    for slices in (recipe.slices, *(module.slices for module in recipe.modules)):
        yield from _left_out(plan, slices)
        yield from _reversed(slices)
    yield from _long_gradients(plan)


def _left_out(plan: Plan, slices: Sequence[Slice]) -> Iterator[Suspicion]:
    """One layer that lies between two slices, or after the last, and in none: `layer_range` counts
    as Python does, and it is easily written as if its end were part of it."""
    used: dict[str, set[int]] = {}
    for piece in slices:
        for source in piece.sources:
            used.setdefault(source.model, set()).update(range(*(source.layer_range or (0, 0))))
    everywhere: set[int] = set().union(*used.values())
    missing: dict[int, tuple[str, int]] = {}
    for before, after in pairwise(slices):
        ends = {s.model: s.layer_range[1] for s in before.sources if s.layer_range}
        for source in after.sources:
            if source.layer_range is None:
                continue
            start = source.layer_range[0]
            end = ends.get(source.model, next(iter(ends.values()), start))
            if start == end + 1 and end not in everywhere:
                missing.setdefault(end, (source.model, start))
    for layer, (model, start) in missing.items():
        yield Suspicion(
            "layer-left-out",
            f"layer {layer} is in no slice: one ends before it and the next takes {short(model)} "
            f"from layer {start} on; the end of layer_range is not part of it, so write "
            f"[…, {layer + 1}] to include layer {layer}",
            "mistake",
        )
    yield from _last_left_out(plan, slices, everywhere)


def _reversed(slices: Sequence[Slice]) -> Iterator[Suspicion]:
    """Slices that are listed from the last layers to the first. That a slice goes back a little is
    how models are made deeper, and not looked at."""
    ranges = [piece.sources[0].layer_range or (0, 0) for piece in slices]
    if len(ranges) < 2 or any(after[1] > before[0] for before, after in pairwise(ranges)):
        return
    yield Suspicion(
        "layers-reversed",
        f"the slices are listed from the last layers to the first: the output begins with layer "
        f"{ranges[0][0]} of {short(slices[0].sources[0].model)} and ends with layer "
        f"{ranges[-1][1] - 1} of {short(slices[-1].sources[0].model)}; list them in the order in "
        "which the layers follow one another",
        "mistake",
    )


def _last_left_out(
    plan: Plan, slices: Sequence[Slice], everywhere: set[int]
) -> Iterator[Suspicion]:
    counts: dict[str, int] = {}
    for source in slices[-1].sources if slices else ():
        checkpoint = plan.checkpoints.get(source.model)
        if checkpoint is None or source.layer_range is None:
            return
        stop = source.layer_range[1]
        layers = [stack.layer_count for stack in find_layer_stacks(checkpoint.tensors)]
        if stop in everywhere or stop + 1 not in layers:
            return
        counts[source.model] = stop + 1
    for model, count in list(counts.items())[:1]:
        yield Suspicion(
            "layer-left-out",
            f"the last layer, {count - 1} of {short(model)}, is in no slice; the end of "
            f"layer_range is not part of it, so write […, {count}] to include it",
            "mistake",
        )


def _long_gradients(plan: Plan) -> Iterator[Suspicion]:
    """Gradients with more values than there are layers to take them."""
    recipe = plan.recipe
    counts = [stack.layer_count for stack in plan.stacks]
    scopes: list[tuple[str, Mapping[str, Setting], int]] = []
    if counts and not recipe.slices and not recipe.modules:
        scopes.append(("", recipe.parameters, max(counts)))
        scopes += [(f" of {short(e.model)}", e.parameters, max(counts)) for e in recipe.models]
    for place, piece in enumerate(recipe.slices, 1):
        scopes.append((f" of slice {place}", piece.parameters, piece.layer_count))
        scopes += [
            (f" of {short(source.model)} in slice {place}", source.parameters, piece.layer_count)
            for source in piece.sources
        ]
    for owner, settings, layers in scopes:
        for name, setting in settings.items():
            longest = max((len(values) for values in _gradients(setting)), default=0)
            if 1 < layers < longest:
                skipped = sorted(set(range(longest)) - _reached(longest, layers))
                yield Suspicion(
                    "gradient-long",
                    f"the gradient of {name}{owner} has {longest} values for {layers} layers, so "
                    f"that some are never used (number {runs([s + 1 for s in skipped])}); give it "
                    f"{layers} values, or fewer to be interpolated",
                    "note",
                )


def _reached(values: int, layers: int) -> set[int]:
    """The values that a layer's own value is made from."""
    positions = [layer / (layers - 1) * (values - 1) for layer in range(layers)]
    return {int(p) for p in positions} | {min(values - 1, int(p) + 1) for p in positions if p % 1}


def _gradients(setting: Setting) -> Iterator[tuple[object, ...]]:
    if isinstance(setting, Gradient):
        yield setting.values
    elif isinstance(setting, Conditions):
        for condition in setting.entries:
            yield from _gradients(condition.value)
