"""What is told of plans whose models lie elsewhere: the network's share of time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from lazymerge.cli.plan_time import time_lines
from lazymerge.engine.plan import Plan
from lazymerge.inspection import measurement
from lazymerge.inspection.estimate import estimate, unique_bytes_read
from lazymerge.inspection.measurement import Measured, MeasuredKind, measure
from lazymerge.inspection.memory_parts import memory_parts
from lazymerge.inspection.network import network_rate

from conftest import needs_kernels, write_checkpoint
from range_server import RangeServer, range_server

pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")

CONFIG = {"model_type": "llama", "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("a", "b"):
        shape = (1500, 1000)
        tensors = {f"model.layers.{n}.w.weight": torch.ones(shape).bfloat16() for n in range(2)}
        write_checkpoint(root / name, tensors, CONFIG)
    return root


@pytest.fixture
def server(models: Path) -> Iterator[RangeServer]:
    with range_server(models) as serving:
        yield serving


def plan(places: dict[str, object], folder: Path, **options: Any) -> Plan:
    """A plan of models a and b. places: the folders or addresses that hold them."""
    entries = [
        {"model": f"{place}/{name}", "parameters": {"weight": 1}} for name, place in places.items()
    ]
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": entries}))
    return lazymerge.plan(path, **options)


def measured(network: float | None) -> Measured:
    kinds = (MeasuredKind("w", 2, 12_000_000, 12e6),)
    return Measured(kinds, 2, 0.0, 3e6, "a file", 6e6, "read", 0.5, network)


def test_the_network_is_a_part_of_its_own(
    models: Path, server: RangeServer, tmp_path: Path
) -> None:
    both = plan({"a": models, "b": server.address}, tmp_path)
    assert unique_bytes_read(both) == both.bytes_to_fetch == 6_000_000
    found = estimate(both, measured(1e6))
    assert found.network_seconds == 6.0
    assert found.reading_seconds == 2.0
    assert found.computing_seconds == 1.0
    writing = both.bytes_written / 6e6
    assert found.least_seconds == 6.0
    assert found.most_seconds == 9.0 + writing
    lines = time_lines(both, found)
    assert lines[0] == "6.0 s to 10 s"
    assert "network 6.0 s: 6.00 MB at 1.00 MB/s (measured on a sample)" in lines


def test_what_was_not_measured_is_told_for_some_rates(server: RangeServer, tmp_path: Path) -> None:
    remote = plan({"a": server.address, "b": server.address}, tmp_path)
    found = estimate(remote, measured(None))
    assert found.network_seconds is None
    assert found.most_seconds is None
    assert found.disk_bytes_read == 0
    lines = time_lines(remote, found)
    assert lines[0].endswith("or as long as the network takes")
    assert any(line.startswith("network: less than a second at 100 MB/s, ") for line in lines)
    assert not any(line.startswith("reading") for line in lines)


@needs_kernels
def test_a_sample_is_fetched_only_if_asked_for(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "COMPUTING_SECONDS", 0.01)
    remote = plan({"a": server.address, "b": server.address}, tmp_path)
    server.log.clear()
    assert measure(remote, tmp_path).network_rate is None
    assert not server.log
    found = measure(remote, tmp_path, touches_files=True)
    assert found.network_rate is not None
    assert server.log


def test_the_rate_is_that_of_all_connections(server: RangeServer, tmp_path: Path) -> None:
    remote = plan({"a": server.address, "b": server.address}, tmp_path)
    server.bytes_per_second = 2e6
    server.latency_seconds = 0.01
    rate = network_rate(remote, seconds=0.4)
    assert rate is not None
    assert 0.5 * 8 * 2e6 < rate < 1.5 * 8 * 2e6


def test_nobody_answers(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazymerge.checkpoint.transport.FIRST_PAUSE_SECONDS", 0.001)
    remote = plan({"a": server.address, "b": server.address}, tmp_path)
    server.broken_from = {"a/model.safetensors": 0, "b/model.safetensors": 0}
    assert network_rate(remote, seconds=0.1) is None


def test_memory_by_workers_is_without_what_is_fetched_ahead(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lazymerge.engine.needed_ranges.CHUNK_BYTES", 1 << 16)
    for module in ("scheduler", "needed_ranges"):
        monkeypatch.setattr(f"lazymerge.engine.{module}.SPAN_BLOCKS", 1)
    remote = plan({"a": server.address, "b": server.address}, tmp_path, workers=2)
    found = memory_parts(remote)
    assert sum(part.size_bytes for part in found.parts) == remote.memory.projected_bytes
    assert remote.memory.window_bytes > 0
    needs = {need.workers: need.projected_bytes for need in found.needs}
    assert needs[1] < needs[2] < needs[4]
    assert needs[2] == remote.memory.projected_bytes - remote.memory.window_bytes
    tight = plan({"a": server.address, "b": server.address}, tmp_path, memory=str(needs[1]))
    assert (tight.memory.workers, tight.memory.window_bytes) == (1, 0)
    assert replace(tight.memory, limit_bytes=0).projected_bytes == needs[1]
