"""A model's vocabulary: token → number, as the tokenizer that loads it would say.

    tokenizer.json           the vocabulary of its model (BPE, WordPiece, WordLevel, Unigram), then
                             its added tokens, numbered on from there in their order
    tokenizer_config.json    more added tokens, and special tokens (bos_token …)
    special_tokens_map.json, added_tokens.json
                             the same in older models: where the config lists no added tokens

Files are read as data, by no library; their sizes are bounded before they are parsed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..checkpoint import leaves_model
from ..checkpoint.json_file import parse_json_mapping
from ..checkpoint.regular_file import open_regular_file, read_exactly
from ..checkpoint.wording import quoted, shown
from ..errors import InputError

TOKENIZER_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
SPECIAL_NAME = "special_tokens_map.json"
ADDED_NAME = "added_tokens.json"
SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

LIMIT_BYTES = 100_000_000
"""The largest in use, of 262,144 tokens, have 33 MB."""

LIMIT_VALUES = 5_000_000
"""262,144 tokens and 514,906 merges are 2.1 million."""

SMALL_LIMIT_BYTES = 20_000_000
SMALL_LIMIT_VALUES = 1_000_000

MOST_TOKENS = 1 << 22

_KINDS = ("BPE", "WordPiece", "WordLevel", "Unigram")

_SPECIAL_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

_SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True, eq=False)
class MadeTokenizer(os.PathLike[str]):
    """The tokenizer of a merge that others of the recipe use: files that are in no folder.

    name: of the merge. files: contents, by name.
    origin: the folder of the model whose tokenizer it was made from.
    """

    name: str
    files: Mapping[str, bytes]
    origin: str

    def __fspath__(self) -> str:
        """What messages call its folder."""
        return self.name

    def __str__(self) -> str:
        return self.name


Folder = str | MadeTokenizer
"""Where the files of a tokenizer are."""


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the model's own vocabulary, with the properties that tokenizers know."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


class Numbers:
    """Tokens and their numbers, numbered on as the tokenizers library does."""

    def __init__(self, own: Mapping[str, int]) -> None:
        """own: the vocabulary of the tokenizer's model."""
        self.own = own
        self.added: dict[str, int] = {}
        self._highest_added = -1

    def __contains__(self, token: str) -> bool:
        return token in self.added or token in self.own

    def add(self, token: str) -> None:
        """Adds a token; one that is there keeps its number."""
        if token in self.added or not token:
            return
        number = self.own.get(token)
        if number is None:
            number = len(self.own)
            if self._highest_added >= number or (self.added and not self.own):
                number = self._highest_added + 1
        self.added[token] = number
        self._highest_added = max(self._highest_added, number)

    def all(self) -> dict[str, int]:
        """Every token's number, in ascending order of numbers."""
        numbers = {**self.own, **self.added}
        return dict(sorted(numbers.items(), key=lambda pair: pair[1]))


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokens.

    own: numbers of the tokens that the tokenizer's model has, by token.
    added: the added tokens, in the order in which they were added.
    numbers: of all of them, in ascending order.
    """

    own: Mapping[str, int]
    added: Mapping[str, AddedToken]
    numbers: Mapping[str, int]

    @classmethod
    def of(cls, own: Mapping[str, int], added: Mapping[str, AddedToken]) -> Vocabulary:
        """The vocabulary of a tokenizer's own tokens and added ones."""
        numbers = Numbers(own)
        for token in added:
            numbers.add(token)
        return cls(own, added, numbers.all())

    def below(self, size: int | None) -> Vocabulary:
        """The vocabulary without the tokens whose numbers reach a model's size (None: any)."""
        if size is None or all(number < size for number in self.numbers.values()):
            return self
        return Vocabulary.of(
            {token: number for token, number in self.own.items() if number < size},
            {token: each for token, each in self.added.items() if self.numbers[token] < size},
        )


def read_vocabulary(folder: Folder) -> Vocabulary | None:
    """The vocabulary of a model's folder; None where there is no tokenizer in it.

    Raises:
        InputError: a file is broken, too large or not of a tokenizer, or the vocabulary cannot be
            read without its library (SentencePiece).
    """
    if not has_file(folder, TOKENIZER_NAME):
        _refuse_sentencepiece(folder)
        return None
    document = read_mapping(folder, TOKENIZER_NAME)
    own = model_vocabulary(document, Path(folder, TOKENIZER_NAME))
    added = added_tokens(document, folder)
    del document  # its merges are most of it
    return Vocabulary.of(own, added)


def has_tokenizer_file(folder: Folder) -> bool:
    """Whether a folder holds a tokenizer that can be read."""
    return has_file(folder, TOKENIZER_NAME)


def has_file(folder: Folder, name: str) -> bool:
    """Whether there is such a file in a model's folder."""
    if isinstance(folder, MadeTokenizer):
        return name in folder.files
    return os.path.lexists(os.path.join(folder, name))


def read_mapping(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON file of a model's folder.

    Raises:
        InputError: it is not one, too large, or leads out of the folder.
    """
    is_large = name == TOKENIZER_NAME
    data = read_file(folder, name, LIMIT_BYTES if is_large else SMALL_LIMIT_BYTES)
    limit_values = LIMIT_VALUES if is_large else SMALL_LIMIT_VALUES
    return parse_json_mapping(data, Path(folder, name), limit_values=limit_values)


def read_file(folder: Folder, name: str, limit_bytes: int = LIMIT_BYTES) -> bytes:
    """A file of a model's folder.

    Raises:
        InputError: it cannot be read, is too large, or leads out of the folder.
    """
    if isinstance(folder, MadeTokenizer):
        return folder.files[name]
    path = Path(folder, name)
    if leaves_model(Path(folder), name):
        raise InputError(
            f"{path}: is a link out of the model's folder. Replace the link with the file if you "
            "trust it."
        )
    with open_regular_file(path) as (descriptor, status):
        if status.st_size > limit_bytes:
            raise InputError(
                f"{path}: holds {status.st_size:,} bytes; at most {limit_bytes:,} are read. It is "
                "not what its name says: download it again."
            )
        return read_exactly(descriptor, status.st_size, path)


def model_vocabulary(document: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The vocabulary of a tokenizer's model.

    Raises:
        InputError: it is not one.
    """
    model = document.get("model")
    if not isinstance(model, dict):
        _damaged(path, "has no mapping `model`")
    kind = model.get("type")
    if kind is not None and kind not in _KINDS:
        _damaged(path, f"has a model of type {shown(kind)}, not one of {', '.join(_KINDS)}")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, list):
        return _pieces(vocabulary, path)
    if not isinstance(vocabulary, dict):
        _damaged(path, "has no `vocab` in its `model`")
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < MOST_TOKENS:
            _damaged(path, f"gives token {quoted(token)} no number below {MOST_TOKENS:,}")
    return vocabulary


def _pieces(pieces: list[Any], path: Path) -> dict[str, int]:
    """The vocabulary of a Unigram model: pairs of token and score, numbered in their order."""
    vocabulary: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        if not isinstance(piece, list) or len(piece) != 2 or not isinstance(piece[0], str):
            _damaged(path, f"has an entry {number} in `vocab` that is no pair of token and score")
        vocabulary[piece[0]] = number
    return vocabulary


def added_tokens(document: Mapping[str, Any], folder: Folder) -> dict[str, AddedToken]:
    """The tokens that are added to a tokenizer's model, in the order in which they are.

    document: tokenizer.json.

    Raises:
        InputError: a file is broken.
    """
    path = Path(folder, TOKENIZER_NAME)
    entries = document.get("added_tokens") or []
    if not isinstance(entries, list):
        _damaged(path, "has `added_tokens` that are no list")
    added: dict[str, AddedToken] = {}
    for entry in entries:
        token = _added_token(entry, path)
        added.setdefault(token.content, token)
    for token in _configured_tokens(folder):
        added.setdefault(token.content, token)
    added.pop("", None)  # the tokenizers library passes over it
    return added


def _configured_tokens(folder: Folder) -> Iterable[AddedToken]:
    """What the files beside tokenizer.json add."""
    config = read_mapping(folder, CONFIG_NAME) if has_file(folder, CONFIG_NAME) else {}
    path = Path(folder, CONFIG_NAME)
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        entries = sorted(decoder.items(), key=lambda item: _number(item[0], path))
        yield from (_added_token(entry, path) for _, entry in entries)
        special = config
    else:
        special = dict(config)
        if has_file(folder, SPECIAL_NAME):
            special |= read_mapping(folder, SPECIAL_NAME)
        if has_file(folder, ADDED_NAME):
            numbers = read_mapping(folder, ADDED_NAME)
            path = Path(folder, ADDED_NAME)
            if not all(type(number) is int for number in numbers.values()):
                _damaged(path, "holds a token without a number")
            for token, _ in sorted(numbers.items(), key=lambda item: item[1]):
                yield AddedToken(token)
    yield from _special_tokens(special)


def _special_tokens(config: Mapping[str, Any]) -> Iterable[AddedToken]:
    named = [key for key in config if key.endswith("_token") and key not in _SPECIAL_KEYS]
    lists = [config.get(key) for key in _SPECIAL_LISTS]
    values = [config.get(key) for key in (*_SPECIAL_KEYS, *named)]
    values += [value for each in lists if isinstance(each, dict) for value in each.values()]
    values += [value for each in lists if isinstance(each, list) for value in each]
    for value in values:
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and content:  # add_prefix_token: true is no token
            yield AddedToken(content, special=True, normalized=False)


def _added_token(entry: object, path: Path) -> AddedToken:
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        _damaged(path, "has an added token without text")
    special = entry.get("special", False) is True
    return AddedToken(
        content=entry["content"],
        single_word=entry.get("single_word", False) is True,
        lstrip=entry.get("lstrip", False) is True,
        rstrip=entry.get("rstrip", False) is True,
        normalized=entry.get("normalized", not special) is True,
        special=special,
    )


def _number(text: str, path: Path) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        _damaged(path, f"has an added token whose number is {quoted(text)}")
    return int(text)


def _refuse_sentencepiece(folder: Folder) -> None:
    for name in SENTENCEPIECE_NAMES:
        if has_file(folder, name):
            raise InputError(
                f"{folder}: holds {name} and no {TOKENIZER_NAME}, so its vocabulary cannot be "
                "matched with another's. Convert it once, in Python: transformers.AutoTokenizer"
                ".from_pretrained(FOLDER).save_pretrained(FOLDER) writes it; or leave `tokenizer` "
                "and `tokenizer_source` out, then the files are copied as they are."
            )


def _damaged(path: Path, problem: str) -> NoReturn:
    raise InputError(f"{path}: {problem}. Download it again.")
