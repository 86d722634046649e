"""Files of servers that send no ranges: each is read once, from beginning to end, before the merge.

Into the cache, where there is one, from which it is then read like any other; else into memory, of
which the plan has set enough aside.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..checkpoint.range_cache import RangeCache
from ..checkpoint.transport import Take
from .memory_files import empty_file, store
from .needed_ranges import FileChunks
from .remote_inputs import Distant

WAKE_SECONDS = 0.1

CLOSE_SECONDS = 2.0
"""How long an interruption waits for requests to end."""


class ReadingStopped(Exception):
    """Nobody waits for it any more."""


def fill_cache(
    cache: RangeCache,
    files: Mapping[str, Distant],
    layouts: Mapping[str, FileChunks],
    connections: int,
) -> None:
    """Has files in the cache, from the first byte that is read of them to the last.

    files: by path. layouts: what is read of them. connections: files that are read at a time.

    Raises:
        InputError: one is not what it was. LazymergeError: one does not come, or has no room.
    """

    def work(path: str, stopped: threading.Event) -> None:
        file, layout = files[path], layouts[path]

        def fetch(start: int, stop: int, take: Take) -> None:
            file.read(start, stop, _until(stopped, take))

        cache.fill(file.identity, layout.starts[0], layout.stops[-1], fetch)

    _at_once(work, files, connections)


def load(
    files: Mapping[str, Distant], layouts: Mapping[str, FileChunks], connections: int
) -> dict[str, int]:
    """Has files in memory, as far as they are read; descriptors by path, for the caller to close.

    As fill_cache.
    """
    descriptors = {path: empty_file(path, file) for path, file in files.items()}

    def work(path: str, stopped: threading.Event) -> None:
        layout, descriptor = layouts[path], descriptors[path]
        offset = layout.starts[0]

        def take(piece: Any) -> None:
            nonlocal offset
            data = memoryview(piece).cast("B")
            for number in layout.overlapping(offset, offset + len(data)):
                first = max(offset, layout.starts[number])
                last = min(offset + len(data), layout.stops[number])
                store(path, descriptor, data[first - offset : last - offset], first)
            offset += len(data)

        files[path].read(offset, layout.stops[-1], _until(stopped, take))

    def close() -> None:
        for descriptor in descriptors.values():
            os.close(descriptor)

    _at_once(work, files, connections, close)
    return descriptors


def _until(stopped: threading.Event, take: Take) -> Take:
    def taken(piece: Any) -> None:
        if stopped.is_set():
            raise ReadingStopped
        take(piece)

    return taken


def _at_once(
    work: Callable[[str, threading.Event], None],
    paths: Collection[str],
    most: int,
    close: Callable[[], None] = lambda: None,
) -> None:
    """Does something with several files at once. The first error ends all; so does Ctrl-C.

    close: is called where it fails, when none of them is worked on any more: soon, or where a
    server is silent, as soon as that is over.
    """
    waiting = list(paths)
    errors: list[BaseException] = []
    stopped = threading.Event()

    ends = [threading.Event() for _ in range(min(most, len(waiting)))]

    def run(ended: threading.Event) -> None:
        try:
            while waiting and not stopped.is_set():
                work(waiting.pop(0), stopped)
        except ReadingStopped:
            pass
        except IndexError:  # another has taken the last one
            pass
        except BaseException as error:
            errors.append(error)
            stopped.set()
        finally:
            ended.set()

    threads = [
        threading.Thread(target=run, args=(ended,), name=f"whole-{number}", daemon=True)
        for number, ended in enumerate(ends)
    ]

    def close_later() -> None:
        for thread, ended in zip(threads, ends, strict=True):
            if thread.ident is not None:  # none of them may write when the files are closed
                ended.wait()
        close()

    try:
        for thread in threads:
            thread.start()
        for ended in ends:  # not Thread.join, which errs when Ctrl-C interrupts it
            while not ended.wait(WAKE_SECONDS):
                pass
        if errors:
            raise errors[0]
    except BaseException:
        stopped.set()
        closing = threading.Thread(target=close_later, name="closing", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        raise
