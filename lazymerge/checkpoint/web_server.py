"""Files of web servers, by the session of fsspec's own filesystem for them."""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from email.utils import parsedate_to_datetime
from hashlib import blake2b
from typing import Any

from ..errors import InputError, LazymergeError
from . import transport
from .transport import (
    AbsentError,
    PassingError,
    RemoteFile,
    Take,
    changed_error,
    in_its_thread,
)

PASSING_STATUSES = frozenset({408, 425, 429})
"""Of 4xx, those that say to come again: RFC 9110 and 8470, RFC 6585."""

MISDIRECTED = frozenset({"InvalidURL", "NonHttpUrlClientError", "TooManyRedirects"})
"""Errors of the client that an answer leads to; not all are in every version of it."""

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MOST_REDIRECTS = 10

OPTIONS = ("proxy", "proxy_headers", "ssl")
"""Of fsspec's configuration, what requests are made with besides headers."""

BUFFER_BYTES = 1 << 18
"""Of a connection: as much as asyncio receives at a time. With aiohttp's own, a fourth of that,
every connection is held up after each piece; ties over three models of 503 MB took 4% longer."""

SLOW_SECONDS = 30.0
LEAST_BYTES = 1 << 15
"""In SLOW_SECONDS: at 1 KiB/s a chunk of 2 MiB would take more than half an hour."""

NO_VERSION = "without version"

LONGEST_PIN = 200
"""Characters. The ETags of servers have 10 to 70."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_UNREACHABLE = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH})

Host = tuple[str | None, int | None]


class HttpTransport:
    """Web servers.

    Redirects are followed here, for the client would send all headers to wherever they lead.
    """

    def __init__(self, filesystem: Any, headers: Mapping[str, str]) -> None:
        """headers: sent with every request, to hosts that the user has named alone."""
        self._filesystem = filesystem
        self._headers = {**headers, **(filesystem.kwargs.get("headers") or {})}
        given = filesystem.kwargs
        self._options = {name: given[name] for name in OPTIONS if name in given}
        self._answering: set[Host] = set()

    def begin(self, url: str, count: int) -> tuple[RemoteFile, bytes]:
        start = bytearray()

        def take(piece: Any) -> None:
            start.extend(piece)

        file = in_its_thread(self._get(url, None, 0, count, take))
        if len(start) < min(count, file.size_bytes):
            raise PassingError(f"the answer ended after {len(start):,} bytes")
        return file, bytes(start)

    def read(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        in_its_thread(self._get(file.url, file, start, stop, take))

    def names(self, url: str) -> None:
        return None

    def place(self, url: str) -> str:
        return ""

    def check(self, file: RemoteFile) -> None:
        """Every answer has been looked at."""

    async def _get(
        self, url: str, known: RemoteFile | None, start: int, stop: int, take: Take
    ) -> RemoteFile:
        import aiohttp  # type: ignore[import-not-found, unused-ignore]

        headers = {"Accept-Encoding": "identity"}
        if known is None or known.has_ranges:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        try:
            async with self._answer(url, headers) as answer:
                file = _answered(url, known, answer.status, answer.headers, start)
                if answer.status == 416:  # an empty file has no ranges
                    return file
                await _hand_on(answer.content, file, start, min(stop, file.size_bytes), take)
                return file
        except (
            aiohttp.ClientError,
            asyncio.TimeoutError,  # which is no TimeoutError in Python 3.10
            OSError,
            ValueError,
        ) as error:
            raise self._failed(url, known, error) from None

    @asynccontextmanager
    async def _answer(self, url: str, headers: Mapping[str, str]) -> AsyncIterator[Any]:
        """The answer to a request, or to that where it is sent on to."""
        import aiohttp
        from yarl import URL

        session = await self._filesystem.set_session()
        timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=transport.CONNECT_SECONDS,
            sock_read=transport.SILENCE_SECONDS,
        )
        address, own = URL(self._filesystem.encode_url(url)), self._headers
        for _ in range(MOST_REDIRECTS):
            asked = session.get(
                address,
                headers={**own, **headers},
                timeout=timeout,
                allow_redirects=False,
                read_bufsize=BUFFER_BYTES,
                **self._options,
            )
            # as a whole, too: the lines of an answer may come one by one
            seconds = transport.CONNECT_SECONDS + transport.SILENCE_SECONDS
            async with await asyncio.wait_for(asked, seconds) as answer:
                self._answering.add((answer.url.host, answer.url.port))
                target = answer.headers.get("Location")
                if answer.status not in REDIRECTS or target is None:
                    yield answer
                    return
            before, place = address, URL(target)
            address = place if place.scheme else before.join(place)
            if not address.host or address.scheme not in ("http", "https"):
                raise _misdirected(url, "where nothing can be read")
            if (before.scheme, address.scheme) == ("https", "http"):
                raise _misdirected(url, "where nobody vouches for what comes (http://)")
            if address.origin() != before.origin():
                own = {}
        raise _misdirected(url, "and on, without end")

    def _failed(self, url: str, known: RemoteFile | None, error: Exception) -> Exception:
        """What to raise for a client's error; without the address that was asked, for redirects
        sign theirs."""
        import aiohttp

        text = str(getattr(error, "strerror", None) or "") or type(error).__name__
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            found = getattr(error.certificate_error, "verify_message", "") or "it is not trusted"
            return LazymergeError(
                f"{url}: the server's certificate is not accepted ({_short(found)}). Correct the "
                "address, or have the certificate's issuer trusted (SSL_CERT_FILE)"
            )
        if {each.__name__ for each in type(error).__mro__} & MISDIRECTED:
            return _misdirected(url, f"where nothing can be read ({type(error).__name__})")
        if isinstance(error, aiohttp.ClientConnectorError):
            host = (error.host, error.port)
            problem = _lasting_problem(error)
            if problem is not None and known is None and host not in self._answering:
                return LazymergeError(
                    f"{url}: the connection failed ({problem}). Correct the address, or see "
                    "whether this machine reaches that host"
                )
        elif isinstance(error, ValueError) and not isinstance(error, aiohttp.ClientError):
            return LazymergeError(f"{url}: cannot be read ({type(error).__name__})")
        return PassingError(f"the connection failed ({_short(text)})")


def _misdirected(url: str, where: str) -> LazymergeError:
    return LazymergeError(f"{url}: the server sends it on to {where}. Correct the address")


def _lasting_problem(error: Any) -> str | None:
    """Why a host cannot be reached at all; None where that may pass."""
    cause = error.os_error
    if isinstance(cause, socket.gaierror):
        return f"{error.host[:200]!r} is no known host"
    if isinstance(cause, ssl.SSLError):
        return "it speaks no TLS"
    return _short(cause.strerror or "") if cause.errno in _UNREACHABLE else None


def _short(text: str) -> str:
    return "".join(letter for letter in text[:100] if letter.isprintable())


async def _hand_on(content: Any, file: RemoteFile, start: int, stop: int, take: Take) -> None:
    """Hands the bytes of an answer on; of all of a file, those of the range.

    Piece by piece as they were received: joined, they took a fourth more of the processor.
    """
    left = stop - start
    skipped = 0 if file.has_ranges else start
    since, arrived = time.monotonic(), 0
    while left > 0:
        received, is_chunk_end = await content.readchunk()
        if not received and not is_chunk_end:
            return
        arrived += len(received)
        if (seconds := time.monotonic() - since) >= SLOW_SECONDS:
            if arrived < LEAST_BYTES:
                raise PassingError(f"{arrived:,} bytes came in {seconds:.0f} seconds")
            since, arrived = time.monotonic(), 0
        piece = memoryview(received)[skipped:][:left]
        skipped = max(0, skipped - len(received))
        if piece:
            take(piece)
            left -= len(piece)


def _answered(
    url: str, known: RemoteFile | None, status: int, headers: Any, start: int
) -> RemoteFile:
    """The file that an answer is of.

    known: what it must be. start: the first byte that was asked for.

    Raises as Transport.read.
    """
    if status in PASSING_STATUSES or status >= 500:
        after = headers.get("Retry-After") or ""
        pause = float(after) if after.isdecimal() and len(after) < 10 else 0.0
        raise PassingError(f"the server answers {status}", pause)
    if status in (404, 410):
        raise AbsentError(url)
    if status in (401, 403):
        raise InputError(
            f"{url}: may not be read (the server answers {status}). Log in (a netrc file), or "
            "correct the address"
        )
    coding = (headers.get("Content-Encoding") or "identity").strip().lower()
    if status in (200, 206) and coding != "identity":
        raise LazymergeError(
            f"{url}: the server sends it packed ({_short(coding)}), though asked not to. Use "
            "another server, or download the model"
        )
    pin = _pin(headers.get("ETag") or headers.get("Last-Modified") or NO_VERSION)
    if status == 416 and (headers.get("Content-Range") or "").strip() == "bytes */0":
        file = RemoteFile(url, 0, pin)
    elif status == 200:
        file = _whole(url, known, headers, pin)
    elif status != 206:
        raise LazymergeError(f"{url}: the server answers {status}. Correct the address")
    else:
        match = _CONTENT_RANGE.fullmatch((headers.get("Content-Range") or "").strip())
        if match is None or int(match[1]) != start:
            raise PassingError("the server answers with another range than was asked for")
        file = RemoteFile(url, int(match[3]), pin)
    if known is not None and (file.size_bytes, file.pin) != (known.size_bytes, known.pin):
        raise changed_error(known)
    return replace(file, is_lasting=_is_lasting(headers))


def _is_lasting(headers: Any) -> bool:
    """Whether no later version of a file will be named as this one is: by an ETag that is not weak,
    or by a time of change that is over, for those are told to the second.

    Source: RFC 9110, 8.8.1 and 8.8.2.2.
    """
    etag = headers.get("ETag")
    if etag:
        return not etag.startswith("W/")
    try:
        changed = parsedate_to_datetime(headers.get("Last-Modified") or "")
        return (parsedate_to_datetime(headers.get("Date") or "") - changed).total_seconds() >= 1
    except (TypeError, ValueError, OverflowError):  # one is not there, or no date
        return False


def _pin(named: str) -> str:
    """A version as plans and messages hold it: by a hash where a server names it strangely."""
    if len(named) <= LONGEST_PIN and named.isascii() and named.isprintable():
        return named
    return blake2b(named.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _whole(url: str, known: RemoteFile | None, headers: Any, pin: str) -> RemoteFile:
    """The file of an answer that is all of it."""
    size = headers.get("Content-Length") or ""
    if size == "0":
        return RemoteFile(url, 0, pin)
    if known is not None and known.has_ranges:
        raise LazymergeError(f"{url}: the server sends no ranges of it any more. Try again later")
    if not size.isdecimal() or len(size) > 18:
        raise LazymergeError(
            f"{url}: the server does not say how long it is. Use another server, or download the "
            "model"
        )
    return RemoteFile(url, int(size), pin, has_ranges=False)
