"""docs/methods.md is what the methods declare."""

from __future__ import annotations

from pathlib import Path

import pytest
from lazymerge.methods import METHODS

import make_methods_page


def test_the_page_is_up_to_date() -> None:
    assert make_methods_page.main(["--check"]) == 0


def test_every_departure_is_of_a_method() -> None:
    assert set(make_methods_page.DEPARTURES) <= set(METHODS)


def test_costs_are_kept_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_methods_page, "PAGE", tmp_path / "methods.md")
    assert make_methods_page.main(["--check"]) == 1
    (tmp_path / "costs.md").write_text("| della | 7 |\n")
    assert make_methods_page.main(["--costs", str(tmp_path / "costs.md")]) == 0
    first = (tmp_path / "methods.md").read_text("utf-8")
    assert "| della | 7 |" in first
    assert make_methods_page.main([]) == 0
    assert (tmp_path / "methods.md").read_text("utf-8") == first
    assert make_methods_page.main(["--check"]) == 0
    for name in METHODS:
        assert f"\n## {name}\n" in first
