"""Merges on real Dask clusters: one in threads of the test's process, and one of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lazymerge
import pytest
from cluster_cases import weights, write_models, write_recipe
from lazymerge.cluster import group
from lazymerge.cluster.connection import parse_address
from lazymerge.cluster.workforce import DaskWorkforce
from lazymerge.engine.plan import Plan
from lazymerge.engine.report import Silent
from lazymerge.engine.run import run_plan
from lazymerge.errors import InputError, LazymergeError

from range_server import range_server

distributed = pytest.importorskip("distributed", reason="the extra [dask] is not installed")

pytestmark = pytest.mark.filterwarnings("default")  # Dask's own


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a scheduler with two workers, all in threads of this process."""
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address=None,
        memory_limit=None,
        silence_logs=50,
    ) as running:
        yield running.scheduler_address


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    return root


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "LEAST_GROUP_BYTES", 200_000)


def run(plan: Plan, out: Path, cluster: str, **options: Any) -> Mapping[str, bytes]:
    workforce = DaskWorkforce(parse_address(cluster), threads=1)
    run_plan(plan, out, fsync=False, workforce=workforce, **options)
    return weights(out)


def expected(plan: Plan, out: Path) -> Mapping[str, bytes]:
    run_plan(plan, out, fsync=False)
    return weights(out)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare_ties"])
def test_bytes_equal_to_one_process(
    models: Path, tmp_path: Path, cluster: str, method: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", models, method)
    plan = lazymerge.plan(recipe, max_shard_size=150_000)
    assert run(plan, tmp_path / "out", cluster) == expected(plan, tmp_path / "alone")
    documents = [
        json.loads((tmp_path / name / "lazymerge.json").read_text()) for name in ("out", "alone")
    ]
    for document in documents:
        for key in ("run", "timeline", "memory", "name", "files"):
            document.pop(key)
    assert documents[0] == documents[1]
    assert lazymerge.verify(tmp_path / "out").problems == ()


def test_statistics_travel(models: Path, tmp_path: Path, cluster: str) -> None:
    recipe = write_recipe(tmp_path / "recipe.yml", models)
    plan = lazymerge.plan(recipe, max_shard_size=150_000, statistics=True)
    assert run(plan, tmp_path / "out", cluster) == expected(plan, tmp_path / "alone")
    one, other = (
        (tmp_path / name / "lazymerge-statistics.json").read_bytes() for name in ("out", "alone")
    )
    assert one == other


def test_models_at_addresses(models: Path, tmp_path: Path, cluster: str) -> None:
    """Workers fetch their own ranges."""
    pytest.importorskip("aiohttp", reason="the extra [remote] is not installed")
    local = lazymerge.plan(write_recipe(tmp_path / "local.yml", models), max_shard_size=150_000)
    with range_server(models) as server:
        recipe = write_recipe(tmp_path / "remote.yml", server.address)
        plan = lazymerge.plan(recipe, max_shard_size=150_000)
        server.log.clear()
        made = run(plan, tmp_path / "out", cluster)
        assert len(server.log) > 6
    assert made == expected(local, tmp_path / "alone")


def test_an_unfinished_output_is_gone_on_with(models: Path, tmp_path: Path, cluster: str) -> None:
    """Begun by one process, finished by a cluster."""
    plan = lazymerge.plan(
        write_recipe(tmp_path / "recipe.yml", models), max_shard_size=150_000, workers=1
    )
    out = tmp_path / "out"

    class Stops(Silent):
        def finished(self, tensor: str) -> None:
            if "layers.3" in tensor:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, out, observer=Stops())
    again = lazymerge.plan_of_unfinished(out)
    report = run_plan(again, out, workforce=DaskWorkforce(parse_address(cluster), threads=1))
    assert report.resumed_tensors > 1
    assert weights(out) == expected(plan, tmp_path / "alone")


def test_no_scheduler(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lazymerge.cluster.connection.CONNECT_SECONDS", 0.5)
    plan = lazymerge.plan(write_recipe(tmp_path / "recipe.yml", models))
    with pytest.raises(LazymergeError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        run(plan, tmp_path / "out", "tcp://127.0.0.1:9")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["local:0", "local:", "local", "host:8786", "http://host:1", "tls://host", "tls:///:1"]
)
def test_no_address(text: str) -> None:
    with pytest.raises(InputError, match=r"local:N .*tls://host:8786"):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ("local:3", False),
        ("tls://node7:8786", False),
        ("tcp://127.0.0.1:8786", False),
        ("tcp://localhost:8786", False),
        ("tcp://[::1]:8786", False),
        ("tcp://10.0.0.7:8786", True),
        ("tcp://node7:8786", True),
        ("tcp://[fe80::1]:8786", True),
    ],
)
def test_open_addresses(text: str, is_open: bool) -> None:
    assert parse_address(text).is_open is is_open


class TestTheCommand:
    """With worker processes of its own."""

    @pytest.fixture
    def recipe(self, models: Path, tmp_path: Path) -> Path:
        return write_recipe(tmp_path / "recipe.yml", models)

    def command(self, recipe: Path, out: Path, *more: str) -> list[str]:
        options = ["-o", str(out), "--cluster", "local:2", "--max-shard-size", "150000"]
        return [sys.executable, "-m", "lazymerge", "run", str(recipe), *options, *more]

    def test_it_runs(self, recipe: Path, tmp_path: Path) -> None:
        done = subprocess.run(
            self.command(recipe, tmp_path / "out", "--json"),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["measured_bytes"] > 1 << 20
        plan = lazymerge.plan(recipe, max_shard_size=150_000)
        assert weights(tmp_path / "out") == expected(plan, tmp_path / "alone")
        assert "Traceback" not in done.stderr
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"recipe.yml", "out", "alone"}, "nothing of Dask's is left"

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_its_processes_end_with_it(self, recipe: Path, tmp_path: Path, number: int) -> None:
        mark = f"LAZYMERGE_TEST_{os.getpid()}_{time.monotonic_ns()}"
        running = subprocess.Popen(
            self.command(recipe, tmp_path / "out", "--memory", "1GiB"),
            env={**os.environ, mark: "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while len(_with_mark(mark)) < 4 and time.monotonic() < deadline and running.poll() is None:
            time.sleep(0.05)
        running.send_signal(number)
        _, said = running.communicate(timeout=60)
        assert running.returncode in (130, -signal.SIGKILL, 0)
        if number != signal.SIGKILL:  # a worker that is just being started finds its start cut off
            assert "Traceback" not in said
        while _with_mark(mark) and time.monotonic() < deadline + 30:
            time.sleep(0.1)
        assert not _with_mark(mark)


def _with_mark(mark: str) -> list[int]:
    """Processes that have a variable in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
