"""The small files beside the weights: config, tokenizer and generation settings.

They are copied from the base model (without one, from the first) as data: nothing in them is
interpreted but config.json, no code file is ever copied, and no link is followed out of the model.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..checkpoint import leaves_model
from ..errors import LazymergeError
from .writer import sync_folder

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v[0-9]",  # of mistral: v3, v11, v7m1; nothing longer, for that may be code
    "tokenizer.model.v[0-9][0-9]",
    "tokenizer.model.v[0-9]m[0-9]",
    "tokenizer.model.v[0-9][0-9]m[0-9]",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
"""Patterns of what is copied, relative to the model's folder."""

PIECE_BYTES = 1 << 20
"""Held in memory of a file that is copied."""

MAX_SIDECAR_BYTES = 200_000_000
"""A larger file is no tokenizer. The largest in use (a 256k vocabulary) are below 40 MB."""


def sidecar_files(folder: str) -> tuple[str, ...]:
    """Relative paths of the files that would be copied from a model's folder, sorted.

    Left out without a word are links that leave the model, files too large to be a tokenizer's, and
    names with unprintable characters or bytes that are not UTF-8, which no manifest could hold.
    """
    root = Path(folder)
    found = set()
    for candidate in [*root.glob("*"), *root.glob("1_Pooling/*")]:
        name = candidate.relative_to(root).as_posix()
        if (
            _is_copied(name)
            and candidate.is_file()
            and not leaves_model(root, name)
            and candidate.stat().st_size <= MAX_SIDECAR_BYTES
        ):
            found.add(name)
    return tuple(sorted(found))


def copied_files(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Those of a model's files that would be copied, sorted.

    sizes: of its files, by relative path.
    """
    return tuple(
        sorted(
            name
            for name, size_bytes in sizes.items()
            if _is_copied(name) and size_bytes <= MAX_SIDECAR_BYTES
        )
    )


def _is_copied(name: str) -> bool:
    return name.isprintable() and any(fnmatch.fnmatchcase(name, pattern) for pattern in COPIED)


def copy_sidecars(folder: str, files: Sequence[str], output: Path, *, fsync: bool) -> None:
    """Copies files' contents (never links) from a model's folder into the output.

    fsync: waits until they are on disk.

    Raises:
        OSError: one cannot be written.
        LazymergeError: one cannot be read.
    """
    for name in files:
        target = output / name
        if target.parent.is_symlink():
            target.parent.unlink()
        target.parent.mkdir(exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        partial.unlink(missing_ok=True)  # of a run that was killed; or somebody's link
        with partial.open("xb") as stream:
            for piece in _pieces(Path(folder) / name):
                stream.write(piece)
            if fsync:
                stream.flush()
                os.fsync(stream.fileno())
        partial.rename(target)
        if fsync and target.parent != output:
            sync_folder(target.parent)


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            while piece := stream.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise LazymergeError(
            f"cannot read {path}: {error.strerror}; it is copied into the output: make it readable"
        ) from error
