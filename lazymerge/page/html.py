"""One page in one file: nothing is fetched, and nothing in it runs but the scripts of this package.

    <meta Content-Security-Policy>   default-src 'none'; each script and style named by its hash
    <script type=application/json>   the data, with every < > & written as an escape
    <script>                         vendored libraries, then the page's own

Text of models and recipes reaches the page as data alone, and the scripts show it with textContent.
"""

from __future__ import annotations

import html
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.resources import files

from .columns import packed_text

D3 = (
    "color",
    "dispatch",
    "drag",
    "ease",
    "interpolate",
    "selection",
    "timer",
    "transition",
    "zoom",
)
"""Parts of D3 that zooming needs, in an order in which each finds what it uses."""

VENDORED = {
    "uPlot": ("uPlot.iife.min.js", "uPlot.LICENSE.txt"),
    "dagre": ("dagre.min.js", "dagre.LICENSE.txt"),
    **{f"d3-{part}": (f"d3-{part}.min.js", f"d3-{part}.LICENSE.txt") for part in D3},
}
"""Script and licence of each library; their versions are in vendor/README.md."""


def json_for_html(document: object) -> str:
    """JSON that can stand in a script element: it holds no <, > or &, and only ASCII.

    Raises:
        ValueError: a number in it is not finite.
    """
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


PAGE_BEGINS = (b'<!DOCTYPE html>\n<html lang="en">\n<head>\n', b"lazymerge")
"""By which a page that is replaced is known: what it begins with, and what its title holds."""


def assemble(
    title: str,
    document: Mapping[str, object],
    packed: object,
    *,
    libraries: Sequence[str],
    scripts: Sequence[str],
) -> str:
    """A page.

    title: of the window; anything.
    document: what is needed at once. packed: what is unpacked after the first sight.
    libraries: names of VENDORED. scripts: file names in assets/, in the order they run.
    """
    code = [*(_vendored(VENDORED[name][0]) for name in libraries)]
    code.append("".join(_asset(script) for script in scripts))
    style = _vendored("uPlot.min.css") + _asset("page.css")
    policy = "; ".join(
        [
            "default-src 'none'",
            "script-src " + " ".join(_hash_source(text) for text in code),
            f"style-src {_hash_source(style)}",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    licences = {name: _vendored(VENDORED[name][1]) for name in libraries}
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        '<meta name="color-scheme" content="light dark">\n',
        f"<title>{html.escape(_printable(title))}</title>\n",
        f"<style>{style}</style>\n</head>\n<body>\n",
        '<main id="page"><p id="opening">Opening …</p></main>\n',
        "<noscript><p>This page draws its contents with scripts that are inside it; "
        "allow them to see it.</p></noscript>\n",
        f'<script type="application/json" id="document">{json_for_html(document)}</script>\n',
        f'<script type="application/json" id="licences">{json_for_html(licences)}</script>\n',
        f'<script type="text/plain" id="packed">{packed_text(packed)}</script>\n',
        *(f"<script>{text}</script>\n" for text in code),
        "</body>\n</html>\n",
    ]
    return "".join(parts)


def _printable(text: str) -> str:
    """The text with what UTF-8 cannot say, and control characters, as question marks."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _hash_source(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


@cache
def _vendored(name: str) -> str:
    """A vendored file, without the comment that would make a debugger fetch its source map."""
    lines = _text("vendor", name).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("//# sourceMappingURL="))


@cache
def _asset(name: str) -> str:
    return _text("assets", name)


def _text(folder: str, name: str) -> str:
    return (files(__package__) / folder / name).read_text(encoding="utf-8")
