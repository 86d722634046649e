"""The two streams: results on stdout, progress and messages on stderr.

Both take text as it is: names of models and tensors are other people's, and what looks like
markup in them must neither change what is shown nor break it.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def escaped(text: str) -> str:
    """The text without characters that would steer a terminal; line ends stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else REPLACEMENT for c in text)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console, RenderHook
    from rich.measure import Measurement
    from rich.segment import Segment

    class Escaped:
        """Something to show, its text escaped after it has been laid out."""

        def __init__(self, shown: ConsoleRenderable) -> None:
            self._shown = shown

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for segment in console.render(self._shown, options):
                if segment.control:
                    yield segment
                else:
                    yield Segment(escaped(segment.text), segment.style)

        def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
            return Measurement.get(console, options, self._shown)

    class Escape(RenderHook):
        """Escapes all that is printed."""

        def process_renderables(
            self, renderables: list[ConsoleRenderable]
        ) -> list[ConsoleRenderable]:
            return [Escaped(shown) for shown in renderables]

    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    console.push_render_hook(Escape())
    return console


def results() -> Console:
    """The console for what the user asked for."""
    return _console(stderr=False)


def messages() -> Console:
    """The console for everything else."""
    return _console(stderr=True)


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
