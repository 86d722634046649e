"""What people see, to the letter, at two widths of the terminal.

LAZYMERGE_UPDATE_GOLDEN=1 pytest tests/cli/test_golden_text.py writes the files in golden/ anew;
read their difference before committing it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import (
    TASK_ARITHMETIC,
    TIES_WITH_GRADIENT_AND_FILTERS,
    Command,
    write_recipe,
)

pytest_plugins = ["command_fixtures"]

GOLDEN = Path(__file__).parent / "golden"
UPDATE_VARIABLE = "LAZYMERGE_UPDATE_GOLDEN"
FREE_BYTES = 123_456_789_012

COMMANDS = {
    "plan_uniform": ["plan", "uniform.yml", "--dry-run", "--workers", "2", "--memory", "1GiB"],
    "plan_layers": ["plan", "layers.yml", "--dry-run", "--workers", "2", "--memory", "1GiB"],
    "methods": ["methods"],
    "methods_ties": ["methods", "ties"],
    "inspect": ["inspect", "one"],
}


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("name", COMMANDS)
def test_text(
    lazymerge: Command, place: Path, monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> None:
    write_recipe(place, TASK_ARITHMETIC, "uniform.yml")
    write_recipe(place, TIES_WITH_GRADIENT_AND_FILTERS, "layers.yml")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=FREE_BYTES))
    answer = lazymerge(*COMMANDS[name])
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(line.rstrip() for line in lines) + "\n"
    # the model's folder differs from run to run, and may be folded over several lines
    text = re.sub(r"^folder( +)\S+\n(?: {8,}\S+\n)*", r"folder\1FOLDER\n", text, flags=re.MULTILINE)
    # what is reserved depends on the versions of Python and torch
    text = re.sub(r"^(memory +)\S+ MiB peak", r"\1NNN MiB peak", text, flags=re.MULTILINE)
    file = GOLDEN / f"{name}_{width}.txt"
    if os.environ.get(UPDATE_VARIABLE):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    expected = {f"{name}_{width}.txt" for name in COMMANDS for width in (80, 140)}
    assert {file.name for file in GOLDEN.iterdir()} == expected
