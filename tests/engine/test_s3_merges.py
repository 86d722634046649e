"""Merges of models in S3, against moto's server: bytes equal to a local run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from lazymerge.checkpoint import remote
from lazymerge.engine.run import run_plan
from lazymerge.errors import InputError, LazymergeError

from conftest import write_checkpoint

moto_server = pytest.importorskip("moto.server", reason="moto is not installed")
boto3 = pytest.importorskip("boto3", reason="moto is not installed")
pytest.importorskip("s3fs", reason="the extra [remote] is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # of the libraries

SECRET = "TheSecretOfATest"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty bucket named `models`."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "TheKeyOfATest",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lazymerge.checkpoint.transport.FIRST_PAUSE_SECONDS", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    remote._transport.cache_clear()
    resource = boto3.resource("s3", endpoint_url=endpoint)
    made = resource.Bucket("models")
    if made.creation_date is None:
        made.create()
    made.objects.delete()
    return made


def publish(bucket: Any, folder: Path, name: str) -> None:
    for path in sorted(folder.iterdir()):
        bucket.upload_file(str(path), f"{name}/{path.name}")


def model(bucket: Any, root: Path, name: str, seed: int, shards: int = 1) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.layers.{n}.w.weight": torch.randn(400, 900, generator=generator).bfloat16()
        for n in range(4)
    }
    write_checkpoint(root / name, tensors, {"model_type": "llama"}, shards=shards)
    (root / name / "generation_config.json").write_text('{"a": 1}')
    publish(bucket, root / name, name)
    return root / name


def recipe(root: object, path: Path) -> Path:
    document = {
        "merge_method": "slerp",
        "base_model": f"{root}/a",
        "models": [{"model": f"{root}/b"}],
        "parameters": {"t": 0.3},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def test_a_merge(bucket: Any, tmp_path: Path) -> None:
    model(bucket, tmp_path, "a", 1)
    model(bucket, tmp_path, "b", 2, shards=2)
    run_plan(lazymerge.plan(recipe(tmp_path, tmp_path / "l.yml")), tmp_path / "local", fsync=False)
    plan = lazymerge.plan(recipe("s3://models", tmp_path / "r.yml"))
    plan.save(tmp_path / "plan.json")
    out = tmp_path / "out"
    run_plan(plan, out, fsync=False)
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert (out / "generation_config.json").read_text() == '{"a": 1}'
    assert lazymerge.verify(out, recompute=2).problems == ()
    files = [tmp_path / "plan.json", *out.glob("*.json"), out / "README.md"]
    assert not any(SECRET in file.read_text() for file in files)
    run_plan(lazymerge.plan(tmp_path / "plan.json"), tmp_path / "saved", fsync=False)


def test_a_cache(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "ranges.key"
    monkeypatch.setattr("lazymerge.checkpoint.cached_pieces._key_path", lambda: key)
    model(bucket, tmp_path, "a", 1)
    model(bucket, tmp_path, "b", 2)
    for number in range(2):
        plan = lazymerge.plan(recipe("s3://models", tmp_path / "r.yml"), cache=tmp_path / "cache")
        run_plan(plan, tmp_path / str(number), fsync=False)
    assert plan.cache_state is not None
    assert plan.cache_state.held_bytes == plan.bytes_to_fetch
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in "01")
    assert first == second


def test_an_object_that_changes(bucket: Any, tmp_path: Path) -> None:
    model(bucket, tmp_path, "a", 1)
    model(bucket, tmp_path, "b", 2)
    plan = lazymerge.plan(recipe("s3://models", tmp_path / "r.yml"))
    model(bucket, tmp_path / "later", "b", 3)
    with pytest.raises(InputError, match=r"s3://models/b/.*has changed since the merge was"):
        run_plan(plan, tmp_path / "out", fsync=False)


def test_what_is_not_there(bucket: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'s3://models/a'.*is not there"):
        lazymerge.plan(recipe("s3://models", tmp_path / "r.yml"))
    with pytest.raises(InputError, match=r"'s3://nowhere/a'") as caught:
        lazymerge.plan(recipe("s3://nowhere", tmp_path / "r.yml"))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("first_ignored", [0, 1])
def test_a_storage_that_ignores_ranges(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_ignored: int
) -> None:
    """From the beginning, or what is between only later: it sends whole objects all the same."""
    import s3fs

    for name, seed in (("a", 1), ("b", 2)):
        model(bucket, tmp_path, name, seed)
    ask = s3fs.S3FileSystem._call_s3

    async def ask_for_all(self: Any, method: str, *rest: Any, **options: Any) -> Any:
        wanted = str(options.get("Range") or "")
        if wanted and not (wanted.startswith("bytes=0-") and first_ignored):
            del options["Range"]
        return await ask(self, method, *rest, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", ask_for_all)
    path = recipe("s3://models", tmp_path / "r.yml")
    said = r"s3://models/\w/model.*sends no ranges of files"
    if not first_ignored:
        with pytest.raises(LazymergeError, match=said):
            lazymerge.plan(path)
        return
    plan = lazymerge.plan(path)
    with pytest.raises(LazymergeError, match=said):
        run_plan(plan, tmp_path / "out", fsync=False)
