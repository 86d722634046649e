"""Every kind of suspicion is in docs/inspecting.md, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import lazymerge

PACKAGE = Path(lazymerge.__file__).parent / "inspection"
PAGE = PACKAGE.parent.parent / "docs" / "inspecting.md"

KIND = re.compile(r'Suspicion\(\s*"([a-z0-9-]+)"|^    \(\n        "([a-z-]+)",\n', re.MULTILINE)


def test_kinds() -> None:
    used = {
        first or second
        for path in PACKAGE.rglob("*.py")
        for first, second in KIND.findall(path.read_text(encoding="utf-8"))
    }
    rows = re.findall(r"^\| (`[^|]+) \| [a-z]", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    documented = {kind for row in rows for kind in re.findall(r"`([a-z0-9-]+)`", row)}
    assert len(used) > 50
    # the document's keys have underscores or stand in a table of two columns
    assert used <= documented
    assert {kind for kind in documented if "-" in kind} <= used
