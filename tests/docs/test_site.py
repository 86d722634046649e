"""The documentation site can be built, leads to nothing that is not there, and needs no network."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import lazymerge
import pytest
from document_blocks import shape_of

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
pytest.importorskip("material", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")

ROOT = Path(__file__).resolve().parents[2]

LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}
"""What a browser fetches by itself, by element and attribute."""


@dataclass
class Links(HTMLParser):
    """What a page leads to, loads, and has anchors for."""

    led: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.led.append(values["href"])
        elif tag in LOADED and LOADED[tag] in values and values.get("rel") != "canonical":
            self.loaded.append(values[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Links]:
    """The links of every page, by its name."""
    pages = {}
    for path in sorted(site.glob("*.html")):
        pages[path.name] = Links()
        pages[path.name].feed(path.read_text(encoding="utf-8"))
    return pages


def test_every_document_is_a_page(pages: dict[str, Links]) -> None:
    documents = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    made = {"commands.html", "plans.html", "contributing.html", "changelog.html"}
    assert documents | made | {"404.html"} == set(pages)


def test_links_lead_to_what_is_there(site: Path, pages: dict[str, Links]) -> None:
    wrong = []
    for name, page in pages.items():
        if name == "404.html":  # its links begin at the root of a server
            continue
        for link in page.led + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or not (parts.path or parts.fragment):
                continue
            target = unquote(parts.path) or name
            anchor = unquote(parts.fragment)
            if not (site / target).exists() or (
                anchor and target in pages and anchor not in pages[target].anchors
            ):
                wrong.append(f"{name}: {link}")
    assert not wrong


def test_nothing_is_loaded_from_elsewhere(pages: dict[str, Links]) -> None:
    loaded = {link for page in pages.values() for link in page.loaded}
    assert loaded
    assert [link for link in sorted(loaded) if urlsplit(link).netloc] == []


def test_python_shows_the_public_interface(pages: dict[str, Links]) -> None:
    shown = {
        anchor.rpartition(".")[2]
        for anchor in pages["python.html"].anchors
        if anchor.startswith("lazymerge.")
    }
    assert {*lazymerge.__all__} - {"__version__"} <= shown


def test_python_shows_parameters_and_errors(site: Path) -> None:
    text = (site / "python.html").read_text(encoding="utf-8")
    for word in ("bound of the process", "DoesNotFitError", "measured_bytes", "ValueError"):
        assert word in text


def test_every_command_has_its_options(site: Path) -> None:
    text = (site / "commands.html").read_text(encoding="utf-8")
    for word in ("lazymerge resume", "--recompute", "--max-shard-size", "130"):
        assert word in text


def test_shapes_of_outputs() -> None:
    """What the comparison of shown outputs overlooks, and what not."""
    assert shape_of("done in 2.8 s: 133 tensors") == shape_of("done  in 80 ms: 2 tensors")
    assert shape_of("13.0B parameters") == shape_of("93.2k parameters")
    assert shape_of("6 shards") == shape_of("1 shard")
    assert shape_of("model.layers.0–39") == shape_of("model.layers.0–1")
    assert shape_of("state complete") != shape_of("state unfinished")
    assert shape_of("float16") != shape_of("float32")
