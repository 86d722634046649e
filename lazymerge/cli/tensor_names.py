"""Choosing tensors by a regular expression that somebody has typed."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ..errors import InputError

MOST_SECONDS = 2.0
"""An expression that backtracks without end is given up: names of 90,000 tensors take 0.1 s."""


class _TooSlowError(Exception):
    pass


def matching(names: Sequence[str], pattern: str) -> list[str]:
    """The names that an expression is found in, in their order.

    Raises:
        InputError: it is no expression, takes too long, or matches nothing.
    """
    try:
        with _time_limit():
            expression = re.compile(pattern)
            found = [name for name in names if expression.search(name)]
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(
            f"--tensor {pattern[:80]!r} is not a regular expression: {error}"
        ) from error
    except _TooSlowError:
        raise InputError(
            f"--tensor {pattern[:80]!r} takes longer than {MOST_SECONDS:.0f} s to look for: it "
            "backtracks; write it without repetitions inside repetitions"
        ) from None
    if not found:
        example = f"; the first is named {names[0]}" if names else ""
        raise InputError(
            f"--tensor {pattern[:80]!r} matches none of the {len(names)} output tensors{example}"
        )
    return found


@contextmanager
def _time_limit() -> Iterator[None]:
    """Interrupts the block, where the system can: in the main thread, with its own timer."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _TooSlowError

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
