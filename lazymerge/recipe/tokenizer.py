"""The tokenizer part of a recipe: where the vocabulary comes from, and what new rows hold.

tokenizer_source: union            short for   tokenizer: {source: union}

tokenizer:
  source: union                    or base, or a model of the recipe
  tokens:
    <|im_start|>: {source: path/of/model}
    <pad>:        {source: {kind: zero}, force: true}
    <tool>:       {source: {kind: model_token, model: path/of/model, token: <s>}}
  pad_to_multiple_of: 64
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import Position
from .chat_templates import CHAT_TEMPLATES
from .source import Entry, MapNode, Node, ScalarNode, describe, quote

UNION, BASE = "union", "base"
"""What `source` may say besides a model."""

TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
TOKEN_KEYS = ("source", "force")
KINDS = ("zero", "model_token")
KIND_KEYS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}

LARGEST_MULTIPLE = 1 << 20
LARGEST_TOKEN_ID = (1 << 24) - 1

AUTO = "auto"

Report = Callable[[str, Position], None]
Reference = Callable[[Node, str], "str | None"]


@dataclass(frozen=True, slots=True)
class TokenSource:
    """Where a token's row comes from: zeros (no model), the token's own row in a model, or the row
    of another token, by its text or its number."""

    model: str | None = None
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True, slots=True)
class TokenSetting:
    """One entry of `tokens`.

    source: None: as for tokens that are not listed.
    force: for models that have the token, too.
    """

    source: TokenSource | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """What a recipe says of the tokenizer.

    source: "union", "base", or the reference of a model.
    tokens: by text; tokens that the vocabulary lacks are added to it, in this order.
    pad_to_multiple_of: of the embeddings' rows; None: as many as there are tokens.
    """

    source: str = UNION
    tokens: Mapping[str, TokenSetting] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


class TokenizerReader:
    """Reads `tokenizer`, `tokenizer_source` and `chat_template` of a recipe."""

    def __init__(self, root: MapNode, report: Report, reference: Reference) -> None:
        """report: is told what is wrong. reference: reads a model reference."""
        self._root = root
        self._report = report
        self._reference = reference

    def tokenizer(self) -> TokenizerSettings | None:
        """None where the recipe says nothing; what is wrong has been reported."""
        short, long = self._given("tokenizer_source"), self._given("tokenizer")
        if short is not None and long is not None:
            self._report(
                "'tokenizer_source' and 'tokenizer' say the same thing twice; "
                "write 'source' under 'tokenizer'",
                short.key_position,
            )
            return None
        if short is not None:
            source = self._reference(short.node, "tokenizer_source")
            return None if source is None else TokenizerSettings(source)
        return None if long is None else self._settings(long.node)

    def chat_template(self) -> str | None:
        """`auto`, a known name, or Jinja text."""
        entry = self._given("chat_template")
        if entry is None:
            return None
        text = _text(entry.node)
        if text is None:
            self._report(
                f"'chat_template' must be text, not {describe(entry.node)}", entry.node.position
            )
            return None
        if text == AUTO or text in CHAT_TEMPLATES or ("{" in text and len(text) >= 20):
            return text
        known = ", ".join([AUTO, *CHAT_TEMPLATES])
        self._report(
            f"unknown chat_template {quote(text)}; known names: {known}; or give Jinja text",
            entry.node.position,
        )
        return None

    def _given(self, key: str) -> Entry | None:
        entry = self._root.entries.get(key)
        return None if entry is None or _is_null(entry.node) else entry

    def _settings(self, node: Node) -> TokenizerSettings | None:
        if not isinstance(node, MapNode):
            self._report(
                f"'tokenizer' must be a mapping (source: ...), not {describe(node)}; "
                "'tokenizer_source' takes a name alone",
                node.position,
            )
            return None
        self._check_keys(node, TOKENIZER_KEYS, "'tokenizer'")
        source: str | None = UNION
        entry = node.entries.get("source")
        if entry is not None and not _is_null(entry.node):
            source = self._reference(entry.node, "source")
        tokens = self._tokens(node.entries.get("tokens"))
        multiple = self._multiple(node.entries.get("pad_to_multiple_of"))
        return None if source is None else TokenizerSettings(source, tokens, multiple)

    def _multiple(self, entry: Entry | None) -> int | None:
        if entry is None or _is_null(entry.node):
            return None
        number = _whole_number(entry.node)
        if number is not None and 1 <= number <= LARGEST_MULTIPLE:
            return number
        self._report(
            f"'pad_to_multiple_of' must be a whole number from 1 to {LARGEST_MULTIPLE}, "
            f"not {describe(entry.node)}",
            entry.node.position,
        )
        return None

    def _tokens(self, entry: Entry | None) -> dict[str, TokenSetting]:
        if entry is None or _is_null(entry.node):
            return {}
        if not isinstance(entry.node, MapNode):
            self._report(
                f"'tokens' must be a mapping (token: ...), not {describe(entry.node)}",
                entry.node.position,
            )
            return {}
        tokens = {}
        for token, value in entry.node.entries.items():
            if not token:
                self._report("a token must have at least one character", value.key_position)
            tokens[token] = self._token(token, value.node)
        return tokens

    def _token(self, token: str, node: Node) -> TokenSetting:
        if _is_null(node):
            return TokenSetting()
        if not isinstance(node, MapNode):
            self._report(
                f"token {quote(token)} must be a mapping (source: ..., force: ...), "
                f"not {describe(node)}",
                node.position,
            )
            return TokenSetting()
        self._check_keys(node, TOKEN_KEYS, f"token {quote(token)}")
        source_entry, force_entry = node.entries.get("source"), node.entries.get("force")
        source, force = None, False
        if source_entry is not None and not _is_null(source_entry.node):
            source = self._source(token, source_entry.node)
        if force_entry is not None and not _is_null(force_entry.node):
            value = force_entry.node.value if isinstance(force_entry.node, ScalarNode) else None
            if isinstance(value, bool):
                force = value
            else:
                self._report(
                    f"'force' of token {quote(token)} must be true or false, "
                    f"not {describe(force_entry.node)}",
                    force_entry.node.position,
                )
        return TokenSetting(source, force)

    def _source(self, token: str, node: Node) -> TokenSource | None:
        if not isinstance(node, MapNode):
            model = self._reference(node, "source")
            return None if model is None else TokenSource(model)
        kind_entry = node.entries.get("kind")
        kind = None if kind_entry is None else _text(kind_entry.node)
        if kind not in KINDS:
            self._report(
                f"the source of token {quote(token)} must be a model, {{kind: zero}}, or "
                "{kind: model_token, model: ..., token: ...}",
                node.position,
            )
            return None
        self._check_keys(node, KIND_KEYS[kind], f"the source of token {quote(token)}")
        return TokenSource() if kind == "zero" else self._model_token(token, node)

    def _model_token(self, token: str, node: MapNode) -> TokenSource | None:
        given = {key: entry.node for key, entry in node.entries.items() if not _is_null(entry.node)}
        if "model" not in given or ("token" in given) == ("token_id" in given):
            self._report(
                f"the source of token {quote(token)} needs 'model' and one of 'token', 'token_id'",
                node.position,
            )
            return None
        model = self._reference(given["model"], "model")
        if model is None:
            return None
        if "token_id" in given:
            number = _whole_number(given["token_id"])
            if number is not None and 0 <= number <= LARGEST_TOKEN_ID:
                return TokenSource(model, token_id=number)
            self._report(
                f"'token_id' must be a whole number from 0 to {LARGEST_TOKEN_ID}, "
                f"not {describe(given['token_id'])}",
                given["token_id"].position,
            )
            return None
        text = _text(given["token"])
        if text is None:
            self._report(
                f"'token' must be text, not {describe(given['token'])}; put it in quotes",
                given["token"].position,
            )
            return None
        return TokenSource(model, token=text)

    def _check_keys(self, node: MapNode, known: tuple[str, ...], where: str) -> None:
        for key, entry in node.entries.items():
            if key not in known:
                self._report(
                    f"unknown key {quote(key)} in {where}; known here: {', '.join(known)}",
                    entry.key_position,
                )


def referenced_models(settings: TokenizerSettings) -> list[str]:
    """The models that a tokenizer's settings name, each once."""
    named = [] if settings.source in (UNION, BASE) else [settings.source]
    for token in settings.tokens.values():
        if token.source is not None and token.source.model is not None:
            named.append(token.source.model)
    return list(dict.fromkeys(named))


def _is_null(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.value is None


def _text(node: Node) -> str | None:
    value = node.value if isinstance(node, ScalarNode) else None
    return value if isinstance(value, str) and value else None


def _whole_number(node: Node) -> int | None:
    value = node.value if isinstance(node, ScalarNode) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
