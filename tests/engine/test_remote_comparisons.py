"""Comparisons and scans of models at addresses: the same figures as of local copies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
from lazymerge.checkpoint import open_checkpoint
from lazymerge.engine import byte_streams, comparing, fetching
from lazymerge.engine.comparing import run_comparison
from lazymerge.engine.comparison import Comparison, plan_comparison
from lazymerge.engine.memory import CONNECTION_BYTES
from lazymerge.engine.resources import Resources
from lazymerge.errors import DoesNotFitError, InputError, LazymergeError
from lazymerge.inspection.scan import TensorScan, scan_checkpoint

from conftest import write_adapter, write_checkpoint
from range_server import RangeServer, range_server

pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")

SEED = 23
CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "vocab_size": 900}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        f"model.layers.{n}.mlp.up_proj.weight": torch.randn(500, 700, generator=generator)
        for n in range(3)
    }
    embedding = torch.randn(900, 700, generator=generator)
    embedding[3, 4] = float("nan") if seed == SEED else 1.0
    return {
        "model.embed_tokens.weight": embedding.bfloat16(),
        **{name: tensor.half() for name, tensor in layers.items()},
        "model.norm.weight": torch.ones(700),
        "same": torch.arange(200_000),
        "other": torch.arange(300_000) + (seed == SEED),
        "nothing": torch.zeros(0, 7),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders one (in shards) and two, and an adapter."""
    root = tmp_path_factory.mktemp("models")
    write_checkpoint(root / "one", tensors(SEED), CONFIG, shards=3)
    write_checkpoint(root / "two", tensors(SEED + 1), {**CONFIG, "rope_theta": 5.0})
    (root / "two" / "tokenizer_config.json").write_text("{}")
    generator = torch.Generator().manual_seed(SEED)
    target = "model.layers.1.mlp.up_proj"
    factors = {
        f"base_model.model.{target}.lora_A.weight": torch.randn(8, 700, generator=generator),
        f"base_model.model.{target}.lora_B.weight": torch.randn(500, 8, generator=generator),
    }
    write_adapter(root / "adapter", factors)
    return root


@pytest.fixture
def server(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr("lazymerge.checkpoint.transport.FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("lazymerge.engine.needed_ranges.CHUNK_BYTES", 1 << 16)
    with range_server(models) as serving:
        yield serving


def figures(found: Comparison) -> dict[str, Any]:
    """What does not depend on where the models are."""
    plan = found.plan
    return {
        "tensors": {name: tensor.moments for name, tensor in found.tensors.items()},
        "integers": (plan.integers, found.unequal_integers),
        "differences": (plan.shapes, plan.dtypes, plan.config, plan.files),
        "bytes": plan.bytes_read,
    }


def same(one: object, other: object) -> bool:
    return repr(one) == repr(other)  # nan is in it


@pytest.mark.parametrize("first", ["here", "there"])
def test_the_figures_of_local_copies(models: Path, server: RangeServer, first: str) -> None:
    here, there = f"{models}/one", f"{server.address}/one"
    found = lazymerge.diff(
        here if first == "here" else there, f"{server.address}/two", workers=2, memory="1GiB"
    )
    expected = lazymerge.diff(here, models / "two", workers=2, memory="1GiB")
    assert same(figures(found), figures(expected))
    assert [each.name for each in found.plan.files] == ["tokenizer_config.json"]
    assert found.unequal_integers == ("other",)
    assert not expected.plan.remote


def test_every_byte_is_fetched_once(server: RangeServer) -> None:
    plan = plan_comparison(f"{server.address}/one", f"{server.address}/two")
    server.log.clear()
    run_comparison(plan)
    names = {path.rpartition("/")[2] for path, _ in server.log}
    fetched = sum(stop - start for name in names for start, stop in server.ranges(name))
    sizes = sum(checkpoint.size_bytes for checkpoint in plan.checkpoints)
    # between integers and others lie gaps, which are fetched with either
    assert sizes <= plan.bytes_to_fetch <= sizes + (1 << 20)
    assert sizes <= fetched <= 2 * sizes


def test_adapters(models: Path, server: RangeServer) -> None:
    there = f"{server.address}/one+{server.address}/adapter"
    found = lazymerge.diff(there, f"{server.address}/one", workers=2, memory="1GiB")
    expected = lazymerge.diff(f"{models}/one+{models}/adapter", models / "one", workers=2)
    assert same(figures(found), figures(expected))


@pytest.mark.parametrize("workers", [1, 3])
def test_little_memory(
    models: Path, server: RangeServer, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Never is more held than planned, and the figures are the same."""
    for module in ("scheduler", "needed_ranges", "byte_streams"):
        monkeypatch.setattr(f"lazymerge.engine.{module}.SPAN_BLOCKS", 1)
    held: list[int] = []

    class Watched(fetching.Fetcher):
        def _arrived(self, key: fetching.Key) -> None:
            blocks = (os.fstat(each).st_blocks for each in self.descriptors.values())
            held.append(512 * sum(blocks))
            super()._arrived(key)

    monkeypatch.setattr(comparing, "Fetcher", Watched)
    monkeypatch.setattr(byte_streams, "Fetcher", Watched)
    pair = (f"{server.address}/one", f"{server.address}/two")
    roomy = plan_comparison(*pair, Resources(workers=workers, limit_bytes=1 << 30))
    limit = roomy.memory.projected_bytes - roomy.memory.fetch_bytes
    limit += CONNECTION_BYTES + workers * (1 << 20) * 2
    plan = plan_comparison(*pair, Resources(workers=workers, limit_bytes=limit))
    assert plan.memory.fetch_bytes < roomy.memory.fetch_bytes
    found = run_comparison(plan)
    expected = lazymerge.diff(models / "one", models / "two", workers=workers, memory="1GiB")
    assert same(figures(found), figures(expected))
    assert 0 < max(held) <= plan.memory.fetch_bytes - CONNECTION_BYTES


def test_a_limit_that_is_too_small(server: RangeServer) -> None:
    with pytest.raises(DoesNotFitError, match="of inputs that are fetched"):
        lazymerge.diff(f"{server.address}/one", f"{server.address}/two", memory="16MiB")
    with pytest.raises(DoesNotFitError, match="a scan needs"):
        lazymerge.inspect(f"{server.address}/one", scan=True, memory="16MiB")


def test_what_may_pass_is_tried_again(models: Path, server: RangeServer) -> None:
    plan = plan_comparison(f"{server.address}/one", f"{server.address}/two")
    server.answers["two/model.safetensors"] = [500, 429, 503]
    server.cuts["two/model.safetensors"] = [100, 70_000]
    found = run_comparison(plan)
    assert same(figures(found), figures(lazymerge.diff(models / "one", models / "two")))
    assert not server.cuts["two/model.safetensors"]


@pytest.mark.parametrize("command", ["diff", "scan"])
def test_a_file_that_changes(server: RangeServer, command: str) -> None:
    pair = (f"{server.address}/one", f"{server.address}/two")
    plan = plan_comparison(*pair)
    checkpoint = open_checkpoint(pair[0])
    server.etag = '"another"'
    with pytest.raises(InputError, match="has changed since"):
        run_comparison(plan) if command == "diff" else scan_checkpoint(checkpoint)


def test_a_server_without_ranges(models: Path, server: RangeServer) -> None:
    server.has_ranges = False
    with pytest.raises(InputError, match="sends no ranges of files"):
        lazymerge.diff(models / "one", f"{server.address}/two")


def test_what_does_not_pass(models: Path, server: RangeServer) -> None:
    checkpoint = open_checkpoint(f"{server.address}/two")
    server.broken_from["two/model.safetensors"] = 600_000
    with pytest.raises(LazymergeError, match=r"/two/model\.safetensors: .*; tried \d+ times"):
        scan_checkpoint(checkpoint, workers=2)


def by_name(scans: tuple[TensorScan, ...]) -> dict[str, TensorScan]:
    return {scan.name: replace(scan, name="") for scan in scans}


@pytest.mark.parametrize("workers", [1, 3])
def test_scans_are_those_of_local_copies(models: Path, server: RangeServer, workers: int) -> None:
    expected = scan_checkpoint(open_checkpoint(str(models / "one")), workers=workers)
    seen: list[int] = []
    found = lazymerge.inspect(
        f"{server.address}/one",
        scan=True,
        workers=workers,
        scanned=lambda size, name: seen.append(size),
    )
    assert found.scans is not None
    assert by_name(found.scans) == by_name(expected)
    assert by_name(expected)["model.embed_tokens.weight"].nan == 1
    assert sum(seen) == found.checkpoint.size_bytes


def test_a_scan_with_an_adapter(models: Path, server: RangeServer) -> None:
    """Here and there at once."""
    reference = f"{models}/one+{server.address}/adapter"
    found = lazymerge.inspect(reference, scan=True).scans
    expected = lazymerge.inspect(f"{models}/one+{models}/adapter", scan=True).scans
    assert found is not None
    assert expected is not None
    assert by_name(found) == by_name(expected)
