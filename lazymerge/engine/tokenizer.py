"""The output's tokenizer at plan time: its vocabulary, and its files as they will be written."""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.header import garbage_collector_paused
from ..errors import InputError
from ..output.sidecars import sidecar_files
from ..recipe import Recipe
from ..recipe.chat_templates import CHAT_TEMPLATES
from ..recipe.tokenizer import AUTO, BASE, UNION, TokenizerSettings
from ..vocabulary import Alignment, Folder, MadeTokenizer, Member, output_vocabulary
from ..vocabulary.files import (
    chat_template_of,
    copied_files,
    is_tokenizer_file,
    tokenizer_files,
    with_chat_template,
)
from ..vocabulary.reading import TOKENIZER_NAME

READING_FACTOR = 7
"""Memory that reading all models' vocabularies takes, by the size of their tokenizer.json: four of
262,144 tokens and 10 MB each took 270 MB."""

MAKING_FACTOR = 12.5
MAKING_TOKEN_BYTES = 360
"""The same of making one, by its size and the number of its tokens: BPE of 300,000 tokens and 34 MB
took 490 MB, Unigram of 262,000 and 13 MB took 248 MB, WordPiece of 220,000 and 7 MB took 131 MB."""


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
    merges: of merges that the recipe uses as models, those that ask for a tokenizer, by name.
    """

    folder: str
    files: Mapping[str, bytes]
    alignment: Alignment | None
    notices: tuple[str, ...]
    planning_bytes: int
    merges: Mapping[str, TokenizerPlan] = field(default_factory=dict)

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
        inner = sum(sum(map(len, plan.files.values())) for plan in self.merges.values())
        return sum(map(len, self.files.values())) + inner + LIBRARY_BYTES

    @property
    def is_matched(self) -> bool:
        """Whether rows are matched by token in any merge."""
        return self.alignment is not None or any(plan.is_matched for plan in self.merges.values())

    @property
    def merge_alignments(self) -> dict[str, Alignment]:
        """Where rows are in the merges that the recipe uses as models, by name."""
        return {
            name: plan.alignment for name, plan in self.merges.items() if plan.alignment is not None
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = None if self.alignment is None else self.alignment.digest
        inner = {name: plan.as_dict() for name, plan in self.merges.items()}
        return {
            "folder": self.folder,
            "files": self.digests,
            "rows": rows,
            **({"merges": inner} if inner else {}),
        }


def plan_tokenizer(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], paths: Mapping[str, str] | None = None
) -> TokenizerPlan | None:
    """The output's tokenizer; None where the recipe says nothing of it: it is copied then.

    paths: where a model is whose reference says so from another folder.

    Raises:
        InputError: a tokenizer is missing, broken or too large, or the library refuses it.
    """
    if not recipe.asks_for_tokenizer:
        return None
    with garbage_collector_paused():  # millions of strings in lists, none of them garbage
        plan = _plan_all(recipe, checkpoints, paths or {})
    _give_back_memory()
    return plan


@dataclass(frozen=True)
class _Model:
    """A model as far as tokenizers go; it may be what another merge gives.

    folder: where its tokenizer is. size: as of Member.
    config: of the model that its config is from.
    rows: that model's row for each of its own, -1: none; None: the same.
    """

    folder: Folder
    size: int | None
    config: Mapping[str, object]
    rows: Sequence[int] | None = None


def _plan_all(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], paths: Mapping[str, str]
) -> TokenizerPlan:
    known = {
        reference: _Model(
            _folder_of(checkpoint), vocabulary_size(checkpoint), checkpoint.config or {}
        )
        for reference, checkpoint in checkpoints.items()
    }
    made: dict[str, TokenizerPlan] = {}
    for merge in recipe.merges:
        name, main = str(merge.name), known[merge.references[0]]
        if merge.tokenizer is None and merge.chat_template is None:
            known[name] = main
            continue
        plan = _plan_one(merge, known, paths)
        made[name] = plan
        size, rows = main.size, main.rows
        if plan.alignment is not None:
            size = plan.alignment.padded_rows
            rows = _rows_of(main, plan.alignment.tables[merge.references[0]])
        folder = MadeTokenizer(name, plan.files, plan.folder)
        known[name] = _Model(folder, size, main.config, rows)
    final = _plan_one(recipe, known, paths)
    main = known[recipe.references[0]]
    notices = [f"{name}: {notice}" for name, plan in made.items() for notice in plan.notices]
    notices += final.notices
    rows = main.rows
    if final.alignment is not None:
        rows = _rows_of(main, final.alignment.tables[recipe.references[0]])
    if rows is not None:
        notices += _moved_ids(main.config, rows)
    inner_bytes = sum(sum(map(len, plan.files.values())) for plan in made.values())
    planning_bytes = max(plan.planning_bytes for plan in (*made.values(), final)) + inner_bytes
    return replace(final, notices=tuple(notices), planning_bytes=planning_bytes, merges=made)


def _folder_of(checkpoint: Checkpoint) -> Folder:
    """Where a model's tokenizer is; of one that lies elsewhere, what it is."""
    remote = checkpoint.remote
    if remote is None:
        return checkpoint.folder
    names = [name for name in sidecar_files(remote.folder) if is_tokenizer_file(name)]
    files = {name: Path(remote.folder, name).read_bytes() for name in names}
    return MadeTokenizer(checkpoint.reference, files, checkpoint.folder)


def _rows_of(main: _Model, table: Sequence[int]) -> Sequence[int]:
    """The rows of the model that a config is from, for those of a merge.

    table: the rows of the merge's first model.
    """
    if main.rows is None:
        return table
    before = main.rows
    return [before[row] if 0 <= row < len(before) else -1 for row in table]


def _plan_one(
    recipe: Recipe, known: Mapping[str, _Model], paths: Mapping[str, str]
) -> TokenizerPlan:
    """The tokenizer of one merge.

    known: all models, those that are made before it among them, by reference.
    """
    first = recipe.references[0]
    folders = {reference: known[reference].folder for reference in recipe.members}
    if recipe.tokenizer is None:
        folder, alignment, planning_bytes = folders[first], None, 0
        files, notices = copied_files(folder, _names(folder)), []
    else:
        every = {reference: model.folder for reference, model in known.items()}
        vocabulary = output_vocabulary(
            recipe.tokenizer,
            {reference: Member(folders[reference], known[reference].size) for reference in folders},
            _source_folder(recipe.tokenizer, every, paths),
        )
        folder, alignment = vocabulary.source_folder, vocabulary.alignment
        files, file_notices = tokenizer_files(vocabulary, _names(folder))
        notices = [*vocabulary.notices, *file_notices]
        planning_bytes = READING_FACTOR * _tokenizer_bytes([folder, *folders.values()])
        if vocabulary.start is not None:
            made = int(MAKING_FACTOR * len(files[TOKENIZER_NAME]))
            made += MAKING_TOKEN_BYTES * len(vocabulary.numbers)
            planning_bytes = max(planning_bytes, made)
    if recipe.chat_template is not None:
        template = _chat_template(recipe.chat_template, folders)
        if template is None:
            notices.append("chat_template: auto finds none in any model; the output has none")
        else:
            files = with_chat_template(files, template)
    origin = folder.origin if isinstance(folder, MadeTokenizer) else folder
    return TokenizerPlan(origin, files, alignment, tuple(notices), planning_bytes)


def _names(folder: Folder) -> tuple[str, ...]:
    """The files that would be copied from a folder."""
    return tuple(folder.files) if isinstance(folder, MadeTokenizer) else sidecar_files(folder)


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


def _tokenizer_bytes(folders: Sequence[Folder]) -> int:
    """The size of all tokenizer.json together."""
    size = 0
    for folder in dict.fromkeys(folders):
        if isinstance(folder, MadeTokenizer):
            size += len(folder.files.get(TOKENIZER_NAME, b""))
            continue
        with suppress(OSError):
            size += os.stat(os.path.join(folder, TOKENIZER_NAME)).st_size
    return size


def _give_back_memory() -> None:
    """Has the C library return what it keeps of freed memory: some hundred MiB, which the merge's
    buffers would come on top of."""
    with suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _source_folder(
    settings: TokenizerSettings, folders: Mapping[str, Folder], paths: Mapping[str, str]
) -> Folder | None:
    """The folder of the model that is named as the tokenizer's source.

    folders: of all models of the recipe.

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


def _chat_template(asked: str, folders: Mapping[str, Folder]) -> str | None:
    """The text of a chat template: the one that most models have, a known one, or as given."""
    if asked != AUTO:
        return CHAT_TEMPLATES.get(asked, asked)
    found = [chat_template_of(folder) for folder in folders.values()]
    counts = Counter(template.strip() for template in found if template)
    return counts.most_common(1)[0][0] if counts else None
