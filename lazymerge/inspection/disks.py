"""How fast disks are, and what of files the page cache holds.

What is timed is read past the cache (O_DIRECT), several stretches at a time, as a run's read-ahead
keeps several in flight.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

STRETCH_BYTES = 1 << 20
STREAMS = 8
"""Stretches in flight: 8 MB, a span of one input, as a run's read-ahead announces them."""

READING_SECONDS = 0.1
MOST_READ_BYTES = 256 << 20
LEAST_FILE_BYTES = STREAMS * STRETCH_BYTES

PATIENCE_SECONDS = 0.5
"""How long a disk is waited for beyond that: one that others keep busy may take minutes."""

WRITING_SECONDS = 0.25
WRITTEN_BYTES = 16 << 20
"""Between two waits for the disk; runs wait once a shard. With 1 MiB half the rate came out."""

MOST_WRITTEN_BYTES = 128 << 20

PROBES = 256
"""Places at which the page cache is asked, all files together; PROBE_PAGES pages at each. 10 µs a
place."""

PROBE_PAGES = 16


def cached_share(files: Sequence[tuple[Path, int]]) -> float | None:
    """The share of some files' bytes that is in the page cache; None where the system does not say.

    files: paths and sizes in bytes. Nothing of them is read.
    """
    total = cached = 0.0
    files = files[:: -(-len(files) // PROBES)] if files else []
    for path, size in files:
        share = _cached_share_of(path, size, max(1, PROBES // len(files)))
        if share is None:
            return None
        total += size
        cached += share * size
    return cached / total if total else None


def _cached_share_of(path: Path, size: int, probes: int) -> float | None:
    """probes: how many places of it to ask for."""
    if size == 0:
        return 1.0
    try:
        status = path.stat()
        # since Linux 5.2 the system says of others' files that all of them is there
        if os.geteuid() not in (0, status.st_uid) and not os.access(path, os.W_OK):
            return None
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return None
    try:
        resident = asked = 0
        length = min(size, PROBE_PAGES * mmap.PAGESIZE)
        spacing = (size - length) / probes  # the middles: where it begins is what planning has read
        starts = {
            round((probe + 0.5) * spacing)
            // mmap.ALLOCATIONGRANULARITY
            * mmap.ALLOCATIONGRANULARITY
            for probe in range(probes)
        }
        for start in starts:
            pages = _resident_pages(descriptor, start, min(length, size - start))
            resident += sum(pages)
            asked += len(pages)
        return resident / asked
    except (OSError, ValueError, AttributeError):
        return None
    finally:
        os.close(descriptor)


def _resident_pages(descriptor: int, start: int, length: int) -> list[int]:
    """One 0 or 1 for each page of a file's range.

    Raises:
        AttributeError: there is no mincore here.
        OSError: it fails.
    """
    prot = mmap.PROT_READ | mmap.PROT_WRITE  # private: ctypes wants it writable
    with mmap.mmap(descriptor, length, mmap.MAP_PRIVATE, prot, offset=start) as mapped:
        flags = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapped)
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        failed = mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(length), flags)
        del first
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return [flag & 1 for flag in flags]


def are_on_one_disk(paths: Sequence[Path]) -> bool:
    """Whether some paths lie, or would lie, on the same filesystem."""
    return len({_device(path) for path in paths}) == 1


def reading_rate(
    paths: Sequence[Path], *, is_sample_allowed: bool
) -> tuple[float | None, str | None]:
    """Bytes per second that the disk of some files gives, and the name of the file that was read to
    know it. (None, None) where that is not known.

    is_sample_allowed: the files themselves may be read. Else a library of this installation is, if
        it lies on the same disk.
    """
    devices = {device for path in paths if (device := _device(path)) is not None}
    if len(devices) != 1:
        return None, None
    if is_sample_allowed:
        path = max(paths, key=_size, default=None)
        rate = None if path is None else _direct_rate(path)
        if path is not None and rate is not None:
            return rate, path.name
    for path in _installed_files():
        if _device(path) in devices:
            return _direct_rate(path), path.name
    return None, None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _device(path: Path) -> int | None:
    """The disk that a path lies on, or would."""
    for place in (path.absolute(), *path.absolute().parents):
        try:
            return place.stat().st_dev
        except OSError:
            continue
    return None


def _installed_files() -> list[Path]:
    """Large files that are on this machine whatever is merged: torch's libraries."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return []
    files = [(_size(path), path) for path in (Path(spec.origin).parent / "lib").glob("*torch*")]
    return [path for size, path in sorted(files, reverse=True) if size >= LEAST_FILE_BYTES]


_Move = Callable[[int, "_Transfer"], None]


class _Transfer:
    """Threads that move bytes for a while; whoever waits for a disk that does not answer is left
    behind, and what was moved by then is what counts."""

    def __init__(
        self, move: Callable[[int, _Transfer], None], threads: int, seconds: float
    ) -> None:
        """move: is given its thread's number and this; adds what it has moved to `add`, and ends
        when `is_over`."""
        self._lock = threading.Lock()
        self._bytes = 0
        self._failed = False
        self._began = self._last = time.perf_counter()
        self._deadline = self._began + seconds

        def run(number: int) -> None:
            try:
                move(number, self)
            except OSError:
                self._failed = True

        running = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(max(0.0, self._deadline + PATIENCE_SECONDS - time.perf_counter()))

    @property
    def is_over(self) -> bool:
        return time.perf_counter() > self._deadline

    def add(self, count: int) -> None:
        """Says that so many bytes more have been moved."""
        with self._lock:
            self._bytes += count
            self._last = time.perf_counter()

    @property
    def rate(self) -> float | None:
        """Bytes per second; None if something failed, or nothing was moved."""
        with self._lock:
            if self._failed or not self._bytes:
                return None
            return self._bytes / (self._last - self._began)


def _direct_rate(path: Path) -> float | None:
    """Reads stretches from all over a file, past the page cache; None where that does not go."""
    direct = getattr(os, "O_DIRECT", None)
    size = _size(path)
    if direct is None or size < LEAST_FILE_BYTES:
        return None
    flags = os.O_RDONLY | os.O_CLOEXEC | direct
    count = min(size, MOST_READ_BYTES) // STRETCH_BYTES
    spacing = (size - STRETCH_BYTES) / max(1, count - 1)
    starts = [round(n * spacing) // mmap.PAGESIZE * mmap.PAGESIZE for n in range(count)]

    def read(first: int, transfer: _Transfer) -> None:
        descriptor = os.open(path, flags)
        try:
            with mmap.mmap(-1, STRETCH_BYTES) as room:
                for start in starts[first::STREAMS]:
                    if transfer.is_over:
                        break
                    transfer.add(os.preadv(descriptor, [room], start))
        finally:
            os.close(descriptor)

    return _Transfer(read, STREAMS, READING_SECONDS).rate


def writing_rate(place: Path) -> float | None:
    """Bytes per second that a file without a name takes in a folder, or the nearest that exists;
    None where there is no such thing. It is gone when it is closed."""
    unnamed = getattr(os, "O_TMPFILE", None)
    folder = next((f for f in (place.absolute(), *place.absolute().parents) if f.is_dir()), None)
    if unnamed is None or folder is None:
        return None
    flags = os.O_WRONLY | os.O_CLOEXEC | unnamed

    def write(_: int, transfer: _Transfer) -> None:
        data = memoryview(os.urandom(1 << 16) * (WRITTEN_BYTES >> 16))
        descriptor = os.open(folder, flags, 0o600)
        try:
            for _ in range(MOST_WRITTEN_BYTES // WRITTEN_BYTES):
                if transfer.is_over:
                    break
                count = os.write(descriptor, data)
                os.fdatasync(descriptor)
                transfer.add(count)
        finally:
            os.close(descriptor)

    return _Transfer(write, 1, WRITING_SECONDS).rate
