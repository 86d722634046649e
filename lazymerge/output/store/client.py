"""Objects of an S3 store, by the client of fsspec's filesystem for it (s3fs).

    put        an object in one request: it is there whole, or not at all
    uploads    a large one in parts; it is not there until `complete`
    objects (lists them), get, read_once, remove

What fails for a reason that may pass (a broken connection, 429, 5xx, SlowDown) is tried again with
growing pauses, then reported with the object's address. Credentials are the client's own affair
(AWS_PROFILE, AWS_ACCESS_KEY_ID, …): nothing here sees them, and no message has what the store's
own messages may hold of them.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar

from ...checkpoint.transport import AbsentError, PassingError, Take, persistently
from ...errors import InputError, LazymergeError
from .address import StoreAddress

_T = TypeVar("_T")

PIECE_BYTES = 1 << 18

MOST_OBJECTS = 1_000_000
"""Under a prefix: an output has fewer, and something else is not listed to its end."""

MOST_REMOVED_AT_ONCE = 1000
"""By one request. Source: Amazon S3 API, DeleteObjects."""


class ConditionError(Exception):
    """A conditional request: there is such an object, or it is another one by now."""


class UnsupportedError(Exception):
    """The store does not know this kind of request."""


class NoUploadError(Exception):
    """There is no such upload: it was completed, or somebody has aborted it."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as it is now.

    name: relative to the output. etag: changes when its contents do.
    """

    name: str
    size_bytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """A small object. age_seconds: since it was written, by the store's clock."""

    content: bytes
    etag: str
    age_seconds: float


@dataclass(frozen=True, slots=True)
class Upload:
    """An object that is being uploaded in parts. id: the store's name of the upload."""

    name: str
    id: str


class Body(Protocol):
    """What is sent: a file for the client, which forms checksums of it and may have to send it
    again; and, for what sends it, its pieces."""

    def read(self, count: int = -1) -> bytes:
        """The next bytes."""

    def seek(self, offset: int, whence: int = 0) -> int:
        """Goes to a place."""

    def tell(self) -> int:
        """Where it is."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """All of it, from where it is."""


@dataclass(frozen=True)
class Store:
    """The objects of one output. Safe to use from several threads, and can be pickled."""

    address: StoreAddress
    _made: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "_made": {}}

    def connect(self) -> None:
        """Has the client ready, and checks that the bucket answers.

        Raises:
            InputError: what that takes is not installed, there is no such bucket, or it may not
                be used.
        """
        self._call("", "list_objects_v2", Prefix=self.address.key(""), MaxKeys=1)

    def objects(self) -> dict[str, StoredObject]:
        """All objects of the output, by name."""
        found: dict[str, StoredObject] = {}
        start = self.address.key("")
        more: dict[str, Any] = {}
        while True:
            answer = self._call("", "list_objects_v2", Prefix=start, **more)
            for entry in answer.get("Contents", ()):
                name = str(entry["Key"]).removeprefix(start)
                found[name] = StoredObject(name, int(entry["Size"]), str(entry["ETag"]))
            token = answer.get("NextContinuationToken")
            if not answer.get("IsTruncated") or not token:
                return found
            if len(found) > MOST_OBJECTS:
                raise InputError(
                    f"{self.address} holds more than {MOST_OBJECTS:,} objects, and is no output; "
                    "choose another prefix"
                )
            more = {"ContinuationToken": token}

    def get(self, name: str, most_bytes: int) -> Fetched | None:
        """A small object; None if it is not there.

        Raises:
            InputError: it is larger than it may be.
        """

        async def work() -> Fetched | None:
            answer = await self._request("get_object", Key=self.address.key(name))
            async with answer["Body"] as body:
                size = int(answer.get("ContentLength") or 0)
                if size > most_bytes:
                    raise InputError(
                        f"{self.address.url(name)} holds {size:,} bytes; at most {most_bytes:,} "
                        "are read: it is not what its name says"
                    )
                content = await body.read()
            return Fetched(content, str(answer.get("ETag")), _age_seconds(answer))

        return self._persistently(name, work, absent=lambda: None)

    def head(self, name: str) -> tuple[StoredObject, Mapping[str, str]] | None:
        """An object and what was noted of it when it was made; None if it is not there."""
        answer = self._call(name, "head_object", Key=self.address.key(name), absent=True)
        if answer is None:
            return None
        size, etag = int(answer["ContentLength"]), str(answer["ETag"])
        return StoredObject(name, size, etag), dict(answer.get("Metadata") or {})

    def read_once(self, found: StoredObject, start: int, stop: int, take: Take) -> None:
        """Hands a byte range on, piece by piece, by one request.

        Raises:
            PassingError: ask again. AbsentError: it is not there any more.
            InputError: it is not what it was. LazymergeError: it cannot be read.
        """

        async def work() -> None:
            answer = await self._request(
                "get_object",
                Key=self.address.key(found.name),
                Range=f"bytes={start}-{stop - 1}",
                IfMatch=found.etag,
            )
            async with answer["Body"] as body:
                left = stop - start
                while left > 0 and (piece := await body.read(min(PIECE_BYTES, left))):
                    take(piece)
                    left -= len(piece)

        if stop > start:
            try:
                self._once(found.name, work)
            except ConditionError:
                url = self.address.url(found.name)
                raise InputError(f"{url} was replaced while it was read; try again") from None
            except FileNotFoundError:
                raise AbsentError(self.address.url(found.name)) from None

    def put(
        self,
        name: str,
        content: bytes | Body,
        *,
        metadata: Mapping[str, str] | None = None,
        only_if_absent: bool = False,
        only_if: str = "",
    ) -> str:
        """Writes an object in one request; returns its ETag.

        only_if: the ETag that it must have now.

        Raises:
            ConditionError: it is there though it may not be, or is another one.
            UnsupportedError: the store knows no such conditions.
        """
        conditions = {"IfNoneMatch": "*"} if only_if_absent else {}
        conditions |= {"IfMatch": only_if} if only_if else {}
        noted = dict(metadata or {})
        return self._send(name, "put_object", content, Metadata=noted, **conditions)

    def remove(self, names: Sequence[str]) -> None:
        """Removes objects that may be there."""
        for start in range(0, len(names), MOST_REMOVED_AT_ONCE):
            some = names[start : start + MOST_REMOVED_AT_ONCE]
            if len(some) == 1:  # not all stores know DeleteObjects, and some ask a checksum for it
                self._call(some[0], "delete_object", Key=self.address.key(some[0]), absent=True)
                continue
            keys = [{"Key": self.address.key(name)} for name in some]
            answer = self._call("", "delete_objects", Delete={"Objects": keys, "Quiet": True})
            for error in answer.get("Errors", ()):
                name = str(error.get("Key", "")).removeprefix(self.address.key(""))
                raise LazymergeError(
                    f"{self.address.url(name)}: cannot be removed ({str(error.get('Code'))[:60]})"
                )

    # uploads in parts

    def begin_upload(self, name: str, metadata: Mapping[str, str]) -> Upload:
        """Begins to upload an object in parts."""
        key = self.address.key(name)
        answer = self._call(name, "create_multipart_upload", Key=key, Metadata=dict(metadata))
        return Upload(name, str(answer["UploadId"]))

    def upload_part(self, upload: Upload, number: int, body: Body) -> str:
        """Uploads a part; returns its ETag. number: from 1.

        Raises:
            NoUploadError: there is no such upload any more.
        """
        return self._send(upload.name, "upload_part", body, UploadId=upload.id, PartNumber=number)

    def _send(self, name: str, method: str, content: bytes | Body, **arguments: Any) -> str:
        """Sends an object, or a part of one; returns its ETag."""

        async def work() -> str:
            body = io.BytesIO(content) if isinstance(content, bytes) else content
            body.seek(0)
            answer = await self._request(method, Key=self.address.key(name), Body=body, **arguments)
            return str(answer["ETag"])

        return self._persistently(name, work)

    def complete(self, upload: Upload, etags: Mapping[int, str]) -> None:
        """Makes an object of the parts that were uploaded: it is there whole from now on.

        etags: of all parts, by number.

        Raises:
            NoUploadError: there is no such upload; it may have been completed by a request whose
                answer was lost.
        """
        parts = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]
        self._call(
            upload.name,
            "complete_multipart_upload",
            Key=self.address.key(upload.name),
            UploadId=upload.id,
            MultipartUpload={"Parts": parts},
        )

    def abort(self, upload: Upload) -> None:
        """Throws away what was uploaded of an object."""
        key = self.address.key(upload.name)
        try:
            self._call(upload.name, "abort_multipart_upload", Key=key, UploadId=upload.id)
        except NoUploadError:
            return

    def uploads(self) -> Iterator[Upload]:
        """Those of the output's objects that were begun, and neither completed nor aborted."""
        start = self.address.key("")
        more: dict[str, Any] = {}
        while True:
            answer = self._call("", "list_multipart_uploads", Prefix=start, **more)
            for entry in answer.get("Uploads") or ():
                yield Upload(str(entry["Key"]).removeprefix(start), str(entry["UploadId"]))
            if not answer.get("IsTruncated") or not answer.get("NextKeyMarker"):
                return
            more = {
                "KeyMarker": answer["NextKeyMarker"],
                "UploadIdMarker": answer.get("NextUploadIdMarker") or "",
            }

    # requests

    def _call(self, name: str, method: str, *, absent: bool = False, **arguments: Any) -> Any:
        """name: of the object, for messages. absent: None is an answer."""
        return self._persistently(
            name,
            lambda: self._request(method, **arguments),
            absent=(lambda: None) if absent else None,
        )

    async def _request(self, method: str, **arguments: Any) -> Any:
        return await self._filesystem()._call_s3(method, Bucket=self.address.bucket, **arguments)

    def _persistently(
        self,
        name: str,
        work: Callable[[], Coroutine[Any, Any, _T]],
        absent: Callable[[], _T] | None = None,
    ) -> _T:
        """Runs a request, again while it fails for a reason that may pass."""

        def once() -> _T:
            try:
                return self._once(name, work)
            except FileNotFoundError:
                if absent is not None:
                    return absent()
                raise LazymergeError(f"{self._url(name)}: is not there any more") from None

        return persistently(self._url(name), once)

    def _once(self, name: str, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Runs a request, once.

        Raises:
            PassingError: ask again. FileNotFoundError: there is no such object.
            ConditionError, NoUploadError, UnsupportedError, InputError, LazymergeError.
        """
        self._filesystem()  # here, for it may have to be made, and say what is missing
        try:
            return _run(work())
        except (LazymergeError, PassingError):
            raise
        except Exception as error:
            raise _explained(error, self._url(name), self.address) from None

    def _url(self, name: str) -> str:
        return self.address.url(name) if name else str(self.address)

    def _filesystem(self) -> Any:
        if "filesystem" not in self._made:
            self._made["filesystem"] = _filesystem()
        return self._made["filesystem"]


def _filesystem() -> Any:
    """fsspec's for S3, with what its configuration says.

    Raises:
        InputError: it is not installed.
    """
    try:
        import fsspec  # type: ignore[import-untyped, unused-ignore]

        return fsspec.filesystem("s3")
    except ImportError as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"outputs at s3:// take packages that are not installed ({line}). Install them: "
            "pip install 'lazymerge[remote]'"
        ) from None


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine, run in fsspec's thread."""
    import asyncio

    from fsspec.asyn import get_loop  # type: ignore[import-untyped, unused-ignore]

    result: _T = asyncio.run_coroutine_threadsafe(work, get_loop()).result()
    return result


_PASSING = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted"}
_PASSING |= {"ConditionalRequestConflict", "RequestTimeTooSkewed", "IncompleteBody", "BadDigest"}
_REFUSED = {"AccessDenied", "AllAccessDisabled", "ExpiredToken", "InvalidAccessKeyId"}
_REFUSED |= {"InvalidToken", "SignatureDoesNotMatch", "TokenRefreshRequired", "403", "401"}


def _explained(error: Exception, url: str, address: StoreAddress) -> Exception:
    """What to raise for an error of the client, without what its message may hold."""
    code, status = _code_and_status(error)
    kind = type(error).__name__
    if code == "NoSuchUpload":
        return NoUploadError()
    if code == "NoSuchBucket":
        return InputError(
            f"{url}: there is no bucket {address.bucket!r}; make it, or correct the address"
        )
    if code in ("PreconditionFailed", "412") or status == 412:
        return ConditionError()
    if code in ("NotImplemented", "501") or status == 501:
        return UnsupportedError()
    told = ", ".join(word for word in (kind, code) if word)
    if isinstance(error, PermissionError) or code in _REFUSED or "Credentials" in kind:
        return InputError(
            f"{url}: may not be read or written ({told}). Give the storage's own credentials "
            "(AWS_PROFILE, AWS_ACCESS_KEY_ID, …), or correct the address"
        )
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(url)
    is_passing = code in _PASSING or status == 429 or status >= 500
    if not is_passing and (status or isinstance(error, ValueError | TypeError | KeyError)):
        return LazymergeError(f"{url}: the storage refuses a request ({told})")
    return PassingError(f"the storage fails ({told})")


def _code_and_status(error: BaseException) -> tuple[str, int]:
    """The store's own word for what went wrong, and the status of its answer; "" and 0 where
    there was none."""
    for each in (error, error.__cause__, error.__context__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            is_plain = code.isalnum() and code.isascii() and len(code) <= 60
            return code if is_plain else "", status if isinstance(status, int) else 0
    return "", 0


def _age_seconds(answer: Mapping[str, Any]) -> float:
    """How long ago an object was written, by the clock of the store; 0 where that is not told."""
    modified = answer.get("LastModified")
    date = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    try:
        now = parsedate_to_datetime(date)
    except (TypeError, ValueError):
        return 0.0
    return (now - modified).total_seconds() if isinstance(modified, datetime) else 0.0
