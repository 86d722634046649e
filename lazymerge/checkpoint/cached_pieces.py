"""Pieces of files that lie elsewhere, as they lie in a cache (range_cache.py): named and sealed.

    ranges/FILE/FROM-TO    the bytes, then a seal of 16

FILE is a keyed hash of address, version and size. The seal is a keyed hash of the bytes, FILE and
place. The key is the user's, and not in the cache: what is damaged, what somebody else has made and
what belongs elsewhere has no seal that fits, and is not believed.

A piece is written under another name, locked, and gets its own when it is whole. Links are not
followed.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

from xxhash import xxh3_128

from ..errors import LazymergeError
from .transport import RemoteFile

SEAL_BYTES = 16
KEY_BYTES = 32

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

Range = tuple[int, int]
"""First byte, and the one after the last."""


def cut(start: int, stop: int, piece_bytes: int) -> Iterator[Range]:
    """A range in pieces, cut at multiples of `piece_bytes`."""
    while start < stop:
        end = min(stop, (start // piece_bytes + 1) * piece_bytes)
        yield start, end
        start = end


def places(file: RemoteFile, piece: Range, piece_bytes: int) -> tuple[Range, ...]:
    """What may hold a piece: itself, or all of what it was cut from."""
    first = piece[0] // piece_bytes * piece_bytes
    whole = (first, min(first + piece_bytes, file.size_bytes))
    return (piece,) if piece == whole else (piece, whole)


def piece_name(piece: Range) -> str:
    return f"{piece[0]}-{piece[1]}"


def piece_size(piece: Range) -> int:
    """Of a piece's file."""
    return piece[1] - piece[0] + SEAL_BYTES


def shelf_name(key: bytes, file: RemoteFile) -> str:
    """Of the folder that holds a file's pieces."""
    text = "\0".join([file.url, str(file.size_bytes), file.pin])
    return blake2b(text.encode("utf-8", "surrogatepass"), key=key, digest_size=16).hexdigest()


@contextmanager
def opened(name: str, folder: int, flags: int = READ) -> Iterator[int]:
    """Something in a folder, open while the block runs.

    Raises:
        OSError: it cannot be opened.
    """
    descriptor = os.open(name, flags, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class Shelf:
    """The pieces of one file at one version. Safe to use from several threads."""

    def __init__(self, root: int, key: bytes, file: RemoteFile) -> None:
        """root: the folder `ranges`, open."""
        self.file = file
        self._root = root
        self._key = key
        self._name = shelf_name(key, file)
        self._mutex = threading.Lock()
        self._folders: list[int] = []  # the last one is in use; others may be, by other threads

    def close(self) -> None:
        """Closes its files. It must not be in use."""
        while self._folders:
            os.close(self._folders.pop())

    def _folder(self) -> int:
        with self._mutex:
            if not self._folders:
                self._folders.append(os.open(self._name, FOLDER, dir_fd=self._root))
            return self._folders[-1]

    def has(self, piece: Range) -> bool:
        """Whether there is something with a piece's name and size."""
        with suppress(OSError):
            status = os.stat(piece_name(piece), dir_fd=self._folder(), follow_symlinks=False)
            return stat.S_ISREG(status.st_mode) and status.st_size == piece_size(piece)
        return False

    def touch(self, piece: Range, now_ns: int) -> None:
        """Says that a piece is used.

        Raises:
            OSError: there is none.
        """
        times = (now_ns, now_ns)
        os.utime(piece_name(piece), ns=times, dir_fd=self._folder(), follow_symlinks=False)

    def load(self, piece: Range) -> memoryview | None:
        """A piece's bytes; one that is not what it should be is removed.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        folder, name = self._folder(), piece_name(piece)
        with opened(name, folder) as descriptor:
            status = os.fstat(descriptor)
            data = bytearray(piece_size(piece))
            is_whole = stat.S_ISREG(status.st_mode) and status.st_size == len(data)
            if is_whole and os.preadv(descriptor, [data], 0) == len(data):
                content = memoryview(data)[:-SEAL_BYTES]
                digest = xxh3_128(content, self.seed).digest()
                if self.seal(digest, piece) == data[-SEAL_BYTES:]:
                    now = time.time_ns()
                    with suppress(OSError):  # a cache that others own serves all the same
                        os.utime(descriptor, ns=(now, now))
                    return content
        os.unlink(name, dir_fd=folder)
        return None

    @property
    def seed(self) -> int:
        """Of the hash of contents."""
        return int.from_bytes(self._key[:8], "little")

    def seal(self, digest: bytes, piece: Range) -> bytes:
        """What follows a piece's bytes. digest: of them."""
        text = f"{self._name} {piece_name(piece)} ".encode() + digest
        return blake2b(text, key=self._key, digest_size=SEAL_BYTES).digest()

    def begin(self, piece: Range) -> Partial:
        """A piece that is to be written.

        Raises:
            OSError: it cannot be.
        """
        try:
            return Partial(self, self._folder(), piece)
        except FileNotFoundError:  # nobody had it yet, or it was empty and went
            with suppress(FileExistsError):
                os.mkdir(self._name, 0o700, dir_fd=self._root)
            with self._mutex:
                self._folders.append(os.open(self._name, FOLDER, dir_fd=self._root))
            return Partial(self, self._folder(), piece)


class Partial:
    """A piece that is being written."""

    def __init__(self, shelf: Shelf, folder: int, piece: Range) -> None:
        self._shelf = shelf
        self._folder = folder
        self._piece = piece
        self._name = f"{piece_name(piece)}.{os.urandom(8).hex()}.partial"
        self._hash = xxh3_128(seed=shelf.seed)
        self._descriptor = os.open(self._name, _CREATE, 0o600, dir_fd=folder)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, data: memoryview) -> None:
        """The next bytes.

        Raises:
            OSError: they cannot be written.
        """
        self._hash.update(data)
        self._write(data)

    def finish(self) -> None:
        """Seals it, and gives it its name.

        Raises:
            OSError: it cannot be.
        """
        self._write(memoryview(self._shelf.seal(self._hash.digest(), self._piece)))
        now = time.time_ns()
        os.utime(self._descriptor, ns=(now, now))
        names = (self._name, piece_name(self._piece))
        os.rename(*names, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._close()

    def discard(self) -> None:
        """Removes it."""
        with suppress(OSError):
            os.unlink(self._name, dir_fd=self._folder)
        self._close()

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[os.write(self._descriptor, data) :]

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def is_abandoned(name: str, folder: int) -> bool:
    """Whether nobody writes a piece any more; it is removed then. name: that it has until then."""
    with suppress(OSError), opened(name, folder) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.unlink(name, dir_fd=folder)
    return True


def _key_path() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache_home) / "lazymerge" / "ranges.key"


def read_key() -> bytes | None:
    """The user's key; None where there is none yet."""
    try:
        key = _key_path().read_bytes()
    except OSError:
        return None
    return key if len(key) == KEY_BYTES else None


def make_key() -> bytes:
    """The user's key, made by whoever is first.

    Raises:
        LazymergeError: it cannot be kept.
    """
    path = _key_path()
    partial = path.with_name(f"{path.name}.{os.urandom(8).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, _CREATE, 0o600)
        try:
            os.write(descriptor, os.urandom(KEY_BYTES))
        finally:
            os.close(descriptor)
        try:
            with suppress(FileExistsError):
                os.link(partial, path)
            if read_key() is None:  # something else is there
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise LazymergeError(
            f"{path}: the key of the cache cannot be written ({error.strerror}). Set "
            "XDG_CACHE_HOME to a folder of yours that stays"
        ) from error
    key = read_key()
    if key is None:
        raise LazymergeError(f"{path}: the key of the cache cannot be read. Remove it")
    return key
