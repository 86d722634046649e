"""What a model's small files say of it: config.json and the tokenizer's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from ..architecture.config import rotary_positions
from ..architecture.roles import Role, tensor_role
from ..architecture.tying import heads, is_tied
from ..checkpoint.tensor import Checkpoint
from ..checkpoint.wording import shown
from ..engine.tokenizer import vocabulary_size
from ..errors import InputError
from ..vocabulary.files import TEMPLATE_KEY, TEMPLATE_NAME, is_tokenizer_file
from ..vocabulary.reading import CONFIG_NAME, has_file, read_mapping
from .parts import whole_number
from .vocabularies import count_tokens

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")

MOST_NAMES = 4


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a model besides its tensors. None: not known.

    architectures, model_type: as config.json says.
    context_length: tokens. rope: rotary positions, in words.
    vocabulary: rows that config.json says. embedding_rows, head_rows: that there are.
    tokens: of the tokenizer.
    tied: what config.json says of the output head.
    has_head: whether one is stored.
    tokenizer_files: names. has_chat_template: whether one of them holds one.
    """

    architectures: tuple[str, ...]
    model_type: str | None
    context_length: int | None
    rope: str | None
    vocabulary: int | None
    embedding_rows: int | None
    head_rows: int | None
    tokens: int | None
    tied: bool | None
    has_head: bool
    tokenizer_files: tuple[str, ...]
    has_chat_template: bool

    @property
    def head(self) -> str:
        """Where the output head is, in words."""
        if self.tied:
            return (
                "stored, and tied: the embedding counts" if self.has_head else "tied: the embedding"
            )
        if self.has_head:
            return "its own"
        return "none stored" + (", and config.json says it is not tied" * (self.tied is False))


def facts_of(checkpoint: Checkpoint) -> Facts:
    """What is known of a model besides its tensors; files that are broken say nothing."""
    config = checkpoint.config or {}
    files = _tokenizer_files(checkpoint)
    matrices = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    stored = heads(matrices)
    return Facts(
        architectures=_architectures(config),
        model_type=_text(config.get("model_type")),
        context_length=whole_number(config, *CONTEXT_KEYS),
        rope=_rope(config),
        vocabulary=vocabulary_size(checkpoint),
        embedding_rows=_rows(matrices),
        head_rows=matrices[stored[0]][0] if stored else None,
        tokens=count_tokens(checkpoint.local_folder),
        tied=is_tied(checkpoint.config),
        has_head=bool(stored),
        tokenizer_files=files,
        has_chat_template=_has_template(checkpoint.local_folder, files),
    )


def _architectures(config: Mapping[str, object]) -> tuple[str, ...]:
    names = config.get("architectures")
    if not isinstance(names, list):
        return ()
    return tuple(_text(name) or shown(name) for name in names[:MOST_NAMES])


def _text(value: object) -> str | None:
    return value[:80] if isinstance(value, str) and value else None


def _rope(config: Mapping[str, object]) -> str | None:
    """Rotary positions in words: theta, and how they are scaled."""
    for each in (config, *(v for v in config.values() if isinstance(v, dict))):
        theta, scaling = rotary_positions(each)
        if theta is None and scaling is None:
            continue
        words = [] if theta is None else [f"theta {_number(theta)}"]
        if isinstance(scaling, dict):
            words += _scaling(scaling)
        return ", ".join(words)
    return None


def _scaling(scaling: Mapping[str, object]) -> list[str]:
    """How rotary positions are scaled, in a word."""
    kind, factor = scaling.get("rope_type"), scaling.get("factor")
    if kind is None:
        return ["several kinds" if any(isinstance(v, dict) for v in scaling.values()) else "scaled"]
    if kind == "default":
        return []
    name = shown(kind).strip('"')
    return [name if factor is None else f"{name} × {_number(factor)}"]


def _number(value: object) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    with suppress(OverflowError, ValueError):
        if is_number:
            return f"{float(value):g}"  # type: ignore[arg-type]
    return shown(value)


def _rows(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Rows of the input embedding; the most, where there are several."""
    rows = [s[0] for n, s in shapes.items() if tensor_role(n, s) is Role.INPUT_EMBEDDING]
    return max(rows, default=None)


def _tokenizer_files(checkpoint: Checkpoint) -> tuple[str, ...]:
    names: list[str] = [] if checkpoint.hub is None else list(checkpoint.hub.sizes)
    with suppress(OSError):
        names += os.listdir(checkpoint.local_folder)
    return tuple(sorted({name for name in names if is_tokenizer_file(name)}))


def _has_template(folder: str, files: tuple[str, ...]) -> bool:
    if TEMPLATE_NAME in files:
        return True
    try:
        return has_file(folder, CONFIG_NAME) and bool(
            read_mapping(folder, CONFIG_NAME).get(TEMPLATE_KEY)
        )
    except InputError:
        return False
