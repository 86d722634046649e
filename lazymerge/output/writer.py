"""Shards on disk: preallocated, written at any place in any order, renamed when complete.

model-00001-of-00002.safetensors.partial   while any tensor of it is missing
model-00001-of-00002.safetensors           complete, and synced unless told otherwise
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from ..errors import DoesNotFitError, LazymergeError
from .layout import Placement, Shard, shard_header

PARTIAL_SUFFIX = ".partial"


class ShardWriter:
    """All shards of one output. Methods may be called from several threads at once."""

    def __init__(self, folder: Path, shards: Sequence[Shard], *, fsync: bool = True) -> None:
        self._folder = folder
        self._fsync = fsync
        self._shards = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._placements: dict[str, Placement] = {
            tensor.name: tensor for shard in shards for tensor in shard.tensors
        }
        self._all_shards = tuple(shards)
        self._missing = {shard.file: len(shard.tensors) for shard in shards}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def create(self) -> None:
        """Creates and preallocates every shard and writes its header.

        Raises:
            DoesNotFitError: the disk is full.
            LazymergeError: a file exists already, or cannot be created.
        """
        for shard in self._all_shards:
            path = self._partial(shard)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                self._descriptors[shard.file] = descriptor
                _preallocate(descriptor, shard.size_bytes)
            except OSError as error:
                raise write_error(path, error, shard.size_bytes) from error
            self._write_at(shard, memoryview(shard_header(shard)), 0)

    def write(self, tensor: str, data: memoryview, offset: int) -> None:
        """Writes part of a tensor.

        offset: bytes from the tensor's first byte.
        """
        shard = self._shards[tensor]
        self._write_at(shard, data, self._placements[tensor].start + offset)

    def finish_tensor(self, tensor: str) -> None:
        """Says that all bytes of a tensor are written; the last one completes its shard."""
        shard = self._shards[tensor]
        with self._lock:
            self._missing[shard.file] -= 1
            if self._missing[shard.file]:
                return
            descriptor = self._descriptors.pop(shard.file)
        path = self._partial(shard)
        try:
            try:
                if self._fsync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            path.rename(self._folder / shard.file)
            if self._fsync:
                sync_folder(self._folder)
        except OSError as error:
            raise write_error(path, error) from error

    def close(self) -> None:
        """Closes what is still open; incomplete shards keep their partial names."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def discard(self) -> None:
        """Removes every file this writer has made, complete or not."""
        self.close()
        for shard in self._all_shards:
            self._partial(shard).unlink(missing_ok=True)
            (self._folder / shard.file).unlink(missing_ok=True)

    def _partial(self, shard: Shard) -> Path:
        return self._folder / (shard.file + PARTIAL_SUFFIX)

    def _write_at(self, shard: Shard, data: memoryview, offset: int) -> None:
        descriptor = self._descriptors[shard.file]
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(descriptor, data[done:], offset + done)
        except OSError as error:
            raise write_error(self._partial(shard), error, len(data) - done) from error


def sync_folder(folder: Path) -> None:
    """Makes renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _preallocate(descriptor: int, size_bytes: int) -> None:
    """Reserves the disk space, so that a full disk shows now and not after an hour."""
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size_bytes)  # a filesystem that cannot reserve


def write_error(path: Path, error: OSError, size_bytes: int = 0) -> LazymergeError:
    """What to raise for an error of the system while a file was written.

    size_bytes: what was still to be written, 0 if unknown.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        wanted = f" ({size_bytes} bytes were to be written)" if size_bytes else ""
        return DoesNotFitError(
            f"no room for {path}: {error.strerror}{wanted}; "
            "free some space or choose another output folder"
        )
    return LazymergeError(f"cannot write {path}: {error.strerror}")
