"""Merges of models at addresses with a cache, and of servers that send whole files only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import lazymerge
import pytest
import torch
import yaml
from lazymerge.checkpoint.header import FIRST_READ_BYTES
from lazymerge.engine.plan import Plan
from lazymerge.engine.report import Silent
from lazymerge.engine.run import run_plan
from lazymerge.errors import DoesNotFitError, InputError, LazymergeError
from lazymerge.inspection.plan_schema import plan_schema

from conftest import write_checkpoint
from range_server import RangeServer, range_server

pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")

NAMES = ("base", "a", "b")


def write_models(root: Path, seed: int = 0) -> None:
    for number, name in enumerate(NAMES, seed):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            f"model.layers.{layer}.w.weight": torch.randn(300, 900, generator=generator).bfloat16()
            for layer in range(4)
        }
        write_checkpoint(root / name, tensors, {"model_type": "llama"})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    key = tmp_path / "ranges.key"
    monkeypatch.setattr("lazymerge.checkpoint.cached_pieces._key_path", lambda: key)
    monkeypatch.setattr("lazymerge.checkpoint.transport.FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("lazymerge.engine.needed_ranges.CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr("lazymerge.checkpoint.remote.FIRST_READ_BYTES", 1 << 12)
    assert FIRST_READ_BYTES > 1 << 12
    write_models(tmp_path / "models")
    with range_server(tmp_path / "models") as serving:
        yield serving


def recipe(root: object, path: Path) -> Path:
    models = [
        {"model": f"{root}/{name}", "parameters": {"weight": 0.7, "density": 0.4}}
        for name in NAMES[1:]
    ]
    document = {"merge_method": "ties", "base_model": f"{root}/base", "models": models}
    path.write_text(yaml.safe_dump(document))
    return path


def remote(server: RangeServer, folder: Path, **options: Any) -> Plan:
    plan = lazymerge.plan(recipe(server.address, folder / "remote.yml"), workers=2, **options)
    server.log.clear()
    return plan


def output(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def local(server: RangeServer, folder: Path) -> bytes:
    run_plan(
        lazymerge.plan(recipe(server.root, folder / "local.yml")), folder / "local", fsync=False
    )
    return output(folder / "local")


def fetched(server: RangeServer) -> int:
    """Bytes that were asked for since the plan."""
    return sum(stop - start for start, stop in server.ranges("model.safetensors"))


def held(cache: Path) -> int:
    return sum(path.stat().st_size for path in (cache / "ranges").glob("*/*"))


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def noted(self, text: str) -> None:
        self.notes.append(text)


class TestCache:
    def test_a_second_run_fetches_nothing(self, server: RangeServer, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        plan = remote(server, tmp_path, cache=cache)
        assert f"{cache} will have all of it after the run" in dict(plan.facts())["cache"]
        assert not cache.exists()
        run_plan(plan, tmp_path / "first", fsync=False)
        assert fetched(server) == plan.bytes_to_fetch
        again = remote(server, tmp_path, cache=cache)
        assert f"{cache} has all of it" in dict(again.facts())["cache"]
        assert dict(again.facts())["network"].startswith("nothing: all ")
        assert again.as_dict()["totals"]["bytes_cached"] == again.bytes_to_fetch
        jsonschema.validate(json.loads(json.dumps(again.as_dict())), plan_schema())
        assert again.cache_state is not None
        assert again.cache_state.grows_bytes == 0
        notes = Notes()
        run_plan(again, tmp_path / "second", fsync=False, observer=notes)
        assert server.log == []
        assert any("all of " in note and "came from the cache" in note for note in notes.notes)
        assert output(tmp_path / "second") == output(tmp_path / "first") == local(server, tmp_path)

    def test_a_resumed_run_fetches_what_is_left(self, server: RangeServer, tmp_path: Path) -> None:
        cache, out = tmp_path / "cache", tmp_path / "out"
        plan = remote(server, tmp_path, cache=cache)
        server.broken_from["b/model.safetensors"] = plan.bytes_to_fetch // 6
        with pytest.raises(LazymergeError, match="tried"):
            run_plan(plan, out, fsync=False)
        server.broken_from.clear()
        before = held(cache)
        assert 0 < before < plan.bytes_to_fetch
        server.log.clear()
        made = lazymerge.plan_of_unfinished(out, cache=cache)
        server.log.clear()
        run_plan(made, out, fsync=False)
        assert fetched(server) <= plan.bytes_to_fetch - 0.9 * before
        assert output(out) == local(server, tmp_path)

    def test_one_that_is_too_small(self, server: RangeServer, tmp_path: Path) -> None:
        cache, limit = tmp_path / "cache", 1_000_000
        plan = remote(server, tmp_path, cache=cache, cache_limit=limit)
        assert "will have 1.00 MB of it after the run" in dict(plan.facts())["cache"]
        for number in range(2):
            run_plan(
                remote(server, tmp_path, cache=cache, cache_limit="1MB"), tmp_path / f"{number}"
            )
            assert 0.8 * limit < held(cache) <= limit
            assert output(tmp_path / str(number)) == local(server, tmp_path)
        assert plan.bytes_to_fetch - limit <= fetched(server) < plan.bytes_to_fetch - 0.8 * limit

    def test_a_model_that_changes(self, server: RangeServer, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        run_plan(remote(server, tmp_path, cache=cache), tmp_path / "first", fsync=False)
        write_models(server.root, seed=9)
        plan = remote(server, tmp_path, cache=cache)
        assert "has " not in dict(plan.facts())["cache"]
        run_plan(plan, tmp_path / "second", fsync=False)
        assert output(tmp_path / "second") == local(server, tmp_path) != output(tmp_path / "first")

    @pytest.mark.parametrize("etag", ["", 'W/"1"'])
    def test_a_model_without_version(self, server: RangeServer, tmp_path: Path, etag: str) -> None:
        """Nobody could tell what it is followed by: nothing of it is kept."""
        server.etag = etag
        cache = tmp_path / "cache"
        run_plan(remote(server, tmp_path, cache=cache), tmp_path / "first", fsync=False)
        assert held(cache) == 0
        assert output(tmp_path / "first") == local(server, tmp_path)

    def test_damage(self, server: RangeServer, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        run_plan(remote(server, tmp_path, cache=cache), tmp_path / "first", fsync=False)
        for path in (cache / "ranges").glob("*/*"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 64
            path.write_bytes(data)
        run_plan(remote(server, tmp_path, cache=cache), tmp_path / "second", fsync=False)
        assert output(tmp_path / "second") == output(tmp_path / "first")

    def test_small_memory(
        self, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is let go of between two passes comes from the cache the second time."""
        for module in ("scheduler", "needed_ranges"):
            monkeypatch.setattr(f"lazymerge.engine.{module}.SPAN_BLOCKS", 1)
        roomy = remote(server, tmp_path, cache=tmp_path / "cache")
        memory = roomy.memory.projected_bytes - roomy.memory.fetch_bytes + (45 << 20)
        plan = remote(server, tmp_path, cache=tmp_path / "cache", memory=memory)
        assert plan.memory.fetch_bytes < roomy.memory.fetch_bytes
        run_plan(plan, tmp_path / "out", fsync=False)
        assert output(tmp_path / "out") == local(server, tmp_path)

    def test_saved_plans_name_no_cache(self, server: RangeServer, tmp_path: Path) -> None:
        cache, saved = tmp_path / "the cache", tmp_path / "plan.json"
        remote(server, tmp_path, cache=cache).save(saved)
        assert "the cache" not in saved.read_text()
        run_plan(lazymerge.plan(saved, cache=cache), tmp_path / "first", fsync=False)
        plan = lazymerge.plan(saved, cache=cache)
        server.log.clear()
        run_plan(plan, tmp_path / "second", fsync=False)
        assert server.log == []

    def test_a_disk_that_is_too_small(
        self, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = remote(server, tmp_path, cache=tmp_path / "cache", cache_limit="1GB")
        free = "lazymerge.engine.remote_facts.free_disk_bytes"
        monkeypatch.setattr(free, lambda _: plan.bytes_to_fetch + 100)
        with pytest.raises(DoesNotFitError, match=r"may grow by .* beside the output's"):
            run_plan(plan, tmp_path / "out", fsync=False)
        assert not (tmp_path / "out").exists()

    def test_a_limit_of_no_cache(self, server: RangeServer, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="--cache DIR"):
            remote(server, tmp_path, cache_limit="1GB")

    def test_a_folder_that_is_something_else(self, server: RangeServer, tmp_path: Path) -> None:
        plan = remote(server, tmp_path, cache=server.root)
        with pytest.raises(InputError, match="holds other things"):
            plan.facts()


class TestWholeFiles:
    def test_they_are_refused_unless_asked_for(self, server: RangeServer, tmp_path: Path) -> None:
        server.has_ranges = False
        with pytest.raises(InputError, match=r"sends no ranges .* merge with --whole-files"):
            remote(server, tmp_path)

    @pytest.mark.parametrize("cached", [False, True])
    def test_each_is_read_once(self, server: RangeServer, tmp_path: Path, cached: bool) -> None:
        server.has_ranges = False
        options = {"cache": tmp_path / "cache"} if cached else {}
        plan = remote(server, tmp_path, whole_files=True, **options)
        where = "the cache" if cached else "memory"
        assert f"read into {where} before the merge begins" in dict(plan.facts())["whole"]
        server.cuts["a/model.safetensors"] = [300_000]
        run_plan(plan, tmp_path / "out", fsync=False)
        assert len(server.log) == len(NAMES) + 1
        assert output(tmp_path / "out") == local(server, tmp_path)
        if cached:
            again = remote(server, tmp_path, whole_files=True, **options)
            run_plan(again, tmp_path / "again", fsync=False)
            assert server.log == []
            assert output(tmp_path / "again") == output(tmp_path / "out")
        else:
            assert plan.memory.fetch_bytes > plan.bytes_to_fetch

    def test_headers_that_are_long(
        self, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lazymerge.checkpoint.remote.FIRST_READ_BYTES", 64)
        server.has_ranges = False
        plan = remote(server, tmp_path, whole_files=True)
        run_plan(plan, tmp_path / "out", fsync=False)
        assert output(tmp_path / "out") == local(server, tmp_path)

    def test_neither_memory_nor_cache_is_enough(self, server: RangeServer, tmp_path: Path) -> None:
        server.has_ranges = False
        roomy = remote(server, tmp_path, whole_files=True)
        memory = roomy.memory.smallest_limit_bytes - (1 << 20)
        with pytest.raises(DoesNotFitError, match=r"of files that come whole; with --cache DIR"):
            remote(server, tmp_path, whole_files=True, memory=memory)
        small = remote(
            server, tmp_path, whole_files=True, cache=tmp_path / "cache", cache_limit="1MB"
        )
        with pytest.raises(DoesNotFitError, match="do not fit into the cache"):
            small.facts()

    def test_one_that_changes(self, server: RangeServer, tmp_path: Path) -> None:
        server.has_ranges = False
        plan = remote(server, tmp_path, whole_files=True)
        server.etag = '"another"'
        with pytest.raises(InputError, match="has changed since the merge was planned"):
            run_plan(plan, tmp_path / "out", fsync=False)

    def test_what_was_agreed_to_stays_so(self, server: RangeServer, tmp_path: Path) -> None:
        server.has_ranges = False
        plan = remote(server, tmp_path, whole_files=True)
        plan.save(tmp_path / "plan.json")

        class Stopper(Silent):
            def finished(self, _: str) -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_plan(lazymerge.plan(tmp_path / "plan.json"), tmp_path / "out", observer=Stopper())
        assert lazymerge.resume(tmp_path / "out").resumed_tensors >= 1
        assert output(tmp_path / "out") == local(server, tmp_path)
        assert json.loads((tmp_path / "out" / "lazymerge.json").read_text())["whole_files"] is True
        assert lazymerge.verify(tmp_path / "out", recompute=1).problems == ()


@pytest.mark.parametrize(("gap", "size"), [(0, 4 * 60_000), ("64MiB", 7 * 60_000)])
def test_gaps_between_tensors(
    server: RangeServer, tmp_path: Path, gap: int | str, size: int
) -> None:
    """Every other tensor is read: each by itself, or what lies between them too."""
    names = [f"model.layers.{n}.w.weight" for n in range(8)]
    tensors = {name: torch.ones(100, 300).bfloat16() * n for n, name in enumerate(names)}
    write_checkpoint(server.root / "gaps", tensors, {"model_type": "llama", "num_hidden_layers": 8})
    slices = [
        {"sources": [{"model": f"{server.address}/gaps", "layer_range": [n, n + 1]}]}
        for n in range(0, 8, 2)
    ]
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    plan = lazymerge.plan(path, max_gap=gap, connections=2)
    server.log.clear()
    server.most_at_once = 0
    run_plan(plan, tmp_path / "out", fsync=False)
    assert fetched(server) == plan.bytes_to_fetch == size
    assert server.most_at_once <= 4  # it may count one that has been read to its end already


def test_settings_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from lazymerge.engine.network import Network, network

    monkeypatch.setenv("LAZYMERGE_CONNECTIONS", "3")
    monkeypatch.setenv("LAZYMERGE_MAX_GAP", "4MiB")
    assert (Network().connections, Network().max_gap_bytes) == (3, 4 << 20)
    assert network(connections=5).connections == 5
    for name, value in (
        ("LAZYMERGE_CONNECTIONS", "0"),
        ("LAZYMERGE_CONNECTIONS", "many"),
        ("LAZYMERGE_CONNECTIONS", "9" * 5000),
        ("LAZYMERGE_MAX_GAP", "wide"),
        ("LAZYMERGE_MAX_GAP", "2GiB"),
    ):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            with pytest.raises(InputError, match=r"LAZYMERGE|gaps of"):
                Network()
