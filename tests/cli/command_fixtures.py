"""The command, and a folder with three models that is the current folder.

A plugin that the tests beside it name: a conftest.py here would hide the one above from imports.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import Answer, Command, run_command, write_models


@pytest.fixture
def lazymerge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """lazymerge("plan", "recipe.yml", "--dry-run") → its Answer."""

    def command(*arguments: object) -> Answer:
        return run_command(monkeypatch, capsys, *arguments)

    monkeypatch.setenv("COLUMNS", "100")
    return command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; it holds the models base, one and two."""
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
