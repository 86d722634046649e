"""Ctrl-C that comes where Python ignores exceptions."""

from __future__ import annotations

import signal
import threading

import pytest
from lazymerge.cluster.interrupts import noted_interrupts


class Ends:
    """Has a signal come while it ends."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_is_noticed_by_the_next_check() -> None:
    before = signal.getsignal(signal.SIGINT)
    with noted_interrupts() as check:
        check()
        Ends()
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is before


def test_elsewhere_it_is_raised_at_once() -> None:
    with noted_interrupts(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_handlers_that_raise_nothing_stay_what_they_are() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with noted_interrupts() as check:
            signal.raise_signal(signal.SIGTERM)
            check()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def test_other_threads_have_no_signals() -> None:
    raised: list[BaseException] = []

    def checked() -> None:
        try:
            with noted_interrupts() as check:
                check()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=checked)
    thread.start()
    thread.join()
    assert raised == []
