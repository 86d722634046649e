"""The output's tokenizer files, as bytes: copied where nothing changes, else made anew.

    tokenizer.json             the source's, without lost tokens, with those added; by the
                               tokenizers library, which is imported here and nowhere else
    tokenizer_config.json, special_tokens_map.json, added_tokens.json
                               where the source has them, with the same changes
    chat_template.jinja        where the source has it, or the recipe gives one

What else belongs to a tokenizer (tokenizer.model, vocab.txt …) is left out when tokens change: it
would say something else than tokenizer.json.
"""

from __future__ import annotations

import fnmatch
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint.wording import quoted
from ..errors import InputError
from .build import OutputVocabulary
from .reading import (
    ADDED_NAME,
    CONFIG_NAME,
    SPECIAL_NAME,
    TOKENIZER_NAME,
    AddedToken,
    Folder,
    has_file,
    model_vocabulary,
    read_file,
    read_mapping,
)

TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE_KEY = "chat_template"

TOKENIZER_FILES = (
    TOKENIZER_NAME,
    CONFIG_NAME,
    SPECIAL_NAME,
    ADDED_NAME,
    TEMPLATE_NAME,
    "tokenizer.model",
    "tokenizer.model.v*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
)
"""Patterns of the files that a tokenizer is made of."""

_REWRITTEN = (TOKENIZER_NAME, CONFIG_NAME, SPECIAL_NAME, ADDED_NAME, TEMPLATE_NAME)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file beside the weights is part of a tokenizer."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in TOKENIZER_FILES)


def copied_files(folder: Folder, names: Iterable[str]) -> dict[str, bytes]:
    """Tokenizer files as they are.

    names: of files in the folder.

    Raises:
        InputError: one cannot be read, or is too large.
    """
    return {name: read_file(folder, name) for name in names if is_tokenizer_file(name)}


def tokenizer_files(
    vocabulary: OutputVocabulary, names: Sequence[str]
) -> tuple[dict[str, bytes], list[str]]:
    """The files of the output's tokenizer, and what a person should know of them.

    names: of the files beside the weights in the source's folder.

    Raises:
        InputError: a file of the source is broken, or the library refuses the tokenizer.
    """
    folder = vocabulary.source_folder
    if vocabulary.start is None:
        return copied_files(folder, names), []
    start = vocabulary.start
    kept = [name for name in names if is_tokenizer_file(name)]
    files = {TOKENIZER_NAME: _tokenizer_json(vocabulary)}
    lost = _Lost(set(vocabulary.numbers))
    added = {
        token: {**asdict(each), "id": vocabulary.numbers[token]}
        for token, each in [*start.added.items(), *((a.content, a) for a in vocabulary.added)]
    }
    if CONFIG_NAME in kept:
        config = lost.without(read_mapping(folder, CONFIG_NAME))
        if isinstance(config.get("added_tokens_decoder"), dict):
            config["added_tokens_decoder"] = _decoder(added)
        files[CONFIG_NAME] = _json_bytes(config)
    if SPECIAL_NAME in kept:
        files[SPECIAL_NAME] = _json_bytes(lost.without(read_mapping(folder, SPECIAL_NAME)))
    if ADDED_NAME in kept:
        numbers = {token: each["id"] for token, each in added.items() if token not in start.own}
        files[ADDED_NAME] = _json_bytes(numbers)
    if TEMPLATE_NAME in kept:
        files[TEMPLATE_NAME] = read_file(folder, TEMPLATE_NAME)
    stale = [name for name in kept if name not in _REWRITTEN]
    notices = []
    if stale:
        notices.append(
            f"{', '.join(stale)} would not know the tokens that are new, or know some that are "
            f"gone: left out, {TOKENIZER_NAME} says it all"
        )
    if lost.found:
        named = ", ".join(f"{key} ({quoted(token)})" for key, token in lost.found.items())
        notices.append(f"special tokens that the output has no row for are left out: {named}")
    return files, notices


def _decoder(added: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Added tokens by number, as tokenizer_config.json lists them."""
    ordered = sorted(added.values(), key=lambda each: int(str(each["id"])))
    return {
        str(each["id"]): {key: value for key, value in each.items() if key != "id"}
        for each in ordered
    }


class _Lost:
    """Mentions of special tokens that the vocabulary has not; a tokenizer would add them again."""

    def __init__(self, known: set[str]) -> None:
        self._known = known
        self.found: dict[str, str] = {}

    def without(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config without them."""
        kept = {}
        for key, value in config.items():
            if key.endswith("special_tokens") and isinstance(value, list):
                value = [each for each in value if not self._is_lost(key, each)]
            elif key.endswith("_token") and self._is_lost(key, value):
                continue
            kept[key] = value
        return kept

    def _is_lost(self, key: str, value: object) -> bool:
        content = value.get("content") if isinstance(value, dict) else value
        if not isinstance(content, str) or not content or content in self._known:
            return False
        self.found[key] = content
        return True


def _tokenizer_json(vocabulary: OutputVocabulary) -> bytes:
    """tokenizer.json of the output's vocabulary."""
    assert vocabulary.start is not None
    path = Path(vocabulary.source_folder, TOKENIZER_NAME)
    document = read_mapping(vocabulary.source_folder, TOKENIZER_NAME)
    own = vocabulary.start.own
    if len(model_vocabulary(document, path)) != len(own):
        _strip(document, own, path)
    document["added_tokens"] = [
        {"id": vocabulary.numbers[token], **asdict(each)}
        for token, each in vocabulary.start.added.items()
    ]
    normalizer = document.get("normalizer")
    document["normalizer"] = None  # a chain of replacements may make a token of gigabytes
    text = json.dumps(document, ensure_ascii=False)
    del document
    result = _with_added(text, vocabulary, path)
    if result.count(_NO_NORMALIZER) != 1:  # at the outermost level: no text holds a line break
        raise InputError(
            f"{path}: the tokenizers library writes no normalizer. Take a version between 0.13 and "
            "0.23 of it."
        )
    said = textwrap.indent(json.dumps(normalizer, indent=2, ensure_ascii=False), "  ").lstrip()
    return result.replace(_NO_NORMALIZER, f'\n  "normalizer": {said},\n').encode("utf-8")


_NO_NORMALIZER = '\n  "normalizer": null,\n'


def _with_added(text: str, vocabulary: OutputVocabulary, path: Path) -> str:
    from tokenizers import AddedToken as LibraryToken
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.add_tokens([_library_token(LibraryToken, each) for each in vocabulary.added])
        numbers: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        result: str = tokenizer.to_str(pretty=True)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of Rust: panics are no Exceptions
        reason = str(error)[:200]
        raise InputError(
            f"{path}: the tokenizers library refuses it: {reason}. Download it again."
        ) from None
    if numbers != vocabulary.numbers:
        differing = next(iter(set(numbers.items()) ^ set(vocabulary.numbers.items())))[0]
        raise InputError(
            f"{path}: the tokenizers library gives token {quoted(differing)} another number than "
            "the file. Save it again, in Python: transformers.AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)."
        )
    return f"{result}\n"


def _library_token(kind: Any, each: AddedToken) -> Any:
    return kind(
        each.content,
        single_word=each.single_word,
        lstrip=each.lstrip,
        rstrip=each.rstrip,
        normalized=each.normalized,
        special=each.special,
    )


def _strip(document: dict[str, Any], own: Mapping[str, int], path: Path) -> None:
    """Takes what is not in `own` out of a tokenizer's model.

    Raises:
        InputError: it is no model that tokens can be taken out of.
    """
    model = document["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][: len(own)]  # numbers are places
        return
    model["vocab"] = dict(own)
    merges = model.get("merges", [])
    if not isinstance(merges, list):
        raise InputError(f"{path}: has `merges` that are no list. Download it again.")
    model["merges"] = [merge for merge in merges if _is_kept(merge, own)]


def _is_kept(merge: object, own: Mapping[str, int]) -> bool:
    """Whether a merge's parts and result are all there; the library judges its form."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return True
    return all(part in own for part in (*parts, "".join(parts)))


def _json_bytes(document: Mapping[str, object]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def chat_template_of(folder: Folder) -> str | None:
    """A model's own chat template; of several, the one named `default`.

    Raises:
        InputError: a file is broken.
    """
    if has_file(folder, TEMPLATE_NAME):
        return _text(read_file(folder, TEMPLATE_NAME), Path(folder, TEMPLATE_NAME))
    if not has_file(folder, CONFIG_NAME):
        return None
    template = read_mapping(folder, CONFIG_NAME).get(TEMPLATE_KEY)
    if isinstance(template, list):  # {"name": …, "template": …}, as older versions write them
        named = [each for each in template if isinstance(each, dict)]
        template = next(
            (each.get("template") for each in named if each.get("name") == "default"), None
        )
    return template if isinstance(template, str) and template else None


def with_chat_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """Tokenizer files that say how a conversation becomes text: in a file of its own, and in
    tokenizer_config.json for older versions of transformers.

    Raises:
        InputError: the config is no mapping.
    """
    config: dict[str, Any] = {}
    if CONFIG_NAME in files:
        parsed = json.loads(files[CONFIG_NAME])
        if not isinstance(parsed, dict):
            raise InputError(f"{CONFIG_NAME}: is not a JSON mapping. Download it again.")
        config = parsed
    config[TEMPLATE_KEY] = template
    return {
        **files,
        CONFIG_NAME: _json_bytes(config),
        TEMPLATE_NAME: template.encode("utf-8"),
    }


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8. Download it again.") from None
