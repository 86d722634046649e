"""The output's tokenizer at plan time: its vocabulary, and its files as they will be written."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.header import garbage_collector_paused
from ..errors import InputError
from ..output.sidecars import sidecar_files
from ..recipe import Recipe
from ..recipe.chat_templates import CHAT_TEMPLATES
from ..recipe.tokenizer import AUTO, BASE, UNION, TokenizerSettings
from ..vocabulary import Alignment, Member, output_vocabulary
from ..vocabulary.files import (
    chat_template_of,
    copied_files,
    tokenizer_files,
    with_chat_template,
)
from ..vocabulary.reading import TOKENIZER_NAME

READING_FACTOR = 7
"""Memory that reading all models' vocabularies takes, by the size of their tokenizer.json: four of
262,144 tokens and 10 MB each took 270 MB."""

MAKING_FACTOR = 15
"""The same of making one, by its size: one of 300,000 tokens and 34 MB took 490 MB."""


LIBRARY_BYTES = 8 << 20
"""Of the tokenizers library, once it is loaded: 6 MiB."""


@dataclass(frozen=True)
class TokenizerPlan:
    """The tokenizer that is written beside the weights.

    folder: of the model whose tokenizer it was made from.
    files: contents, by name.
    alignment: where the rows of its tokens are; None: as in every model.
    notices: what a person should know.
    planning_bytes: upper bound of what reading and making tokenizers has taken for a while.
    """

    folder: str
    files: Mapping[str, bytes]
    alignment: Alignment | None
    notices: tuple[str, ...]
    planning_bytes: int

    @property
    def digests(self) -> dict[str, str]:
        """Hashes of the files, by name."""
        return {
            name: blake2b(content, digest_size=16).hexdigest()
            for name, content in sorted(self.files.items())
        }

    @property
    def held_bytes(self) -> int:
        """What the files occupy, and the library that may have made them."""
        return sum(map(len, self.files.values())) + LIBRARY_BYTES

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = None if self.alignment is None else self.alignment.digest
        return {"folder": self.folder, "files": self.digests, "rows": rows}


def plan_tokenizer(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], paths: Mapping[str, str] | None = None
) -> TokenizerPlan | None:
    """The output's tokenizer; None where the recipe says nothing of it: it is copied then.

    paths: where a model is whose reference says so from another folder.

    Raises:
        InputError: a tokenizer is missing, broken or too large, or the library refuses it.
    """
    if recipe.tokenizer is None and recipe.chat_template is None:
        return None
    with garbage_collector_paused():  # millions of strings in lists, none of them garbage
        plan = _plan_tokenizer(recipe, checkpoints, paths or {})
    _give_back_memory()
    return plan


def _plan_tokenizer(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], paths: Mapping[str, str]
) -> TokenizerPlan:
    first = recipe.main_model
    folders = {reference: checkpoints[reference].folder for reference in recipe.members}
    if recipe.tokenizer is None:
        folder, alignment, planning_bytes = folders[first], None, 0
        files, notices = copied_files(folder, sidecar_files(folder)), []
    else:
        vocabulary = output_vocabulary(
            recipe.tokenizer,
            {
                reference: Member(folders[reference], vocabulary_size(checkpoints[reference]))
                for reference in folders
            },
            _source_folder(recipe.tokenizer, folders, paths),
        )
        folder, alignment = vocabulary.source_folder, vocabulary.alignment
        files, file_notices = tokenizer_files(vocabulary, sidecar_files(folder))
        notices = [*vocabulary.notices, *file_notices]
        if alignment is not None:
            notices += _moved_ids(checkpoints[first].config or {}, alignment.tables[first])
        planning_bytes = READING_FACTOR * _tokenizer_bytes([folder, *folders.values()])
        if vocabulary.start is not None:
            made = len(files[TOKENIZER_NAME])
            planning_bytes = max(planning_bytes, MAKING_FACTOR * made)
    if recipe.chat_template is not None:
        template = _chat_template(recipe.chat_template, folders)
        if template is None:
            notices.append("chat_template: auto finds none in any model; the output has none")
        else:
            files = with_chat_template(files, template)
    return TokenizerPlan(folder, files, alignment, tuple(notices), planning_bytes)


def _moved_ids(config: Mapping[str, object], table: Sequence[int]) -> list[str]:
    """Numbers of tokens in a config (eos_token_id …) that are others in the output; one sentence
    each.

    table: the config's model's row of every row of the output.
    """
    sentences = []
    for key, number in config.items():
        if not key.endswith("_token_id") or type(number) is not int or number < 0:
            continue
        if number < len(table) and table[number] == number:
            continue
        now = next((str(row) for row, old in enumerate(table) if old == number), "absent")
        sentences.append(
            f"config.json says {key}: {number}, which is {now} in the output's vocabulary; correct "
            "it there, and in generation_config.json"
        )
    return sentences


def vocabulary_size(checkpoint: Checkpoint) -> int | None:
    """The number of tokens that a model's config says its embeddings have rows for."""
    config = checkpoint.config or {}
    inner = [config, *(config.get(key) for key in ("text_config", "llm_config"))]
    for each in inner:
        size = each.get("vocab_size") if isinstance(each, dict) else None
        if type(size) is int and size > 0:
            return size
    return None


def _tokenizer_bytes(folders: Sequence[str]) -> int:
    """The size of all tokenizer.json together."""
    size = 0
    for folder in dict.fromkeys(folders):
        with suppress(OSError):
            size += os.stat(os.path.join(folder, TOKENIZER_NAME)).st_size
    return size


def _give_back_memory() -> None:
    """Has the C library return what it keeps of freed memory: some hundred MiB, which the merge's
    buffers would come on top of."""
    with suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _source_folder(
    settings: TokenizerSettings, folders: Mapping[str, str], paths: Mapping[str, str]
) -> str | None:
    """The folder of the model that is named as the tokenizer's source.

    Raises:
        InputError: it is not there.
    """
    source = settings.source
    if source in (UNION, BASE):
        return None
    if source in folders:
        return folders[source]
    path = os.path.realpath(os.path.expanduser(paths.get(source, source)))
    if not os.path.isdir(path):
        raise InputError(
            f"tokenizer source {source!r}: is neither union, base, a model of the recipe nor a "
            "folder. Correct it, or download the model and give its folder."
        )
    return path


def _chat_template(asked: str, folders: Mapping[str, str]) -> str | None:
    """The text of a chat template: the one that most models have, a known one, or as given."""
    if asked != AUTO:
        return CHAT_TEMPLATES.get(asked, asked)
    found = [chat_template_of(folder) for folder in folders.values()]
    counts = Counter(template.strip() for template in found if template)
    return counts.most_common(1)[0][0] if counts else None
