"""Files of object storage: S3 and what speaks like it, Google Cloud Storage. Folders are listed."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlencode

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

UNREACHABLE = frozenset(
    {
        "ClientConnectorCertificateError",
        "ClientConnectorDNSError",
        "ClientConnectorError",
        "ClientConnectorSSLError",
        "EndpointConnectionError",
        "InvalidURL",
        "SSLError",
    }
)
"""Errors of clients that reach no storage at all (aiohttp, botocore)."""

PASSING_CODES = frozenset(
    {"RequestTimeout", "SlowDown", "OperationAborted", "RequestTimeTooSkewed"}
)
"""Of answers 4xx, those that say to come again."""


MOST_PAGES = 100
"""Of a folder's list: of 1,000 files each; the largest models have some hundreds."""


class _ObjectStorage(ABC):
    """What the kinds have in common."""

    has_answered = False

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    def read(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        failed: list[BaseException] = []

        def taken(piece: Any) -> None:
            try:
                take(piece)
            except BaseException as error:
                failed.append(error)  # it is not the storage's
                raise

        if stop > start:
            try:
                with self._explained(file.url, file):
                    in_its_thread(self._get(file, start, stop, taken))
            except PassingError:
                if failed:
                    raise failed[0] from None
                raise

    @abstractmethod
    async def _get(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        """Hands a byte range on, by one request."""

    @contextmanager
    def _explained(self, url: str, known: RemoteFile | None = None) -> Iterator[None]:
        """Says what goes wrong in a filesystem, without what its messages may hold of
        credentials."""
        try:
            yield
        except (LazymergeError, PassingError, AbsentError):
            self.has_answered = True
            raise
        except Exception as error:
            raise self._explanation(url, known, error) from None
        self.has_answered = True

    def _explanation(self, url: str, known: RemoteFile | None, error: Exception) -> Exception:
        code, status, name = _code(error), _status(error), type(error).__name__
        what = f"{name}, {code}" if code else name
        if known is not None and (status == 412 or code == "PreconditionFailed"):
            return changed_error(known)
        if isinstance(error, FileNotFoundError) or status == 404:
            return AbsentError(url)
        if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in name:
            return InputError(
                f"{url}: may not be read ({what}). Give the storage's own credentials (for s3: "
                "AWS_PROFILE, AWS_ACCESS_KEY_ID, …), or correct the address"
            )
        if isinstance(error, ValueError | TypeError | KeyError | NotImplementedError):
            return LazymergeError(f"{url}: cannot be read ({name})")
        names = {type(each).__name__ for each in (error, error.__cause__, error.__context__)}
        if names & UNREACHABLE and not self.has_answered:
            return LazymergeError(
                f"{url}: the storage is not reached ({what}). Correct its address (for s3: "
                "AWS_ENDPOINT_URL), or see whether this machine reaches it"
            )
        passes = status in (408, 429) or code in PASSING_CODES
        if status is not None and 400 <= status < 500 and not passes:
            return LazymergeError(f"{url}: cannot be read ({what}). Correct the address")
        return PassingError(f"the storage fails ({what})")


class S3Transport(_ObjectStorage):
    """S3 and what speaks like it. Every request asks for the version that was planned with."""

    def place(self, url: str) -> str:
        return str(self._filesystem.s3.meta.endpoint_url)

    def names(self, url: str) -> dict[str, RemoteFile] | None:
        with self._explained(url):
            entries = self._filesystem.ls(url, detail=True, refresh=True)
        files = {}
        for entry in entries:
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if entry["type"] == "file" and name:
                files[name] = RemoteFile(f"{url}/{name}", int(entry["size"]), _etag(entry))
        return files

    def begin(self, url: str, count: int) -> tuple[RemoteFile, bytes]:
        with self._explained(url):
            facts = self._filesystem.info(url, refresh=True)
            file = RemoteFile(url, int(facts["size"]), _etag(facts))
        start = bytearray()
        self.read(file, 0, min(count, file.size_bytes), start.extend)
        return file, bytes(start)

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
            _check_range(answer, file, start, stop)
            left = stop - start
            while left > 0 and (piece := await body.read(min(transport.PIECE_BYTES, left))):
                take(piece)
                left -= len(piece)


class GsTransport(_ObjectStorage):
    """Google Cloud Storage, by its JSON API and the session of gcsfs. Every request asks for the
    generation that was planned with.

    gcsfs's own requests are made again for half a minute, and logged, whatever went wrong.
    """

    def place(self, url: str) -> str:
        return str(self._filesystem._location)

    def names(self, url: str) -> dict[str, RemoteFile] | None:
        with self._explained(url):
            return in_its_thread(self._list(url))

    def begin(self, url: str, count: int) -> tuple[RemoteFile, bytes]:
        with self._explained(url):
            facts = in_its_thread(self._json(_object_path(url), {"fields": "size,generation"}))
            file = _of_facts(url, facts)
        start = bytearray()
        self.read(file, 0, min(count, file.size_bytes), start.extend)
        return file, bytes(start)

    async def _list(self, url: str) -> dict[str, RemoteFile]:
        bucket, _, folder = url.partition("://")[2].partition("/")
        prefix = f"{folder}/" if folder else ""
        fields = "items(name,size,generation),nextPageToken"
        wanted = {"prefix": prefix, "delimiter": "/", "fields": fields}
        files: dict[str, RemoteFile] = {}
        for _ in range(MOST_PAGES):
            page = await self._json(f"/storage/v1/b/{quote(bucket, safe='')}/o", wanted)
            for facts in page.get("items", ()):
                name = str(facts["name"]).removeprefix(prefix)
                if name:
                    files[name] = _of_facts(f"{url}/{name}", facts)
            if not page.get("nextPageToken"):
                return files
            wanted["pageToken"] = str(page["nextPageToken"])
        raise LazymergeError(
            f"{url}: the storage lists more than {MOST_PAGES:,} pages of files. Name a folder that "
            "holds a model and nothing else"
        )

    async def _json(self, path: str, wanted: Mapping[str, str]) -> dict[str, Any]:
        async with await self._ask(f"{path}?{urlencode(wanted)}", {}) as answer:
            answer.raise_for_status()
            found = await answer.json()
        if not isinstance(found, dict):
            raise TypeError("an answer")
        return found

    async def _ask(self, path: str, headers: Mapping[str, str]) -> Any:
        """A request that has been made, to be entered."""
        import aiohttp  # type: ignore[import-not-found, unused-ignore]
        from yarl import URL

        filesystem = self._filesystem
        await filesystem._set_session()
        timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=transport.CONNECT_SECONDS,
            sock_read=transport.SILENCE_SECONDS,
        )
        return filesystem.session.get(
            URL(f"{filesystem._location}{path}", encoded=True),
            headers=filesystem._get_headers(dict(headers)),
            timeout=timeout,
        )

    def check(self, file: RemoteFile) -> None:
        """Every answer has been looked at."""

    async def _get(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        path = f"/download{_object_path(file.url)}?alt=media&generation={file.pin}"
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        async with await self._ask(path, headers) as answer:
            answer.raise_for_status()
            found = answer.headers.get("Content-Range") or ""
            if answer.status != 206 or found != f"bytes {start}-{stop - 1}/{file.size_bytes}":
                raise PassingError("the storage answers with another range than was asked for")
            left = stop - start
            while left > 0 and (
                piece := await answer.content.read(min(transport.PIECE_BYTES, left))
            ):
                take(piece)
                left -= len(piece)


def _check_range(answer: Mapping[str, Any], file: RemoteFile, start: int, stop: int) -> None:
    """Checks that an answer of S3 is the range that was asked for: not all that speaks like it
    knows ranges, and what is between does not always let them through.

    Raises:
        LazymergeError: it is all of the file. PassingError: it is another range.
    """
    found = answer.get("ContentRange")
    if found is None and (start, stop) != (0, file.size_bytes):
        raise LazymergeError(
            f"{file.url}: the storage sends no ranges of files, only whole ones. Use another "
            "server (for s3: AWS_ENDPOINT_URL), or download the model"
        )
    if found is not None and found != f"bytes {start}-{stop - 1}/{file.size_bytes}":
        raise PassingError("the storage answers with another range than was asked for")


def _object_path(url: str) -> str:
    """Of an object, in the JSON API."""
    bucket, _, name = url.partition("://")[2].partition("/")
    return f"/storage/v1/b/{quote(bucket, safe='')}/o/{quote(name, safe='')}"


def _of_facts(url: str, facts: Mapping[str, Any]) -> RemoteFile:
    """A file as the JSON API describes it.

    Raises:
        ValueError: it does not.
    """
    size, generation = str(facts.get("size")), str(facts.get("generation"))
    if not (re.fullmatch(r"\d{1,18}", size) and re.fullmatch(r"\d{1,20}", generation)):
        raise ValueError("an object without size or generation")
    return RemoteFile(url, int(size), generation)


def _etag(facts: Mapping[str, Any]) -> str:
    return str(facts.get("ETag") or facts.get("LastModified") or "without version")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it comes from."""
    for each in (error, error.__cause__, error.__context__):
        if each is not None:
            yield each


def _status(error: BaseException) -> int | None:
    """The status of the answer that an error is about, if there was one."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(found, int):
                return found
        status = getattr(each, "status", None)  # of aiohttp's ClientResponseError
        if isinstance(status, int):
            return status
    return None


def _code(error: BaseException) -> str:
    """The storage's own word for what went wrong, if the error or its cause has one."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            code = response.get("Error", {}).get("Code")
            if isinstance(code, str) and re.fullmatch(r"\w{1,60}", code):
                return code
    return ""
