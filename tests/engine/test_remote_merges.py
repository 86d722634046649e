"""Merges of models at addresses, against a web server of our own: bytes equal to a local run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from lazymerge.checkpoint.transport import RemoteFile
from lazymerge.checkpoint.web_server import HttpTransport
from lazymerge.engine import fetching, remote_reading
from lazymerge.engine.memory import CONNECTION_BYTES
from lazymerge.engine.network import CONNECTIONS
from lazymerge.engine.plan import Plan
from lazymerge.engine.report import Silent
from lazymerge.engine.run import run_plan
from lazymerge.engine.streaming import YIELDING_NICENESS
from lazymerge.errors import DoesNotFitError, InputError, LazymergeError

from conftest import write_adapter, write_checkpoint
from range_server import RangeServer, range_server

pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")

CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "vocab_size": 700}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders base, a and b: in one file, in shards, and again in one."""
    root = tmp_path_factory.mktemp("models")
    for seed, (name, shards) in enumerate({"base": 1, "a": 3, "b": 1}.items()):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(
                700, 1100, generator=generator
            ).bfloat16()
            for layer in range(3)
        }
        tensors["model.norm.weight"] = torch.randn(1100, generator=generator).bfloat16()
        tensors["model.embed_tokens.weight"] = torch.randn(
            3000, 1100, generator=generator
        ).bfloat16()
        write_checkpoint(root / name, tensors, CONFIG, shards=shards)
        (root / name / "generation_config.json").write_text('{"a": 1}')
        (root / name / "modeling.py").write_text("raise SystemExit")
    return root


@pytest.fixture
def server(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr("lazymerge.checkpoint.transport.FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("lazymerge.engine.needed_ranges.CHUNK_BYTES", 1 << 16)
    with range_server(models) as serving:
        yield serving


METHODS: dict[str, dict[str, Any]] = {
    "linear": {"parameters": {"weight": 0.5}},
    "task_arithmetic": {"base_model": "base", "parameters": {"weight": 0.7}},
    "ties": {"base_model": "base", "parameters": {"weight": 0.7, "density": 0.4}},
    "slerp": {"base_model": "a", "parameters": {"t": 0.3}},
    "dare_ties": {"base_model": "base", "parameters": {"weight": 0.7, "density": 0.4}},
    "passthrough": {},
}


def recipe(root: object, path: Path, method: str = "ties", **more: Any) -> Path:
    document = {"merge_method": method, **METHODS[method], **more}
    names = {"slerp": ["b"], "passthrough": ["a"]}.get(method, ["a", "b"])
    document["models"] = [{"model": f"{root}/{name}"} for name in names]
    if "base_model" in document:
        document["base_model"] = f"{root}/{document['base_model']}"
    path.write_text(yaml.safe_dump(document))
    return path


def weights(folder: Path) -> Mapping[str, bytes]:
    names = ("*.safetensors", "config.json", "generation_config.json")
    return {p.name: p.read_bytes() for name in names for p in sorted(folder.glob(name))}


def local(models: Path, folder: Path, method: str = "ties") -> Mapping[str, bytes]:
    plan = lazymerge.plan(recipe(models, folder / "local.yml", method), workers=2)
    lazymerge.run(plan, folder / "local", fsync=False)
    return weights(folder / "local")


def remote(server: RangeServer, folder: Path, method: str = "ties", **options: Any) -> Plan:
    path = recipe(server.address, folder / "remote.yml", method)
    return lazymerge.plan(path, **{"workers": 2, **options})


@pytest.mark.parametrize("method", METHODS)
def test_bytes_equal_to_a_local_run(
    models: Path, server: RangeServer, tmp_path: Path, method: str
) -> None:
    plan = remote(server, tmp_path, method)
    lazymerge.run(plan, tmp_path / "out", fsync=False)
    assert weights(tmp_path / "out") == local(models, tmp_path, method)
    assert not (tmp_path / "out" / "modeling.py").exists()
    assert "network" in dict(plan.facts())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
@pytest.mark.parametrize("where", ["here", "there"])
def test_workers_yield_to_who_receives(
    models: Path, server: RangeServer, tmp_path: Path, where: str
) -> None:
    """Where something is received; elsewhere they are like all other threads."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    seen: set[int] = set()

    class Observer(Silent):
        def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
            seen.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    root = models if where == "here" else server.address
    plan = lazymerge.plan(recipe(root, tmp_path / "recipe.yml"))
    run_plan(plan, tmp_path / "out", fsync=False, observer=Observer())
    assert seen == {own if where == "here" else min(19, own + YIELDING_NICENESS)}
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def smallest(plan: Plan) -> str:
    """A limit in which nothing of the window is left over."""
    memory = plan.memory
    window = CONNECTION_BYTES + memory.workers * needs(plan).job_bytes
    return str(memory.projected_bytes - memory.fetch_bytes + window)


def needs(plan: Plan) -> Any:
    from lazymerge.engine.needed_ranges import fetch_needs

    return fetch_needs(plan.graph, plan.tasks, plan.remote_inputs, "cpu")


@pytest.mark.parametrize("read_mode", ["pread", "mmap"])
@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_the_smallest_memory_that_is_allowed(
    models: Path,
    server: RangeServer,
    tmp_path: Path,
    method: str,
    read_mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What does not fit is let go of and fetched again; never is more held than planned."""
    expected = local(models, tmp_path, method)
    for module in ("scheduler", "needed_ranges"):
        monkeypatch.setattr(f"lazymerge.engine.{module}.SPAN_BLOCKS", 1)
    held: list[int] = []
    in_files: list[int] = []

    class Watched(fetching.Fetcher):
        def _let_go(self, key: fetching.Key) -> None:
            held.append(self._held)
            super()._let_go(key)

        def _arrived(self, key: fetching.Key) -> None:
            held.append(self._held)
            blocks = (os.fstat(each).st_blocks for each in self.descriptors.values())
            in_files.append(512 * sum(blocks))
            super()._arrived(key)

    monkeypatch.setattr(remote_reading, "Fetcher", Watched)
    roomy = remote(server, tmp_path, method, read_mode=read_mode)
    plan = remote(server, tmp_path, method, memory=smallest(roomy), read_mode=read_mode)
    assert plan.memory.fetch_bytes < roomy.memory.fetch_bytes
    run_plan(plan, tmp_path / "out", fsync=False)
    assert weights(tmp_path / "out") == expected
    assert 0 < max(held) <= plan.memory.fetch_bytes - CONNECTION_BYTES
    assert 0 < max(in_files) <= plan.memory.fetch_bytes - CONNECTION_BYTES


def test_layers_that_are_here_and_layers_that_are_not(
    models: Path, server: RangeServer, tmp_path: Path
) -> None:
    """They are of one kind, and need other memory."""
    whole = lazymerge.plan(recipe(server.address, tmp_path / "whole.yml", "passthrough"))
    document = yaml.safe_load((tmp_path / "whole.yml").read_text())
    layers = next(iter(whole.stacks)).layer_count
    del document["models"]
    document["slices"] = [
        {"sources": [{"model": f"{root}/{name}", "layer_range": [start, stop]}]}
        for root, name, start, stop in (
            (models, "a", 0, layers - 1),
            (server.address, "b", layers - 1, layers),
        )
    ]
    document["dtype"] = "float16"  # not as they are stored: merged by kernels
    (tmp_path / "mixed.yml").write_text(yaml.safe_dump(document))
    plan = lazymerge.plan(tmp_path / "mixed.yml", workers=1)
    remote_only = [task for task in plan.tasks if f".{layers - 1}." in task.write.name]
    assert remote_only
    assert needs(plan).job_bytes > 0
    assert needs(plan).total_bytes > 0
    lazymerge.run(plan, tmp_path / "out", fsync=False)


@pytest.mark.parametrize("read_mode", ["pread", "mmap"])
def test_samples_of_tensors_that_are_not_held_whole(
    models: Path,
    server: RangeServer,
    tmp_path: Path,
    read_mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = local(models, tmp_path)
    for module in ("scheduler", "needed_ranges"):
        monkeypatch.setattr(f"lazymerge.engine.{module}.SPAN_BLOCKS", 1)
    picked = []

    class Watched(fetching.Fetcher):
        def _drop(self, job: Any, needed: Any) -> None:
            blocks = (os.fstat(each).st_blocks for each in self.descriptors.values())
            picked.append(512 * sum(blocks))
            super()._drop(job, needed)

    monkeypatch.setattr(remote_reading, "Fetcher", Watched)
    roomy = remote(server, tmp_path, read_mode=read_mode)
    plan = remote(server, tmp_path, memory=smallest(roomy), read_mode=read_mode)
    run_plan(plan, tmp_path / "out", fsync=False)
    assert picked
    assert max(picked) <= plan.memory.fetch_bytes - CONNECTION_BYTES
    assert weights(tmp_path / "out") == expected


def test_less_memory_is_refused(server: RangeServer, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match="of inputs that are fetched"):
        remote(server, tmp_path, "ties", memory="16MiB")


def test_a_plan_reads_headers_only(models: Path, server: RangeServer, tmp_path: Path) -> None:
    plan = remote(server, tmp_path, "ties")
    for name in ("model.safetensors", "model-00001-of-00003.safetensors"):
        assert all(stop <= 1 << 17 for _, stop in server.ranges(name))
    expected = sum(c.size_bytes for c in plan.checkpoints.values())
    assert plan.bytes_to_fetch == expected


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_every_byte_is_fetched_once_where_there_is_room(
    server: RangeServer, tmp_path: Path, method: str
) -> None:
    plan = remote(server, tmp_path, method)
    server.log.clear()
    run_plan(plan, tmp_path / "out", fsync=False)
    ranges = [
        r for name in {p.rpartition("/")[2] for p, _ in server.log} for r in server.ranges(name)
    ]
    assert sum(stop - start for start, stop in ranges) == plan.bytes_to_fetch
    assert 1 < server.most_at_once <= CONNECTIONS


def test_part_of_a_model(models: Path, server: RangeServer, tmp_path: Path) -> None:
    """Of tensors that the merge does not read, nothing is fetched."""
    slices = [{"sources": [{"model": f"{server.address}/a", "layer_range": [0, 1]}]}]
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    plan = lazymerge.plan(path)
    whole = sum(c.size_bytes for c in plan.checkpoints.values())
    assert plan.bytes_to_fetch < whole
    run_plan(plan, tmp_path / "out", fsync=False)


class TestWhatGoesWrong:
    def test_what_may_pass_is_tried_again(
        self, models: Path, server: RangeServer, tmp_path: Path
    ) -> None:
        plan = remote(server, tmp_path)
        server.answers["base/model.safetensors"] = [500, 429, 503]
        server.cuts["b/model.safetensors"] = [0, 100, 50_000]
        server.cuts["a/model-00002-of-00003.safetensors"] = [4097]
        run_plan(plan, tmp_path / "out", fsync=False)
        assert weights(tmp_path / "out") == local(models, tmp_path)
        assert not server.answers["base/model.safetensors"]
        assert not server.cuts["b/model.safetensors"]

    def test_a_server_that_falls_silent(
        self,
        models: Path,
        server: RangeServer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        plan = remote(server, tmp_path, "slerp")
        monkeypatch.setattr("lazymerge.checkpoint.transport.SILENCE_SECONDS", 0.3)
        server.stalls["b/model.safetensors"] = [3.0, 3.0]
        report = run_plan(plan, tmp_path / "out", fsync=False)
        assert report.seconds < 2.5
        assert weights(tmp_path / "out") == local(models, tmp_path, "slerp")

    def test_a_slow_server(self, models: Path, server: RangeServer, tmp_path: Path) -> None:
        """Several requests at a time make up for it: one would take five seconds."""
        plan = remote(server, tmp_path, "slerp")
        server.latency_seconds, server.bytes_per_second = 0.05, 5e6
        report = run_plan(plan, tmp_path / "out", fsync=False)
        assert plan.bytes_to_fetch / 5e6 > 4.0 > report.seconds
        assert weights(tmp_path / "out") == local(models, tmp_path, "slerp")

    def test_what_does_not_pass(
        self,
        models: Path,
        server: RangeServer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """It is said with the address, and another run goes on."""
        monkeypatch.setattr("lazymerge.checkpoint.transport.FIRST_PAUSE_SECONDS", 0.05)
        plan = remote(server, tmp_path, "linear")
        out = tmp_path / "out"
        path = "b/model.safetensors"
        server.broken_from[path] = (models / path).stat().st_size - 1000
        with pytest.raises(LazymergeError, match=r"/b/model\.safetensors: .*; tried \d+ times"):
            run_plan(plan, out, fsync=False)
        server.broken_from.clear()
        assert lazymerge.resume(out).resumed_tensors >= 1
        assert weights(out) == local(models, tmp_path, "linear")
        assert lazymerge.verify(out, recompute=2).problems == ()

    def test_a_file_that_changes(self, server: RangeServer, tmp_path: Path) -> None:
        plan = remote(server, tmp_path)
        server.etag = '"another"'
        with pytest.raises(InputError, match="has changed since the merge was planned"):
            run_plan(plan, tmp_path / "out", fsync=False)
        assert not (tmp_path / "out").exists()
        assert remote(server, tmp_path).fingerprint != plan.fingerprint

    def test_a_server_without_ranges(self, server: RangeServer, tmp_path: Path) -> None:
        server.has_ranges = False
        with pytest.raises(InputError, match="sends no ranges of files"):
            remote(server, tmp_path)

    def test_a_server_without_versions(
        self, models: Path, server: RangeServer, tmp_path: Path
    ) -> None:
        server.etag = ""
        plan = remote(server, tmp_path)
        assert any("names no version" in notice for notice in plan.notices)
        run_plan(plan, tmp_path / "out", fsync=False)
        assert weights(tmp_path / "out") == local(models, tmp_path)

    def test_no_model_there(self, server: RangeServer, tmp_path: Path) -> None:
        path = recipe(f"{server.address}/elsewhere", tmp_path / "r.yml")
        with pytest.raises(InputError, match=r"has neither model\.safetensors\.index\.json nor"):
            lazymerge.plan(path)

    def test_nobody_answers(
        self, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = recipe("http://127.0.0.1:9/x", tmp_path / "r.yml")
        with pytest.raises(LazymergeError, match=r"127\.0\.0\.1:9/x.*the connection failed"):
            lazymerge.plan(path)

    @pytest.mark.parametrize(
        "reference", ["https://user:secret@host/model", "https://host/model?signature=secret"]
    )
    def test_credentials_in_an_address(self, tmp_path: Path, reference: str) -> None:
        path = recipe("/nowhere", tmp_path / "r.yml", "passthrough")
        document = {"merge_method": "passthrough", "models": [{"model": reference}]}
        path.write_text(yaml.safe_dump(document))
        with pytest.raises(InputError) as caught:
            lazymerge.plan(path)
        assert "secret" not in str(caught.value)

    def test_passwords_come_from_a_netrc_file(
        self, models: Path, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.password = "TheSecretOfATest"
        netrc = tmp_path / "netrc"
        netrc.write_text("")
        monkeypatch.setenv("NETRC", str(netrc))
        with pytest.raises(InputError, match="may not be read"):
            remote(server, tmp_path)
        netrc.write_text(f"machine 127.0.0.1 login somebody password {server.password}\n")
        plan = remote(server, tmp_path)
        plan.save(tmp_path / "plan.json")
        run_plan(plan, tmp_path / "out", fsync=False)
        assert weights(tmp_path / "out") == local(models, tmp_path)
        files = [tmp_path / "plan.json", *(tmp_path / "out").glob("*.json")]
        assert not any(server.password in file.read_text() for file in files)

    def test_an_interrupted_run(self, models: Path, server: RangeServer, tmp_path: Path) -> None:
        plan = remote(server, tmp_path)

        class Stopper(Silent):
            def finished(self, _: str) -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_plan(plan, tmp_path / "out", fsync=False, observer=Stopper())
        assert lazymerge.resume(tmp_path / "out").resumed_tensors >= 1
        assert weights(tmp_path / "out") == local(models, tmp_path)


def test_saved_plans_and_manifests(models: Path, server: RangeServer, tmp_path: Path) -> None:
    plan = remote(server, tmp_path)
    plan.save(tmp_path / "plan.json")
    again = lazymerge.plan(tmp_path / "plan.json")
    assert again.fingerprint == plan.fingerprint
    run_plan(again, tmp_path / "out", fsync=False)
    assert weights(tmp_path / "out") == local(models, tmp_path)
    manifest = json.loads((tmp_path / "out" / "lazymerge.json").read_text())
    files = [file for model in manifest["models"] for file in model["files"]]
    assert all(file["pin"] for file in files)
    server.etag = '"another"'
    with pytest.raises(InputError, match="is not what it was when"):
        lazymerge.plan(tmp_path / "plan.json")


def test_inf_in_an_input(server: RangeServer, tmp_path: Path) -> None:
    """Where it is from is found by reading those tensors again."""
    tensor = torch.ones(300, 40)
    tensor[7, 7] = float("inf")
    write_checkpoint(server.root / "broken", {"w": tensor})
    entry = {"model": f"{server.address}/broken", "parameters": {"weight": 1.0}}
    path = tmp_path / "r.yml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": [entry]}))
    report = run_plan(lazymerge.plan(path), tmp_path / "out", fsync=False)
    assert [sum(tensor.inputs.values()) for tensor in report.nonfinite] == [1]


def test_nothing_is_left_behind(server: RangeServer, tmp_path: Path) -> None:
    """Neither of a run nor of a plan that fails, by the command itself."""
    recipe(server.address, tmp_path / "good.yml", "slerp")
    recipe(f"{server.address}/elsewhere", tmp_path / "bad.yml", "slerp")
    (tmp_path / "own").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "own")}
    command = [sys.executable, "-m", "lazymerge", "run", "-o", str(tmp_path / "out")]
    codes = [
        subprocess.run([*command, str(tmp_path / name)], env=environment, check=False).returncode
        for name in ("good.yml", "bad.yml")
    ]
    assert codes == [0, 2]
    assert list((tmp_path / "own").iterdir()) == []


@pytest.mark.parametrize("place", ["both", "model", "adapter"])
def test_adapters(models: Path, server: RangeServer, tmp_path: Path, place: str) -> None:
    generator = torch.Generator().manual_seed(3)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {
        f"{name}.lora_A.weight": torch.randn(4, 1100, generator=generator),
        f"{name}.lora_B.weight": torch.randn(700, 4, generator=generator),
    }
    write_adapter(models / "adapter", factors, r=4, lora_alpha=8, target_modules=["up_proj"])
    written = []
    for out in ("local", "out"):
        roots = [
            server.address if out == "out" and place in ("both", each) else models
            for each in ("model", "adapter")
        ]
        entry = {"model": f"{roots[0]}/a+{roots[1]}/adapter", "parameters": {"weight": 1.0}}
        path = tmp_path / "r.yml"
        path.write_text(yaml.safe_dump({"merge_method": "linear", "models": [entry]}))
        plan = lazymerge.plan(path)
        plan.save(tmp_path / "plan.json")
        run_plan(lazymerge.plan(tmp_path / "plan.json"), tmp_path / out, fsync=False)
        written.append(weights(tmp_path / out))
    assert written[1] == written[0]
    assert lazymerge.verify(tmp_path / "out", recompute=2).problems == ()


def test_statistics(models: Path, server: RangeServer, tmp_path: Path) -> None:
    written = []
    for root, out in ((models, "local"), (server.address, "out")):
        plan = lazymerge.plan(recipe(root, tmp_path / "r.yml"), statistics=True)
        run_plan(plan, tmp_path / out, fsync=False)
        text = (tmp_path / out / "lazymerge-statistics.json").read_text()
        written.append(json.loads(text)["tensors"])
    assert written[1] == written[0]


def test_a_header_that_claims_exabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before the chunks of it are listed, which would take all memory."""
    size = 1 << 60
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    header += " " * (-len(header) % 8)
    start = len(header).to_bytes(8, "little") + header.encode()
    file = RemoteFile("http://127.0.0.1:1/a/model.safetensors", len(start) + size, '"1"')
    begin = lambda _, url, count: (file, start.ljust(count, b"\0"))  # noqa: E731
    monkeypatch.setattr(HttpTransport, "begin", begin)
    path = tmp_path / "recipe.yml"
    path.write_text(
        yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": file.url}]})
    )
    with pytest.raises(InputError, match=r"claims 1,152,921,504,606,846,976 bytes of tensors"):
        lazymerge.plan(path)
