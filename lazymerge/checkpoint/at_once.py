"""Threads for requests that are made at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def requesting(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads, while the block runs. What has been begun in them is waited for at its end;
    not so when it is interrupted (Ctrl-C), for a server may be silent for minutes."""
    pool = ThreadPoolExecutor(count, "requesting")
    try:
        yield pool
    except Exception:
        pool.shutdown(cancel_futures=True)
        raise
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
