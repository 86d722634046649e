"""A web server of the test's own: files of a folder, whole or a range, and what can go wrong.

It runs in threads of the test's process, on the loopback interface, and keeps a log of what it was
asked. What a slow, broken or changing server does is set on it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class RangeServer:
    """A web server, and what it does wrong.

    root: of the files. latency_seconds: before every answer.
    bytes_per_second: of one connection; None: as fast as it goes.
    password: that every request must come with, of the user `somebody`; None: none.
    has_ranges: whole files are sent where it has not. etag: in place of the files' own; "": none.
    stalls: of the next answers for a file, how many seconds pass before their bytes.
    answers: statuses in place of the next answers for a file. cuts: of the next answers for a file,
    how many bytes are sent before the connection is reset. broken_from: of files, from which byte
    on they are never sent.
    redirects: where files are said to be instead. headers: sent with every answer besides.
    log: path and range of every request. bytes_sent: of files.
    """

    root: Path
    address: str = ""
    latency_seconds: float = 0.0
    bytes_per_second: float | None = None
    password: str | None = None
    has_ranges: bool = True
    etag: str | None = None
    stalls: dict[str, list[float]] = field(default_factory=dict)
    answers: dict[str, list[int]] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    broken_from: dict[str, int] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    log: list[tuple[str, str | None]] = field(default_factory=list)
    bytes_sent: int = 0
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """The byte ranges (start, stop) that were asked for of files with a name."""
        found = []
        for path, wanted in self.log:
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
            if path.rpartition("/")[2] == name and match:
                found.append((int(match[1]), int(match[2]) + 1))
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server: RangeServer = self.server.of_test
        path = unquote(urlsplit(self.path).path).lstrip("/")
        with server.lock:
            server.log.append((path, self.headers.get("Range")))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            time.sleep(server.latency_seconds)
            self._answer(server, path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with server.lock:
                server.at_once -= 1

    def _answer(self, server: RangeServer, path: str) -> None:
        with server.lock:
            status = server.answers[path].pop(0) if server.answers.get(path) else None
        file = server.root / path
        if server.password is not None:
            expected = base64.b64encode(f"somebody:{server.password}".encode()).decode()
            if self.headers.get("Authorization") != f"Basic {expected}":
                status = 401
        if path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[path])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if status is not None or not file.is_file():
            self.send_response(status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = file.stat().st_size
        start, stop = 0, size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted and server.has_ranges:
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, size)
            self.send_response(206 if start < size else 416)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        else:
            self.send_response(200)
        etag = server.etag
        if etag is None:
            stamp = f"{path}{file.stat().st_mtime_ns}{size}"
            etag = f'"{hashlib.sha256(stamp.encode()).hexdigest()[:20]}"'
        if etag:
            self.send_header("ETag", etag)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(max(0, stop - start)))
        self.end_headers()
        with server.lock:
            stall = server.stalls[path].pop(0) if server.stalls.get(path) else 0.0
            cut = server.cuts[path].pop(0) if server.cuts.get(path) else None
            if stop > server.broken_from.get(path, stop):
                cut = max(0, server.broken_from[path] - start)
        self.wfile.flush()
        time.sleep(stall)
        self._send(server, file, start, stop if cut is None else min(stop, start + cut))
        if cut is not None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _send(self, server: RangeServer, file: Path, start: int, stop: int) -> None:
        began, sent = time.monotonic(), 0
        self.wfile.flush()
        with file.open("rb") as stream:
            while start + sent < stop:
                length = min(1 << 18, stop - start - sent)
                place = start + sent
                if isinstance(self.connection, ssl.SSLSocket):
                    count = self.wfile.write(os.pread(stream.fileno(), length, place))
                else:
                    count = os.sendfile(self.connection.fileno(), stream.fileno(), place, length)
                sent += count
                with server.lock:
                    server.bytes_sent += count
                if server.bytes_per_second is not None:
                    ahead = sent / server.bytes_per_second - (time.monotonic() - began)
                    time.sleep(max(0.0, ahead))


class _Listening(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Who has read enough may hang up."""


@contextmanager
def range_server(root: Path, tls: ssl.SSLContext | None = None) -> Iterator[RangeServer]:
    """A server of a folder's files, while the block runs. tls: with what it speaks TLS."""
    listening = _Listening(("127.0.0.1", 0), _Handler)
    if tls is not None:
        listening.socket = tls.wrap_socket(listening.socket, server_side=True)
    scheme = "http" if tls is None else "https"
    server = RangeServer(root, f"{scheme}://127.0.0.1:{listening.server_address[1]}")
    listening.of_test = server  # type: ignore[attr-defined]
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
