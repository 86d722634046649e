"""How mkdocstrings reads this project's docstrings (mkdocs.yml, extensions).

Parameters and fields are described in plain paragraphs, "memory: bound of the process's ...",
often several to a line. Here they become sections that are shown as tables, with their types.
"""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Any

import griffe

ENTRY = re.compile(r"(?:(?<=\. )|^)(?P<names>\w+(?:, \w+)*): ")


class PlainParagraphs(griffe.Extension):
    """Makes sections of paragraphs that describe parameters or fields."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        _rewrite(func, {parameter.name for parameter in func.parameters}, "Args")

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        names = {name for name, member in cls.members.items() if member.is_attribute}
        _rewrite(cls, names, "Attributes")


def _rewrite(described: griffe.Function | griffe.Class, names: Set[str], title: str) -> None:
    if described.docstring is None or not names:
        return
    paragraphs = described.docstring.value.split("\n\n")
    described.docstring.value = "\n\n".join(
        _section(paragraph, names, title) for paragraph in paragraphs
    )


def _section(paragraph: str, names: Set[str], title: str) -> str:
    """The paragraph as a section, if it describes nothing but what has one of these names."""
    if paragraph.startswith(" "):
        return paragraph
    entries: list[tuple[str, str]] = []
    for line in _joined(paragraph):
        matches = [
            match for match in ENTRY.finditer(line) if set(match["names"].split(", ")) <= names
        ]
        if not matches or matches[0].start() != 0:
            return paragraph
        ends = [match.start() for match in matches[1:]] + [len(line)]
        for match, end in zip(matches, ends, strict=True):
            words = line[match.end() : end].strip()
            entries += [(name, words) for name in match["names"].split(", ")]
    return f"{title}:\n" + "\n".join(f"    {name}: {words}" for name, words in entries)


def _joined(paragraph: str) -> list[str]:
    """The lines of a paragraph, those that are indented joined to the one before."""
    lines: list[str] = []
    for line in paragraph.split("\n"):
        if line.startswith(" ") and lines:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return lines
