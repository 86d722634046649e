"""Pictures of graphs as text for others' programs: Graphviz (DOT) and Mermaid.

Names are other people's. In DOT they stand in quoted strings, in which a backslash and a quote are
escaped; in Mermaid in quoted labels, in which whatever could end one or begin markup is written as
a character entity. What steers a terminal is replaced in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Role = Literal["model", "read", "reduce", "apply", "write"]

MOST_LABEL_CHARACTERS = 120
"""Of a line of a label; longer ones are cut in the middle."""

SHAPES: dict[Role, str] = {
    "model": "cylinder",
    "read": "box",
    "reduce": "hexagon",
    "apply": "box",
    "write": "note",
}
COLOURS: dict[Role, str] = {
    "model": "#dbe9f6",
    "read": "#eef4fa",
    "reduce": "#fdebd0",
    "apply": "#e3f1e1",
    "write": "#efe6f5",
}


@dataclass(frozen=True, slots=True)
class PictureNode:
    """A box. lines: of its label, the first the most important."""

    role: Role
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PictureEdge:
    """From one node to another that uses its result; both are places in Picture.nodes.

    label: what flows, or "". is_statistic: a finished statistic, not blocks.
    """

    source: int
    target: int
    label: str = ""
    is_statistic: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """A directed graph to be drawn."""

    title: str
    nodes: tuple[PictureNode, ...]
    edges: tuple[PictureEdge, ...]


def to_dot(picture: Picture) -> str:
    """The picture in Graphviz' language.

    Source: https://graphviz.org/doc/info/lang.html
    """
    return "\n".join(_dot_lines(picture)) + "\n"


def _dot_lines(picture: Picture) -> Iterator[str]:
    yield "digraph lazymerge {"
    yield f"  label={_dot_text(picture.title)}; labelloc=t; rankdir=LR;"
    yield '  node [fontname="Helvetica", fontsize=11, style=filled, color="#5b6770"];'
    yield '  edge [fontname="Helvetica", fontsize=9, color="#5b6770"];'
    for number, node in enumerate(picture.nodes):
        shape, colour = SHAPES[node.role], COLOURS[node.role]
        label = _dot_text(*node.lines)
        yield f'  n{number} [label={label}, shape={shape}, fillcolor="{colour}"];'
    for edge in picture.edges:
        attributes = [f"label={_dot_text(edge.label)}"] if edge.label else []
        attributes += ["style=dashed"] if edge.is_statistic else []
        shown = f" [{', '.join(attributes)}]" if attributes else ""
        yield f"  n{edge.source} -> n{edge.target}{shown};"
    yield "}"


def _dot_text(*lines: str) -> str:
    escaped = (_plain(line).replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'


MERMAID_SHAPES: dict[Role, tuple[str, str]] = {
    "model": ("[(", ")]"),
    "read": ("[", "]"),
    "reduce": ("{{", "}}"),
    "apply": ("[", "]"),
    "write": ("[/", "/]"),
}


def to_mermaid(picture: Picture) -> str:
    """The picture as a Mermaid flowchart.

    Source: https://mermaid.js.org/syntax/flowchart.html
    """
    return "\n".join(_mermaid_lines(picture)) + "\n"


def _mermaid_lines(picture: Picture) -> Iterator[str]:
    yield f"%% {_mermaid_text(picture.title)}"
    yield "flowchart LR"
    for number, node in enumerate(picture.nodes):
        opening, closing = MERMAID_SHAPES[node.role]
        label = "<br/>".join(map(_mermaid_text, node.lines))
        yield f'  n{number}{opening}"{label}"{closing}:::{node.role}'
    for edge in picture.edges:
        arrow = "-.->" if edge.is_statistic else "-->"
        label = f'|"{_mermaid_text(edge.label)}"|' if edge.label else ""
        yield f"  n{edge.source} {arrow}{label} n{edge.target}"
    for role, colour in COLOURS.items():
        yield f"  classDef {role} fill:{colour},stroke:#5b6770,color:#1b1f23"


def _mermaid_text(text: str) -> str:
    """Only letters, digits and a few harmless signs stand as they are."""
    return "".join(
        character if character.isalnum() or character in " .,-_:/()+=×–" else f"#{ord(character)};"
        for character in _plain(text)
    )


def _plain(text: str) -> str:
    """Without control characters and line ends, and not too long."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(text) <= MOST_LABEL_CHARACTERS:
        return text
    half = MOST_LABEL_CHARACTERS // 2
    return f"{text[:half]}…{text[-half:]}"
