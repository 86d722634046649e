"""Output heads that are the input embedding once more: `tie_word_embeddings`.

    config says     file has       the model's head is
    tied, nothing   no head        its embedding
    tied            both           its embedding; the stored head is a copy of it
    untied          a head         that head
    untied          no head        not known: an export without it

A config within the config (`text_config`) counts as the config does; where they contradict each
other, nothing is said.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from .config import TEXT_CONFIGS
from .roles import Role, tensor_role

TYING_KEY = "tie_word_embeddings"

_NEVER_TIED = ("embed_tokens_per_layer.weight", "token_embedding.weight")
"""Ends of names of embeddings that are no head's: gemma 3n's of its layers, clip's of its text."""

_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Ends of names of copies of `shared.weight` (t5, bart); without it the decoder's is the head's."""

_HEADS: Mapping[str, str] = {
    "model.embed_tokens.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "lm_head.weight",
    "language_model.model.embed_tokens.weight": "language_model.lm_head.weight",
    "transformer.wte.weight": "lm_head.weight",
    "transformer.word_embeddings.weight": "lm_head.weight",
    "gpt_neox.embed_in.weight": "embed_out.weight",
}
"""What models call the head that they do not store."""

Shape = tuple[int, ...]


def is_tied(config: Mapping[str, object] | None) -> bool | None:
    """What a config says of the output head; None: nothing, or both."""
    if config is None:
        return None
    said = {
        inner[TYING_KEY] for inner in _configs(config) if isinstance(inner.get(TYING_KEY), bool)
    }
    return bool(said.pop()) if len(said) == 1 else None


def untied(config: Mapping[str, object]) -> dict[str, object]:
    """A copy of a config that says that the model has a head of its own."""
    changed = copy.deepcopy(dict(config))
    for inner in _configs(changed):
        inner[TYING_KEY] = False
    return changed


def is_head(name: str) -> bool:
    """Whether a name is that of an output head's matrix."""
    return tensor_role(name, (1, 1)) is Role.OUTPUT_HEAD


def heads(shapes: Mapping[str, Shape]) -> list[str]:
    """Names of output heads that an embedding might take the place of: matrices."""
    return [name for name, shape in shapes.items() if len(shape) == 2 and is_head(name)]


def embedding_of_head(
    head: str, shapes: Mapping[str, Shape], width: int | None = None
) -> str | None:
    """The input embedding that a model with tied embeddings has for its head.

    head: its name. shapes: of the model's tensors. width: the head's columns; None: not known.

    Returns None where there is none, or where it is not clear which.
    """
    found = [
        name
        for name, shape in shapes.items()
        if len(shape) == 2
        and width in (None, shape[1])
        and not name.endswith(_NEVER_TIED)
        and tensor_role(name, shape) is Role.INPUT_EMBEDDING
    ]
    if len(found) > 1:
        shared = [name for name in found if not name.endswith(_COPIES)]
        found = shared or [name for name in found if name.endswith(_COPIES[1])]
    if len(found) > 1:
        common = {name: _common_words(name, head) for name in found}
        found = [name for name in found if common[name] == max(common.values())]
    return found[0] if len(found) == 1 else None


def head_of_embedding(embedding: str, shapes: Mapping[str, Shape]) -> str | None:
    """The head that is tied to an input embedding, stored or not; None: it has none, or one of
    unknown name. shapes: of the model's tensors."""
    stored = [head for head in heads(shapes) if embedding_of_head(head, shapes) == embedding]
    return stored[0] if stored else _HEADS.get(embedding)


def _configs(config: Mapping[str, object]) -> list[dict[str, object]]:
    inner = [config, *(config.get(key) for key in TEXT_CONFIGS)]
    return [each for each in inner if isinstance(each, dict)]


def _common_words(name: str, other: str) -> int:
    common = 0
    for word, another in zip(name.split("."), other.split("."), strict=False):
        if word != another:
            break
        common += 1
    return common
