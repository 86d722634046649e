"""A small stand-in for the Hugging Face Hub: its HTTP interface, as far as models are read by it.

    GET       /api/models/ID[/revision/REVISION]        commit and files
    HEAD GET  /ID/resolve/REVISION/FILE                 a file, whole or a range of it

It runs in a thread of the test's process, on the loopback interface, and keeps a log of what it was
asked. What a broken or hostile Hub does is set on the server: `answers`, `cut`, `names`, `etag`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_TheTokenOfATest"
HASHED_BYTES = 1 << 20
"""Of a file, for its ETag: what is larger may be mapped, and mostly holes."""


def commit_of(files: Mapping[str, bytes]) -> str:
    """A commit id, for files."""
    content = sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items())
    return hashlib.sha1(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Request:
    """What the server was asked. file: None for the list of files."""

    method: str
    repository: str
    file: str | None
    range: str | None
    token: str | None


@dataclass
class HubServer:
    """The Hub, and what it does wrong.

    commits: per repository, the files of every commit. branches: per repository, their commits.
    answers: status (and X-Error-Code) in place of a file (`ID/FILE`) or a list (`ID`).
    cut: of a file, how many bytes are sent before the connection is closed, once for each entry.
    names: further names that a repository's list has. lengths: what the list says of a file.
    etag: in place of the files' own. ignores_ranges: whole files are sent.
    latency_seconds: before every answer. bytes_sent: of files.
    """

    endpoint: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    etag: str | None = None
    sha: str | None = None
    ignores_ranges: bool = False
    latency_seconds: float = 0.0
    log: list[Request] = field(default_factory=list)
    bytes_sent: int = 0

    def publish(self, repository: str, folder: Path, branch: str = "main") -> str:
        """Makes a folder's files the newest commit of a branch; returns it."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        commit = commit_of(files)
        self.commits.setdefault(repository, {})[commit] = files
        self.branches.setdefault(repository, {})[branch] = commit
        return commit

    def fetched(self, repository: str | None = None) -> list[str]:
        """Names of the files that were sent whole, in order."""
        return [
            request.file
            for request in self.log
            if request.method == "GET"
            and request.file is not None
            and request.range is None
            and repository in (None, request.repository)
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        hub: HubServer = self.server.hub
        time.sleep(hub.latency_seconds)
        path = unquote(urlsplit(self.path).path)
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = listing or resolve
        if match is None:
            return self._fail(404, "")
        file = resolve[3] if resolve else None
        hub.log.append(
            Request(
                self.command,
                match[1],
                file,
                self.headers.get("Range"),
                self.headers.get("Authorization"),
            )
        )
        wrong = hub.answers.get(match[1] if file is None else f"{match[1]}/{file}")
        if wrong is not None:
            return self._fail(*wrong)
        if match[1] not in hub.commits:
            return self._fail(404, "RepoNotFound")
        revision = match[2] or "main"
        commit = hub.branches[match[1]].get(revision, revision)
        files = hub.commits[match[1]].get(commit)
        if files is None:
            return self._fail(404, "RevisionNotFound")
        if file is None:
            return self._send_list(hub, match[1], commit, files)
        if file not in files:
            return self._fail(404, "EntryNotFound")
        return self._send_file(hub, f"{match[1]}/{file}", commit, files[file], with_body=with_body)

    def _send_list(
        self, hub: HubServer, repository: str, commit: str, files: Mapping[str, bytes]
    ) -> None:
        siblings = [
            {"rfilename": name, "size": hub.lengths.get(f"{repository}/{name}", len(data))}
            for name, data in files.items()
        ]
        siblings += [{"rfilename": name, "size": 7} for name in hub.names.get(repository, [])]
        document = {
            "id": repository,
            "modelId": repository,
            "sha": hub.sha or commit,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "private": False,
        }
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(
        self, hub: HubServer, name: str, commit: str, data: bytes, *, with_body: bool
    ) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        body = data
        if wanted and not hub.ignores_ranges:
            start = int(wanted[1])
            stop = min(int(wanted[2]) + 1 if wanted[2] else len(data), len(data))
            body = data[start:stop]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        digest = hashlib.sha256(data[:HASHED_BYTES]).hexdigest()
        self.send_header("ETag", hub.etag or f'"{digest}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if not with_body:
            return
        if hub.cut.get(name):
            body = body[: hub.cut[name].pop(0)]
            self.close_connection = True
        try:
            self.wfile.write(body)
            hub.bytes_sent += len(body)
        except (BrokenPipeError, ConnectionResetError):  # who has read enough may hang up
            self.close_connection = True

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A Hub without models, while the block runs."""
    listening = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    listening.daemon_threads = True
    hub = HubServer(f"http://127.0.0.1:{listening.server_address[1]}")
    listening.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
