"""One process at a time on an output: OUT/.lazymerge/lock.

Who holds it has an advisory lock on the file (flock), which the system takes away when the process
ends, however it ends; and has written its name into the file, for messages. Where filesystems do
not lock, and between machines whose shared filesystem locks for each of them alone, what the file
says decides: its owner is taken for alive if a process of that number and that start time runs on
this machine, or, on another machine, if the file was touched within the last ALIVE_SECONDS.
"""

from __future__ import annotations

import errno
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .journal import boot_id, this_session
from .writer import write_error

try:
    import fcntl
except ImportError:  # Windows: what the file says decides
    fcntl = None  # type: ignore[assignment]

LOCK_PATH = ".lazymerge/lock"

TOUCH_SECONDS = 10.0
"""How often a run touches its lock."""

ALIVE_SECONDS = 60.0
"""A lock of another machine that has not been touched for so long, six times, is nobody's."""

NAMED_SECONDS = 0.5
"""How long to wait for whoever has just taken the lock to write its name."""

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_MAX_OWNER_BYTES = 10_000


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that a lock says it belongs to.

    started: when, in clock ticks since boot; 0 where the system does not tell. A number of a
        process alone would not do: it is given again.
    """

    pid: int
    host: str
    boot: str
    started: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class LockedError(InputError):
    """Another process is at work on the output (exit code 2)."""


class OutputLock:
    """The lock of an output folder, held from when it is made until it is released."""

    def __init__(self, folder: Path) -> None:
        """Takes the lock; makes OUT/.lazymerge if need be.

        Raises:
            LockedError: another process holds it; the message names it.
            LazymergeError: the lock cannot be written.
        """
        self._path = folder / LOCK_PATH
        self.taken_over: Owner | None = None
        """Whose it was, if its owner ended without releasing it."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._open(folder)
            self._write()
        except OSError as error:
            raise write_error(self._path, error) from error
        self._touched = time.monotonic()

    def _open(self, folder: Path) -> int:
        while True:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
            descriptor = os.open(self._path, flags, 0o666)
            try:
                is_free = _try_lock(descriptor)
                owner = _owner(descriptor) if is_free is not False else _holder(descriptor)
                if is_free is False or (owner and _is_alive(owner, descriptor, is_free)):
                    raise LockedError(
                        f"{folder} is being written by {owner or 'another process'}; wait for it, "
                        f"or stop it and go on with: lazymerge resume {folder}"
                    )
                if _is_at(descriptor, self._path):
                    self.taken_over = owner
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner removed it while we waited to be told

    def _write(self) -> None:
        session = this_session()
        owner = Owner(session.pid, session.host, session.boot, _start_ticks(session.pid))
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(asdict(owner)).encode() + b"\n", 0)

    def touch(self) -> None:
        """Says that the owner is alive; does so at most every TOUCH_SECONDS."""
        now = time.monotonic()
        if now - self._touched >= TOUCH_SECONDS:
            self._touched = now
            with suppress(OSError):
                os.utime(self._descriptor)

    def release(self) -> None:
        """Removes the lock, and its folder if nothing else is in it. May be called again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        with suppress(OSError):
            if _is_at(descriptor, self._path):
                self._path.unlink()
        os.close(descriptor)
        with suppress(OSError):
            self._path.parent.rmdir()


def lock_owner(folder: Path) -> Owner | None:
    """The living process that holds an output's lock; None if there is none."""
    try:
        descriptor = os.open(folder / LOCK_PATH, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        is_free = _try_lock(descriptor)
        owner = _owner(descriptor)
        if owner is not None and (is_free is False or _is_alive(owner, descriptor, is_free)):
            return owner
        return None
    finally:
        os.close(descriptor)  # and with it the lock


def _try_lock(descriptor: int) -> bool | None:
    """Whether the file's lock could be taken; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _is_alive(owner: Owner, descriptor: int, is_free: bool | None) -> bool:
    """Whether the process that a lock names still runs, as far as can be told.

    is_free: the lock could be taken, which on the owner's machine settles it.
    """
    if owner.boot and owner.boot == boot_id():
        if is_free:
            return False
        return owner.started == _start_ticks(owner.pid) and _exists(owner.pid)
    if owner.host == this_session().host and (owner.boot or is_free):
        return False  # this machine was started again, or does not tell and does lock
    return time.time() - os.fstat(descriptor).st_mtime < ALIVE_SECONDS


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if it is not there or the system does
    not tell. Source: Linux, proc_pid_stat(5), field 22."""
    with suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    return 0


def _holder(descriptor: int) -> Owner | None:
    """Who holds a lock that could not be taken: it may be about to write its name over that of the
    one before."""
    deadline = time.monotonic() + NAMED_SECONDS
    while True:
        owner = _owner(descriptor)
        if owner is not None and _is_alive(owner, descriptor, None):
            return owner
        if time.monotonic() > deadline:
            return owner
        time.sleep(NAMED_SECONDS / 50)


def _owner(descriptor: int) -> Owner | None:
    try:
        record: Any = json.loads(os.pread(descriptor, _MAX_OWNER_BYTES, 0))
        owner = Owner(**record)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = (int, str, str, int)
    values = (owner.pid, owner.host, owner.boot, owner.started)
    is_sound = all(isinstance(v, kind) for v, kind in zip(values, kinds, strict=True))
    return owner if is_sound and 0 < owner.pid < 1 << 31 else None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
