"""Tokenizers that are not looked into: of SentencePiece, in a file that only its library reads.

Where all models have the very same, there is nothing to match, and it is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

from .reading import (
    SENTENCEPIECE_NAMES,
    TOKENIZER_NAME,
    Folder,
    added_tokens,
    has_file,
    read_file,
)

LIMIT_BYTES = 50_000_000
"""The largest in use have 5 MB."""


def is_one_tokenizer(folders: Sequence[Folder]) -> bool:
    """Whether all models have one tokenizer of SentencePiece, and no other.

    Raises:
        InputError: a file cannot be read.
    """
    folders = list(dict.fromkeys(folders))
    if any(has_file(folder, TOKENIZER_NAME) for folder in folders):
        return False
    first, *others = (_content(folder) for folder in folders)
    return first is not None and all(other == first for other in others)


def _content(folder: Folder) -> object:
    """What a tokenizer is made of; None where there is none."""
    name = next((name for name in SENTENCEPIECE_NAMES if has_file(folder, name)), None)
    if name is None:
        return None
    return name, read_file(folder, name, LIMIT_BYTES), added_tokens({}, folder)
