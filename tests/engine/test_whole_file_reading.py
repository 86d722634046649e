"""Whole files, read before a merge begins: interruptions."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from lazymerge.checkpoint.transport import RemoteFile, Take
from lazymerge.engine import whole_files
from lazymerge.engine.needed_ranges import FileChunks


class SilentFile:
    """A file whose server says nothing until it is let go."""

    size_bytes = 10_000
    place = "host"
    has_ranges = False
    identity = RemoteFile("http://host/file", 10_000, "one", has_ranges=False)

    def __init__(self) -> None:
        self.let_go = threading.Event()

    def read(self, start: int, stop: int, take: Take, *, keeps: bool = True) -> None:
        self.let_go.wait(30)
        take(bytes(stop - start))

    def check(self) -> None:
        """It is what it was."""


def test_an_interruption_does_not_wait_for_a_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are files closed that may still be written to."""
    monkeypatch.setattr(whole_files, "CLOSE_SECONDS", 0.2)
    file, made = SilentFile(), []
    empty_file = whole_files.empty_file

    def noted(*given: object) -> int:
        made.append(empty_file(*given))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(whole_files, "empty_file", noted)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        whole_files.load({"file": file}, {"file": FileChunks([0], [10_000])}, 1)
    assert time.monotonic() - began < 5
    os.fstat(made[0])
    file.let_go.set()
    for thread in threading.enumerate():
        if thread.name == "closing":
            thread.join(5)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(made[0])
