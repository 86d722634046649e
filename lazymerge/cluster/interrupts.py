"""Ctrl-C is not lost.

Its KeyboardInterrupt is raised wherever the main thread is. Where that is the end of an object, as
of one of Dask's futures (`__del__`), Python prints it and goes on, and so would the run.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@contextmanager
def noted_interrupts() -> Iterator[Callable[[], None]]:
    """Yields what is to be called now and then: it raises KeyboardInterrupt if a signal has come
    that does so, and the block still runs."""
    came: list[int] = []

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check  # signals are the main thread's
        return
    before = {}
    for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
        handler = signal.getsignal(number)
        if callable(handler):
            before[number] = handler
            signal.signal(number, _noting(came, handler))
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _noting(
    came: list[int], handler: Callable[[int, FrameType | None], object]
) -> Callable[[int, FrameType | None], None]:
    def note(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except KeyboardInterrupt:
            came.append(number)
            raise

    return note
