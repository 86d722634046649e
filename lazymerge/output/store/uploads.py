"""Shards on their way into a store: what workers have written leaves memory as it is uploaded.

Every shard is a file in memory (memfd_create) of its full size, empty at first. Workers write
spans at their places, as into any other file. A part of which all bytes are there is uploaded,
several at a time, and then a hole takes its place.

    shard in memory    ··············▓▓▓▓▓▓▓▓▓▓▓▓░░░░░░░░░░░░·······
                        uploaded     │ on its   │ being       │ not begun
                                     │ way      │ written

Before a worker begins a span it asks for room (`await_room`), and waits while the parts that are
begun fill the window. A span near the first part that is still in memory need not wait: else
workers could fill the window with spans behind it, and wait for each other without end. Tensors are
made in the order of the file, so that parts are complete soon.

A shard is there under its name when all its parts are, by one request; until then nothing is. A
shard of one part is put whole. Whoever is killed leaves uploads that no listing of objects shows,
and that the next run aborts.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field

from ...errors import LazymergeError
from ..holes import make_hole
from ..layout import Placement, Shard, shard_header
from .client import PIECE_BYTES, NoUploadError, Store, StoredObject, Upload
from .records import FINGERPRINT_KEY, ShardRecord, TensorRecord, is_of_plan, new_record

PART_BYTES = 8 << 20
"""Of an upload: MOST_UPLOADS of them, at 100 MB/s and with 50 ms of waiting, come to 600 MB/s, as
8 parts of twice the length would; with a small limit of memory more of them are on their way."""

MOST_PARTS = 10_000
"""Of one object. Source: Amazon S3 user guide, multipart upload limits."""

MOST_UPLOADS = 10
"""Parts on their way at a time: the connections that the client has by default. Source: botocore,
max_pool_connections."""

WAKE_SECONDS = 0.1
"""How often who waits looks whether the run has been stopped."""

COMPLETE_SECONDS = 60.0
"""How long a store may take to make an object of its parts after the client has given up waiting
(s3fs: 15 s) and asked again: it is then told that there is no such upload."""

LOOK_SECONDS = 0.5
"""Between looks whether it is there."""

CLOSE_SECONDS = 2.0
"""How long a run that fails waits for requests to end."""

STEP_BYTES = 1 << 16
"""Parts are multiples of this, and so of a page of memory on every machine."""


def part_bytes(size_bytes: int) -> int:
    """Length of the parts that a shard is uploaded in, by its size: all but the last are equal, as
    some stores want it."""
    return max(PART_BYTES, -(-size_bytes // (MOST_PARTS * STEP_BYTES)) * STEP_BYTES)


def least_window_bytes(shards: Sequence[Shard], span_bytes: int) -> int:
    """The room with which a run can go on: a span, the two parts that it begins and ends in, and
    the longest header; or all there is, if that is less. span_bytes: of the longest span."""
    total = sum(shard.size_bytes for shard in shards)
    return min(_zone_bytes(shards, span_bytes) + _longest_part(shards), total)


def _zone_bytes(shards: Sequence[Shard], span_bytes: int) -> int:
    """How far beyond the beginning of the first part that is in memory a span may end and need not
    wait: so far that no span with bytes of that part does."""
    return span_bytes + _longest_part(shards) + max(shard.header_bytes for shard in shards)


def _longest_part(shards: Sequence[Shard]) -> int:
    return max(part_bytes(shard.size_bytes) for shard in shards)


Made = Callable[[ShardRecord], None]
"""Is told of every shard that is complete."""


@dataclass(slots=True)
class _Open:
    """A shard that is being uploaded.

    first: its first part among those of all shards. missing: bytes that are still to be written of
    each part. begun: parts that are in memory.
    tensors: those that are finished.
    """

    shard: Shard
    first: int
    part_bytes: int
    missing: list[int]
    descriptor: int = -1
    begun: set[int] = field(default_factory=set)
    upload: Upload | None = None
    etags: dict[int, str] = field(default_factory=dict)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    is_completing: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def size(self, part: int) -> int:
        """Bytes of a part."""
        return min(self.part_bytes, self.shard.size_bytes - part * self.part_bytes)

    def parts_of(self, start: int, stop: int) -> range:
        """Those that a byte range touches."""
        return range(start // self.part_bytes, -(-stop // self.part_bytes))


class ShardUploads:
    """Shards that are written into a store. A `PacedWriter`: methods may be called from several
    threads at once."""

    def __init__(
        self,
        store: Store,
        shards: Sequence[Shard],
        fingerprint: str,
        made: Made,
        sent: Callable[[int], None],
        *,
        window_bytes: int,
        span_bytes: int,
    ) -> None:
        """shards: in the order in which their tensors are made. fingerprint: of the plan.

        made: is told of every complete shard, from threads of this object's own.
        sent: is told of bytes that have been uploaded, from these threads too.
        window_bytes: what may be in memory of them; at least `least_window_bytes`.
        span_bytes: of the longest span.
        """
        self._store = store
        self._fingerprint = fingerprint
        self._made = made
        self._sent = sent
        self._zone = _zone_bytes(shards, span_bytes)
        self._ahead = max(0, window_bytes - least_window_bytes(shards, span_bytes))
        self._shards: list[_Open] = []
        self._of: dict[str, tuple[_Open, Placement]] = {}
        self._bases: list[int] = []
        base = first = 0
        for shard in shards:
            size = part_bytes(shard.size_bytes)
            count = max(1, -(-shard.size_bytes // size))
            opened = _Open(shard, first, size, [])
            opened.missing = [opened.size(part) for part in range(count)]
            self._shards.append(opened)
            self._bases.append(base)
            for tensor in shard.tensors:
                self._of[tensor.name] = opened, tensor
            first, base = first + count, base + count * size
        self._base_of = {
            opened.shard.file: at for opened, at in zip(self._shards, self._bases, strict=True)
        }
        self._left = len(self._shards)
        self._lowest = (0, 0)
        self._gone: set[int] = set()
        self._held = 0
        self._changed = threading.Condition()
        self._closing = False
        self._failed: BaseException | None = None
        self._pool = ThreadPoolExecutor(MOST_UPLOADS, "upload")
        self.most_held_bytes = 0

    # as a writer

    def await_room(
        self, tensor: str, start: int, stop: int, is_stopped: Callable[[], bool]
    ) -> bool:
        """Waits until a byte range of a tensor may be written; False: all has been stopped.

        Raises:
            LazymergeError: an upload has failed.
        """
        opened, placement = self._of[tensor]
        first, last = placement.start + start, placement.start + stop
        with self._changed:
            while not self._has_room(opened, first, last):
                if self._failed is not None:
                    raise self._failed
                if self._closing or is_stopped():
                    return False
                self._changed.wait(WAKE_SECONDS)
            self._open(opened)
            self._begin(opened, opened.parts_of(first, last))
        return True

    def written(self, tensor: str, start: int, stop: int) -> None:
        """Says that a byte range of a tensor has been written."""
        if start == stop:
            return
        opened, placement = self._of[tensor]
        self._wrote(opened, placement.start + start, placement.start + stop)

    def write(self, tensor: str, data: memoryview, offset: int) -> None:
        """Writes part of a tensor. offset: bytes from the tensor's first byte."""
        opened, placement = self._of[tensor]
        try:
            _write_all(opened.descriptor, data, placement.start + offset)
        except OSError as error:
            raise self.failure(tensor, error, len(data)) from error

    def place(self, tensor: str) -> tuple[int, int]:
        """Descriptor of the file that a tensor is in, and the tensor's first byte there."""
        opened, placement = self._of[tensor]
        return opened.descriptor, placement.start

    def failure(self, tensor: str, error: OSError, size_bytes: int) -> LazymergeError:
        """What `write` would raise for an error. size_bytes: what was still to be written."""
        url = self._store.address.url(self._of[tensor][0].shard.file)
        return LazymergeError(
            f"{url}: no memory for what is uploaded ({error.strerror}, {size_bytes:,} bytes); give "
            "--memory less, or free some"
        )

    # the end

    def finished(self, tensor: str, record: TensorRecord) -> None:
        """Says that all bytes of a tensor are written, and what is known of it."""
        opened, _ = self._of[tensor]
        with self._changed:
            opened.tensors[tensor] = record
            self._complete_if_ready(opened)

    def check(self) -> None:
        """Raises:
        LazymergeError: an upload has failed.
        """
        if self._failed is not None:
            raise self._failed

    def wait(self, check: Callable[[], None]) -> None:
        """Waits until all shards are complete. check: is called every WAKE_SECONDS.

        Raises:
            LazymergeError: an upload has failed.
        """
        with self._changed:
            for opened in self._shards:
                self._open(opened)  # one without any bytes of tensors, for which nobody has asked
                self._complete_if_ready(opened)
            while self._left:
                self.check()
                self._changed.wait(WAKE_SECONDS)
                check()
        self._pool.shutdown()

    def close(self) -> None:
        """Ends all uploads, and aborts those of shards that are not complete."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)
        threads = list(getattr(self._pool, "_threads", ()))
        for thread in threads:
            thread.join(CLOSE_SECONDS / max(1, len(threads)))
        with ThreadPoolExecutor(MOST_UPLOADS) as pool:
            open_uploads = [each.upload for each in self._shards if each.upload is not None]
            wait([pool.submit(self._abort, upload) for upload in open_uploads])
        for opened in self._shards:
            _close(opened)

    def _abort(self, upload: Upload) -> None:
        with suppress(Exception):  # the next run does so; what went wrong first is to be said
            self._store.abort(upload)

    # room; all of this with the lock

    def _has_room(self, opened: _Open, start: int, stop: int) -> bool:
        if self._base_of[opened.shard.file] + stop <= self._lowest_byte() + self._zone:
            return True
        touched = {*opened.parts_of(0, opened.shard.header_bytes), *opened.parts_of(start, stop)}
        return self._held + sum(map(opened.size, touched - opened.begun)) <= self._ahead

    def _lowest_byte(self) -> int:
        """Where the first part that has not left memory begins, among the bytes of all shards."""
        number, part = self._lowest
        while number < len(self._shards):
            opened = self._shards[number]
            while part < len(opened.missing) and opened.first + part in self._gone:
                self._gone.remove(opened.first + part)
                part += 1
            if part < len(opened.missing):
                if opened.shard.size_bytes == opened.shard.header_bytes:
                    self._open(opened)  # it has no bytes for which anybody would ask
                break
            number, part = number + 1, 0
        self._lowest = number, part
        if number == len(self._shards):
            return 1 << 62
        return self._bases[number] + part * self._shards[number].part_bytes

    def _begin(self, opened: _Open, parts: range) -> None:
        for part in parts:
            if part not in opened.begun:
                opened.begun.add(part)
                self._held += opened.size(part)
        self.most_held_bytes = max(self.most_held_bytes, self._held)

    def _open(self, opened: _Open) -> None:
        """Makes the file in memory, with its header."""
        if opened.descriptor >= 0 or opened.is_completing:
            return
        header = shard_header(opened.shard)
        opened.descriptor = os.memfd_create(opened.shard.file[:200], os.MFD_CLOEXEC)
        os.ftruncate(opened.descriptor, opened.shard.size_bytes)
        self._begin(opened, opened.parts_of(0, len(header)))
        _write_all(opened.descriptor, memoryview(header), 0)
        self._wrote(opened, 0, len(header))

    def _wrote(self, opened: _Open, start: int, stop: int) -> None:
        with self._changed:
            for part in opened.parts_of(start, stop):
                first = part * opened.part_bytes
                opened.missing[part] -= min(stop, first + opened.size(part)) - max(start, first)
                if not opened.missing[part] and not self._closing:
                    self._pool.submit(self._guarded, self._upload, opened, part)

    def _complete_if_ready(self, opened: _Open) -> None:
        is_ready = len(opened.etags) == len(opened.missing) and len(opened.tensors) == len(
            opened.shard.tensors
        )
        if is_ready and not opened.is_completing and not self._closing:
            opened.is_completing = True
            self._pool.submit(self._guarded, self._complete, opened)

    # requests, in the pool's threads

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            if self._failed is None and not self._closing:
                work(*arguments)
        except BaseException as error:
            with self._changed:
                self._failed = self._failed or error
                self._changed.notify_all()

    def _upload(self, opened: _Open, part: int) -> None:
        size, offset = opened.size(part), part * opened.part_bytes
        body = _Part(opened.descriptor, offset, size)
        if len(opened.missing) == 1:
            etag = self._store.put(opened.shard.file, body, metadata=self._metadata())
        else:
            etag = self._upload_part(opened, part, body)
        make_hole(opened.descriptor, offset, size)
        with self._changed:
            self._held -= size
            self._gone.add(opened.first + part)
            opened.etags[part + 1] = etag
            self._complete_if_ready(opened)
            self._changed.notify_all()
        self._sent(size)

    def _upload_part(self, opened: _Open, part: int, body: _Part) -> str:
        try:
            return self._store.upload_part(self._upload_of(opened), part + 1, body)
        except NoUploadError:
            raise LazymergeError(
                f"{self._store.address.url(opened.shard.file)}: its upload was aborted: by "
                "another run, or by a rule of the bucket's. Run it again; shards that are "
                "complete stay"
            ) from None

    def _metadata(self) -> Mapping[str, str]:
        return {FINGERPRINT_KEY: self._fingerprint}

    def _upload_of(self, opened: _Open) -> Upload:
        with opened.lock:
            if opened.upload is None:
                opened.upload = self._store.begin_upload(opened.shard.file, self._metadata())
            return opened.upload

    def _complete(self, opened: _Open) -> None:
        shard, etag = opened.shard, opened.etags.get(1, "")
        if opened.upload is not None:
            seconds = 0.0
            try:
                self._store.complete(opened.upload, opened.etags)
            except NoUploadError:  # by a request whose answer was lost, or has not come yet
                seconds = COMPLETE_SECONDS
            etag = self._etag_of(shard, seconds)
        found = StoredObject(shard.file, shard.size_bytes, etag)
        record = new_record(self._fingerprint, found, opened.tensors)
        self._store.put(record.name, record.as_bytes())
        opened.upload = None
        self._made(record)
        with self._changed:
            _close(opened)
            opened.tensors, opened.etags = {}, {}
            self._left -= 1
            self._changed.notify_all()

    def _etag_of(self, shard: Shard, seconds: float) -> str:
        """That of a shard's object, which must be there, whole and of this plan, after so long."""
        deadline = time.monotonic() + seconds
        while True:
            answer = self._store.head(shard.file)
            if answer is not None and is_of_plan(*answer, shard.size_bytes, self._fingerprint):
                return answer[0].etag
            if time.monotonic() >= deadline or self._closing:
                break
            time.sleep(LOOK_SECONDS)
        raise LazymergeError(
            f"{self._store.address.url(shard.file)} is not what was uploaded: another run has "
            "aborted its upload, or replaced it. Run it again; shards that are complete stay"
        )


def _close(opened: _Open) -> None:
    descriptor, opened.descriptor = opened.descriptor, -1
    if descriptor >= 0:
        os.close(descriptor)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    data = data.cast("B")
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


class _Part:
    """A byte range of a file in memory, as the store's client reads it and what sends it asks for
    it. Nothing of it is copied but the piece that is on its way."""

    def __init__(self, descriptor: int, start: int, size_bytes: int) -> None:
        self._descriptor = descriptor
        self._start = start
        self._size = size_bytes
        self._at = 0

    def __len__(self) -> int:
        return self._size

    def read(self, count: int = -1) -> bytes:
        """The next bytes."""
        left = self._size - self._at
        data = os.pread(
            self._descriptor, left if count < 0 else min(count, left), self._start + self._at
        )
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Goes to a place."""
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        """Where it is."""
        return self._at

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while piece := self.read(PIECE_BYTES):
            yield piece
