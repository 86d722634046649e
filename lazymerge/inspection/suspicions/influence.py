"""Models that a recipe lists and that change nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from ...checkpoint.tensor import Checkpoint
from ...engine.plan import Plan
from ...graph.node import Read
from ...methods import METHODS
from ...recipe.signature import BaseModel
from .groups import COPY, Group
from .suspicion import Suspicion, listed, short
from .weights import BY_SIGN, SUMMED, factors_of

CANCELS = 1e-6
"""What of the base is left where weights sum to 1, for all that rounding does."""


def influence_suspicions(plan: Plan, groups: Sequence[Group]) -> Iterator[Suspicion]:
    """Models without influence, models that are one, adapters that change nothing."""
    without = _without_influence(groups)
    yield from parameter_suspicions(groups)
    read = {node.folder for node in plan.graph if isinstance(node, Read)}
    part_in = {model for group in groups for model in group.by_model}
    for model, checkpoint in plan.checkpoints.items():
        if model not in without:
            yield from _not_read(plan, model, checkpoint, read, part_in)
        adapter = checkpoint.adapter
        if adapter is not None and adapter.folder not in {checkpoint.folder, *read}:
            yield Suspicion(
                "adapter-without-effect",
                f"the adapter {short(adapter.reference)} of {short(model)} changes no tensor of "
                "the output; name the model without it, or check that it was made for this model",
                "mistake",
            )
    yield from _same_models(plan, groups)


def parameter_suspicions(groups: Sequence[Group]) -> Iterator[Suspicion]:
    """Models that their parameters silence."""
    for model, reason in _without_influence(groups).items():
        yield Suspicion(
            "no-influence",
            f"{short(model)} has no influence on the output: {reason}; correct that, or take the "
            "model out of the recipe",
            "mistake",
        )
    yield from _base_cancels(groups)


def _not_read(
    plan: Plan, model: str, checkpoint: Checkpoint, read: set[str], part_in: set[str]
) -> Iterator[Suspicion]:
    """A model whose tensors the output is not made of."""
    method = METHODS[plan.recipe.merge_method]
    if checkpoint.folder in read:
        return
    is_base = model == plan.recipe.base_model and model not in part_in
    if is_base and method.signature.base is BaseModel.UNUSED:
        yield Suspicion(
            "base-unused",
            f"{plan.recipe.merge_method} has no base: {short(model)} gives config.json and "
            "tokenizer, and none of its weights; list it among the models if it should have a "
            "share",
            "note",
        )
    elif not _is_main(plan, model):
        yield Suspicion(
            "no-influence",
            f"{short(model)} has no influence on the output: none of its tensors is read for it; "
            "take it out of the recipe, or give it a part",
            "mistake",
        )


def _is_main(plan: Plan, model: str) -> bool:
    """Whether config and tokenizer come from a model."""
    return model == plan.recipe.main_model


def _without_influence(groups: Sequence[Group]) -> dict[str, str]:
    """Models that take part in tensors and change none of them, and why."""
    reasons: dict[str, str] = {}
    influential: set[str] = set()
    for group in groups:
        if group.method == COPY:
            influential.update(group.by_model)  # integers: equal in all models
            continue
        silent = _silent(group)
        for model in group.by_model:
            if model in silent:
                reasons.setdefault(model, silent[model])
            else:
                influential.add(model)
    merged = {model for group in groups if group.method != COPY for model in group.by_model}
    only_copied = influential - _influential_in_merges(groups)
    return {
        model: reason
        for model, reason in reasons.items()
        if model in merged and (model not in influential or model in only_copied)
    }


def _influential_in_merges(groups: Sequence[Group]) -> set[str]:
    return {
        model
        for group in groups
        if group.method != COPY
        for model in group.by_model.keys() - _silent(group).keys()
    }


def _silent(group: Group) -> Mapping[str, str]:
    """The models that do not change a group's tensors, and why."""
    method = group.method
    if method in ("linear", "multislerp", "nuslerp"):
        of = group.by_model if method == "linear" else group.others
        weights = {model: group.value(model, "weight", 1.0) for model in of}
        if not any(weights.values()):
            return {}
        return {model: "its weight is 0" for model, weight in weights.items() if weight == 0}
    if method in SUMMED + BY_SIGN:
        if group.shared("lambda", 1.0) == 0:
            return dict.fromkeys(group.others, "lambda is 0, and the output is the base")
        return {
            model: f"its {name} is 0"
            for model in group.others
            for name, default in (("density", 1.0), ("weight", 1.0))
            if group.value(model, name, default) == 0
        }
    if method == "slerp" and group.base is not None:
        t = group.shared("t", 0.5)
        if t == 0:
            return dict.fromkeys(group.others, f"t is 0, and the output is {short(group.base)}")
        if t == 1:
            return {group.base: "t is 1, and the output is the other model"}
    if method == "nearswap" and group.shared("t", 1.0) <= 0:
        return dict.fromkeys(group.others, "t is 0, and the output is the base")
    if method == "sce" and group.shared("select_topk", 1.0) == 0:
        return dict.fromkeys(group.others, "select_topk is 0, and the output is the base")
    return {}


def _base_cancels(groups: Sequence[Group]) -> Iterator[Suspicion]:
    """Task vectors whose weights sum to 1: x₀ + Σ wᵢ(xᵢ − x₀) = Σ wᵢ xᵢ."""
    merged = [group for group in groups if group.method != COPY]
    if not merged or any(g.method != "task_arithmetic" or g.base is None for g in merged):
        return
    factors = [factors_of(group) for group in merged]
    if any(abs(sum(each.values()) - 1) > CANCELS for each in factors):
        return
    base = str(merged[0].base)
    only = {model for each in factors for model, factor in each.items() if factor}
    if len(only) == 1:
        (model,) = only
        yield Suspicion(
            "base-cancels",
            f"the output is {short(model)} itself: its change of {short(base)} is added once, and "
            "nothing else; choose another weight, or name a second model",
            "mistake",
        )
    else:
        yield Suspicion(
            "base-cancels",
            f"the weights sum to 1 in all tensors, so that {short(base)} cancels: the output is "
            "the average of the other models, as linear gives it; other weights keep the base",
            "note",
        )


LEAST_COPY_BYTES = 1 << 26
"""Smaller models may be written within one tick of the clock that files get their times from."""

FileIdentities = frozenset[tuple[object, ...]]


def _same_models(plan: Plan, groups: Sequence[Group]) -> Iterator[Suspicion]:
    """Models that are one under two names, and merged with each other."""
    merged = [group.by_model for group in groups if group.method != COPY]
    identities = {model: _identity(checkpoint) for model, checkpoint in plan.checkpoints.items()}
    stamps = {model: _stamps(checkpoint) for model, checkpoint in plan.checkpoints.items()}
    same = _alike(identities, merged)
    for models in same:
        yield Suspicion(
            "same-model",
            f"{listed(models)} are the same files, so that one model is merged with itself; name "
            "another model, or only one of them",
            "mistake",
        )
    for models in _alike(stamps, merged):
        if models not in same:
            yield Suspicion(
                "same-model",
                f"{listed(models)} look like copies: their files have the same sizes and headers, "
                "and the same times to the nanosecond; compare them, and name another model if "
                "they are one",
                "note",
            )


def _alike(
    known: Mapping[str, FileIdentities], merged: Sequence[Mapping[str, object]]
) -> list[list[str]]:
    """Models of which the same is known, where they are merged with each other.

    merged: the models of every group of tensors.
    """
    found: dict[tuple[str, ...], None] = {}
    for models in {tuple(by_model): None for by_model in merged}:
        alike: dict[FileIdentities, list[str]] = {}
        for model in models:
            if known.get(model):  # another merge's result has no files
                alike.setdefault(known[model], []).append(model)
        found |= {tuple(each): None for each in alike.values() if len(each) > 1}
    return [list(each) for each in found]


def _identity(checkpoint: Checkpoint) -> FileIdentities:
    """What files a model is; nothing where that is not known."""
    found: set[tuple[object, ...]] = set()
    if checkpoint.hub is not None:
        found.add(("hub", checkpoint.hub.repository, checkpoint.hub.commit))
    elif checkpoint.remote is not None:
        found |= {("remote", checkpoint.folder, file.path, file.pin) for file in checkpoint.files}
    else:
        for file in checkpoint.files:
            with suppress(OSError, ValueError):
                status = os.stat(os.path.join(checkpoint.folder, file.path))
                found.add(("file", status.st_dev, status.st_ino))
        if len(found) < len(checkpoint.files):
            return frozenset()
    if checkpoint.adapter is not None:
        found.add(("adapter", checkpoint.adapter.folder))
    return frozenset(found)


def _stamps(checkpoint: Checkpoint) -> FileIdentities:
    """What copies have in common; nothing where times are whole seconds, as archives keep them."""
    if checkpoint.hub is not None or checkpoint.adapter is not None:
        return frozenset()
    times = [file.modified_ns for file in checkpoint.files]
    if checkpoint.size_bytes < LEAST_COPY_BYTES or any(
        time is None or time % 1_000_000_000 == 0 for time in times
    ):
        return frozenset()
    return frozenset((f.size_bytes, f.modified_ns, f.header_digest) for f in checkpoint.files)
