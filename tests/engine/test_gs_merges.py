"""Merges of models in Google Cloud Storage, against a stand-in: bytes equal to a local run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import lazymerge
import pytest
import torch
import yaml
from lazymerge.checkpoint import remote
from lazymerge.engine.run import run_plan
from lazymerge.errors import InputError, LazymergeError

from conftest import write_checkpoint
from gs_server import GsServer, gs_server

gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # of the libraries


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GsServer]:
    """A stand-in with the bucket `models`, which gcsfs is told of."""
    (tmp_path / "buckets" / "models").mkdir(parents=True)
    with gs_server(tmp_path / "buckets") as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
        monkeypatch.setitem(gcsfs_options(), "token", "anon")
        monkeypatch.setattr("lazymerge.checkpoint.transport.FIRST_PAUSE_SECONDS", 0.01)
        key = tmp_path / "ranges.key"
        monkeypatch.setattr("lazymerge.checkpoint.cached_pieces._key_path", lambda: key)
        forget()
        yield server
        forget()


def gcsfs_options() -> dict[str, object]:
    from fsspec.config import conf

    options: dict[str, object] = conf.setdefault("gs", {})
    return options


def forget() -> None:
    gcsfs.GCSFileSystem.clear_instance_cache()
    remote._transport.cache_clear()


def model(root: Path, name: str, seed: int, shards: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.layers.{n}.w.weight": torch.randn(400, 900, generator=generator).bfloat16()
        for n in range(4)
    }
    write_checkpoint(root / name, tensors, {"model_type": "llama"}, shards=shards)
    (root / name / "generation_config.json").write_text('{"a": 1}')


def recipe(root: object, path: Path) -> Path:
    document = {
        "merge_method": "slerp",
        "base_model": f"{root}/some where/a",
        "models": [{"model": f"{root}/some where/b"}],
        "parameters": {"t": 0.3},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_merge(storage: GsServer, tmp_path: Path) -> None:
    root = storage.root / "models" / "some where"
    model(root, "a", 1)
    model(root, "b", 2, shards=3)
    bucket = storage.root / "models"
    run_plan(lazymerge.plan(recipe(bucket, tmp_path / "l.yml")), tmp_path / "local", fsync=False)
    plan = lazymerge.plan(recipe("gs://models", tmp_path / "r.yml"), cache=tmp_path / "cache")
    pins = {file.pin for checkpoint in plan.checkpoints.values() for file in checkpoint.files}
    assert pins == {str(path.stat().st_mtime_ns) for path in root.glob("*/*.safetensors")}
    storage.answers += [503, 429]
    storage.cuts += [1000, 70_000]
    run_plan(plan, tmp_path / "out", fsync=False)
    assert not storage.answers
    assert not storage.cuts
    for name in ("model.safetensors", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    again = lazymerge.plan(tmp_path / "r.yml", cache=tmp_path / "cache")
    storage.log.clear()
    run_plan(again, tmp_path / "again", fsync=False)
    assert storage.log == []


def test_an_object_that_changes(storage: GsServer, tmp_path: Path) -> None:
    root = storage.root / "models" / "some where"
    model(root, "a", 1)
    model(root, "b", 2)
    plan = lazymerge.plan(recipe("gs://models", tmp_path / "r.yml"))
    model(root, "b", 3)
    with pytest.raises(InputError, match=r"gs://models/some where/b/.*has changed since"):
        run_plan(plan, tmp_path / "out", fsync=False)
    assert not (tmp_path / "out").exists()


def test_what_is_not_there(storage: GsServer, tmp_path: Path) -> None:
    for root in ("gs://models", "gs://nowhere"):
        with pytest.raises(InputError, match=r"'gs://.*/some where/a'.*is not there"):
            lazymerge.plan(recipe(root, tmp_path / "r.yml"))
    storage.answers += [403]
    with pytest.raises(InputError, match="may not be read"):
        lazymerge.plan(tmp_path / "r.yml")


def test_a_storage_that_is_not_reached(
    storage: GsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said at once."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    forget()
    began = time.monotonic()
    with pytest.raises(LazymergeError, match="the storage is not reached"):
        lazymerge.plan(recipe("gs://models", tmp_path / "r.yml"))
    assert time.monotonic() - began < 2.0
