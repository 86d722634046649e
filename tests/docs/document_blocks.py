"""The code blocks of a Markdown document, and what the document says to the tests about them.

A comment right before a block is for the tests, and not shown to readers:

    <!-- not run: REASON -->     it is not run; the reason is one of NOT_RUN in test_documents.py
    <!-- exit code: 2 -->        its last command ends with that, and not with 0
    <!-- first: COMMAND -->      run before it
    <!-- file: NAME -->          it is the content of that file
    <!-- tried with: NEW, for OLD -->     NEW stands in its place when it is tried: smaller, say
    <!-- planned: WHERE -->      it is a recipe that only commands elsewhere can plan

A YAML block whose first line is a comment with nothing but a file's name is that file, too. An
indented block is one of shell commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"(?P<indent> *)(?P<marks>`{3,})\s*(?P<language>\S*)")
COMMENT = re.compile(r"<!-- (?P<key>[a-z ]+): (?P<value>.*?) -->")
FILE_COMMENT = re.compile(r"# ([\w./-]+\.ya?ml)\n")

SHELL = frozenset({"sh", "bash", "console"})
LANGUAGES = SHELL | {"", "text", "python", "yaml", "json", "toml"}


@dataclass(frozen=True)
class Block:
    """A code block.

    language: what its fence says; sh for an indented block.
    line: of its first line, counted from 1.
    comments: key and value of the comments before it, in order.
    """

    language: str
    text: str
    line: int
    comments: tuple[tuple[str, str], ...] = ()

    def comment(self, key: str) -> str | None:
        """What a comment before it says."""
        return dict(self.comments).get(key)

    @property
    def tried(self) -> str:
        """Its text as it is tried."""
        comment = self.comment("tried with")
        if comment is None:
            return self.text
        new, _, old = comment.rpartition(", for ")
        if not old or old not in self.text:
            raise ValueError(f"line {self.line}: {old!r} is not in the block")
        return self.text.replace(old, new)

    @property
    def file(self) -> str | None:
        """The file that it is the content of."""
        match = FILE_COMMENT.match(self.text) if self.language == "yaml" else None
        return self.comment("file") or (match[1] if match else None)


@dataclass(frozen=True)
class Command:
    """A command of a console block, and what the document shows as its output."""

    text: str
    shown: str


def blocks_of(document: Path) -> list[Block]:
    """All blocks of a document, in order.

    Raises:
        ValueError: a fence is not closed, a language is unknown, or commands stand in a block that
            does not say that it is one of commands.
    """
    blocks = list(_blocks(document.read_text(encoding="utf-8").splitlines()))
    for block in blocks:
        if block.language not in LANGUAGES:
            raise ValueError(f"{document.name}:{block.line}: a block of {block.language!r}")
        if block.language in ("", "text") and re.search(
            r"^(\$ |lazymerge[\w-]* (?!\[)[a-z])", block.text, re.MULTILINE
        ):
            raise ValueError(
                f"{document.name}:{block.line}: commands in a block without a language; make it "
                "console or sh, so that they are tried"
            )
    return blocks


def _blocks(lines: list[str]) -> Iterator[Block]:
    comments: list[tuple[str, str]] = []
    number = 0
    while number < len(lines):
        line = lines[number]
        fence = FENCE.match(line)
        if fence is not None:
            stop = next(
                (n for n in range(number + 1, len(lines)) if lines[n].strip() == fence["marks"]),
                None,
            )
            if stop is None:
                raise ValueError(f"line {number + 1}: a block that does not end")
            indent = len(fence["indent"])
            body = [text[indent:] for text in lines[number + 1 : stop]]
            yield Block(fence["language"], _joined(body), number + 2, tuple(comments))
            number = stop
        elif _begins_indented(lines, number):
            stop = number
            while stop < len(lines) and (lines[stop].startswith("    ") or not lines[stop].strip()):
                stop += 1
            body = [text[4:] for text in lines[number:stop]]
            yield Block("sh", _joined(body), number + 1, tuple(comments))
            number = stop - 1
        found = COMMENT.findall(line)
        if found:
            comments += found
        elif line.strip():
            comments = []
        number += 1


def _begins_indented(lines: list[str], number: int) -> bool:
    """Whether an indented code block begins there: after an empty line, and not within a list."""
    if not lines[number].startswith("    ") or not lines[number].strip():
        return False
    if number and lines[number - 1].strip():
        return False
    before = next((text for text in reversed(lines[:number]) if text and text[0] != " "), "")
    return not re.match(r"([-*+]|\d+[.)]) |!!!|\?\?\?|:   ", before)


def _joined(lines: list[str]) -> str:
    return "\n".join(lines).rstrip() + "\n"


def commands_of(block: Block) -> list[Command]:
    """The commands of a console block: what stands behind `$ `, lines ended by \\ continued."""
    commands: list[Command] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            commands.append(Command(line[2:], ""))
        elif not commands:
            raise ValueError(f"line {block.line}: a console block begins with a command: $ ...")
        elif commands[-1].text.endswith("\\") and not commands[-1].shown:
            commands[-1] = Command(f"{commands[-1].text}\n{line}", "")
        else:
            commands[-1] = Command(commands[-1].text, f"{commands[-1].shown}{line}\n")
    return commands


NUMBER = re.compile(
    r"(?<![\w.])[-+]?\d(?:[\d.,:]*\d)?(?:\s?(?:[kKMGTB]i?B?|B|ms|µs|s|min|h|%))?(?![A-Za-z])"
)


def shape_of(output: str) -> list[str]:
    """An output without what varies: numbers with their units, plurals, widths of columns."""
    lines = []
    for line in output.splitlines():
        line = re.sub(r"\x1b\[[\d;]*m", "", line)
        line = re.sub(r"\b[0-9a-f]{12,}\b", "#", line)
        line = NUMBER.sub("#", line)
        line = re.sub(r"(# [a-z]{3,}?)s\b", r"\1", line)
        line = re.sub(r"[─━═╌-]{2,}", "─", line)
        line = re.sub(r"[█▉▊▋▌▍▎▏░▒▓]+", "█", line)
        line = re.sub(r"\s+", " ", line).strip()
        if line:
            lines.append(line)
    return lines


def difference(shown: str, output: str) -> str | None:
    """What of an output is not as it is shown; None: nothing.

    A line of … alone stands for any lines, … at the end of a line for the rest of it.
    """
    expected, got = shape_of(shown), shape_of(output)
    place = 0
    is_gap = False
    for line in expected:
        if line in ("…", "..."):
            is_gap = True
            continue
        found = next(
            (
                n
                for n in range(place, len(got) if is_gap else min(place + 1, len(got)))
                if _is_like(line, got[n])
            ),
            None,
        )
        if found is None:
            seen = got[place] if place < len(got) else "(the end)"
            return f"shown: {line}\nis:    {seen}\n\nthe whole output:\n{output}"
        place, is_gap = found + 1, False
    if place < len(got) and not is_gap:
        return f"not shown: {got[place]}\n\nthe whole output:\n{output}"
    return None


def _is_like(shown: str, line: str) -> bool:
    return line.startswith(shown[:-1].rstrip()) if shown.endswith("…") else line == shown
