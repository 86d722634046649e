"""Merges into an S3 store, against moto's server: objects equal to the files of a local run,
whatever happens on the way."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lazymerge
import pytest
import torch
import yaml
from lazymerge.engine.plan import Plan
from lazymerge.engine.report import Silent
from lazymerge.engine.stamps import stamps_of
from lazymerge.engine.store.run import run_into_store
from lazymerge.engine.store.shards import Target, store_shard
from lazymerge.engine.streaming import Conditions, work_of
from lazymerge.errors import InputError, LazymergeError
from lazymerge.output.lock import LockedError
from lazymerge.output.store import uploads
from lazymerge.output.store.address import store_address

from conftest import write_checkpoint
from store_server import HANG_UP, SECRET, Request, StoreServer, store_server, wait_until

boto3 = pytest.importorskip("boto3", reason="moto is not installed")
pytest.importorskip("s3fs", reason="the extra [remote] is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # of the libraries

PART_BYTES = 1 << 16
SHARD_SIZE = "500kB"
OUT = "s3://models/out/merged"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def serving() -> Iterator[StoreServer]:
    with store_server() as server:
        yield server


@pytest.fixture
def server(serving: StoreServer, monkeypatch: pytest.MonkeyPatch) -> StoreServer:
    """With an empty bucket named `models`, small parts and short pauses."""
    import s3fs

    serving.reset()
    for name, value in serving.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lazymerge.checkpoint.transport.FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(uploads, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = boto3.resource("s3", endpoint_url=serving.address).Bucket("models")
    if bucket.creation_date is None:
        bucket.create()
    bucket.objects.delete()
    for upload in bucket.multipart_uploads.all():
        upload.abort()
    serving.reset()
    return serving


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a and b, with tensors of two dtypes, one of several parts, one of no elements."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"model.layers.{n}.mlp.up_proj.weight": torch.randn(
                200, 330, generator=generator
            ).bfloat16()
            for n in range(6)
        }
        tensors["model.norm.weight"] = torch.randn(330, generator=generator)
        tensors["model.nothing"] = torch.zeros(0, 4)
        tensors["model.embed_tokens.weight"] = torch.randn(900, 330, generator=generator).bfloat16()
        write_checkpoint(root / name, tensors, {"model_type": "llama"})
        (root / name / "generation_config.json").write_text('{"a": 1}')
    for method, parameters in {"linear": {"weight": 0.5}, "slerp": {"t": 0.3}}.items():
        document: dict[str, Any] = {"merge_method": method, "parameters": parameters}
        document["models"] = [{"model": str(root / name)} for name in "ab"]
        if method == "slerp":
            document |= {"base_model": str(root / "a"), "models": [{"model": str(root / "b")}]}
        (root / f"{method}.yml").write_text(yaml.safe_dump(document))
    for method in ("linear", "slerp"):
        plan = lazymerge.plan(root / f"{method}.yml", max_shard_size=SHARD_SIZE, workers=2)
        lazymerge.run(plan, root / "local" / method / "merged", fsync=False)
    return root


def plan_of(models: Path, method: str = "linear", **options: Any) -> Plan:
    options = {"max_shard_size": SHARD_SIZE, "workers": 2, **options}
    return lazymerge.plan(models / f"{method}.yml", **options)


def local(models: Path, method: str = "linear") -> Mapping[str, bytes]:
    folder = models / "local" / method / "merged"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def objects(server: StoreServer, prefix: str = "out/merged/") -> Mapping[str, bytes]:
    bucket = boto3.resource("s3", endpoint_url=server.address).Bucket("models")
    found = bucket.objects.filter(Prefix=prefix)
    return {each.key.removeprefix(prefix): each.get()["Body"].read() for each in found}


def names_in_store(prefix: str = "out/merged/") -> set[str]:
    """The same, without a request."""
    from moto.backends import get_backend

    for account in get_backend("s3").values():
        for buckets in account.values():
            if "models" in buckets.buckets:
                keys = buckets.buckets["models"].keys
                return {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    return set()


def open_uploads(server: StoreServer) -> int:
    bucket = boto3.resource("s3", endpoint_url=server.address).Bucket("models")
    return len(list(bucket.multipart_uploads.all()))


def assert_equal(server: StoreServer, models: Path, method: str = "linear") -> None:
    """The store has what a local run has written, and nothing else is left."""
    found, expected = dict(objects(server)), dict(local(models, method))
    assert found.keys() == expected.keys()
    ours, theirs = (json.loads(each.pop("lazymerge.json")) for each in (found, expected))
    assert found == expected
    for key in ("tensors", "shards", "files", "fingerprint", "name", "output"):
        assert ours[key] == theirs[key], key
    assert open_uploads(server) == 0


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_objects_equal_to_the_files_of_a_local_run(
    server: StoreServer, models: Path, method: str
) -> None:
    report = lazymerge.run(plan_of(models, method), OUT)
    assert report.output == OUT
    assert_equal(server, models, method)
    assert not any(SECRET.encode() in content for content in objects(server).values())
    assert lazymerge.status(OUT).state == "complete"
    assert lazymerge.verify(OUT, recompute=2).problems == ()
    before = objects(server)
    lazymerge.run(plan_of(models, method), OUT)
    assert objects(server) == before


def test_all_in_one_shard_of_many_parts(server: StoreServer, models: Path, tmp_path: Path) -> None:
    plan = plan_of(models, max_shard_size="5GB")
    lazymerge.run(plan, tmp_path / "local", fsync=False)
    lazymerge.run(plan, "s3://models/a b%20c+d/~")
    found = objects(server, "a b%20c+d/~/")["model.safetensors"]
    assert found == (tmp_path / "local" / "model.safetensors").read_bytes()
    assert len([r for r in server.seen if "partNumber" in r.line]) > 10
    written = {f"a b%20c+d/~/{path.name}" for path in (tmp_path / "local").iterdir()}
    assert names_in_store("") == written


def test_nothing_looks_complete_before_it_is(server: StoreServer, models: Path) -> None:
    """Looked at after every request."""
    plan = plan_of(models)
    shards = {shard.file for shard in plan.shards}
    seen: list[set[str]] = []
    server.after = lambda _: seen.append(names_in_store())
    lazymerge.run(plan, OUT)
    assert len(seen) > 20
    for names in seen:
        if names & {"model.safetensors.index.json", "config.json", "lazymerge.json"}:
            assert shards <= names
        if "lazymerge.json" in names:
            assert "model.safetensors.index.json" in names
        elif names - {".lazymerge/lock"}:
            assert ".lazymerge/merge.json" in names


PROGRAM = f"""
import lazymerge.output.store.uploads as uploads
uploads.PART_BYTES = {PART_BYTES}
from lazymerge.cli.main import command
command()
"""


def start(models: Path, *arguments: str) -> subprocess.Popen[str]:
    """The program, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.Popen(
        command,
        cwd=models,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


KILLS = ["PUT merge.json", "PUT partNumber=3", "POST uploadId", "PUT config.json"]


@pytest.mark.parametrize("point", KILLS)
def test_killed_and_run_again(server: StoreServer, models: Path, point: str) -> None:
    """SIGKILL in the middle of the second request of a kind."""
    method, what = point.split()
    count = 0

    def strike(request: Request) -> int | None:
        nonlocal count
        if not (request.line.startswith(method) and what in request.line):
            return None
        count += 1
        if count == (1 if "json" in what else 2):
            process.send_signal(signal.SIGKILL)
            process.wait()
        return None

    arguments = ["linear.yml", "-o", OUT, "--max-shard-size", SHARD_SIZE, "--workers", "2", "-q"]
    server.before = strike
    process = start(models, "run", *arguments)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "lazymerge.json" not in names_in_store()
    server.reset()
    kept = sum(name.startswith(".lazymerge/shards/") for name in names_in_store())
    if "merge" not in what:
        assert lazymerge.status(OUT).state == "unfinished"
    resumed: list[int] = []

    class Watched(Silent):
        def resumed(self, bytes_read: int, bytes_written: int, tensors: int) -> None:
            resumed.append(tensors)

    report = run_into_store(plan_of(models), store_address(OUT), observer=Watched())
    assert_equal(server, models)
    assert bool(report.resumed_tensors) == bool(kept)


@pytest.mark.parametrize("status", [500, 503, HANG_UP])
def test_failures_that_pass(server: StoreServer, models: Path, status: int) -> None:
    """The first of every kind of request fails, and every fifth."""
    kinds: set[str] = set()

    def strike(request: Request) -> int | None:
        kind = request.line.split("uploadId")[0][-12:] + request.line[:4]
        is_new = kind not in kinds
        kinds.add(kind)
        return status if is_new or request.number % 5 == 0 else None

    server.before = strike
    lazymerge.run(plan_of(models), OUT)
    server.reset()
    assert_equal(server, models)


def test_a_completion_whose_answer_is_lost(server: StoreServer, models: Path) -> None:
    lost: list[str] = []

    def lose(request: Request) -> int | None:
        if request.line.startswith("POST") and "uploadId" in request.line:
            lost.append(request.line)
            return HANG_UP if len(lost) == 1 else None
        return None

    server.after = lose
    lazymerge.run(plan_of(models), OUT)
    assert len(lost) > 1
    server.reset()
    assert_equal(server, models)


def test_a_store_that_goes_away(server: StoreServer, models: Path) -> None:
    """What is complete by then stays, and is not made again."""

    def strike(request: Request) -> int | None:
        is_later = "00003-of" in request.line and "partNumber" in request.line
        return 503 if is_later else None

    server.before = strike
    with pytest.raises(LazymergeError, match=r"s3://models/out/merged/model-00003.*SlowDown") as e:
        lazymerge.run(plan_of(models), OUT)
    assert SECRET not in str(e.value)
    server.reset()
    kept = {name for name in names_in_store() if name.startswith(".lazymerge/shards/")}
    assert kept
    assert open_uploads(server) == 0
    assert lazymerge.status(OUT).tensors > 0
    plan = lazymerge.api.plan_of_unfinished(OUT)
    lazymerge.run(plan, OUT)
    assert_equal(server, models)
    sent = {r.line.split("?")[0] for r in server.seen if "partNumber" in r.line}
    assert not any(
        Path(name).stem.removesuffix(".safetensors") in line for name in kept for line in sent
    )


def test_nothing_is_left_of_a_run_that_did_nothing(server: StoreServer, models: Path) -> None:
    server.before = lambda r: 403 if "uploads" in r.line and r.line.startswith("POST") else None
    with pytest.raises(InputError, match="may not be read or written") as caught:
        lazymerge.run(plan_of(models), OUT)
    assert SECRET not in str(caught.value)
    assert names_in_store() == set()


def test_one_run_at_a_time(server: StoreServer, models: Path) -> None:
    plan, held = plan_of(models), threading.Event()

    def hold(request: Request) -> None:
        if "partNumber" in request.line:
            held.wait(30)

    server.before = lambda request: hold(request)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lazymerge.run, plan, OUT)
        wait_until(lambda: any("partNumber" in r.line for r in server.seen))
        assert lazymerge.status(OUT).state == "running"
        with pytest.raises(LockedError, match="is being written by process"):
            lazymerge.run(plan, OUT)
        held.set()
        first.result()
    assert_equal(server, models)


def test_two_at_once_where_there_are_no_locks(server: StoreServer, models: Path) -> None:
    """The same objects are made twice; another plan is refused."""
    import s3fs

    real = s3fs.S3FileSystem._call_s3

    async def without_conditions(self: Any, method: str, **arguments: Any) -> Any:
        arguments.pop("IfNoneMatch", None)
        return await real(self, method, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_call_s3", without_conditions)
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(lazymerge.run, plan_of(models), OUT) for _ in range(2)]
            for each in runs:
                each.result()
        lazymerge.run(plan_of(models), OUT)  # which removes what the slower one may have left
        assert_equal(server, models)


def test_a_shard_that_somebody_replaces(server: StoreServer, models: Path) -> None:
    """As a worker of an earlier run of another plan does that comes back."""
    bucket = boto3.resource("s3", endpoint_url=server.address).Bucket("models")
    plan = plan_of(models)
    name = plan.shards[0].file
    replaced = threading.Event()

    def strike(request: Request) -> None:
        if request.line == "PUT /models/out/merged/config.json" and not replaced.is_set():
            replaced.set()
            bucket.put_object(Key=f"out/merged/{name}", Body=b"x" * plan.shards[0].size_bytes)

    server.after = strike
    with pytest.raises(LazymergeError, match=f"{name} is not what this run has made"):
        lazymerge.run(plan, OUT)
    assert "lazymerge.json" not in names_in_store()
    assert lazymerge.run(plan, OUT).resumed_tensors > 0
    assert_equal(server, models)


def test_uploads_of_an_earlier_plan(server: StoreServer, models: Path) -> None:
    """Of more shards; a worker that comes back cannot complete its upload any more."""
    client = boto3.client("s3", endpoint_url=server.address)
    for name in ("model-00009-of-00042.safetensors", "notes.bin"):
        client.create_multipart_upload(Bucket="models", Key=f"out/merged/{name}")
    lazymerge.run(plan_of(models), OUT)
    left = client.list_multipart_uploads(Bucket="models")["Uploads"]
    assert [upload["Key"] for upload in left] == ["out/merged/notes.bin"]


def test_an_input_that_changes_and_is_put_back(
    server: StoreServer, models: Path, tmp_path: Path
) -> None:
    """What was made meanwhile is not believed."""
    path = models / "a" / "model.safetensors"
    modified_ns = path.stat().st_mtime_ns

    def strike(request: Request) -> None:
        if request.line.startswith("PUT") and request.line.endswith("safetensors.json"):
            os.utime(path, ns=(0, 0))

    server.after = strike
    try:
        with pytest.raises(LazymergeError, match="was changed while it was merged"):
            lazymerge.run(plan_of(models), OUT)
    finally:
        os.utime(path, ns=(modified_ns, modified_ns))
    server.after = lambda _: None
    assert lazymerge.run(plan_of(models), OUT).resumed_tensors == 0
    assert_equal(server, models)


def test_a_run_that_was_stopped_until_another_took_its_lock(
    server: StoreServer, models: Path
) -> None:
    """It looks before it says that the output is complete, however late the thread is that keeps
    the lock."""
    bucket = boto3.resource("s3", endpoint_url=server.address).Bucket("models")

    def strike(request: Request) -> None:
        if request.line == "PUT /models/out/merged/config.json":
            bucket.put_object(Key="out/merged/.lazymerge/lock", Body=b"{}")

    server.after = strike
    with pytest.raises(LazymergeError, match="was removed or replaced while it was held"):
        lazymerge.run(plan_of(models), OUT)
    assert "lazymerge.json" not in names_in_store()


def test_what_is_there_already(server: StoreServer, models: Path) -> None:
    store = boto3.resource("s3", endpoint_url=server.address).Bucket("models")
    store.put_object(Key="out/merged/notes.txt", Body=b"mine")
    plan = plan_of(models)
    with pytest.raises(InputError, match=r"is not empty \(it holds notes.txt\)"):
        lazymerge.run(plan, OUT)
    with pytest.raises(InputError, match="it is not an earlier output of lazymerge"):
        lazymerge.run(plan, OUT, overwrite=True)
    store.Object("out/merged/notes.txt").delete()
    lazymerge.run(plan, OUT)
    with pytest.raises(InputError, match="is not empty"):
        lazymerge.run(plan_of(models, "slerp"), OUT)
    store.put_object(Key="out/merged/sub/notes.txt", Body=b"mine")
    with pytest.raises(InputError, match=r"no merge has written \(sub/notes.txt\)"):
        lazymerge.run(plan_of(models, "slerp"), OUT, overwrite=True)
    store.Object("out/merged/sub/notes.txt").delete()
    lazymerge.run(plan_of(models, "slerp"), OUT, overwrite=True)
    assert_equal(server, models, "slerp")
    store.Object("out/merged/config.json").delete()
    lazymerge.run(plan_of(models, "slerp"), OUT)
    assert_equal(server, models, "slerp")


def test_another_plan_is_refused(server: StoreServer, models: Path) -> None:
    server.before = lambda r: 403 if "PUT" in r.line and "config.json" in r.line else None
    with pytest.raises(InputError):
        lazymerge.run(plan_of(models), OUT)
    server.reset()
    with pytest.raises(InputError, match=r"not of this plan: the recipe has changed"):
        lazymerge.run(plan_of(models, "slerp"), OUT)
    lazymerge.run(plan_of(models), OUT, recheck=True)
    assert_equal(server, models)


def test_damage_is_found(server: StoreServer, models: Path) -> None:
    lazymerge.run(plan_of(models), OUT)
    store = boto3.resource("s3", endpoint_url=server.address).Bucket("models")
    shard = plan_of(models).shards[1]
    content = bytearray(objects(server)[shard.file])
    content[shard.tensors[0].start] ^= 1
    store.put_object(Key=f"out/merged/{shard.file}", Body=bytes(content))
    store.put_object(Key="out/merged/config.json", Body=b"{}")
    found = lazymerge.verify(OUT)
    (problem,) = found.problems
    assert shard.tensors[0].name in problem
    assert "has other bytes than were written" in problem
    assert found.edited == ("config.json",)
    store.put_object(Key="out/merged/lazymerge.json", Body=b"[]")
    with pytest.raises(InputError, match=r"lazymerge.json is damaged"):
        lazymerge.status(OUT)


def test_a_shard_made_twice_at_once(server: StoreServer, models: Path) -> None:
    """As machines of a cluster do that believe that each of them has it."""
    plan = plan_of(models).into_store()
    shard = plan.shards[0]
    names = {tensor.name for tensor in shard.tensors}
    work = work_of(plan, [t for t in plan.tasks if t.write.name in names], forgets=False)
    target = pickle.loads(pickle.dumps(Target(store_address(OUT), plan.fingerprint)))

    class Told(Silent):
        def finished(self, tensor: Any) -> None:
            pass

    def make(_: int) -> Any:
        record, held_bytes = store_shard(work, shard, target, Told(), Conditions(stamps_of(plan)))
        assert 0 < held_bytes <= shard.size_bytes
        return record

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(make, range(2))
    assert (first.etag, first.tensors) == (second.etag, second.tensors)
    assert objects(server)[shard.file] == local(models)[shard.file]
    assert pickle.loads(pickle.dumps(first)) == first


def test_statistics_and_what_is_not_finite(server: StoreServer, tmp_path: Path) -> None:
    tensors = {"model.layers.0.w": torch.full((300, 300), 3e38).bfloat16()}
    for name in "ab":
        write_checkpoint(tmp_path / name, tensors, {"model_type": "llama"})
    document = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / name)} for name in "ab"],
        "parameters": {"weight": 1.0, "normalize": False},
    }
    (tmp_path / "r.yml").write_text(yaml.safe_dump(document))
    report = lazymerge.run(lazymerge.plan(tmp_path / "r.yml", statistics=True), OUT)
    assert report.nonfinite[0].inf == 90_000
    assert "lazymerge-statistics.json" in names_in_store()
    with pytest.raises(LazymergeError, match="holds inf or nan"):
        lazymerge.run(lazymerge.plan(tmp_path / "r.yml"), OUT, strict=True)


def test_what_cannot_be_an_output(models: Path, tmp_path: Path) -> None:
    plan = plan_of(models)
    with pytest.raises(InputError, match="given as text, and not as a Path"):
        lazymerge.run(plan, Path(OUT))
    with pytest.raises(InputError, match="holds a name or password"):
        lazymerge.run(plan, "s3://KEY:SECRET@models/out")
    with pytest.raises(InputError, match="works on folders only"):
        lazymerge.report(OUT)
    with pytest.raises(InputError, match="are written into folders"):
        lazymerge.run(plan, OUT, intermediates={"x": tmp_path})


def test_no_such_bucket(server: StoreServer, models: Path) -> None:
    with pytest.raises(InputError, match="there is no bucket 'nowhere'"):
        lazymerge.run(plan_of(models), "s3://nowhere/out")


def test_memory_of_a_process(
    server: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With parts of their real length and the smallest limit: no more than was planned."""
    monkeypatch.setattr(uploads, "PART_BYTES", 8 << 20)
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"model.layers.{n}.w": torch.randn(3000, 2500, generator=generator).bfloat16()
            for n in range(4)
        }
        write_checkpoint(tmp_path / name, tensors, {"model_type": "llama"})
    document = {
        "merge_method": "linear",
        "models": [{"model": name} for name in "ab"],
        "parameters": {"weight": 0.5},
    }
    (tmp_path / "r.yml").write_text(yaml.safe_dump(document))
    monkeypatch.chdir(tmp_path)
    least = lazymerge.plan("r.yml").into_store().memory.smallest_limit_bytes
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lazymerge", "run", "r.yml", "-o", OUT, "--json", "-q"]
    done = subprocess.run(
        [*command, "--memory", str(least)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["measured_bytes"] <= report["memory"]["projected_bytes"] <= least
    lazymerge.run(lazymerge.plan("r.yml"), tmp_path / "local", fsync=False)
    name = "model.safetensors"
    assert objects(server)[name] == (tmp_path / "local" / name).read_bytes()
