"""The last few results of what several workers would otherwise each work out for themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

Value = TypeVar("Value")


class Recent:
    """A small cache, shared by threads. Two that ask at the same time may both do the work."""

    def __init__(self, most_entries: int) -> None:
        self._most_entries = most_entries
        self._entries: dict[Hashable, tuple[object, object]] = {}
        self._lock = threading.Lock()

    def get(
        self,
        key: Hashable,
        token: object,
        make: Callable[[], Value],
        is_kept: Callable[[Value], bool] = lambda _: True,
    ) -> Value:
        """The value last made for a key and this very token (compared by identity).

        is_kept: whether a value may stay here when its tensor is done.
        """
        entry = self._entries.get(key)
        if entry is not None and entry[0] is token:
            return cast("Value", entry[1])
        value = make()
        if not is_kept(value):
            return value
        with self._lock:
            self._entries[key] = (token, value)
            if len(self._entries) > self._most_entries:
                del self._entries[next(iter(self._entries))]
        return value
