"""The output's vocabulary, and where every model has the rows of its tokens.

    base     the base model's tokens
    union    these, then what other models have besides, in the order of the recipe: first tokens
             of their tokenizers' own vocabularies, then added tokens
    a model  that model's tokens

Tokens that the recipe lists and nobody has come last. Tokens whose number is not below the
`vocab_size` of their model's config have no row and do not count.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from hashlib import blake2b

from ..checkpoint.wording import quoted
from ..errors import InputError
from ..recipe.tokenizer import BASE, UNION, TokenizerSettings, TokenSetting
from .reading import AddedToken, Folder, Numbers, Vocabulary, has_tokenizer_file, read_vocabulary
from .sentencepiece import is_one_tokenizer

ABSENT = -1


@dataclass(frozen=True, slots=True)
class Member:
    """A model whose embeddings take part.

    folder: where it is. size: rows that its config says it has; None: it does not say.
    """

    folder: Folder
    size: int | None


@dataclass(frozen=True, slots=True)
class ChosenRow:
    """What the recipe says of a token's row.

    token: its text. force: for models that have it, too.
    is_chosen: whether the recipe says where it comes from.
    model, row: from there; without a model: zeros.
    """

    token: str
    force: bool
    is_chosen: bool
    model: str | None = None
    row: int = ABSENT


@dataclass(frozen=True, slots=True)
class Alignment:
    """Where the rows of the output's tokens are.

    rows: of the output, a token each.
    padded_rows: with those that belong to no token.
    tables: by model, its row for every row of the output; -1: it has none.
    sizes: by model, rows of its tokens, from 0.
    declared: by model, rows that its config says it has; None: it does not say.
    chosen: rows that the recipe says something of.
    """

    rows: int
    padded_rows: int
    tables: Mapping[str, array[int]]
    sizes: Mapping[str, int]
    declared: Mapping[str, int | None]
    chosen: Mapping[int, ChosenRow]

    @property
    def digest(self) -> str:
        """Hash of all of it."""
        state = blake2b(digest_size=16)
        said = sorted((row, *astuple(chosen)) for row, chosen in self.chosen.items())
        sizes = [(model, self.sizes[model], len(self.tables[model])) for model in self.tables]
        state.update(
            repr((self.rows, self.padded_rows, sizes, said)).encode("utf-8", "surrogatepass")
        )
        for table in self.tables.values():
            state.update(table.tobytes())
        return state.hexdigest()


@dataclass(frozen=True, slots=True)
class OutputVocabulary:
    """The output's vocabulary.

    alignment: None where all models have one tokenizer that is not looked into.
    source_folder: whose tokenizer it was made from.
    start: what of that tokenizer is left; added: what has been added to it, in order. None, none:
        it is taken as it is.
    numbers: by token.
    notices: what a person should know.
    """

    alignment: Alignment | None
    source_folder: Folder
    start: Vocabulary | None
    added: tuple[AddedToken, ...]
    numbers: Mapping[str, int]
    notices: tuple[str, ...]


def output_vocabulary(
    settings: TokenizerSettings,
    members: Mapping[str, Member],
    source_folder: Folder | None = None,
) -> OutputVocabulary:
    """Works out the output's vocabulary.

    members: by reference; the one whose vocabulary is `base` first.
    source_folder: of the model that `source` names.

    Raises:
        InputError: a tokenizer is missing or cannot be read, or a token's source does not exist.
    """
    return _Builder(settings, members, source_folder).build()


class _Builder:
    def __init__(
        self,
        settings: TokenizerSettings,
        members: Mapping[str, Member],
        source_folder: Folder | None,
    ) -> None:
        self.settings = settings
        self.members = members
        self.first = next(iter(members))
        self.source_folder = source_folder or members[self.first].folder
        self.notices: list[str] = []

    def build(self) -> OutputVocabulary:
        folders = [member.folder for member in self.members.values()]
        plain = not self.settings.tokens and self.settings.pad_to_multiple_of is None
        if plain and is_one_tokenizer([self.source_folder, *folders]):
            return OutputVocabulary(None, self.source_folder, None, (), {}, ())
        vocabularies = self._read()
        start, added = self._start(vocabularies), []
        unstripped = start
        if self.settings.source in (UNION, BASE):
            start = start.below(self.members[self.first].size)
            if start is not unstripped:
                lost = [token for token in unstripped.numbers if token not in start.numbers]
                self.notices.append(
                    f"the tokenizer of {self.first} has {_tokens(lost)} without a row in the "
                    "model; the output's has not"
                )
        numbers = Numbers(start.own)
        for token in start.added:
            numbers.add(token)
        wanted = self._union(vocabularies) if self.settings.source == UNION else []
        wanted += [AddedToken(token) for token in self.settings.tokens]
        for each in wanted:
            # special ones too that it has as ordinary pieces: in a text they would not be found
            is_piece = each.content in numbers and each.content not in numbers.added
            if not each.content:  # the tokenizers library adds no token without text
                continue
            if each.content not in numbers or (each.special and is_piece):
                numbers.add(each.content)
                added.append(each)
        result = numbers.all()
        is_changed = bool(added) or start is not unstripped
        return OutputVocabulary(
            self._alignment(result, vocabularies),
            self.source_folder,
            start if is_changed else None,
            tuple(added),
            result,
            tuple(self.notices),
        )

    def _read(self) -> dict[str, Vocabulary]:
        """By model; those without a tokenizer have that of the first."""
        by_folder: dict[Folder, Vocabulary | None] = {}
        for member in self.members.values():
            if member.folder not in by_folder:
                by_folder[member.folder] = read_vocabulary(member.folder)
        first = by_folder[self.members[self.first].folder]
        if first is None:
            raise InputError(
                f"model {self.first}: has no tokenizer ({self.members[self.first].folder}), and "
                "the recipe asks for one. Put its tokenizer.json there, or leave `tokenizer` out."
            )
        vocabularies = {}
        for model, member in self.members.items():
            found = by_folder[member.folder]
            if found is None:
                self.notices.append(
                    f"{model} has no tokenizer; its vocabulary is taken for that of {self.first}"
                )
            vocabularies[model] = found or first
        return vocabularies

    def _start(self, vocabularies: Mapping[str, Vocabulary]) -> Vocabulary:
        for model, member in self.members.items():
            has_own = has_tokenizer_file(member.folder)
            if member.folder == self.source_folder and has_own:
                return vocabularies[model]
        found = read_vocabulary(self.source_folder)
        if found is None:
            raise InputError(
                f"{self.source_folder}: has no tokenizer, and the recipe names it as the source "
                "of one. Name a folder that holds tokenizer.json."
            )
        return found

    def _union(self, vocabularies: Mapping[str, Vocabulary]) -> list[AddedToken]:
        """All tokens of all models: those of their own vocabularies, then added ones."""
        special: dict[str, AddedToken] = {}
        differing: dict[str, None] = {}
        for model, vocabulary in vocabularies.items():
            for token, each in vocabulary.below(self.members[model].size).added.items():
                if special.setdefault(token, each) != each:
                    differing[token] = None
        if differing:
            self.notices.append(
                f"models have {_tokens(list(differing))} with different properties; those of the "
                "first count"
            )
        plain: dict[str, None] = {}
        for model, vocabulary in vocabularies.items():
            size = self.members[model].size
            ordered = sorted(vocabulary.own.items(), key=lambda pair: pair[1])
            for token, number in ordered:
                if token not in special and (size is None or number < size):
                    plain[token] = None
        return [*map(AddedToken, plain), *special.values()]

    def _alignment(
        self, numbers: Mapping[str, int], vocabularies: Mapping[str, Vocabulary]
    ) -> Alignment:
        rows = max(numbers.values(), default=-1) + 1
        multiple = self.settings.pad_to_multiple_of or 1
        tables = {}
        for model, vocabulary in vocabularies.items():
            size = self.members[model].size
            table = array("i", [ABSENT]) * rows
            for token, row in numbers.items():
                number = vocabulary.numbers.get(token, ABSENT)
                if size is None or number < size:
                    table[row] = number
            tables[model] = table
        chosen = {
            numbers[token]: self._chosen(token, numbers[token], setting, tables, vocabularies)
            for token, setting in self.settings.tokens.items()
        }
        self._note_absent(numbers, tables, chosen)
        return Alignment(
            rows=rows,
            padded_rows=-(-rows // multiple) * multiple,
            tables=tables,
            sizes={
                model: max(vocabulary.numbers.values(), default=-1) + 1
                for model, vocabulary in vocabularies.items()
            },
            declared={model: member.size for model, member in self.members.items()},
            chosen=chosen,
        )

    def _chosen(
        self,
        token: str,
        row: int,
        setting: TokenSetting,
        tables: Mapping[str, array[int]],
        vocabularies: Mapping[str, Vocabulary],
    ) -> ChosenRow:
        source = setting.source
        if source is None:
            return ChosenRow(token, setting.force, False)
        if source.model is None:
            return ChosenRow(token, setting.force, True)
        if source.model not in self.members:
            raise InputError(
                f"token {quoted(token)}: its source {source.model} is not a model that is merged. "
                f"Name one of {', '.join(self.members)}, as the recipe writes it."
            )
        if source.token is not None:
            number = vocabularies[source.model].numbers.get(source.token, ABSENT)
            if number < 0:
                raise InputError(
                    f"token {quoted(token)}: {source.model} has no token {quoted(source.token)}. "
                    "Name one that it has."
                )
        elif source.token_id is not None:
            number = source.token_id
        else:
            number = tables[source.model][row]
            if number < 0 and (setting.force or any(table[row] < 0 for table in tables.values())):
                raise InputError(
                    f"token {quoted(token)}: its source {source.model} has no such token. "
                    "Name a model that has it, or {kind: zero}, or {kind: model_token, ...}."
                )
        return ChosenRow(token, setting.force, True, source.model, number)

    def _note_absent(
        self,
        numbers: Mapping[str, int],
        tables: Mapping[str, array[int]],
        chosen: Mapping[int, ChosenRow],
    ) -> None:
        absent = [
            token
            for token, row in numbers.items()
            if all(table[row] < 0 for table in tables.values())
            and not (row in chosen and chosen[row].is_chosen)
        ]
        if absent:
            self.notices.append(f"no model has a row for {_tokens(absent)}; theirs hold zeros")
        gaps = max(numbers.values(), default=-1) + 1 - len(set(numbers.values()))
        if gaps:
            self.notices.append(f"{gaps} rows of the vocabulary belong to no token; zeros")


def _tokens(tokens: list[str], most: int = 3) -> str:
    shown = ", ".join(map(quoted, tokens[:most]))
    return shown if len(tokens) <= most else f"{shown} and {len(tokens) - most} more tokens"
