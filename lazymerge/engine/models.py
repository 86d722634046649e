"""Opening the models of a recipe, with names as the main one writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import TypeVar

from ..adapters import is_local, open_model
from ..architecture.layouts import example, renamed
from ..checkpoint import Checkpoint
from ..checkpoint.at_once import requesting
from ..checkpoint.fused import taken_apart
from ..checkpoint.tensor import Adapter
from ..errors import InputError, InputErrors
from ..recipe import Recipe
from ..sizes import format_count

MODELS_AT_ONCE = 4
"""That are opened, where some lie elsewhere; of each, several files are asked for at a time."""


def open_models(
    recipe: Recipe, paths: Mapping[str, str]
) -> tuple[dict[str, Checkpoint], list[str]]:
    """Opens every model of a recipe, with names as the main model writes them; and says in a
    sentence which have others.

    paths: where models are whose references say so from another folder.

    Raises:
        InputErrors: some cannot be opened.
    """
    return _aligned(recipe, _open_all(recipe, paths))


def _open_all(recipe: Recipe, paths: Mapping[str, str]) -> dict[str, Checkpoint]:
    """Opens every model of a recipe; the errors of all of them are raised at once. Those that lie
    elsewhere are asked for at once, too."""

    def open_one(reference: str) -> Checkpoint | str:
        try:
            return replace(open_model(paths.get(reference, reference)), reference=reference)
        except InputError as error:
            return f"{error}{_of_a_merge(reference, recipe)}"

    references = list(recipe.models_read)
    are_here = all(is_local(paths.get(reference, reference)) for reference in references)
    if are_here:
        opened = [open_one(reference) for reference in references]
    else:
        with requesting(MODELS_AT_ONCE) as pool:
            opened = list(pool.map(open_one, references))
    problems = [each for each in opened if isinstance(each, str)]
    if problems:
        raise InputErrors(problems)
    found = zip(references, opened, strict=True)
    return {reference: each for reference, each in found if isinstance(each, Checkpoint)}


def _of_a_merge(reference: str, recipe: Recipe) -> str:
    """What else is to be said of a model that is not there."""
    names = [str(merge.name) for merge in recipe.merges]
    name = next((name for name in names if reference.startswith(f"{name}+")), None)
    if name is None:
        return ""
    return (
        f" (An adapter cannot be put on the merge {name!r} of this file: put it on the models that "
        f"{name!r} is made of, or write {name!r} first, with --write-intermediate)"
    )


def _aligned(
    recipe: Recipe, checkpoints: dict[str, Checkpoint]
) -> tuple[dict[str, Checkpoint], list[str]]:
    """The checkpoints, with names as the base writes them, or the first model where there is no
    base; and a sentence for each whose names are others."""
    names = {reference: reference for reference in checkpoints}
    return aligned(checkpoints[recipe.main_model], checkpoints, names)


Key = TypeVar("Key", bound=Hashable)


def aligned(
    reference: Checkpoint, checkpoints: Mapping[Key, Checkpoint], called: Mapping[Key, str]
) -> tuple[dict[Key, Checkpoint], list[str]]:
    """Checkpoints with names as the reference writes them, and a sentence for each whose names are
    others.

    called: what they are called in it.
    """
    found, sentences = {}, []
    for key, checkpoint in checkpoints.items():
        name = called[key]
        names = renamed(checkpoint.tensors, reference.tensors)
        if names:
            tensors = {names[old]: tensor for old, tensor in checkpoint.tensors.items()}
            checkpoint = replace(checkpoint, tensors=tensors)
            old, new = example(names)
            sentences.append(f"{name} has other names for the same tensors: {old} is {new}")
        parts = taken_apart(checkpoint.tensors, reference.tensors)
        if parts.keys() != checkpoint.tensors.keys():
            checkpoint = replace(checkpoint, tensors=parts)
            sentences.append(
                f"{name} holds projections as one that {reference.reference} has apart"
            )
        found[key] = checkpoint
    return found, sentences


def dtype_shares(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes by dtype, the largest first."""
    shares: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        shares[tensor.dtype] += tensor.size_bytes
    return dict(shares.most_common())


def adapter_text(adapter: Adapter) -> str:
    """An adapter in a line, for people."""
    ranks = [str(rank) for rank in adapter.ranks]
    rank = (
        "" if not ranks else f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
    )
    facts = [adapter.reference, adapter.kind, rank]
    facts.append(f"{format_count(adapter.parameter_count)} parameters")
    facts.append(f"changes {counted(adapter.changed, 'tensor')}")
    if adapter.replaced:
        facts.append(f"replaces {adapter.replaced}")
    return ", ".join(fact for fact in facts if fact)


def dtype_text(shares: Mapping[str, int]) -> str:
    """`BF16`, or `BF16 + F32` where there are several, the largest share first."""
    return " + ".join(shares)


def counted(count: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
