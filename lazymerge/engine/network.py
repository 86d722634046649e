"""How inputs that lie elsewhere are fetched, and what of them is kept. No byte of an output depends
on it.

    LAZYMERGE_CONNECTIONS    requests at a time, in place of 8
    LAZYMERGE_MAX_GAP        bytes between two ranges that are fetched with them, in place of 1MiB
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field

from ..checkpoint.transport import MOST_AT_ONCE
from ..errors import InputError
from ..sizes import parse_size

CONNECTIONS = 8
"""Requests at a time."""

MOST_CONNECTIONS = MOST_AT_ONCE

MAX_GAP_BYTES = 1 << 20
"""Bytes that nobody wants are fetched rather than asking twice: 10 ms at 100 MB/s, where a request
takes 50 ms to be answered."""

LEAST_GAP_BYTES = 2 * mmap.PAGESIZE
"""So that no page of memory belongs to two ranges."""

MOST_GAP_BYTES = 1 << 30


def _connections() -> int:
    text = os.environ.get("LAZYMERGE_CONNECTIONS") or str(CONNECTIONS)
    if not text.isdecimal() or not 1 <= int(text[:9]) <= MOST_CONNECTIONS:
        raise InputError(
            f"LAZYMERGE_CONNECTIONS={text[:40]!r}: is no number of requests at a time, from 1 to "
            f"{MOST_CONNECTIONS}"
        )
    return int(text)


def _max_gap_bytes() -> int:
    text = os.environ.get("LAZYMERGE_MAX_GAP")
    if not text:
        return MAX_GAP_BYTES
    try:
        return parse_size(text)
    except InputError as error:
        raise InputError(f"LAZYMERGE_MAX_GAP: {error}") from None


@dataclass(frozen=True, slots=True)
class Network:
    """How inputs that lie elsewhere are fetched.

    cache_folder: where what is fetched is kept; None: nowhere.
    cache_limit_bytes: that it may occupy; None: half of what the disk has free.
    whole_files: files of servers that send no ranges are read from beginning to end.
    connections: requests at a time.
    max_gap_bytes: what lies between two ranges, and is fetched with them.
    """

    cache_folder: str | None = None
    cache_limit_bytes: int | None = None
    whole_files: bool = False
    connections: int = field(default_factory=_connections)
    max_gap_bytes: int = field(default_factory=_max_gap_bytes)

    def __post_init__(self) -> None:
        """Raises:
        InputError: a number is none that can be, or there is a limit of no cache.
        """
        if not 1 <= self.connections <= MOST_CONNECTIONS:
            raise InputError(
                f"{self.connections} requests at a time: choose from 1 to {MOST_CONNECTIONS}"
            )
        if not 0 <= self.max_gap_bytes <= MOST_GAP_BYTES:
            raise InputError(
                f"gaps of {self.max_gap_bytes:,} bytes cannot be fetched: choose from 0 to 1GiB"
            )
        if self.cache_limit_bytes is not None and self.cache_folder is None:
            raise InputError("--cache-limit bounds a cache: name its folder too (--cache DIR)")

    @property
    def gap_bytes(self) -> int:
        """max_gap_bytes, or as much as must be."""
        return max(self.max_gap_bytes, LEAST_GAP_BYTES)


def network(
    cache: str | os.PathLike[str] | None = None,
    cache_limit: int | str | None = None,
    whole_files: bool = False,
    connections: int | None = None,
    max_gap: int | str | None = None,
) -> Network:
    """How inputs are fetched, as people say it. None: the default, or what the environment says.

    Raises:
        InputError: as Network.
    """
    given: dict[str, int] = {}
    if connections is not None:
        given["connections"] = connections
    if max_gap is not None:
        given["max_gap_bytes"] = parse_size(max_gap) if isinstance(max_gap, str) else max_gap
    return Network(
        cache_folder=None if cache is None else os.path.abspath(cache),
        cache_limit_bytes=parse_size(cache_limit) if isinstance(cache_limit, str) else cache_limit,
        whole_files=whole_files,
        **given,
    )
