"""Byte ranges of files that lie elsewhere, by the filesystems of fsspec.

    begin    one request: what a file is now (size, pin), and its first bytes
    read     a ranged request, handed on piece by piece as it arrives; nothing is kept

A pin says which version of a file is meant: its ETag, or what else the storage names it by. Every
answer is held against it, so that no two versions of a file are ever mixed.

What fails for a reason that may pass (a broken connection, a short answer, 429, 5xx) is asked for
again, from where it broke off, with growing pauses. Credentials are the filesystems' own affair
(netrc and FSSPEC_HTTP for http, AWS_* for s3, …) and nothing here sees them; messages name a file
by the reference that the user wrote, which may hold none.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
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

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_T = TypeVar("_T")


class PassingError(Exception):
    """A request failed for a reason that may pass.

    pause_seconds: how long the server asks to be left alone.
    """

    def __init__(self, problem: str, pause_seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.pause_seconds = pause_seconds


class AbsentError(Exception):
    """There is no such file, or the storage does not tell."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that lies elsewhere, at one version.

    url: as messages and plans name it; without credentials. size_bytes: of all of it.
    pin: which version it is.
    """

    url: str
    size_bytes: int
    pin: str


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
        InputError: the file is not there any more, or not what it was.
        LazymergeError: it cannot be read.
    """
    done = start

    def count(piece: Any) -> None:
        nonlocal done
        piece = memoryview(piece)[: stop - done]
        take(piece)
        done += len(piece)

    def once() -> int:
        before = done
        try:
            reader.read(file, done, stop, count)
        except PassingError as error:
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


def changed_error(file: RemoteFile) -> InputError:
    """What to raise for a file that is another one than was planned with."""
    return InputError(
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
        if scheme in ("http", "https"):  # a netrc file and proxies, unless FSSPEC_HTTP says else
            given = (conf.get(scheme) or conf.get("http") or {}).get("client_kwargs") or {}
            options["client_kwargs"] = {"trust_env": True, **given}
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        also = " gcsfs" if scheme == "gs" else ""
        raise InputError(
            f"what lies at {scheme}:// takes packages that are not installed ({_line(error)}). "
            f"Install them: pip install 'lazymerge[remote]'{also}"
        ) from None
    if scheme in ("http", "https"):
        return HttpTransport(filesystem)
    if scheme == "s3":
        return S3Transport(filesystem)
    return ListedTransport(filesystem)


class HttpTransport:
    """Web servers, by the session of fsspec's own filesystem for them."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def begin(self, url: str, count: int) -> tuple[RemoteFile, bytes]:
        start = bytearray()

        def take(piece: Any) -> None:
            start.extend(piece)

        file = _run(self._get(url, None, 0, count, take))
        if len(start) < min(count, file.size_bytes):
            raise PassingError(f"the answer ended after {len(start):,} bytes")
        return file, bytes(start)

    def read(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        _run(self._get(file.url, file, start, stop, take))

    def names(self, url: str) -> None:
        return None

    def check(self, file: RemoteFile) -> None:
        """Every answer has been looked at."""

    async def _get(
        self, url: str, known: RemoteFile | None, start: int, stop: int, take: Take
    ) -> RemoteFile:
        import aiohttp  # type: ignore[import-not-found, unused-ignore]

        session = await self._filesystem.set_session()
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENCE_SECONDS
        )
        address = self._filesystem.encode_url(url)
        try:
            async with session.get(address, headers=headers, timeout=timeout) as answer:
                file = _answered(url, known, answer.status, answer.headers, start)
                if answer.status == 416:  # an empty file has no ranges
                    return file
                left = min(stop, file.size_bytes) - start
                while left > 0 and (piece := await answer.content.read(min(PIECE_BYTES, left))):
                    take(piece)
                    left -= len(piece)
                return file
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise PassingError(_client_problem(error)) from None


def _client_problem(error: BaseException) -> str:
    """What a client's error says, without the address that was asked: redirects sign theirs."""
    text = str(getattr(error, "strerror", None) or "") or type(error).__name__
    return f"the connection failed ({text[:100]})"


def _answered(
    url: str, known: RemoteFile | None, status: int, headers: Any, start: int
) -> RemoteFile:
    """The file that an answer is of.

    known: what it must be. start: the first byte that was asked for.

    Raises as Transport.read.
    """
    if status == 429 or status >= 500:
        after = headers.get("Retry-After") or ""
        raise PassingError(f"the server answers {status}", float(after) if after.isdigit() else 0.0)
    if status in (404, 410):
        raise AbsentError(url)
    if status in (401, 403):
        raise InputError(
            f"{url}: may not be read (the server answers {status}). Log in (a netrc file), or "
            "correct the address"
        )
    pin = headers.get("ETag") or headers.get("Last-Modified") or "without version"
    if status == 416 and (headers.get("Content-Range") or "").strip() == "bytes */0":
        file = RemoteFile(url, 0, pin)
    elif status == 200:
        if known is None and headers.get("Content-Length") == "0":
            return RemoteFile(url, 0, pin)
        raise InputError(
            f"{url}: the server sends no ranges of files, only whole ones. Download the model and "
            "give its folder, or use another server"
        )
    elif status != 206:
        raise LazymergeError(f"{url}: the server answers {status}")
    else:
        match = _CONTENT_RANGE.fullmatch((headers.get("Content-Range") or "").strip())
        if match is None or int(match[1]) != start:
            raise PassingError("the server answers with another range than was asked for")
        file = RemoteFile(url, int(match[3]), pin)
    if known is not None and (file.size_bytes, file.pin) != (known.size_bytes, known.pin):
        raise changed_error(known)
    return file


class ListedTransport:
    """Any storage that fsspec has a filesystem for: ranges by `cat_file`, versions by `info`.

    Answers do not say which version they are of, so that files are looked at again when all has
    been read.
    """

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def begin(self, url: str, count: int) -> tuple[RemoteFile, bytes]:
        with _Explained(url):
            file = self._file(url, self._filesystem.info(url, refresh=True))
        start = bytearray()
        self.read(file, 0, min(count, file.size_bytes), start.extend)
        return file, bytes(start)

    def read(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        if stop <= start:
            return
        with _Explained(file.url):
            data = self._filesystem.cat_file(file.url, start=start, end=stop)
        if len(data) > stop - start:
            raise PassingError(f"{len(data):,} bytes came where {stop - start:,} were asked for")
        take(data)

    def names(self, url: str) -> dict[str, RemoteFile] | None:
        with _Explained(url):
            entries = self._filesystem.ls(url, detail=True, refresh=True)
        files = {}
        for entry in entries:
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if entry["type"] == "file" and name:
                files[name] = self._file(f"{url}/{name}", entry)
        return files

    def check(self, file: RemoteFile) -> None:
        with _Explained(file.url):
            now = self._file(file.url, self._filesystem.info(file.url, refresh=True))
        if now != file:
            raise changed_error(file)

    def _file(self, url: str, facts: Any) -> RemoteFile:
        for key in ("ETag", "etag", "generation", "VersionId", "md5Hash", "updated", "mtime"):
            if facts.get(key):
                return RemoteFile(url, int(facts["size"]), str(facts[key]))
        for key in ("LastModified", "created"):
            if facts.get(key):
                return RemoteFile(url, int(facts["size"]), str(facts[key]))
        return RemoteFile(url, int(facts["size"]), "without version")


class S3Transport(ListedTransport):
    """S3 and what speaks like it. Every request asks for the version that was planned with."""

    def read(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        if stop > start:
            with _Explained(file.url, file):
                _run(self._get(file, start, stop, take))

    def check(self, file: RemoteFile) -> None:
        """Every answer has been looked at."""

    async def _get(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        bucket, key, _ = self._filesystem.split_path(file.url)
        answer = await self._filesystem._call_s3(
            "get_object",
            Bucket=bucket,
            Key=key,
            Range=f"bytes={start}-{stop - 1}",
            IfMatch=file.pin,
        )
        if answer.get("ETag") != file.pin:
            raise changed_error(file)
        async with answer["Body"] as body:
            left = stop - start
            while left > 0 and (piece := await body.read(min(PIECE_BYTES, left))):
                take(piece)
                left -= len(piece)


class _Explained:
    """Says what goes wrong in a filesystem, without what its messages may hold of credentials."""

    def __init__(self, url: str, known: RemoteFile | None = None) -> None:
        self._url = url
        self._known = known

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        url = self._url
        if error is None or isinstance(error, LazymergeError | PassingError | AbsentError):
            return
        if not isinstance(error, Exception):
            return
        code = _code(error)
        if code in ("PreconditionFailed", "412") and self._known is not None:
            raise changed_error(self._known) from None
        if isinstance(error, FileNotFoundError):
            raise AbsentError(url) from None
        name = type(error).__name__
        if isinstance(error, PermissionError) or "Credentials" in name:
            raise InputError(
                f"{url}: may not be read ({name}{f', {code}' if code else ''}). Give the storage's "
                "own credentials (for s3: AWS_PROFILE, AWS_ACCESS_KEY_ID, …), or correct the "
                "address"
            ) from None
        if isinstance(error, ValueError | TypeError | KeyError | NotImplementedError):
            raise LazymergeError(f"{url}: cannot be read ({name})") from None
        raise PassingError(f"the storage fails ({name}{f', {code}' if code else ''})") from None


def _code(error: BaseException) -> str:
    """The storage's own word for what went wrong, if the error or its cause has one."""
    for each in (error, error.__cause__, error.__context__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            code = response.get("Error", {}).get("Code")
            if isinstance(code, str) and re.fullmatch(r"\w{1,60}", code):
                return code
    return ""


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine, run in fsspec's thread."""
    import asyncio

    from fsspec.asyn import get_loop  # type: ignore[import-untyped, unused-ignore]

    result: _T = asyncio.run_coroutine_threadsafe(work, get_loop()).result()
    return result


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
