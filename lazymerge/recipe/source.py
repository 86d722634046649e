"""YAML text as a tree of values that remember where they stand.

PyYAML's parser gives events; the tree is composed here rather than by PyYAML, for three reasons:
every key and value keeps its position, duplicate keys are refused instead of silently lost, and
hostile text ends in one clear error. Nesting, scalars and the size of the tree with all its
aliases expanded are bounded while the events arrive: an alias shares its target's node, and the
size it would expand to is added up, never built.

Scalars mean what PyYAML's safe loader (YAML 1.1) says they mean, because that is what
mergekit recipes were written against: `on` is a boolean, `010` is eight, `1e-4` is a string.
Merge keys (`<<`) work as they do there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NoReturn

import yaml

from ..errors import Position, Problem, RecipeError

SIZE_LIMIT_BYTES = 10_000_000
NODE_LIMIT = 100_000
DEPTH_LIMIT = 64
NUMBER_LENGTH_LIMIT = 1_000
"""Characters of an unquoted number: converting a long one takes quadratic time."""

DIRECTIVE_LIMIT = 10
"""Lines that begin with %: libyaml compares each %TAG with all before it, and half a million of
them took minutes. A recipe needs none."""

DOCUMENT_LIMIT = 1_000
"""Merges in one file."""

PROBLEM_LIMIT = 100
"""Problems named before the reading is given up."""

Step = str | int
"""One step into a tree: a mapping's key or a list's index."""


@dataclass(frozen=True, slots=True)
class ScalarNode:
    """A leaf.

    value: str, int, float, bool, None; or bytes, date, datetime, which no recipe has a use for.
    position: where it starts; for an alias, where the alias stands (so for all nodes).
    size: nodes in the tree, aliases expanded (so for all nodes).
    """

    value: object
    position: Position
    size: int = 1


@dataclass(frozen=True, slots=True)
class ListNode:
    """A list of nodes."""

    items: tuple[Node, ...]
    position: Position
    size: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's position and the node it leads to."""

    key_position: Position
    node: Node


@dataclass(frozen=True, slots=True)
class MapNode:
    """A mapping with string keys, in the order of the file; merged keys (`<<`) come first."""

    entries: Mapping[str, Entry]
    position: Position
    size: int


Node = ScalarNode | ListNode | MapNode


@dataclass(frozen=True, slots=True)
class Source:
    """YAML documents that have a mapping at their top each.

    root: the tree of the first. others: those of the documents after it.
    text: the YAML as read.
    path: where it was read from, for messages.
    """

    root: MapNode
    text: str
    path: str
    others: tuple[MapNode, ...] = ()

    @property
    def value(self) -> dict[str, object]:
        """The document as plain dicts, lists and scalars."""
        return {key: _plain(entry.node) for key, entry in self.root.entries.items()}

    def position(self, steps: Sequence[Step]) -> Position:
        """Where the value at the end of `steps` starts; () is the document.

        Raises KeyError or IndexError where there is no such value.
        """
        return self._follow(steps).position

    def key_position(self, steps: Sequence[Step]) -> Position:
        """Where the key that `steps` end in stands; for a list's item, where the item starts.

        Raises KeyError or IndexError where there is no such value.
        """
        parent = self._follow(steps[:-1])
        if isinstance(parent, MapNode) and isinstance(steps[-1], str):
            return parent.entries[steps[-1]].key_position
        return self.position(steps)

    def _follow(self, steps: Sequence[Step]) -> Node:
        node: Node = self.root
        for step in steps:
            if isinstance(node, MapNode) and isinstance(step, str):
                node = node.entries[step].node
            elif isinstance(node, ListNode) and isinstance(step, int):
                node = node.items[step]
            else:
                raise KeyError(step)
        return node


def _plain(node: Node) -> object:
    if isinstance(node, MapNode):
        return {key: _plain(entry.node) for key, entry in node.entries.items()}
    if isinstance(node, ListNode):
        return [_plain(item) for item in node.items]
    return node.value


def quote(text: str) -> str:
    """Text for a message: in quotes, unprintable characters escaped, cut to a readable length."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def decode_source(data: bytes, path: str) -> str:
    """The text of a recipe's bytes.

    Raises RecipeError when they are too many or not UTF-8.
    """
    if len(data) > SIZE_LIMIT_BYTES:
        _refuse_size(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = data[: error.start].decode("utf-8")
        message = f"not UTF-8 text (byte 0x{data[error.start]:02x}); save the recipe as UTF-8"
        raise RecipeError(path, [Problem(message, _position_of(text, len(text)))]) from None


def read_source(text: str, path: str) -> Source:
    """The tree of a YAML text.

    Raises RecipeError when the text is not a single YAML document with a mapping at its top,
    repeats a key, has a key that is not a string, or exceeds one of the limits.
    """
    # A character takes at least one byte, so most texts need no encoding to be measured.
    if len(text) > SIZE_LIMIT_BYTES or len(text.encode("utf-8", "replace")) > SIZE_LIMIT_BYTES:
        _refuse_size(path)
    if forbidden := _FORBIDDEN.search(text):
        message = f"the character {forbidden.group()!a} is not allowed in YAML"
        raise RecipeError(path, [Problem(message, _position_of(text, forbidden.start()))])
    directive = next(islice(_DIRECTIVE.finditer(text), DIRECTIVE_LIMIT, None), None)
    if directive is not None:
        message = f"more than {DIRECTIVE_LIMIT} directives (lines that begin with %); remove them"
        raise RecipeError(path, [Problem(message, _position_of(text, directive.end() - 1))])
    return _Composer(text, path).compose()


_FORBIDDEN = re.compile(
    "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
    # The mark of byte order is allowed where it is one.
    "(?<!\\A\ufeff)"
)

_DIRECTIVE = re.compile("(?:\\A\ufeff?|[\n\r\x85\u2028\u2029])%")
_LINE_END = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def recipe_error(path: str, problems: Sequence[Problem]) -> RecipeError:
    """The error for these problems: each once (aliases repeat them), at most PROBLEM_LIMIT."""
    kept = sorted(dict.fromkeys(problems), key=lambda p: p.position or Position(0, 0))
    if len(kept) > PROBLEM_LIMIT:
        kept = kept[:PROBLEM_LIMIT]
        kept.append(Problem("too many problems; the rest is not shown", kept[-1].position))
    return RecipeError(path, kept)


def _refuse_size(path: str) -> NoReturn:
    raise RecipeError(path, [Problem(f"larger than a recipe may be ({SIZE_LIMIT_BYTES:,} bytes)")])


def _position_of(text: str, offset: int) -> Position:
    line_start = text.rfind("\n", 0, offset) + 1
    return Position(text.count("\n", 0, offset) + 1, offset - line_start + 1)


_LOADER: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS = frozenset(
    _TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "binary")
)


class _FatalError(Exception):
    """The text cannot be read on; the composer's problems say why."""


class _Composer:
    """Builds the tree from the parser's events, one document per composer.

    What does not stop the reading is reported and read over, so that one run names it all.
    """

    def __init__(self, text: str, path: str, loader: type[Any] | None = None) -> None:
        self._text = text
        self._path = path
        self._loader = (loader or _LOADER)(text)
        self._anchors: dict[str, Node | None] = {}  # None: its node is still being composed
        self._size = 0
        self._problems: list[Problem] = []

    def compose(self) -> Source:
        roots: list[MapNode] = []
        try:
            self._next()  # start of the stream
            while not isinstance(self._next(), yaml.StreamEndEvent):
                if len(roots) == DOCUMENT_LIMIT:
                    self._refuse(
                        f"more than {DOCUMENT_LIMIT} documents; no recipe needs so many",
                        roots[-1].position,
                    )
                roots.append(self._document())
            if not roots:
                self._refuse("the recipe is empty", Position(1, 1))
        except yaml.YAMLError as error:
            self._problems.append(self._syntax_problem(error))
        except _FatalError:
            pass
        finally:
            self._loader.dispose()
        if self._problems:
            raise recipe_error(self._path, self._problems)
        return Source(roots[0], self._text, self._path, tuple(roots[1:]))

    def _document(self) -> MapNode:
        self._anchors.clear()  # they end with their document
        event = self._next()
        root = self._node(event, depth=1)
        self._next()  # end of the document
        if not isinstance(root, MapNode):
            if isinstance(root, ScalarNode) and root.value is None:
                self._refuse("the recipe is empty", Position(1, 1))
            kind = "a list" if isinstance(root, ListNode) else "a single value"
            message = f"a recipe is a mapping (merge_method: ..., models: ...), this is {kind}"
            self._refuse(message, root.position)
        return root

    def _next(self) -> Any:
        return self._loader.get_event()

    def _node(self, event: Any, depth: int) -> Node:
        position = _start(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), position)
        self._count(1, position)
        if depth > DEPTH_LIMIT:
            self._refuse(f"nested more than {DEPTH_LIMIT} levels deep", position)
        anchor = event.anchor
        if anchor is not None:
            if anchor in self._anchors:
                self._report(f"the anchor {quote('&' + anchor)} is already in use above", position)
            self._anchors[anchor] = None
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event, position)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._list(event, position, depth)
        else:
            node = self._mapping(event, position, depth)
        if anchor is not None:
            self._anchors[anchor] = node
        return node

    def _alias(self, anchor: str, position: Position) -> Node:
        if anchor not in self._anchors:
            message = f"no anchor {quote('&' + anchor)} stands before this alias of it"
            self._refuse(message, position)
        node = self._anchors[anchor]
        if node is None:
            message = f"the alias {quote('*' + anchor)} stands inside the value it repeats"
            self._refuse(message, position)
        self._count(node.size, position)
        return replace(node, position=position)

    def _count(self, size: int, position: Position) -> None:
        self._size += size
        if self._size > NODE_LIMIT:
            message = f"more than {NODE_LIMIT:,} values, counting what each alias repeats"
            self._refuse(message, position)

    def _scalar(self, event: Any, position: Position) -> ScalarNode:
        tag = self._scalar_tag(event)
        text: str = event.value
        if tag == _TAG + "str":
            return ScalarNode(self._clean(text, position), position)
        if tag not in _SCALAR_TAGS:
            if event.tag is None:  # a lone = or <<, which YAML 1.1 gives tags of their own
                self._report(f"{text} has a special meaning in YAML; put it in quotes", position)
            else:
                self._report_tag(event.tag, position)
            return ScalarNode(text, position)
        if len(text) > NUMBER_LENGTH_LIMIT:
            message = (
                f"a number of more than {NUMBER_LENGTH_LIMIT:,} characters; "
                "put it in quotes if it is text"
            )
            self._report(message, position)
            return ScalarNode(text, position)
        try:
            value = self._loader.construct_object(
                yaml.ScalarNode(tag, text, event.start_mark, event.end_mark)
            )
        except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, AttributeError):
            # The constructors trust the resolver's patterns, which allow 2001-99-99, and an
            # explicit tag (!!int x) skips the patterns.
            kind = tag.removeprefix(_TAG)
            message = f"{quote(text)} cannot be read as {kind}; put it in quotes if it is text"
            self._report(message, position)
            value = text
        return ScalarNode(value, position)

    def _scalar_tag(self, event: Any) -> str:
        if event.tag is not None and event.tag != "!":
            return str(event.tag)
        return str(self._loader.resolve(yaml.ScalarNode, event.value, event.implicit))

    def _clean(self, text: str, position: Position) -> str:
        # PyYAML's own parser, unlike libyaml, lets "\ud800" through: text that no file can hold.
        if _SURROGATE.search(text):
            self._report(f"{text[:80]!a} is not valid Unicode text", position)
        return text

    def _list(self, event: Any, position: Position, depth: int) -> ListNode:
        self._check_tag(event, "seq", position)
        items = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return ListNode(tuple(items), position, 1 + sum(item.size for item in items))

    def _mapping(self, event: Any, position: Position, depth: int) -> MapNode:
        self._check_tag(event, "map", position)
        own: dict[str, Entry] = {}
        merged: dict[str, Entry] = {}
        merge_position: Position | None = None
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key_position = _start(event)
            if isinstance(event, yaml.ScalarEvent) and self._scalar_tag(event) == _TAG + "merge":
                if merge_position:
                    self._report_repetition("<<", merge_position, key_position)
                merge_position = key_position
                self._count(1, key_position)
                merged = self._merged(self._node(self._next(), depth + 1))
                continue
            key = self._key(self._node(event, depth + 1))
            node = self._node(self._next(), depth + 1)
            if key in own:
                self._report_repetition(key, own[key].key_position, key_position)
            else:
                own[key] = Entry(key_position, node)
        # dict.update keeps the place of a merged key and replaces its value, as PyYAML does.
        merged.update(own)
        size = 1 + sum(1 + entry.node.size for entry in merged.values())
        return MapNode(merged, position, size)

    def _key(self, node: Node) -> str:
        if isinstance(node, ScalarNode) and isinstance(node.value, str):
            return node.value
        message = f"a key must be text, this one is {describe(node)}"
        if isinstance(node, ScalarNode):
            message += "; put it in quotes"
        self._report(message, node.position)
        return f"key in line {node.position.line}, column {node.position.column}"

    def _merged(self, node: Node) -> dict[str, Entry]:
        sources = node.items if isinstance(node, ListNode) else (node,)
        entries: dict[str, Entry] = {}
        for source in sources:
            if not isinstance(source, MapNode):
                message = "<< takes a mapping or a list of mappings (usually aliases of them)"
                self._report(message, source.position)
                continue
            for key, entry in source.entries.items():
                # The first of several mappings wins, as the merge key's definition has it.
                # PyYAML 6.0.4, which compares keys by identity, may let the last one win.
                entries.setdefault(key, entry)
        return entries

    def _check_tag(self, event: Any, expected: str, position: Position) -> None:
        if event.tag not in (None, "!", _TAG + expected):
            self._report_tag(event.tag, position)

    def _report_tag(self, tag: str, position: Position) -> None:
        written = "!!" + tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag
        self._report(f"the tag {quote(written)} is not allowed in a recipe", position)

    def _report_repetition(self, key: str, first: Position, second: Position) -> None:
        message = f"the key {quote(key)} stands in this mapping twice, first in line {first.line}"
        self._report(message, second)

    def _report(self, message: str, position: Position) -> None:
        self._problems.append(Problem(message, position))
        if len(self._problems) > PROBLEM_LIMIT:
            raise _FatalError

    def _refuse(self, message: str, position: Position) -> NoReturn:
        self._report(message, position)
        raise _FatalError

    def _syntax_problem(self, error: yaml.YAMLError) -> Problem:
        if not isinstance(error, yaml.MarkedYAMLError):
            return Problem(f"not valid YAML: {error}")
        marks = [mark for mark in (error.problem_mark, error.context_mark) if mark is not None]
        if tab := next(self._indenting_tabs(mark.line for mark in marks), None):
            message = "a tab stands in this line's indentation, where YAML allows only spaces"
            return Problem(message, tab)
        message = f"not valid YAML: {error.problem or error.context}"
        if error.problem and error.context:
            message += f" ({error.context}"
            if error.context_mark is not None and error.context_mark.line != marks[0].line:
                message += f" that starts in line {error.context_mark.line + 1}"
            message += ")"
        position = Position(marks[0].line + 1, marks[0].column + 1) if marks else None
        if position is not None:
            # libyaml places the end of a text without a final newline one line further on.
            lines = _LINE_END.split(self._text)
            position = min(position, Position(len(lines), len(lines[-1]) + 1))
        return Problem(message, position)

    def _indenting_tabs(self, near_lines: Iterator[int]) -> Iterator[Position]:
        lines = self._text.split("\n")
        for near in near_lines:
            # libyaml blames the start of a plain scalar for a tab in the line below it.
            for line in (near, near + 1):
                if line < len(lines):
                    indentation = lines[line][: len(lines[line]) - len(lines[line].lstrip(" \t"))]
                    if "\t" in indentation and len(indentation) < len(lines[line]):
                        yield Position(line + 1, indentation.index("\t") + 1)


def _start(event: Any) -> Position:
    return Position(event.start_mark.line + 1, event.start_mark.column + 1)


def describe(node: Node) -> str:
    """What a node is, for a message: `the text 'a'`, `the number 1`, `a list` …"""
    if isinstance(node, ListNode):
        return "a list"
    if isinstance(node, MapNode):
        return "a mapping"
    value = node.value
    if value is None:
        return "null (no value)"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {number_text(value)}"
    if isinstance(value, str):
        return f"the text {quote(value)}"
    return "binary data" if isinstance(value, bytes) else f"the date {value}"


def number_text(value: int | float) -> str:
    """A number for a message."""
    # A whole number too long for str() (Python refuses beyond 4300 digits) came in as hex.
    if isinstance(value, int) and value.bit_length() > 256:
        return "(very large)"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return repr(value)


def is_null(node: Node) -> bool:
    """Whether nothing is given."""
    return isinstance(node, ScalarNode) and node.value is None
