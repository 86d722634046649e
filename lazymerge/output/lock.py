"""One process at a time on an output: OUT/.lazymerge/lock.

Who holds it has an advisory lock on the file (flock), which the system takes away when the process
ends, however it ends; and has written its name into the file. On one machine whose filesystem
locks, that settles it. Elsewhere what the file says decides: its owner is taken for alive if a
process of that number and that start time runs on this machine; or, where this process could not
see it (on another machine, in another container), if the file was touched within the last
ALIVE_SECONDS. A thread of the owner touches it.

The file is written under a name of its own and then linked to its place, which one of several that
try can do (O_EXCL where there are no links): a lock is never there without its owner's name. What
an owner elsewhere has left is moved away and made anew, by one process at a time: it holds a file
made in the same way (OUT/.lazymerge/lock.taking) while it looks and moves. Two calls cannot be one;
without this, who is slower could move away the lock of who was quicker.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, LazymergeError
from .journal import boot_id, this_session
from .writer import open_own, write_error

try:
    import fcntl
except ImportError:  # Windows: what the file says decides
    fcntl = None  # type: ignore[assignment]

LOCK_PATH = ".lazymerge/lock"

TAKING_PATH = ".lazymerge/lock.taking"
"""Held for the moment in which a lock of an owner that is gone is moved away."""

MOVED_PATTERN = "lock.*"
"""TAKING_PATH, locks that are being made, and those of owners that are gone, for the moment between
being moved away and being removed."""

TOUCH_SECONDS = 10.0
"""How often a lock that is held is touched."""

ALIVE_SECONDS = 60.0
"""A lock of another machine that has not been touched for so long, six times, is nobody's."""

NAMED_SECONDS = 0.5
"""How long to wait for whoever has just made the lock to write its name, or for who only looks at
it (`lazymerge status`) to let go."""

TRY_SECONDS = 5.0
"""Folder and file may vanish between two calls, when others release theirs; not for so long."""

WAIT_SECONDS = 0.005
"""Between such tries."""

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_WITHOUT_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)

_MAX_OWNER_BYTES = 10_000


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that a lock says it belongs to.

    started: when, in clock ticks since boot; 0 where the system does not tell. A number of a
        process alone would not do: it is given again.
    namespace: that its number is of; containers on one machine each have their own.
    """

    pid: int
    host: str
    boot: str
    started: int
    namespace: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class LockedError(InputError):
    """Another process is at work on the output (exit code 2)."""


class LockLostError(LazymergeError):
    """The lock is gone, or another's, while it should be held (exit code 1)."""


class _ComesAndGoesError(Exception):
    """Something was there in one moment and not in the next; to be tried again."""


class OutputLock:
    """The lock of an output folder, held from when it is made until it is released."""

    def __init__(self, folder: Path) -> None:
        """Takes the lock; makes OUT/.lazymerge if need be.

        Raises:
            LockedError: another process holds it; the message names it.
            LazymergeError: the lock cannot be written.
        """
        self._folder = folder
        self._path = folder / LOCK_PATH
        self._descriptor = -1
        self._missing: FileNotFoundError | None = None
        self._released = threading.Event()
        self._toucher = threading.Thread(target=self._keep_touching, name="lock", daemon=True)
        self.taken_over: Owner | None = None
        """Whose it was, if its owner ended without releasing it."""
        self.is_lost = False
        """Whether somebody else has removed it or taken it away."""
        try:
            deadline = time.monotonic() + TRY_SECONDS
            while not self._take_or_wait():
                if time.monotonic() > deadline:
                    if self._missing is not None:  # not a race: it cannot be made
                        raise self._missing
                    raise LazymergeError(f"{self._path} comes and goes; try again")
            self._toucher.start()
        except OSError as error:
            self.release()
            raise write_error(self._path, error) from error
        except BaseException:
            self.release()
            raise

    def _take_or_wait(self) -> bool:
        """Tries once."""
        self._missing = None
        try:
            return self._take()
        except FileNotFoundError as error:
            self._missing = error
        except _ComesAndGoesError:
            pass
        time.sleep(WAIT_SECONDS)
        return False

    def _take(self) -> bool:
        """Tries once; False: others have been quicker, or have just let go.

        Raises:
            FileNotFoundError, _ComesAndGoesError: the folder was removed meanwhile.
            LockedError: another holds it.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # it was there, and when it was looked at, it was not
            if os.path.lexists(self._path.parent) and not self._path.parent.is_dir():
                raise
            raise _ComesAndGoesError from None
        self._descriptor = _make(self._path)
        if self._descriptor >= 0:
            return True
        try:
            descriptor = open_own(self._path, os.O_RDWR, may_have_other_names=True)
        except OSError:
            self._remove_stranger()
            raise
        try:
            is_free = _wait_for_lock(descriptor)
            owner = _wait_for_name(descriptor)
            if is_free is False or (owner and _is_alive(owner, descriptor, is_free)):
                raise LockedError(
                    f"{self._folder} is being written by {owner or 'another process'}; wait for "
                    f"it, or stop it and go on with: lazymerge resume {self._folder}"
                )
            self.taken_over = self.taken_over or owner
            if not _is_at(descriptor, self._path):
                return False
            is_ours_to_write = os.fstat(descriptor).st_nlink == 1
            if not (is_ours_to_write and is_free and owner and owner.boot == boot_id()):
                self._move_away(descriptor)
                return False
            self._descriptor, descriptor = descriptor, -1
            _write_owner(self._descriptor)
            if _is_at(self._descriptor, self._path):
                return True
            self._descriptor, descriptor = -1, self._descriptor
            os.ftruncate(descriptor, 0)  # if it is given back, it is nobody's
            return False
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _move_away(self, descriptor: int) -> None:
        """Removes a lock whose owner is gone, and no other that has come in its place.

        Raises:
            _ComesAndGoesError: another process is about to.
        """
        taking = self._folder / TAKING_PATH
        claim = _make(taking)
        if claim < 0:
            _remove_if_dead(taking)
            raise _ComesAndGoesError
        try:
            if _is_at(descriptor, self._path):
                moved = _name_of_its_own(self._path)
                self._path.rename(moved)
                _unlink(moved)
        finally:
            with suppress(OSError):
                if _is_at(claim, taking):
                    _unlink(taking)
            os.close(claim)

    def _remove_stranger(self) -> None:
        """Removes what stands in the lock's place and was never one: a link, a pipe.

        Raises:
            _ComesAndGoesError: it did.
        """
        if _is_lock_or_folder(self._path):
            return
        moved = _name_of_its_own(self._path)
        self._path.rename(moved)
        if _is_lock_or_folder(moved):  # of one that was quicker: give it back
            with suppress(OSError):
                os.link(moved, self._path)
        with suppress(IsADirectoryError, PermissionError):
            moved.unlink()
        raise _ComesAndGoesError

    def _keep_touching(self) -> None:
        """Says that the owner is alive, until the lock is released; what is to happen if the lock
        is lost is for `check` to say."""
        while not self._released.wait(TOUCH_SECONDS):
            self.touch()

    def touch(self) -> None:
        """Says that the owner is alive, and looks whether the lock is still its own."""
        with suppress(OSError):
            if not _is_at(self._descriptor, self._path):
                self.is_lost = True
            os.utime(self._descriptor)

    def check(self) -> None:
        """Raises:
        LockLostError: somebody has removed the lock, so that another process may be writing.
        """
        if not self.is_lost and not _is_at(self._descriptor, self._path):
            self.is_lost = True
        if self.is_lost:
            raise LockLostError(
                f"{self._path} was removed or replaced while it was held: another process may be "
                f"writing {self._folder} now; look with: lazymerge status {self._folder}"
            )

    def release(self) -> None:
        """Removes the lock, and its folder if nothing else is in it. May be called again."""
        self._released.set()
        if self._toucher.ident is not None and self._toucher is not threading.current_thread():
            self._toucher.join()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            try:
                with suppress(OSError):
                    if _is_at(descriptor, self._path):
                        self._path.unlink()
            finally:
                os.close(descriptor)
            taking = self._folder / TAKING_PATH
            with suppress(OSError):
                for moved in self._path.parent.glob(MOVED_PATTERN):
                    if moved != taking:
                        _unlink(moved)
                _remove_if_dead(taking)
        with suppress(OSError):
            self._path.parent.rmdir()


def lock_owner(folder: Path) -> Owner | None:
    """The living process that holds an output's lock; None if there is none."""
    try:
        descriptor = open_own(folder / LOCK_PATH, os.O_RDONLY)
    except OSError:
        return None
    try:
        is_free = _try_lock(descriptor, to_look=True)
        owner = _owner(descriptor)
        if owner is not None and (is_free is False or _is_alive(owner, descriptor, is_free)):
            return owner
        return None
    finally:
        os.close(descriptor)  # and with it the lock


def _make(path: Path) -> int:
    """A new file that says whose it is, locked where files can be; -1: there is something.

    Raises:
        FileNotFoundError: the folder was removed meanwhile.
        OSError: it cannot be written.
    """
    if os.path.lexists(path):
        return -1
    new = _name_of_its_own(path)
    descriptor = open_own(new, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    is_made = False
    try:
        _try_lock(descriptor)
        _write_owner(descriptor)
        try:
            os.link(new, path)
            is_made = _is_at(descriptor, path)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _WITHOUT_LINKS:
                raise
            os.close(descriptor)
            descriptor = -1
            with suppress(FileExistsError):
                descriptor = open_own(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                _try_lock(descriptor)
                _write_owner(descriptor)
                is_made = _is_at(descriptor, path)
        with suppress(OSError):  # release looks for it again
            _unlink(new)
    except BaseException:
        is_made = False
        raise
    finally:
        if not is_made:
            with suppress(OSError):
                _unlink(new)
                if descriptor >= 0 and _is_at(descriptor, path):
                    _unlink(path)
            if descriptor >= 0:
                os.close(descriptor)
    return descriptor if is_made else -1


def _name_of_its_own(path: Path) -> Path:
    return path.with_name(f"{Path(LOCK_PATH).name}.{os.getpid()}-{secrets.token_hex(4)}")


def _unlink(path: Path) -> None:
    """Removes a file, which somebody else may have done."""
    path.unlink(missing_ok=True)


def _remove_if_dead(path: Path) -> None:
    """Removes a file that its owner has not come to remove."""
    with suppress(OSError):
        descriptor = open_own(path, os.O_RDONLY)
        try:
            owner = _owner(descriptor)
            if owner is None:
                is_alive = time.time() - os.fstat(descriptor).st_mtime < ALIVE_SECONDS
            else:
                is_alive = _is_alive(owner, descriptor, None)
            if not is_alive and _is_at(descriptor, path):
                _unlink(path)
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int, *, to_look: bool = False) -> bool | None:
    """Whether the file's lock could be taken; None where there are no locks.

    to_look: together with others that only look.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if to_look else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _UNSUPPORTED:
            return None
        raise
    return True


def _wait_for_lock(descriptor: int) -> bool | None:
    """As _try_lock; a lock whose holder has no name yet may be held by one that only looks."""
    deadline = time.monotonic() + NAMED_SECONDS
    while (is_free := _try_lock(descriptor)) is False and time.monotonic() < deadline:
        owner = _owner(descriptor)
        if owner is not None and _is_alive(owner, descriptor, None):
            break
        time.sleep(NAMED_SECONDS / 50)
    return is_free


def _wait_for_name(descriptor: int) -> Owner | None:
    """The owner that a lock names; who has just made it may be about to write its name."""
    deadline = time.monotonic() + NAMED_SECONDS
    while (owner := _owner(descriptor)) is None and time.monotonic() < deadline:
        time.sleep(NAMED_SECONDS / 50)
    return owner


def this_owner() -> Owner:
    """This process."""
    session = this_session()
    started = _start_ticks(session.pid)
    return Owner(session.pid, session.host, session.boot, started, _pid_namespace())


def _write_owner(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(asdict(this_owner())).encode() + b"\n", 0)


def runs_here(owner: Owner) -> bool | None:
    """Whether a process runs on this machine; None if it could not be seen from here."""
    if not owner.boot or owner.boot != boot_id() or owner.namespace != _pid_namespace():
        return None
    return owner.started == _start_ticks(owner.pid) and _exists(owner.pid)


def _is_alive(owner: Owner, descriptor: int, is_free: bool | None) -> bool:
    """Whether the process that a lock names still runs, as far as can be told.

    is_free: the lock could be taken, which on the owner's machine settles it.
    """
    if owner.boot and owner.boot == boot_id():
        if is_free:
            return False
        runs = runs_here(owner)
        if runs is not None:
            return runs
    is_named_alike = owner.host == this_session().host
    if is_named_alike and not owner.boot and is_free:
        return False  # a machine that does not tell when it was started, and does lock
    touched = os.fstat(descriptor).st_mtime
    if touched > time.time() + ALIVE_SECONDS:
        return False  # of a clock that was set back since; nobody touches it now
    if is_named_alike and touched < time.time() - _seconds_since_boot():
        return False  # this machine, before it was started again
    return time.time() - touched < ALIVE_SECONDS


def _seconds_since_boot() -> float:
    """How long this machine has been running; without end where the system does not tell."""
    with suppress(AttributeError, OSError):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return float("inf")


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


def _pid_namespace() -> str:
    """What numbers of processes mean something in; empty where the system does not tell.

    Source: Linux, pid_namespaces(7).
    """
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _owner(descriptor: int) -> Owner | None:
    try:
        return owner_of(os.pread(descriptor, _MAX_OWNER_BYTES, 0))
    except OSError:
        return None


def owner_of(text: bytes) -> Owner | None:
    """Whose a lock is that holds this; None if it does not say."""
    try:
        record: Any = json.loads(text)
        owner = Owner(**record)
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = (int, str, str, int, str)
    values = (owner.pid, owner.host, owner.boot, owner.started, owner.namespace)
    is_sound = all(type(v) is kind for v, kind in zip(values, kinds, strict=True))
    return owner if is_sound and 0 < owner.pid < 1 << 31 else None


def _is_lock_or_folder(path: Path) -> bool:
    mode = os.stat(path, follow_symlinks=False).st_mode
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
