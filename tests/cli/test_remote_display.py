"""What a run shows of the network."""

from __future__ import annotations

import io
from pathlib import Path

import lazymerge
import pytest
import torch
import yaml
from lazymerge.cli.progress import Progress, done_line
from lazymerge.engine.run import run_plan
from rich.console import Console

from conftest import write_checkpoint
from range_server import range_server

pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")


def text(shown: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(shown)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_bytes_fetched_and_their_rate(tmp_path: Path) -> None:
    for name in ("here", "there"):
        tensors = {f"layers.{n}.w": torch.ones(300, 400) for n in range(3)}
        write_checkpoint(tmp_path / "models" / name, tensors)
    with range_server(tmp_path / "models") as server:
        places = (str(tmp_path / "models" / "here"), f"{server.address}/there")
        entries = [{"model": place, "parameters": {"weight": 0.5}} for place in places]
        path = tmp_path / "recipe.yml"
        path.write_text(yaml.safe_dump({"merge_method": "linear", "models": entries}))
        plan = lazymerge.plan(path)
        progress = Progress(plan, None)
        assert progress.network().startswith("0 B of 1.44 MB · ")
        report = run_plan(plan, tmp_path / "out", observer=progress, fsync=False)
    assert report.bytes_fetched == progress.fetched_bytes == plan.bytes_to_fetch == 1_440_000
    assert progress.network().startswith("1.44 MB of 1.44 MB · ")
    assert "network" in text(progress)
    assert "fetched 1.44 MB of 1.44 MB at " in progress.plain()
    assert "1.44 MB fetched, " in text(done_line(plan, report))


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    """How much there is left to fetch is not known."""
    write_checkpoint(tmp_path / "m", {"w": torch.ones(3, 4)})
    path = tmp_path / "recipe.yml"
    entry = {"model": str(tmp_path / "m")}
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [entry]}))
    progress = Progress(lazymerge.plan(path), None)
    assert not progress.is_fetching
    assert "network" not in text(progress)
    assert "fetched" not in progress.plain()
    progress.fetched(1000)
    progress.resumed(0, 0, 1)
    assert " of " not in progress.network()
