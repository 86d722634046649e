"""What is written for users is tried: every command, program and recipe of the documentation.

A page's blocks are run in their order, in a folder that has small models under the names that the
pages use (example_models.py). document_blocks.py says how a page speaks to these tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from document_blocks import SHELL, Block, blocks_of, commands_of, difference
from example_models import make_models
from lazymerge import api

from conftest import needs_kernels
from hub_server import hub_server

ROOT = Path(__file__).resolve().parents[2]

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    "installs lazymerge": 4,
    "models that are nowhere": 2,
    "needs Kubernetes": 1,
    "needs SLURM": 2,
    "needs several machines": 7,
    "needs an object store": 1,
    "needs jq": 1,
    "needs systemd": 1,
    "sets up, trains or tests for minutes": 4,
}
"""Reasons not to run a block, and how many blocks have each: a new one is a decision."""

SECONDS = 120
"""After which a block is given up; each takes one or two on an idle machine."""

HUB_MODELS = {"example/base": "base", "example/chat": "chat"}
"""What the stand-in for the Hub has."""


@dataclass(frozen=True)
class Shelves:
    """Where the models lie that every page gets a copy of, and the Hub's address."""

    models: Path
    hub: str


@pytest.fixture(scope="session")
def shelves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelves]:
    """The models, made once."""
    folder = tmp_path_factory.mktemp("documents")
    make_models(folder)
    with hub_server() as hub:
        for repository, name in HUB_MODELS.items():
            hub.publish(repository, folder / "models" / name)
        yield Shelves(folder, hub.endpoint)


class Page:
    """A document's blocks, run in a folder of their own."""

    def __init__(self, document: Path, folder: Path, shelves: Shelves) -> None:
        self.document = document
        self.folder = folder / "page"
        shutil.copytree(shelves.models, self.folder)
        (self.folder / "plans").symlink_to(ROOT / "plans")
        (self.folder / "prepared").symlink_to(Path(__file__).with_name("recipes"))
        programs = folder / "bin"
        programs.mkdir()
        for name, module in (
            ("lazymerge", "lazymerge.cli.main"),
            ("lazymerge-yaml", "lazymerge.cli.mergekit_yaml"),
        ):
            _write_program(
                programs / name,
                f"#!{sys.executable}\nfrom {module} import command\n"
                "if __name__ == '__main__':\n    command()\n",  # as pip makes them
            )
        _write_program(programs / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        interrupted = Path(__file__).with_name("interrupted.py")
        _write_program(
            programs / "interrupted-lazymerge",
            f'#!/bin/sh\nexec {sys.executable} {interrupted} "$@"\n',
        )
        self.environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "100",
            "HF_ENDPOINT": shelves.hub,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def run(self, block: Block) -> None:
        """Runs, writes or reads a block; fails where it is not as the document says."""
        where = f"{self.document.name}:{block.line}"
        if block.comment("not run") is not None:
            return
        first = block.comment("first")
        if first is not None:
            self._shell(first, where)
        if block.file is not None:
            path = self.folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        code = int(block.comment("exit code") or 0)
        if block.language == "console":
            self._console(block, where, code)
        elif block.language in SHELL:
            self._shell(block.tried, where, code)
        elif block.language == "python" and block.file is None:
            self._shell(f"python - <<'PROGRAM'\n{block.text}PROGRAM\n", where, code)
        elif block.comment("planned") is not None:
            return
        elif block.language == "yaml" and "merge_method:" in block.text:
            self._plan(block, where)
        elif block.language == "yaml":
            assert list(yaml.compose_all(block.text)), where
        elif block.language == "json":
            json.loads(block.text)

    def _console(self, block: Block, where: str, code: int) -> None:
        commands = commands_of(block)
        for command in commands:
            text, shown, expected = command.text, command.shown, 0
            if shown.startswith("^C"):
                text = f"interrupted-{text}"
                shown = shown.partition("\n")[2]
                expected = 130
            elif command is commands[-1]:
                expected = code
            output = self._shell(text, where, expected)
            wrong = difference(shown, output)
            assert wrong is None, f"{where}: {command.text}\n{wrong}"

    def _shell(self, text: str, where: str, code: int = 0) -> str:
        """Runs commands with bash; returns what they printed, to either stream."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == code, (
            f"{where}: exit code {done.returncode}, not {code}\n{text}\n{done.stdout}"
        )
        return done.stdout

    def _plan(self, block: Block, where: str) -> None:
        """Plans a recipe: its models are there, and it can be run."""
        if block.file is not None and not block.file.endswith((".yml", ".yaml")):
            return
        path = self.folder / (block.file or "recipe-of-a-block.yml")
        path.write_text(block.text, encoding="utf-8")
        before = Path.cwd()
        os.chdir(self.folder)
        try:
            assert api.plan(path.relative_to(self.folder)).tensors, where
        finally:
            os.chdir(before)


def _write_program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@needs_kernels
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_what_a_document_shows_is_so(document: Path, tmp_path: Path, shelves: Shelves) -> None:
    blocks = blocks_of(document)
    if not any(block.language in SHELL | {"python", "yaml", "json"} for block in blocks):
        return
    page = Page(document, tmp_path, shelves)
    for block in blocks:
        page.run(block)


def test_blocks_that_are_not_run_have_a_known_reason() -> None:
    reasons = Counter(
        reason
        for document in DOCUMENTS
        for block in blocks_of(document)
        if (reason := block.comment("not run")) is not None
    )
    assert reasons == NOT_RUN


def test_most_documents_have_blocks_that_are_run() -> None:
    """Were they no longer found, the tests above would pass."""
    run = sum(
        block.language in SHELL and block.comment("not run") is None
        for document in DOCUMENTS
        for block in blocks_of(document)
    )
    assert run >= 30
