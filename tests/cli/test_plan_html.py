"""lazymerge plan --html: the page is written, with what a finished run measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import TIES_WITH_GRADIENT_AND_FILTERS, Command, write_recipe

pytest_plugins = ["command_fixtures"]


def document_of(page: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="document">(.*?)</script>', page.read_text()
    )
    assert found is not None
    document: dict[str, Any] = json.loads(found[1])
    return document


def test_before_and_after_a_run(lazymerge: Command, place: Path) -> None:
    recipe = write_recipe(place, TIES_WITH_GRADIENT_AND_FILTERS)
    page = place / "plan.html"
    answer = lazymerge("plan", recipe, "--dry-run", "--html", page)
    assert (answer.code, answer.err) == (0, "")
    document = document_of(page)
    assert document["measured"] is None
    assert ["disk", document["facts"][-1][1]] == document["facts"][-1]
    assert "free at the current folder" in document["facts"][-1][1]

    assert lazymerge("run", recipe, "-o", "OUT", "-q").code == 0
    arguments = ("plan", recipe, "-o", "OUT", "--dry-run", "--html", page)
    assert lazymerge(*arguments).code == 0
    measured = document_of(page)["measured"]
    assert measured["bytes_read"][-1] > 0
    assert len(measured["seconds"]) == len(measured["resident_bytes"])

    assert lazymerge(*arguments, "--seed", "7", "--max-shard-size", "9kB").code == 0
    assert document_of(page)["measured"] is None  # that was another merge's run


def test_a_file_that_cannot_be_written(lazymerge: Command, place: Path) -> None:
    recipe = write_recipe(place, TIES_WITH_GRADIENT_AND_FILTERS)
    answer = lazymerge("plan", recipe, "--dry-run", "--html", "absent/plan.html")
    assert answer.code == 2
    assert answer.message() == "cannot write absent/plan.html: No such file or directory"


@pytest.mark.parametrize("option", ["--html"])
def test_it_is_explained(lazymerge: Command, option: str) -> None:
    assert option in lazymerge("plan", "--help").out
