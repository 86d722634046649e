"""Shards on their way into a store that takes its time: what is in memory, and what arrives."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytest
from lazymerge.errors import LazymergeError
from lazymerge.output.layout import OutputTensor, Placement, Shard, lay_out, shard_header
from lazymerge.output.store import uploads
from lazymerge.output.store.address import StoreAddress
from lazymerge.output.store.client import Body, Store, StoredObject, Upload
from lazymerge.output.store.records import FINGERPRINT_KEY, ShardRecord, TensorRecord
from lazymerge.output.store.uploads import ShardUploads, least_window_bytes, part_bytes

SPAN_BYTES = 150_000


class SlowStore:
    """Keeps what it is given, late, and fails when it is told to."""

    address = StoreAddress("bucket", "out")

    def __init__(self, seconds: float = 0.0, fails_at: int = -1) -> None:
        self.seconds, self.fails_at = seconds, fails_at
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.calls = 0

    def _receive(self, body: bytes | Body) -> bytes:
        time.sleep(self.seconds * random.random())
        self.calls += 1
        if self.calls == self.fails_at:
            raise LazymergeError("s3://bucket/out: the storage fails")
        return body if isinstance(body, bytes) else body.read()

    def put(self, name: str, body: bytes | Body, **_: Any) -> str:
        self.objects[name] = self._receive(body)
        return "etag"

    def begin_upload(self, name: str, metadata: Mapping[str, str]) -> Upload:
        assert metadata == {FINGERPRINT_KEY: "plan"}
        self.parts[name] = {}
        return Upload(name, name)

    def upload_part(self, upload: Upload, number: int, body: Body) -> str:
        self.parts[upload.name][number] = self._receive(body)
        return f"etag {number}"

    def complete(self, upload: Upload, etags: Mapping[int, str]) -> None:
        parts = self.parts.pop(upload.name)
        assert etags == {number: f"etag {number}" for number in parts}
        assert sorted(parts) == list(range(1, len(parts) + 1))
        self.objects[upload.name] = b"".join(parts[number] for number in sorted(parts))

    def head(self, name: str) -> tuple[StoredObject, Mapping[str, str]]:
        found = StoredObject(name, len(self.objects[name]), "etag")
        return found, {FINGERPRINT_KEY: "plan"}

    def abort(self, upload: Upload) -> None:
        self.parts.pop(upload.name, None)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", 1 << 16)


def shards_of(seed: int) -> tuple[Shard, ...]:
    """Of tensors from none to several parts, of dtypes in any order."""
    drawn = random.Random(seed)
    tensors = [
        OutputTensor(f"t{n}", drawn.choice(["F32", "BF16", "F64"]), (drawn.choice(SIZES),))
        for n in range(30)
    ]
    return lay_out(tensors, 400_000)


SIZES = (0, 1, 100, 8192, 20_000, 70_001)


def spans(tensor: Placement) -> Iterator[tuple[int, int]]:
    for start in range(0, tensor.size_bytes, SPAN_BYTES):
        yield start, min(start + SPAN_BYTES, tensor.size_bytes)


def write_all(made: ShardUploads, shards: tuple[Shard, ...], workers: int) -> None:
    """As workers do: the next span to whoever asks first."""
    waiting = [(tensor, *span) for s in shards for tensor in s.tensors for span in spans(tensor)]
    left = {t.name: max(1, len(list(spans(t)))) for s in shards for t in s.tensors}
    lock, errors = threading.Lock(), []

    def finish(tensor: Placement) -> None:
        with lock:
            left[tensor.name] -= 1
            is_last = not left[tensor.name]
        if is_last:
            made.finished(tensor.name, TensorRecord(f"sum of {tensor.name}"))

    def work() -> None:
        try:
            while True:
                with lock:
                    if not waiting or errors:
                        return
                    tensor, start, stop = waiting.pop(0)
                if not made.await_room(tensor.name, start, stop, lambda: bool(errors)):
                    return
                content = contents(tensor)[start:stop]
                if start % 2:
                    made.write(tensor.name, memoryview(content), start)
                else:
                    descriptor, first = made.place(tensor.name)
                    os.pwrite(descriptor, content, first + start)
                made.written(tensor.name, start, stop)
                finish(tensor)
        except BaseException as error:
            errors.append(error)

    for shard in shards:
        for tensor in shard.tensors:
            if not tensor.size_bytes:
                finish(tensor)
    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def contents(tensor: Placement) -> bytes:
    return random.Random(tensor.name).randbytes(tensor.size_bytes)


def expected(shard: Shard) -> bytes:
    return shard_header(shard) + b"".join(contents(tensor) for tensor in shard.tensors)


@pytest.mark.parametrize("more_bytes", [0, 100_000, 10_000_000])
@pytest.mark.parametrize("workers", [1, 4])
def test_all_arrives_and_little_is_held(seed: int, more_bytes: int, workers: int) -> None:
    shards, store, made = shards_of(seed), SlowStore(0.002), list[ShardRecord]()
    window = least_window_bytes(shards, SPAN_BYTES) + more_bytes
    sent: list[int] = []
    uploading = ShardUploads(
        cast("Store", store),
        shards,
        "plan",
        made.append,
        sent.append,
        window_bytes=window,
        span_bytes=SPAN_BYTES,
    )
    write_all(uploading, shards, workers)
    uploading.wait(lambda: None)
    for shard in shards:
        assert store.objects[shard.file] == expected(shard)
    assert {record.file for record in made} == {shard.file for shard in shards}
    for record in made:
        assert all(each.checksum == f"sum of {name}" for name, each in record.tensors.items())
    assert uploading.most_held_bytes <= window
    assert sum(sent) == sum(shard.size_bytes for shard in shards)
    assert not store.parts


def test_a_shard_without_bytes_keeps_nobody_waiting() -> None:
    """The first of all, and one in the middle, with as little room as possible."""
    sizes = [0, 80_000, 0, 80_000]
    shards = lay_out([OutputTensor(f"t{n}", "F32", (s,)) for n, s in enumerate(sizes)], 0)
    assert len(shards) == len(sizes)
    store = SlowStore()
    uploading = ShardUploads(
        cast("Store", store),
        shards,
        "plan",
        lambda _: None,
        lambda _: None,
        window_bytes=least_window_bytes(shards, SPAN_BYTES),
        span_bytes=SPAN_BYTES,
    )
    write_all(uploading, shards, 1)
    uploading.wait(lambda: None)
    for shard in shards:
        assert store.objects[shard.file] == expected(shard)


def test_a_store_that_fails_stops_the_workers(seed: int) -> None:
    shards, store = shards_of(seed), SlowStore(0.001, fails_at=5)
    uploading = ShardUploads(
        cast("Store", store),
        shards,
        "plan",
        lambda _: None,
        lambda _: None,
        window_bytes=least_window_bytes(shards, SPAN_BYTES),
        span_bytes=SPAN_BYTES,
    )
    with pytest.raises(LazymergeError, match="the storage fails"):
        write_all(uploading, shards, 2)
    uploading.close()
    assert not store.parts


def test_parts_are_as_large_as_they_must_be() -> None:
    for size in (0, 1, 5_000_000_000, 700_000_000_000, 5_000_000_000_000):
        part = part_bytes(size)
        assert part * 10_000 >= size
        assert part % 65536 == 0
