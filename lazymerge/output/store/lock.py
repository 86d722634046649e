"""One run at a time on an output in a store: the object `.lazymerge/lock`.

It is made by a request that fails if it is there (If-None-Match), says who has made it, and is
written again every TOUCH_SECONDS while it is held. Its owner is taken for gone if no such process
runs on this machine; or, where this process could not see it, if the object is older than
ALIVE_SECONDS by the store's own clock. It is then replaced by a request that fails if it has become
another (If-Match), so that one of several that try gets it.

Stores that do not know such requests have no locks: two runs of one plan would make the same
objects twice, and runs of different plans refuse each other by what the first has begun.
"""

from __future__ import annotations

import json
import secrets
import shlex
import threading
from contextlib import suppress
from dataclasses import asdict

from ...errors import LazymergeError
from ..lock import (
    ALIVE_SECONDS,
    LOCK_PATH,
    TOUCH_SECONDS,
    LockedError,
    LockLostError,
    Owner,
    owner_of,
    runs_here,
    this_owner,
)
from .client import ConditionError, Fetched, Store, UnsupportedError

_MOST_BYTES = 10_000

TRIES = 5
"""Locks may come and go between two requests; not so often."""


class StoreLock:
    """The lock of an output, held from when it is made until it is released."""

    def __init__(self, store: Store) -> None:
        """Takes the lock.

        Raises:
            LockedError: another process holds it; the message names it.
            LazymergeError: the store fails.
        """
        self._store = store
        self._content = json.dumps({**asdict(this_owner()), "token": secrets.token_hex(8)}).encode()
        self._etag = ""
        self._released = threading.Event()
        self._touching = threading.Lock()
        self._toucher = threading.Thread(target=self._keep_touching, name="lock", daemon=True)
        self.taken_over: Owner | None = None
        """Whose it was, if its owner ended without releasing it."""
        self.is_lost = False
        """Whether somebody else has removed it or taken it away."""
        self.is_supported = True
        """Whether the store has locks."""
        try:
            for _ in range(TRIES):
                if self._take():
                    break
            else:
                raise LazymergeError(f"{store.address.url(LOCK_PATH)} comes and goes; try again")
        except UnsupportedError:
            self.is_supported = False
            return
        if self.is_supported:
            self._toucher.start()

    def _take(self) -> bool:
        """Tries once; False: others have been quicker, or have just let go."""
        try:
            self._etag = self._store.put(LOCK_PATH, self._content, only_if_absent=True)
        except ConditionError:
            return self._take_over()
        try:  # some stores take the condition, and do not look at it
            self._store.put(LOCK_PATH, self._content, only_if_absent=True)
        except ConditionError:
            return True
        self._store.remove([LOCK_PATH])
        raise UnsupportedError

    def _take_over(self) -> bool:
        found = self._store.get(LOCK_PATH, _MOST_BYTES)
        if found is None:
            return False
        owner, is_ours = _owner(found), found.content == self._content
        if not is_ours:  # else it is our own request, of which the answer was lost
            if _is_alive(owner, found):
                address = self._store.address
                raise LockedError(
                    f"{address} is being written by {owner or 'another process'}; wait for it, or "
                    f"stop it and go on with: lazymerge resume {shlex.quote(str(address))}"
                )
            self.taken_over = self.taken_over or owner
        try:
            self._etag = self._store.put(LOCK_PATH, self._content, only_if=found.etag)
        except ConditionError:
            return False
        return True

    def _keep_touching(self) -> None:
        while not self._released.wait(TOUCH_SECONDS):
            with suppress(LazymergeError, UnsupportedError):  # a network that is away may come back
                self._touch()
            if self.is_lost:
                return

    def _touch(self) -> None:
        """Writes the lock again, if it is still there and ours."""
        with self._touching:
            try:
                self._etag = self._store.put(LOCK_PATH, self._content, only_if=self._etag)
            except ConditionError:
                found = self._store.get(LOCK_PATH, _MOST_BYTES)
                if found is None or found.content != self._content:
                    self.is_lost = True
                else:  # by a request of ours whose answer was lost
                    self._etag = found.etag

    def confirm(self) -> None:
        """Asks the store whether the lock is held: this process may have been stopped for as long
        as others wait for it, and not have looked since.

        Raises:
            LockLostError: somebody has removed or replaced the lock.
            LazymergeError: the store fails.
        """
        if self.is_supported:
            self._touch()
        self.check()

    def check(self) -> None:
        """Raises:
        LockLostError: somebody has removed or replaced the lock.
        """
        if self.is_lost:
            address = self._store.address
            raise LockLostError(
                f"{address.url(LOCK_PATH)} was removed or replaced while it was held: another "
                f"process may be writing now; look with: lazymerge status {address}"
            )

    def release(self) -> None:
        """Removes the lock. May be called again."""
        if self._released.is_set():
            return
        self._released.set()
        if self._toucher.ident is not None:
            self._toucher.join()
        if not self.is_supported or self.is_lost:
            return
        with suppress(LazymergeError):  # another run finds out that nobody holds it
            found = self._store.get(LOCK_PATH, _MOST_BYTES)
            if found is not None and found.content == self._content:
                self._store.remove([LOCK_PATH])


def store_lock_owner(store: Store) -> Owner | None:
    """The living process that holds an output's lock; None if there is none."""
    found = store.get(LOCK_PATH, _MOST_BYTES)
    if found is None:
        return None
    owner = _owner(found)
    return owner if owner is not None and _is_alive(owner, found) else None


def _owner(found: Fetched) -> Owner | None:
    try:
        document = json.loads(found.content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    document.pop("token", None)
    return owner_of(json.dumps(document).encode())


def _is_alive(owner: Owner | None, found: Fetched) -> bool:
    """Whether the process that a lock names still runs, as far as can be told."""
    runs = None if owner is None else runs_here(owner)
    return found.age_seconds < ALIVE_SECONDS if runs is None else runs
