"""Byte ranges of files that lie elsewhere, by the filesystems of fsspec.

    begin    one request: what a file is now (size, pin), and its first bytes
    read     a ranged request, handed on piece by piece as it arrives; nothing is kept

web_server.py and object_storage.py do so for the kinds of storage.

A pin says which version of a file is meant: its ETag, or what else the storage names it by. Every
answer is held against it, so that no two versions of a file are ever mixed.

What fails for a reason that may pass (a broken connection, a short answer, 429, 5xx) is asked for
again, from where it broke off, with growing pauses. What does not is an error at once: a host that
is not known, or whose first connection is refused, a certificate that is not accepted, a 4xx.

Credentials are the filesystems' own affair
(netrc and FSSPEC_HTTP for http, AWS_* for s3, …) and nothing here sees them; messages name a file
by the reference that the user wrote, which may hold none.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..errors import InputError, LazymergeError

Take = Callable[[Any], None]
"""Is given the bytes of a range, piece by piece, in order."""

TRIES = 6
"""Of a request that fails for a reason that may pass: with the pauses below, 15 to 30 seconds."""

FIRST_PAUSE_SECONDS = 0.5
"""Before the second try; twice as long before each further one, up to half of it more by chance."""

LONGEST_PAUSE_SECONDS = 30.0
"""However long a server asks to be left alone (Retry-After)."""

CONNECT_SECONDS = 30.0
SILENCE_SECONDS = 30.0
"""Without an answer, or between two pieces of one."""

PIECE_BYTES = 1 << 18

MOST_AT_ONCE = 100
"""Requests: what aiohttp allows, too."""

_T = TypeVar("_T")


class PassingError(Exception):
    """A request failed for a reason that may pass.

    pause_seconds: how long the server asks to be left alone.
    """

    def __init__(self, problem: str, pause_seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.pause_seconds = pause_seconds


class UnusableError(InputError):
    """A file is not what it was, or not to be had as it was planned: going on is of no use."""


class AbsentError(Exception):
    """There is no such file, or the storage does not tell."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that lies elsewhere, at one version.

    url: as messages and plans name it; without credentials. size_bytes: of all of it.
    pin: which version it is. has_ranges: parts of it can be asked for; else only all of it.
    is_lasting: no later version will have that pin.
    """

    url: str
    size_bytes: int
    pin: str
    has_ranges: bool = True
    is_lasting: bool = field(default=True, compare=False)


class Reader(Protocol):
    """How files are read. Safe to use from several threads."""

    def read(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        """Hands a byte range on, by one request.

        Raises as Transport.begin does, and:
            InputError: the file is not what it was.
        """


class Transport(Reader, Protocol):
    """How the files of one kind of storage are found and read."""

    def begin(self, url: str, count: int) -> tuple[RemoteFile, bytes]:
        """What a file is now, and its first `count` bytes, or all where it is shorter.

        Raises:
            AbsentError: it is not there. PassingError: ask again.
            InputError, LazymergeError: it cannot be read.
        """

    def names(self, url: str) -> dict[str, RemoteFile] | None:
        """The files of a folder, by name; None where the storage lists none.

        Raises as begin does.
        """

    def place(self, url: str) -> str:
        """What tells a file from those of the same address elsewhere: the storage's own address,
        where `url` holds none."""

    def check(self, file: RemoteFile) -> None:
        """Checks that a file is what it was, where `read` cannot tell.

        Raises as read does.
        """


def begin(transport: Transport, url: str, count: int) -> tuple[RemoteFile, bytes]:
    """`Transport.begin`, tried again while there is hope.

    Raises:
        AbsentError: it is not there.
        InputError, LazymergeError: it cannot be read.
    """
    return persistently(url, lambda: transport.begin(url, count))


def read_range(reader: Reader, file: RemoteFile, start: int, stop: int, take: Take) -> None:
    """`Reader.read`, gone on with where it broke off while there is hope.

    Raises:
        UnusableError: the file is not there any more, or not what it was.
        LazymergeError: it cannot be read.
    """
    done = start
    failed: list[BaseException] = []

    def count(piece: Any) -> None:
        nonlocal done
        piece = memoryview(piece)[: stop - done]
        try:
            take(piece)
        except BaseException as error:
            failed.append(error)  # it is not the network's, whatever it is taken for
            raise
        done += len(piece)

    def once() -> int:
        before = done
        try:
            reader.read(file, done, stop, count)
        except PassingError as error:
            if failed:
                raise failed[0] from None
            error.args = (f"{error} ({done - start:,} of {stop - start:,} bytes came)",)
            if done > before:
                raise _ProgressError(*error.args) from None
            raise
        if done < stop:
            problem = f"the answer ended after {done - start:,} of {stop - start:,} bytes"
            raise _ProgressError(problem) if done > before else PassingError(problem)
        return done

    try:
        persistently(file.url, once)
    except AbsentError:
        raise changed_error(file) from None
    except UnusableError:
        raise
    except InputError as error:  # it could be read, and may be again: what is merged stays
        raise LazymergeError(str(error)) from None


class _ProgressError(PassingError):
    """It failed, but later than the last time."""


def persistently(url: str, once: Callable[[], _T]) -> _T:
    """Does something, again and again while it fails for a reason that may pass.

    Raises:
        LazymergeError: it has failed TRIES times.
    """
    pause, tries, all_tries = FIRST_PAUSE_SECONDS, 0, 0
    while True:
        try:
            return once()
        except PassingError as error:
            all_tries += 1
            # what moves on may break off often, but not for ever
            tries = 0 if isinstance(error, _ProgressError) and all_tries < 10 * TRIES else tries + 1
            if tries >= TRIES:
                raise LazymergeError(
                    f"{url}: {error}; tried {all_tries} times. Try again later"
                ) from None
            asked = min(error.pause_seconds, LONGEST_PAUSE_SECONDS)
            time.sleep(max(asked, pause * (1 + random.random() / 2)))
            pause = FIRST_PAUSE_SECONDS if tries == 0 else min(2 * pause, LONGEST_PAUSE_SECONDS)


def changed_error(file: RemoteFile) -> UnusableError:
    """What to raise for a file that is another one than was planned with."""
    return UnusableError(
        f"{file.url}: has changed since the merge was planned (it was {file.pin}, "
        f"{file.size_bytes:,} bytes). Plan the recipe again"
    )


def transport_of(scheme: str) -> Transport:
    """How files whose addresses begin with a scheme are read.

    Raises:
        InputError: what that takes is not installed.
    """
    try:
        import fsspec  # type: ignore[import-untyped, unused-ignore]
        from fsspec.config import conf  # type: ignore[import-untyped, unused-ignore]

        options: dict[str, Any] = {}
        headers: dict[str, str] = {}
        if scheme in ("http", "https"):  # a netrc file and proxies, unless FSSPEC_HTTP says else
            given = (conf.get(scheme) or conf.get("http") or {}).get("client_kwargs") or {}
            options["client_kwargs"] = {"trust_env": True, **given}
            headers = options["client_kwargs"].pop("headers", None) or {}
        elif scheme == "s3":  # what may pass is asked for again by `persistently`
            given = (conf.get(scheme) or {}).get("config_kwargs") or {}
            own = {"retries": {"total_max_attempts": 1}, "max_pool_connections": MOST_AT_ONCE}
            options["config_kwargs"] = {**own, **given}
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        also = " gcsfs" if scheme == "gs" else ""
        raise InputError(
            f"what lies at {scheme}:// takes packages that are not installed ({_line(error)}). "
            f"Install them: pip install 'lazymerge[remote]'{also}"
        ) from None
    from .object_storage import GsTransport, S3Transport
    from .web_server import HttpTransport

    if scheme in ("http", "https"):
        return HttpTransport(filesystem, headers)
    return S3Transport(filesystem) if scheme == "s3" else GsTransport(filesystem)


def in_its_thread(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine, run in fsspec's thread."""
    import asyncio

    from fsspec.asyn import get_loop  # type: ignore[import-untyped, unused-ignore]

    result: _T = asyncio.run_coroutine_threadsafe(work, get_loop()).result()
    return result


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
