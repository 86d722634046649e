"""Models of the Hugging Face Hub, through its library: listed, looked into, fetched.

    find_source     one request: the commit that a revision means, the files and their sizes
    read_start      a ranged request: the first bytes of a file, for headers; nothing is kept
    fetch           a file, into the library's cache, where it is not there yet

The library decides where the cache is, which token is sent and whether it may go online (HF_HOME,
HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE). It is imported when a model of the Hub is
looked for, and not before.

What a Hub answers is believed no further than needed: commits must be commit ids, files are asked
for by plain names that a merge has use for, and neither may lead out of the cache.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, LazymergeError
from .hub_reference import SCHEME, HubReference, is_commit
from .transport import PassingError, RemoteFile, Take, UnusableError, changed_error, read_range
from .wording import quoted

RETRIES = 2
"""Of a ranged request that fails for a reason that may pass: after 1 and 2 seconds."""

TIMEOUT_SECONDS = 30.0
"""Without an answer, or between two pieces of one."""

SPARE_BYTES = 16 << 20
"""Of a file that is downloaded, beyond twice its size: some ways of the library count roughly."""

_PIECE_BYTES = 1 << 16
_NAME = re.compile(r"(1_Pooling/)?[^/\\\0]+")
"""Files of the folder itself; of those in others, sentence-transformers' settings alone."""
_TOKEN = re.compile(r"hf_\w+")
_USER = re.compile(r"//[^/\s]*@")

Moved = Callable[[int], None]
"""Told how many more bytes have arrived; less than 0: so many must be sent again."""


class HubUnreachableError(LazymergeError):
    """The Hub gives no answer, or one that says to come again later."""


class NoRangesError(UnusableError):
    """The Hub sends whole files only."""


@dataclass(frozen=True, slots=True)
class HubSource:
    """A model of the Hub at one commit.

    repository: its id. revision: as asked for. commit: what that means, 40 hexadecimal digits.
    folder: the cache's folder of that commit, absolute; it may lack files, or be absent.
    sizes: the files that a merge may use, by name, in bytes.
    note: why it was not the Hub that was asked, None where it was.
    is_offline: nobody wanted it to be.
    """

    repository: str
    revision: str
    commit: str
    folder: str
    sizes: Mapping[str, int]
    note: str | None = None
    is_offline: bool = False

    def as_dict(self) -> dict[str, str]:
        """For JSON: what names these files for ever."""
        return {
            "repository": self.repository,
            "revision": self.revision,
            "commit": self.commit,
        }

    def has(self, name: str) -> bool:
        """Whether a file is in the cache."""
        return os.path.exists(os.path.join(self.folder, name))


def find_source(wanted: HubReference) -> HubSource:
    """Ask the Hub what a reference means now; where it gives no answer, the cache.

    A commit that the Hub has no longer is taken from the cache, too.

    Raises:
        InputError: there is no such model or revision, it may not be read, or the library is
            offline and the cache does not have it.
        LazymergeError: the Hub gives no answer and the cache has none.
    """
    from huggingface_hub import constants

    cached = _cached(wanted)
    if constants.HF_HUB_OFFLINE:
        if cached is None:
            raise InputError(
                f"model {quoted(str(wanted))}: is neither a local folder nor in the cache of the "
                f"Hugging Face Hub ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set. Unset "
                f"it, or download the model: hf download {_shell_words(wanted)}"
            )
        note = "HF_HUB_OFFLINE is set: what the cache holds is all there is"
        return replace(cached, note=note, is_offline=True)
    try:
        return _ask(wanted)
    except LazymergeError as error:
        may_stand_in = wanted.is_commit or isinstance(error, HubUnreachableError)
        if cached is None or not may_stand_in:
            raise
        return replace(cached, note=f"{cached.commit[:12]} is taken from the cache: {error}")


def read_start(source: HubSource, name: str, count: int) -> bytes:
    """The first `count` bytes of a file, or all where it is shorter, by a ranged request.

    A server that sends the whole file is listened to no longer than for that.

    Raises:
        LazymergeError: they do not come.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    count = min(count, source.sizes[name])
    url = hf_hub_url(source.repository, name, revision=source.commit)
    headers = {
        **build_hf_headers(library_name="lazymerge"),
        "Range": f"bytes=0-{count - 1}",
        "Accept-Encoding": "identity",
    }
    start = bytearray()
    with (
        _explained(source.repository, source.revision, name),
        http_stream_backoff(
            "GET", url, headers=headers, max_retries=RETRIES, timeout=TIMEOUT_SECONDS
        ) as response,
    ):
        hf_raise_for_status(response)
        _check_is_plain(f"{source.repository}/{name}", response)
        for piece in response.iter_bytes(_PIECE_BYTES):
            start += piece
            if len(start) >= count:
                break
    if len(start) < count:
        raise HubUnreachableError(
            f"model {quoted(source.repository)}: of {name} {len(start):,} bytes came where "
            f"{count:,} were asked for. Try again."
        )
    return bytes(start[:count])


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a model of the Hub, to be read by ranged requests; nothing is kept."""

    source: HubSource
    name: str

    @property
    def identity(self) -> RemoteFile:
        """What tells the file, at its commit, from all others: the Hub that is asked, too."""
        from huggingface_hub import constants

        source = self.source
        url = f"{constants.ENDPOINT} {source.repository}/{self.name}"
        return RemoteFile(url, source.sizes[self.name], source.commit)

    def read_range(self, start: int, stop: int, take: Take) -> None:
        """Hands a byte range on, piece by piece.

        Raises:
            InputError: it may not be read, or is not what the Hub said.
            LazymergeError: it does not come.
        """
        source = self.source
        url = f"{SCHEME}{source.repository}@{source.commit[:12]}/{self.name}"
        read_range(self, RemoteFile(url, source.sizes[self.name], source.commit), start, stop, take)

    def read(self, file: RemoteFile, start: int, stop: int, take: Take) -> None:
        """One request. As Transport.read."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        source, failed = self.source, []
        url = hf_hub_url(source.repository, self.name, revision=source.commit)
        headers = {
            **build_hf_headers(library_name="lazymerge"),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",
        }
        try:
            with (
                _explained(source.repository, source.revision, self.name),
                http_stream_backoff(
                    "GET", url, headers=headers, max_retries=0, timeout=TIMEOUT_SECONDS
                ) as response,
            ):
                hf_raise_for_status(response)
                self._check(file, start, response)
                left = stop - start
                for piece in response.iter_bytes():
                    try:
                        take(piece[:left])
                    except BaseException as error:
                        failed.append(error)  # it is not the Hub's
                        raise
                    left -= len(piece)
                    if left <= 0:  # whatever else it sends
                        break
        except HubUnreachableError as error:
            if failed:
                raise failed[0] from None
            raise PassingError(_first_line(error).removesuffix(". Try again later")) from None

    def _check(self, file: RemoteFile, start: int, response: Any) -> None:
        """Checks that an answer is the range that was asked for."""
        _check_is_plain(file.url, response)
        if response.status_code != 206:
            raise NoRangesError(
                f"{file.url}: this Hub sends no ranges of files, only whole ones. Leave --stream "
                "out: the model is downloaded then"
            )
        found = response.headers.get("Content-Range") or ""
        if not found.startswith(f"bytes {start}-"):
            raise HubUnreachableError(f"{file.url}: another range came than was asked for")
        if found.rpartition("/")[2] != str(file.size_bytes):
            raise changed_error(file)


def _check_is_plain(file: str, response: Any) -> None:
    """Refuses answers that are packed: a few bytes of one may become gigabytes in memory."""
    coding = str(response.headers.get("Content-Encoding") or "identity").strip().lower()
    if coding != "identity":
        raise UnusableError(
            f"{file}: the Hub sends it packed ({coding[:40]!r}), though asked not to. Ask another "
            "one (HF_ENDPOINT), or download the model"
        )


def fetch(source: HubSource, name: str, moved: Moved | None = None) -> None:
    """Have a file in the cache: nothing is asked of the Hub where it is there.

    moved: is told of bytes as they come; None: the library shows its own progress bar.

    Raises:
        InputError: it may not be read, or is not what the Hub said.
        LazymergeError: it does not come, or there is no room for it.
    """
    if source.has(name):
        return
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {}
    if moved is not None:
        options["tqdm_class"] = _counter(_bounded(source, name, moved))
    with _explained(source.repository, source.revision, name), _checked_names():
        hf_hub_download(
            source.repository,
            name,
            revision=source.commit,
            library_name="lazymerge",
            **options,
        )
    path = os.path.join(source.folder, name)
    try:
        size_bytes = os.stat(path).st_size
    except OSError:
        raise InputError(
            f"model {quoted(source.repository)}: the Hub sent {name} of another commit than "
            f"{source.commit}. Try again, or ask another Hub (HF_ENDPOINT)."
        ) from None
    if size_bytes != source.sizes[name]:
        raise InputError(
            f"{path}: holds {size_bytes:,} bytes, the Hub lists {source.sizes[name]:,}. Delete it "
            "and try again."
        )
    _remember(source)


def _bounded(source: HubSource, name: str, moved: Moved) -> Moved:
    """`moved`, which raises InputError where much more comes than the Hub lists: the library would
    write it until the disk is full."""
    came, most = 0, 2 * source.sizes[name] + SPARE_BYTES

    def counted(more: int) -> None:
        nonlocal came
        came += more
        if came > most:
            raise InputError(
                f"model {quoted(source.repository)}: the Hub lists {name} with "
                f"{source.sizes[name]:,} bytes, and sends more than {most:,}. Do not use this Hub "
                "unless you know why."
            )
        moved(more)

    return counted


def silently(_: int) -> None:
    """A `moved` that shows nothing."""


def _ask(wanted: HubReference) -> HubSource:
    from huggingface_hub import HfApi

    with _explained(wanted.repository, wanted.revision):
        info = HfApi(library_name="lazymerge").model_info(
            wanted.repository,
            revision=wanted.revision,
            files_metadata=True,
            timeout=TIMEOUT_SECONDS,
        )
        commit, files = info.sha, info.siblings or []
        if not isinstance(commit, str) or not is_commit(commit):
            raise InputError(
                f"model {quoted(str(wanted))}: the Hub names no commit ({str(commit)[:60]!r}). Ask "
                "another one (HF_ENDPOINT)."
            )
        sizes = {
            file.rfilename: file.size
            for file in files
            if _is_useful_name(file.rfilename) and type(file.size) is int and file.size >= 0
        }
    return HubSource(wanted.repository, wanted.revision, commit, _snapshot(wanted, commit), sizes)


def _cached(wanted: HubReference) -> HubSource | None:
    """What the cache has of a model, as it was when its revision was last asked for."""
    commit = wanted.revision
    if not wanted.is_commit:
        try:
            commit = (_cache(wanted) / "refs" / wanted.revision).read_text("ascii").strip()
        except (OSError, ValueError):
            return None
    folder = _snapshot(wanted, commit)
    if not is_commit(commit) or not os.path.isdir(folder):
        return None
    root = Path(folder)
    sizes = {
        path.relative_to(root).as_posix(): path.stat().st_size
        for path in [*root.glob("*"), *root.glob("1_Pooling/*")]
        if path.is_file()
    }
    return HubSource(wanted.repository, wanted.revision, commit, folder, sizes)


def _cache(wanted: HubReference) -> Path:
    """The cache's folder of a model, links resolved."""
    from huggingface_hub import constants

    name = f"models--{wanted.repository.replace('/', '--')}"
    return Path(os.path.realpath(os.path.expanduser(constants.HF_HUB_CACHE)), name)


def _snapshot(wanted: HubReference, commit: str) -> str:
    return str(_cache(wanted) / "snapshots" / commit)


def _remember(source: HubSource) -> None:
    """Write down which commit a branch was at, as the library does: it is asked for offline.

    Files are fetched by commit, so the library does not know of a branch.
    """
    wanted = HubReference(source.repository, source.revision)
    if wanted.is_commit:
        return
    with suppress(OSError):  # a cache that others own serves all the same while one is online
        path = _cache(wanted) / "refs" / source.revision
        if path.is_file() and path.read_text("ascii") == source.commit:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(source.commit, "ascii")
        partial.replace(path)


def _is_useful_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and _NAME.fullmatch(name) is not None
        and name.isprintable()
        and not name.rpartition("/")[2].startswith(".")
    )


def _counter(moved: Moved) -> type[Any]:
    """A progress bar that shows nothing, and tells what it would show."""
    from tqdm.std import tqdm  # type: ignore[import-untyped, unused-ignore]

    class Counter(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, *_: object, **options: Any) -> None:
            super().__init__(disable=True, total=options.get("total"))

        def update(self, n: float | None = 1) -> None:
            moved(int(n or 0))

    return Counter


@contextmanager
def _checked_names() -> Iterator[None]:
    """Refuse answers whose ETag would lead out of the cache: the library names files by it. Several
    threads may fetch at once."""
    from huggingface_hub import get_session

    with _CHECKING.lock:
        _CHECKING.count += 1
        if _CHECKING.count == 1:
            session = get_session()
            before = session.event_hooks
            responses = [*before.get("response", []), _check_name]
            session.event_hooks = {**before, "response": responses}
            _CHECKING.restore = lambda: setattr(session, "event_hooks", before)
    try:
        yield
    finally:
        with _CHECKING.lock:
            _CHECKING.count -= 1
            if not _CHECKING.count:
                _CHECKING.restore()


class _Checking:
    """How many threads fetch, and how the library's session was before the first of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.restore: Callable[[], None] = lambda: None


_CHECKING = _Checking()


def _check_name(response: Any) -> None:
    """Raises InputError for an ETag that is no file's name."""
    if response.request.method != "HEAD":
        return
    for header in ("X-Linked-ETag", "ETag"):
        value = response.headers.get(header) or ""
        name = value.removeprefix("W/").strip('"')
        if "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            raise InputError(
                f"{response.request.url.host}: answers with the ETag {quoted(value)}, which "
                "is not a file's name. Do not use this Hub unless you know why."
            )


@contextmanager
def _explained(repository: str, revision: str, name: str | None = None) -> Iterator[None]:
    """Say in one line what goes wrong in the library, with the remedy.

    name: of the file that is asked for.
    """
    from huggingface_hub import constants, errors

    model = f"model {quoted(repository)}"
    page = f"{_endpoint()}/{repository}"
    try:
        yield
    except LazymergeError:
        raise
    except errors.GatedRepoError:
        raise InputError(
            f"{model}: is gated. Ask for access at {page}, then log in (hf auth login, or "
            "HF_TOKEN)."
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{model}: is no local folder, and the Hub ({_endpoint()}) has no such model, "
            "or it is private. Correct the path or the id, or log in (hf auth login, or HF_TOKEN)."
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"{model}: has no revision {quoted(revision)}. Look for its branches, tags and commits "
            f"at {page}."
        ) from None
    except errors.HFValidationError as error:
        raise InputError(f"{model}: is no id of a model: {_first_line(error)}") from None
    except errors.DisabledRepoError:
        raise InputError(f"{model}: was disabled by the Hub. Use another model.") from None
    except errors.OfflineModeIsEnabled:
        raise InputError(_offline(model, name)) from None
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise InputError(_offline(model, name)) from None
        cause = error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise _http_error(model, name, page, cause.response.status_code) from None
        raise _unreachable(model, name, cause or error) from None
    except errors.EntryNotFoundError:
        raise InputError(
            f"{model}: the Hub lists {name} and does not have it. Try again later."
        ) from None
    except errors.HfHubHTTPError as error:
        raise _http_error(model, name, page, error.response.status_code) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LazymergeError(
                f"{model}: no space is left in {constants.HF_HUB_CACHE} for {name}. Free some, or "
                "choose another place for the cache (HF_HUB_CACHE)."
            ) from None
        raise _unreachable(model, name, error) from None
    except Exception as error:  # of the HTTP client: timeouts, broken connections, bad answers
        raise _unreachable(model, name, error) from None


def _http_error(model: str, name: str | None, page: str, status: int) -> LazymergeError:
    where = model if name is None else f"{model}: {name}"
    if status in (401, 403):
        return InputError(
            f"{where}: may not be read (the Hub answers {status}). Look at {page}, then log in (hf "
            "auth login, or HF_TOKEN)."
        )
    if status == 429 or status >= 500:
        return HubUnreachableError(f"{where}: the Hub answers {status}. Try again later.")
    return LazymergeError(f"{where}: the Hub answers {status}. Look at {page}.")


def _offline(model: str, name: str | None) -> str:
    what = "is" if name is None else f"{name} is"
    return (
        f"{model}: {what} not in the cache, and HF_HUB_OFFLINE is set. Unset it, or download the "
        "model first."
    )


def _unreachable(model: str, name: str | None, error: BaseException) -> HubUnreachableError:
    where = model if name is None else f"{model}: {name}"
    return HubUnreachableError(
        f"{where}: cannot be had from {_endpoint()}: {_first_line(error)}. Try again, or "
        "name a local folder."
    )


def _first_line(error: BaseException) -> str:
    """What an error says, cut to a line, without what looks like a token."""
    while isinstance(error, RuntimeError) and error.__context__ is not None:
        error = error.__context__  # a generator that did not stop says nothing of why
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return _USER.sub("//", _TOKEN.sub("hf_…", text[:200])).rstrip(".")


def _endpoint() -> str:
    """The Hub's address for people, without a password that stands in it."""
    from huggingface_hub import constants

    return _USER.sub("//", constants.ENDPOINT)


def _shell_words(wanted: HubReference) -> str:
    revision = "" if wanted.revision == "main" else f" --revision {wanted.revision}"
    return f"{wanted.repository}{revision}"
