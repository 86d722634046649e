"""What a run has finished, written down as it goes, so that another run can go on from there.

    OUT/.lazymerge/journal
    3f0c… {"format": 1, "fingerprint": "…"}                       the merge that it belongs to
    a81d… {"boot": "…", "pid": 4711, "host": "…", "at": …}        a process begins or goes on
    77e2… {"tensor": "…", "file": "…", "bytes": [8, 4104], "checksum": "…", "inode": […], …}
    …

Every line begins with a checksum of its own (xxh3_64 of the rest). Reading stops at the first line
that is torn, altered or not understood; what follows counts for nothing. A line is written when all
bytes of its tensor have been handed to the system, so a process may be killed anywhere. After a
power failure lines can be there and data not: lines of another boot are believed only when the
tensor's bytes give the checksum (recovery.py).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from ..errors import LazymergeError
from .identity import FileIdentity
from .writer import open_own, sync_folder, write_error

JOURNAL_PATH = ".lazymerge/journal"
JOURNAL_FORMAT = 1


MAX_LINE_BYTES = 1 << 20
"""No tensor has a longer name; what has no line end for so long is no journal."""

MAX_RECORDS = 1_000_000
"""More are not kept in memory: an index has no more tensors. A record takes some 600 bytes."""

MOST_BYTES = 1 << 62
"""No file is longer, and nothing else that is counted here is more."""


MOST_STATISTICS = 1000
"""Numbers gathered of a tensor: with 20 bytes each they take up a fiftieth of the longest line."""


@dataclass(frozen=True, slots=True)
class Session:
    """A process that worked on an output.

    boot: of its machine; empty where the system does not tell.
    at: when it began, in seconds since 1970.
    """

    boot: str
    pid: int
    host: str
    at: float


@dataclass(frozen=True, slots=True)
class Finished:
    """A tensor that is complete.

    file: its shard's final name. start, stop_exclusive: its byte range in that file.
    checksum: as the manifest defines it.
    identity: of the file that it was written to; None if nothing says so.
    is_nonfinite: it holds inf or nan.
    at: when it was complete, in seconds since 1970.
    session: of the process that wrote it.
    statistics: numbers gathered of it, float64; None: there are none.
    """

    name: str
    file: str
    start: int
    stop_exclusive: int
    checksum: str
    identity: FileIdentity | None
    is_nonfinite: bool
    at: float
    session: Session
    statistics: array[float] | None = None


@dataclass(frozen=True, slots=True)
class JournalContents:
    """What can be believed of a journal's text, if not of the data.

    fingerprint: of the merge; empty if not even that can be read.
    length: bytes up to the first line that cannot be believed.
    """

    fingerprint: str
    sessions: tuple[Session, ...]
    finished: dict[str, Finished]
    length: int


def read_journal(folder: Path) -> JournalContents:
    """Reads an output's journal as far as it is whole; an absent one is empty.

    Raises:
        OSError: it cannot be read.
    """
    fingerprint = ""
    sessions: list[Session] = []
    finished: dict[str, Finished] = {}
    length = 0
    for record, end in _records(folder / JOURNAL_PATH):
        if max(len(sessions), len(finished)) >= MAX_RECORDS:
            break
        try:
            if not fingerprint:
                if record["format"] != JOURNAL_FORMAT:
                    break
                fingerprint = _text(record["fingerprint"])
            elif "lost" in record:
                finished.pop(_text(record["lost"]), None)
            elif "tensor" in record:
                tensor = _finished(record, sessions[-1])
                finished[tensor.name] = tensor
            else:
                sessions.append(_session(record))
        except (IndexError, KeyError, TypeError, ValueError):
            break
        length = end
    return JournalContents(fingerprint, tuple(sessions), finished, length)


def _records(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Records and the byte after each, up to the first that is not whole."""
    end = 0
    try:
        stream = os.fdopen(open_own(path, os.O_RDONLY), "rb")
    except FileNotFoundError:
        return
    with stream:
        while line := stream.readline(MAX_LINE_BYTES):
            checksum, _, text = line.removesuffix(b"\n").partition(b" ")
            if not line.endswith(b"\n") or checksum.decode("ascii", "replace") != _checksum(text):
                return
            try:
                record = json.loads(text)
            except (ValueError, RecursionError):
                return
            if not isinstance(record, dict):
                return
            end += len(line)
            yield record, end


def _checksum(text: bytes) -> str:
    return xxh3_64_hexdigest(text)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
        raise TypeError
    return value


def _place(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST_BYTES:
        raise TypeError
    return value


def _statistics(value: Any) -> array[float] | None:
    if not isinstance(value, list) or not 0 < len(value) <= MOST_STATISTICS:
        return None
    if not all(type(number) is float for number in value):
        return None
    return array("d", value)  # inf and nan are numbers like any other


def _identity(value: Any) -> FileIdentity | None:
    if not isinstance(value, list) or len(value) != 3:
        return None
    if not all(type(number) is int for number in value):
        return None
    device, inode, made = value
    return device, inode, made


def _session(record: dict[str, Any]) -> Session:
    boot = record["boot"]
    if not isinstance(boot, str):
        raise TypeError
    return Session(boot, int(_number(record["pid"])), _text(record["host"]), _number(record["at"]))


def _finished(record: dict[str, Any], session: Session) -> Finished:
    start, stop = (_place(place) for place in record["bytes"])
    if stop < start:
        raise ValueError
    return Finished(
        name=_text(record["tensor"]),
        file=_text(record["file"]),
        start=start,
        stop_exclusive=stop,
        checksum=_text(record["checksum"]),
        identity=_identity(record.get("inode")),
        is_nonfinite=record.get("nonfinite") is True,
        at=_number(record["at"]),
        session=session,
        statistics=_statistics(record.get("statistics")),
    )


class Journal:
    """A journal that is being written. `finished` may be called from several threads."""

    def __init__(self, folder: Path, fingerprint: str, length: int, *, fsync: bool) -> None:
        """Opens an output's journal, or makes it.

        length: bytes of it that are to stay (JournalContents); 0 to begin anew.
        fsync: it is on disk when this returns.

        Raises:
            LazymergeError: it cannot be written.
        """
        self._path = folder / JOURNAL_PATH
        self._lock = threading.Lock()
        self._descriptor = -1
        self._is_torn = False
        try:
            self._begin(fingerprint, length, fsync=fsync)
        except OSError as error:
            self.close()
            raise write_error(self._path, error) from error
        except BaseException:
            self.close()
            raise

    def _begin(self, fingerprint: str, length: int, *, fsync: bool) -> None:
        self._descriptor = open_own(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.ftruncate(self._descriptor, length)
        if not length:
            self._append({"format": JOURNAL_FORMAT, "fingerprint": fingerprint})
        session = this_session()
        self._append(
            {"boot": session.boot, "pid": session.pid, "host": session.host, "at": session.at}
        )
        if fsync:
            os.fsync(self._descriptor)
            sync_folder(self._path.parent)

    def finished(
        self,
        name: str,
        file: str,
        place: tuple[int, int],
        checksum: str,
        *,
        is_nonfinite: bool,
        identity: FileIdentity | None = None,
        statistics: Sequence[float] = (),
    ) -> None:
        """Writes down that a tensor is complete, all its bytes written.

        place: its byte range in the file. identity: the file's. statistics: gathered of it.

        Raises:
            LazymergeError: it cannot be written.
        """
        record: dict[str, Any] = {
            "tensor": name,
            "file": file,
            "bytes": list(place),
            "checksum": checksum,
            "at": round(time.time(), 3),
        }
        if identity is not None:
            record["inode"] = list(identity)
        if is_nonfinite:
            record["nonfinite"] = True
        if statistics:
            record["statistics"] = [float(number) for number in statistics]
        self._append(record)

    def lost(self, name: str) -> None:
        """Writes down that a tensor is not there, whatever earlier lines say. Before its place is
        written to again: a shard made anew has the right size and header, and not its bytes.

        Raises:
            LazymergeError: it cannot be written.
        """
        self._append({"lost": name})

    def _append(self, record: dict[str, Any]) -> None:
        text = json.dumps(record).encode()
        line = memoryview(f"{_checksum(text)} ".encode() + text + b"\n")
        with self._lock:
            if self._is_torn:
                raise LazymergeError(f"cannot write {self._path}: a line of it is torn")
            length = os.fstat(self._descriptor).st_size
            try:
                while line:
                    line = line[os.write(self._descriptor, line) :]
            except OSError as error:
                self._take_back(length)
                raise write_error(self._path, error, len(line)) from error

    def _take_back(self, length: int) -> None:
        """Removes half a line: no line after it would be read."""
        try:
            os.ftruncate(self._descriptor, length)
        except OSError:
            self._is_torn = True

    def close(self) -> None:
        """May be called again, by whoever was interrupted in the middle of it."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def this_session() -> Session:
    """This process, as a session that begins now."""
    return Session(boot_id(), os.getpid(), socket.gethostname() or "?", round(time.time(), 3))


@cache
def boot_id() -> str:
    """What is the same until this machine is started again; empty where the system does not tell.

    Source: Linux, random(4).
    """
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
