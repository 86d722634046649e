"""Output heads of models that tie them, as the embeddings that they are.

all models tie their heads                  no head is merged, the output is tied
some have one of their own                  the embedding of the others is merged as their head
a tied model stores its head all the same   the stored one is a copy, and does not count
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..architecture.tying import TYING_KEY, embedding_of_head, heads, is_tied, untied
from ..checkpoint.tensor import Checkpoint, TensorInfo
from ..recipe.model import Recipe


@dataclass(frozen=True, slots=True)
class TiedHeads:
    """A merge's models, with the heads that the merge is of.

    models: by reference.
    embeddings: model and name of every head that is an embedding in truth.
    copies: the same of those that are stored and do not count.
    """

    models: Mapping[str, Checkpoint]
    embeddings: frozenset[tuple[str, str]]
    copies: tuple[tuple[str, str], ...]


def with_tied_heads(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> TiedHeads:
    """Gives models that tie their heads the heads of the others, or none.

    checkpoints: by reference; those that are not the recipe's are left as they are.
    """
    models = dict(checkpoints)
    deciding = list(dict.fromkeys(_deciding(recipe)))
    copies: list[tuple[str, str]] = []
    for reference in recipe.references:
        stored = checkpoints[reference]
        models[reference] = without_copied_head(stored)
        copies += [(reference, n) for n in stored.tensors if n not in models[reference].tensors]
    wanted: dict[str, TensorInfo] = {}
    for reference in deciding:
        tensors = models[reference].tensors
        for name in heads(_shapes(models[reference])):
            wanted.setdefault(name, tensors[name])
    embeddings = set()
    for reference in deciding:
        found = {
            name: embedding
            for name, head in wanted.items()
            if (embedding := _tied_embedding(models[reference], name, head)) is not None
        }
        if found:
            tensors = {**models[reference].tensors, **found}
            models[reference] = replace(models[reference], tensors=tensors)
            embeddings |= {(reference, name) for name in found}
    return TiedHeads(models, frozenset(embeddings), tuple(copies))


def without_copied_head(model: Checkpoint) -> Checkpoint:
    """A model without the head that it stores, if its config says that it is the embedding."""
    if not is_tied(model.config):
        return model
    shapes = _shapes(model)
    copies = {
        name
        for name in heads(shapes)
        if shapes.get(embedding_of_head(name, shapes, shapes[name][1]) or "") == shapes[name]
    }
    if not copies:
        return model
    tensors = {name: tensor for name, tensor in model.tensors.items() if name not in copies}
    return replace(model, tensors=tensors)


def config_of_output(
    config: dict[str, object], source: Checkpoint, results: Mapping[str, TensorInfo]
) -> tuple[dict[str, object], list[str]]:
    """The output's config, which says that it has a head of its own where it has one and the model
    that the config is from has none.

    config: of the output. source: that model. results: the output's tensors.
    """
    own = without_copied_head(source).tensors
    shapes = {name: result.shape for name, result in results.items()}
    added = [
        name
        for name in heads(shapes)
        if name not in own and embedding_of_head(name, shapes, shapes[name][1]) is not None
    ]
    if not added or is_tied(config) is False:
        return config, []
    return untied(config), [
        f"config.json says {TYING_KEY}: false, since the output has a head of its own: "
        f"{', '.join(added)}"
    ]


def _deciding(recipe: Recipe) -> Iterator[str]:
    """The models that decide whether the output has a head: the one that its config is from, and
    those that the head is merged from."""
    yield recipe.references[0]
    parts = [(recipe.models, recipe.slices)]
    parts += [(module.models, module.slices) for module in recipe.modules]
    for models, slices in parts:
        yield from (entry.model for entry in models)
        if slices:
            yield from (entry.model for entry in slices[-1].sources)


def _tied_embedding(model: Checkpoint, name: str, head: TensorInfo) -> TensorInfo | None:
    """What a model without a head has in its place."""
    if name in model.tensors or is_tied(model.config) is False:
        return None
    shapes = _shapes(model)
    if heads(shapes):  # it has one, of another name
        return None
    embedding = embedding_of_head(name, shapes, head.shape[1])
    return None if embedding is None else model.tensors[embedding]


def _shapes(model: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in model.tensors.items()}
