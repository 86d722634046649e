"""Tokenizers that are not looked into: of SentencePiece, in a file that only its library reads.

Where all models have the very same, there is nothing to match, and it is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoint import leaves_model
from ..checkpoint.regular_file import open_regular_file, read_exactly
from ..errors import InputError
from .reading import (
    SENTENCEPIECE_NAMES,
    TOKENIZER_NAME,
    added_tokens,
    has_file,
)

LIMIT_BYTES = 50_000_000
"""The largest in use have 5 MB."""


def is_one_tokenizer(folders: Sequence[str]) -> bool:
    """Whether all models have one tokenizer of SentencePiece, and no other.

    Raises:
        InputError: a file cannot be read.
    """
    folders = list(dict.fromkeys(folders))
    if any(has_file(folder, TOKENIZER_NAME) for folder in folders):
        return False
    first, *others = (_content(folder) for folder in folders)
    return first is not None and all(other == first for other in others)


def _content(folder: str) -> object:
    """What a tokenizer is made of; None where there is none."""
    name = next((name for name in SENTENCEPIECE_NAMES if has_file(folder, name)), None)
    if name is None:
        return None
    path = Path(folder, name)
    if leaves_model(Path(folder), name):
        raise InputError(
            f"{path}: is a link out of the model's folder. Replace the link with the file if you "
            "trust it."
        )
    with open_regular_file(path) as (descriptor, status):
        if status.st_size > LIMIT_BYTES:
            raise InputError(
                f"{path}: holds {status.st_size:,} bytes; at most {LIMIT_BYTES:,} are read. It is "
                "not what its name says: download it again."
            )
        data = read_exactly(descriptor, status.st_size, path)
    return name, data, added_tokens({}, folder)
