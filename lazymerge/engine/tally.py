"""Keeping count of what is done of an output, wherever it goes, and passing it on."""

from __future__ import annotations

import threading

from .report import Observer
from .timeline import Timeline


class Tally:
    """Counts bytes, notes when they were moved, and tells an observer. Safe to use from several
    threads."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._lock = threading.Lock()
        self.bytes_read = self.bytes_written = self.bytes_fetched = 0
        self.timeline = Timeline()
        self.timeline.note(0, 0)

    def began(self, tensor: str) -> None:
        """A tensor's first byte is read."""
        self._observer.began(tensor)

    def moved(self, bytes_read: int, bytes_written: int, tensor: str) -> None:
        """So much of a tensor has been read and written."""
        with self._lock:
            self.bytes_read += bytes_read
            self.bytes_written += bytes_written
            self.timeline.note(self.bytes_read, self.bytes_written)
        self._observer.moved(bytes_read, bytes_written, tensor)

    def fetched(self, size_bytes: int) -> None:
        """So much has come over the network."""
        with self._lock:
            self.bytes_fetched += size_bytes
        self._observer.fetched(size_bytes)

    def noted(self, message: str) -> None:
        """What a person should know."""
        self._observer.noted(message)

    def end(self) -> None:
        """All is moved."""
        self.timeline.note(self.bytes_read, self.bytes_written, is_last=True)
