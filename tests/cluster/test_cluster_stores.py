"""A cluster's workers that share no filesystem: shards go into an S3 store, by moto's server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lazymerge
import pytest
from cluster_cases import weights, write_models, write_recipe
from lazymerge.cluster.connection import parse_address
from lazymerge.cluster.workforce import DaskWorkforce
from lazymerge.engine.plan import Plan
from lazymerge.engine.report import Silent
from lazymerge.engine.store.run import run_into_store
from lazymerge.errors import LazymergeError
from lazymerge.output.store import uploads
from lazymerge.output.store.address import store_address

from store_server import StoreServer, store_server

boto3 = pytest.importorskip("boto3", reason="moto is not installed")
distributed = pytest.importorskip("distributed", reason="the extra [dask] is not installed")
pytest.importorskip("s3fs", reason="the extra [remote] is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # of the libraries

OUT = "s3://models/out/merged"


@pytest.fixture(scope="module")
def server() -> Iterator[StoreServer]:
    import s3fs

    with store_server() as serving, pytest.MonkeyPatch.context() as patch:
        for name, value in serving.environment.items():
            patch.setenv(name, value)
        patch.setattr("lazymerge.checkpoint.transport.FIRST_PAUSE_SECONDS", 0.01)
        patch.setattr(uploads, "PART_BYTES", 1 << 16)
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        yield serving


@pytest.fixture(autouse=True)
def empty(server: StoreServer) -> None:
    server.reset()
    bucket = boto3.resource("s3", endpoint_url=server.address).Bucket("models")
    if bucket.creation_date is None:
        bucket.create()
    bucket.objects.delete()


@pytest.fixture(scope="module")
def cluster() -> Iterator[DaskWorkforce]:
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=False,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit=None,
        silence_logs=50,
    ) as running:
        yield DaskWorkforce(parse_address(running.scheduler_address), threads=1)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    write_models(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yml", tmp_path)
    return lazymerge.plan(recipe, max_shard_size=150_000)


def objects(server: StoreServer) -> Mapping[str, bytes]:
    bucket = boto3.resource("s3", endpoint_url=server.address).Bucket("models")
    found = bucket.objects.filter(Prefix="out/merged/")
    return {each.key.removeprefix("out/merged/"): each.get()["Body"].read() for each in found}


def shards(found: Mapping[str, bytes]) -> Mapping[str, bytes]:
    return {name: data for name, data in found.items() if name.endswith(".safetensors")}


def test_objects_equal_to_the_files_of_one_process(
    plan: Plan, server: StoreServer, cluster: DaskWorkforce, tmp_path: Path
) -> None:
    lazymerge.run(plan, tmp_path / "merged", fsync=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lazymerge.cluster.worker.peak_resident_bytes", lambda: 0)
        report = run_into_store(plan, store_address(OUT), workforce=cluster)
    assert report.measured_bytes > 0, "what was on its way to the store counts"
    assert report.cluster is not None
    assert report.cluster["groups"] == len(plan.shards)
    found = objects(server)
    assert shards(found) == weights(tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == found.keys()
    documents = [
        json.loads(text)
        for text in (found["lazymerge.json"], (tmp_path / "merged/lazymerge.json").read_bytes())
    ]
    assert documents[0]["tensors"] == documents[1]["tensors"]
    assert lazymerge.verify(OUT).problems == ()


def test_an_interrupted_one_is_gone_on_with(
    plan: Plan, server: StoreServer, cluster: DaskWorkforce, tmp_path: Path
) -> None:
    """By another cluster, or one process; no sign and no record is left at the end."""

    class Stops(Silent):
        def finished(self, tensor: str) -> None:
            if "down_proj" in tensor:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_into_store(plan, store_address(OUT), workforce=cluster, observer=Stops())
    found = objects(server)
    assert not any("cluster-" in name for name in found)
    assert "lazymerge.json" not in found
    report = run_into_store(plan, store_address(OUT), workforce=cluster)
    assert report.resumed_tensors > 0
    lazymerge.run(plan, tmp_path / "merged", fsync=False)
    found = objects(server)
    assert shards(found) == weights(tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == found.keys()


def test_a_worker_whose_run_has_ended_uploads_nothing(
    plan: Plan, server: StoreServer, cluster: DaskWorkforce, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign goes while groups are being given away."""
    from lazymerge.cluster import destination

    original = destination.StoreSign.check

    def gone(self: Any) -> None:
        self._store.remove([self._name])
        original(self)

    monkeypatch.setattr(destination.StoreSign, "check", gone)
    with pytest.raises(LazymergeError, match=r"cluster-\w+ is gone: the run has ended"):
        run_into_store(plan, store_address(OUT), workforce=cluster)
    assert shards(objects(server)) == {}
