"""Byte ranges of files that lie elsewhere, kept on the local disk for later runs.

    DIR/CACHEDIR.TAG          tells backup programs what this is
    DIR/lock                  held while room is made; how many bytes are taken
    DIR/ranges/FILE/FROM-TO   a piece (cached_pieces.py)

Pieces that were used longest ago go first. Those that this process has used or brought stay: a
merge that needs more than there is room for keeps what fits, and finds it the next time.

Several processes may use a cache at once, and each may end at any point. Nothing outside DIR is
touched, and nothing in it that has another name.

Why no library does this: fsspec's caches have no bound of size and no checksums, and are one
process's; diskcache unpickles what it finds.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from heapq import nsmallest
from pathlib import Path
from typing import Any

from ..errors import InputError, LazymergeError
from ..sizes import format_bytes
from .cached_pieces import (
    FOLDER,
    READ,
    Partial,
    Range,
    Shelf,
    cut,
    is_abandoned,
    make_key,
    opened,
    piece_name,
    piece_size,
    places,
    read_key,
    shelf_name,
)
from .transport import RemoteFile, Take

DISK_BLOCK_BYTES = 4096
"""Pieces are counted in such blocks, as disks hold them."""

ROOM_SHARE = 1 / 64
"""Of the limit: room that is made at once, so that a cache is not looked through for each piece."""

MOST_REMOVED = 4096
"""Pieces that are removed before the cache is looked through again: their names are in memory."""

TAG_TEXT = b"""Signature: 8a477f597d28d172789f06886806bc55
# Ranges of models that lie elsewhere, kept by lazymerge. https://bford.info/cachedir/
"""

_OWN_NAMES = frozenset({"CACHEDIR.TAG", "lock", "ranges"})
_SHELF = re.compile(r"[0-9a-f]{32}")
_PIECE = re.compile(r"(\d{1,19})-(\d{1,19})")
_PARTIAL = re.compile(r"(\d{1,19})-(\d{1,19})\.[0-9a-f]{16}\.partial")
_NEW = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def is_keepable(file: RemoteFile) -> bool:
    """Whether a file's version is known, and will not be that of other bytes."""
    return file.pin != "without version" and file.is_lasting


def held_bytes(folder: str, needed: Iterable[tuple[RemoteFile, Range]], piece_bytes: int) -> int:
    """How much of some ranges a cache has, by names and sizes alone. Nothing is written."""
    key = read_key()
    if key is None or not os.path.isdir(folder):
        return 0
    held = 0
    shelves: dict[RemoteFile, str] = {}
    for file, (start, stop) in needed:
        shelf = shelves.setdefault(file, shelf_name(key, file))
        path = os.path.join(folder, "ranges", shelf)
        for piece in cut(start, stop, piece_bytes):
            for whole in places(file, piece, piece_bytes):
                with suppress(OSError):
                    if os.lstat(os.path.join(path, piece_name(whole))).st_size == piece_size(whole):
                        held += piece[1] - piece[0]
                        break
    return held


def taken_bytes(folder: str) -> int:
    """What a cache occupies, as its own processes have written it down."""
    try:
        descriptor = os.open(os.path.join(folder, "lock"), READ)
        try:
            text = os.read(descriptor, 20)
        finally:
            os.close(descriptor)
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def default_limit_bytes(folder: str, planned_bytes: int = 0) -> int:
    """What a cache may occupy where nobody says: half of what is free and what it occupies already.

    planned_bytes: that something else is about to take of the same disk.
    """
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = max(0, shutil.disk_usage(place).free - planned_bytes)
    return (free + taken_bytes(folder)) // 2


def check_cache_folder(folder: str) -> None:
    """Checks that a folder is a cache, or may become one.

    Raises:
        InputError: it is something else.
    """
    try:
        names = set(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"the cache {folder} cannot be used: {error.strerror}") from None
    if names - _OWN_NAMES:
        raise InputError(
            f"--cache {folder}: holds other things ({sorted(names - _OWN_NAMES)[0][:200]!r}). "
            "Name an empty folder, or one that does not exist yet"
        )


class RangeCache:
    """A cache of byte ranges. Safe to use from several threads.

    found_bytes, brought_bytes: what `read` had from it, and what had to be fetched for it.
    problem: why nothing more is kept.
    """

    def __init__(self, folder: str, limit_bytes: int | None, piece_bytes: int) -> None:
        """Opens a cache, and makes it where there is none.

        limit_bytes: that it may occupy; None: default_limit_bytes.
        piece_bytes: how ranges are cut.

        Raises:
            InputError: the folder is something else, or cannot be used.
        """
        check_cache_folder(folder)
        self.folder = folder
        self._piece_bytes = piece_bytes
        self._began_ns = time.time_ns()
        self._shelves: dict[RemoteFile, Shelf] = {}
        self._mutex = threading.RLock()
        self._is_full = False
        self.found_bytes = 0
        self.brought_bytes = 0
        self.problem: str | None = None
        try:
            self._make()
        except OSError as error:
            raise InputError(
                f"the cache {folder} cannot be used ({error.strerror}). Name a folder on a disk of "
                "this machine that you may write to"
            ) from error
        limit = default_limit_bytes(folder) if limit_bytes is None else limit_bytes
        self.limit_bytes = limit
        with self._locked():
            self._write_taken(self._scan()[0])

    def _make(self) -> None:
        os.makedirs(self.folder, 0o700, exist_ok=True)
        tag = os.path.join(self.folder, "CACHEDIR.TAG")
        with suppress(FileExistsError), open(tag, "xb") as stream:
            stream.write(TAG_TEXT)
        with suppress(FileExistsError):
            os.mkdir(os.path.join(self.folder, "ranges"), 0o700)
        self._key = read_key() or make_key()
        self._root = os.open(os.path.join(self.folder, "ranges"), FOLDER)
        self._lock = os.open(os.path.join(self.folder, "lock"), os.O_RDWR | _NEW, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    def close(self) -> None:
        """Closes its files. It must not be used any more."""
        with self._mutex:
            for shelf in self._shelves.values():
                shelf.close()
            self._shelves.clear()
            for descriptor in (self._root, self._lock):
                with suppress(OSError):
                    os.close(descriptor)
            self._root = self._lock = -1

    def protect(self, file: RemoteFile, ranges: Iterable[Range]) -> None:
        """Says that ranges will be needed: what there is of them stays."""
        shelf = self._shelf(file)
        now = time.time_ns()
        for start, stop in ranges:
            for piece in cut(start, stop, self._piece_bytes):
                for whole in places(file, piece, self._piece_bytes):
                    with suppress(OSError):
                        shelf.touch(whole, now)

    def read(
        self,
        file: RemoteFile,
        start: int,
        stop: int,
        take: Take,
        fetch: Callable[[int, int, Take], None],
        *,
        keeps: bool = True,
    ) -> None:
        """Hands a byte range on, from the cache where it has it.

        fetch: gets a range from where the file lies. keeps: what it brings is kept.

        Raises what `fetch` and `take` raise.
        """
        shelf = self._shelf(file)
        waiting = deque(cut(start, stop, self._piece_bytes))
        while waiting:
            piece = waiting.popleft()
            data = self._load(shelf, piece)
            if data is not None:
                take(data)
                with self._mutex:
                    self.found_bytes += len(data)
                continue
            missing = deque([piece])
            while waiting and not self._has(shelf, waiting[0]):
                missing.append(waiting.popleft())
            with self._mutex:
                self.brought_bytes += missing[-1][1] - missing[0][0]
            if keeps:
                self._fetch(shelf, missing, take, fetch)
            else:
                fetch(missing[0][0], missing[-1][1], take)

    def fill(
        self, file: RemoteFile, start: int, stop: int, fetch: Callable[[int, int, Take], None]
    ) -> None:
        """Has a byte range, and what it lacks of it by one request.

        fetch: as of `read`.

        Raises:
            LazymergeError: there is no room for it.

        And what `fetch` raises.
        """
        shelf = self._shelf(file)
        missing = self._missing(shelf, start, stop)
        if missing:
            first, last = missing[0][0], missing[-1][1]
            self._fetch(shelf, deque(cut(first, last, self._piece_bytes)), _nowhere, fetch)
        if self._missing(shelf, start, stop):
            why = self.problem or f"its limit is {format_bytes(self.limit_bytes)}"
            raise LazymergeError(
                f"{file.url.rpartition(' ')[2]}: the cache {self.folder} has no room for "
                f"{format_bytes(stop - start)} of it ({why}). Give it more (--cache-limit)"
            )

    def has(self, file: RemoteFile, start: int, stop: int) -> bool:
        """Whether there is a byte range, by names and sizes."""
        return not self._missing(self._shelf(file), start, stop)

    def _missing(self, shelf: Shelf, start: int, stop: int) -> list[Range]:
        pieces = cut(start, stop, self._piece_bytes)
        return [piece for piece in pieces if not self._has(shelf, piece)]

    def _shelf(self, file: RemoteFile) -> Shelf:
        with self._mutex:
            if file not in self._shelves:
                self._shelves[file] = Shelf(self._root, self._key, file)
            return self._shelves[file]

    # what there is

    def _has(self, shelf: Shelf, piece: Range) -> bool:
        return any(shelf.has(whole) for whole in places(shelf.file, piece, self._piece_bytes))

    def _load(self, shelf: Shelf, piece: Range) -> memoryview | None:
        """A piece, or the part of a larger one; None where there is none that can be believed."""
        for whole in places(shelf.file, piece, self._piece_bytes):
            with suppress(OSError):
                data = shelf.load(whole)
                if data is not None:
                    return data[piece[0] - whole[0] : piece[1] - whole[0]]
        return None

    # what comes

    def _fetch(
        self,
        shelf: Shelf,
        missing: deque[Range],
        take: Take,
        fetch: Callable[[int, int, Take], None],
    ) -> None:
        """Fetches neighbouring pieces, and keeps each that has come whole."""
        start, stop = missing[0][0], missing[-1][1]
        current: Partial | None = None
        left = 0

        def both(data: Any) -> None:
            nonlocal current, left
            take(data)
            view = memoryview(data).cast("B")
            while view and missing:
                if not left:
                    left = missing[0][1] - missing[0][0]
                    current = self._begin(shelf, missing[0])
                part = view[:left]
                if current is not None and not self._written(current, part):
                    current = None
                left -= len(part)
                view = view[len(part) :]
                if not left:
                    if current is not None:
                        self._finish(current)
                    current = None
                    missing.popleft()

        try:
            fetch(start, stop, both)
        finally:
            if current is not None:
                current.discard()

    def _begin(self, shelf: Shelf, piece: Range) -> Partial | None:
        """A piece that is to be written; None where there is no room for it."""
        if self._is_full or self.problem is not None:
            return None
        try:
            with self._locked():
                taken = self._read_taken()
                needed = _occupied(piece_size(piece))
                if taken + needed > self.limit_bytes:
                    taken = self._make_room(needed)
                if taken + needed > self.limit_bytes:
                    self._is_full = True
                    return None
                partial = shelf.begin(piece)
                self._write_taken(taken + needed)
                return partial
        except OSError as error:
            self._give_up(error)
            return None

    def _written(self, partial: Partial, data: memoryview) -> bool:
        try:
            partial.write(data)
        except OSError as error:
            partial.discard()
            self._give_up(error)
            return False
        return True

    def _finish(self, partial: Partial) -> None:
        try:
            partial.finish()
        except OSError as error:
            partial.discard()
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """A cache that cannot be written to is no reason to end a run."""
        self.problem = error.strerror or type(error).__name__

    # room; all of this with the lock

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _read_taken(self) -> int:
        text = os.pread(self._lock, 32, 0)
        return int(text) if text.isdigit() and len(text) < 20 else self._scan()[0]

    def _write_taken(self, taken: int) -> None:
        text = str(taken).encode()
        os.ftruncate(self._lock, len(text))
        os.pwrite(self._lock, text, 0)

    def _make_room(self, needed: int) -> int:
        """Removes what was used longest ago; returns what is taken then."""
        wanted = max(0, self.limit_bytes - needed - int(self.limit_bytes * ROOM_SHARE))
        while True:
            taken, oldest = self._scan()
            removed = 0
            for _, shelf, name, size in oldest:
                if taken <= wanted:
                    break
                with suppress(OSError), opened(shelf, self._root, FOLDER) as folder:
                    os.unlink(name, dir_fd=folder)
                    taken -= size
                    removed += 1
            if taken <= wanted or not removed:
                return taken

    def _scan(self) -> tuple[int, list[tuple[int, str, str, int]]]:
        """What is taken, and what may go: when it was used, FILE, name, bytes; the oldest first.

        What processes that have died were writing is removed.
        """
        taken = 0

        def pieces() -> Iterator[tuple[int, str, str, int]]:
            nonlocal taken
            for shelf in _names(self._root, _SHELF):
                with suppress(OSError), opened(shelf, self._root, FOLDER) as folder:
                    for name in _names(folder, _PARTIAL):
                        if not is_abandoned(name, folder):
                            start, stop = map(int, name.partition(".")[0].split("-"))
                            taken += _occupied(piece_size((start, stop)))
                    is_empty = True
                    for name in _names(folder, _PIECE):
                        is_empty = False
                        with suppress(OSError):
                            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                            if stat.S_ISREG(status.st_mode):
                                size = _occupied(status.st_size)
                                taken += size
                                if status.st_mtime_ns < self._began_ns:
                                    yield status.st_mtime_ns, shelf, name, size
                    if is_empty:
                        os.rmdir(shelf, dir_fd=self._root)

        oldest = nsmallest(MOST_REMOVED, pieces())
        return taken, oldest


def _nowhere(_: Any) -> None:
    """Takes what is wanted in the cache alone."""


def _names(folder: int, pattern: re.Pattern[str]) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name):
                yield entry.name


def _occupied(size_bytes: int) -> int:
    return -(-size_bytes // DISK_BLOCK_BYTES) * DISK_BLOCK_BYTES
